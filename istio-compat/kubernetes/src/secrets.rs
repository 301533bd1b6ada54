//! Secrets that are read, one of them made once.
use std::collections::BTreeMap;

use compat_objects::core::Secret;
use compat_objects::k8s_openapi::ByteString;
use kube::api::{Api, PostParams};

use crate::access::ApiServer;
use crate::backoff::told;

/// What a Secret holds, by key.
pub type SecretData = BTreeMap<String, Vec<u8>>;

/// Why there is no Secret.
#[derive(Debug, thiserror::Error)]
#[error("Secret {namespace}/{name}: {what}: {reason}")]
pub struct SecretError {
    namespace: String,
    name: String,
    what: &'static str,
    reason: String,
}

impl SecretError {
    fn new((namespace, name): (&str, &str), what: &'static str, error: kube::Error) -> SecretError {
        SecretError { namespace: namespace.to_owned(), name: name.to_owned(), what, reason: told(&error) }
    }
}

/// Reads a Secret; None: there is none.
///
/// # Errors
/// What the API server refused, or that it does not answer.
pub async fn secret(api: &ApiServer, (namespace, name): (&str, &str)) -> Result<Option<SecretData>, SecretError> {
    let secrets: Api<Secret> = Api::namespaced(api.client.clone(), namespace);
    let found = secrets.get_opt(name).await.map_err(|error| SecretError::new((namespace, name), "read", error))?;
    Ok(found.map(data))
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
    let failed = |what, error| SecretError::new((namespace, name), what, error);
    if let Some(found) = secret(api, (namespace, name)).await? {
        return Ok(found);
    }
    let secrets: Api<Secret> = Api::namespaced(api.client.clone(), namespace);
    let mut made = Secret { type_: Some(kind.to_owned()), ..Secret::default() };
    made.metadata.name = Some(name.to_owned());
    made.data = Some(new().into_iter().map(|(key, value)| (key, ByteString(value))).collect());
    match secrets.create(&PostParams::default(), &made).await {
        Ok(made) => Ok(data(made)),
        Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
            Ok(data(secrets.get(name).await.map_err(|error| failed("read", error))?))
        }
        Err(error) => Err(failed("create", error)),
    }
}

fn data(secret: Secret) -> SecretData {
    secret.data.unwrap_or_default().into_iter().map(|(key, ByteString(value))| (key, value)).collect()
}
