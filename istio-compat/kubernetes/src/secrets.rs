//! A Secret that is made once and then only read.
use std::collections::BTreeMap;

use compat_objects::core::Secret;
use compat_objects::k8s_openapi::ByteString;
use kube::api::{Api, PostParams};

use crate::access::ApiServer;

/// What a Secret holds, by key.
pub type SecretData = BTreeMap<String, Vec<u8>>;

/// Why there is no Secret.
#[derive(Debug, thiserror::Error)]
#[error("Secret {namespace}/{name}: {what}: {source}")]
pub struct SecretError {
    namespace: String,
    name: String,
    what: &'static str,
    source: Box<kube::Error>,
}

/// Reads a Secret, making it of `kind` from `new` if there is none. Of several processes that make it at once all get
/// what the first one made.
///
/// # Errors
/// What the API server refused, or that it does not answer.
pub async fn secret_or_new(
    api: &ApiServer,
    (namespace, name): (&str, &str),
    kind: &str,
    new: impl FnOnce() -> SecretData,
) -> Result<SecretData, SecretError> {
    let failed = |what| {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        move |source| SecretError { namespace, name, what, source: Box::new(source) }
    };
    let secrets: Api<Secret> = Api::namespaced(api.client.clone(), namespace);
    if let Some(found) = secrets.get_opt(name).await.map_err(failed("read"))? {
        return Ok(data(found));
    }
    let mut secret = Secret { type_: Some(kind.to_owned()), ..Secret::default() };
    secret.metadata.name = Some(name.to_owned());
    secret.data = Some(new().into_iter().map(|(key, value)| (key, ByteString(value))).collect());
    match secrets.create(&PostParams::default(), &secret).await {
        Ok(made) => Ok(data(made)),
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
            Ok(data(secrets.get(name).await.map_err(failed("read"))?))
        }
        Err(error) => Err(failed("create")(error)),
    }
}

fn data(secret: Secret) -> SecretData {
    secret.data.unwrap_or_default().into_iter().map(|(key, ByteString(value))| (key, value)).collect()
}
