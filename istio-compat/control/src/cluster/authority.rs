//! The CA of a cluster: a Secret, read again as long as the process runs, so that a root is replaced without a restart.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use compat_kubernetes::{ApiServer, SecretData, SecretError, secret, secret_or_new};
use strata_runtime::drain;
use tokio::sync::watch;

use crate::ca::{Authority, CaError};

/// A CA of the user's own, and where istiod keeps the one it makes itself: an istiod which comes later goes on with either.
const PLUGGED_IN: &str = "cacerts";
const OWN: &str = "istio-ca-secret";
const OWN_KIND: &str = "istio.io/ca-root";
/// Keys of both.
const KEY: &str = "ca-key.pem";
const CERT: &str = "ca-cert.pem";
const CHAIN: &str = "cert-chain.pem";
pub(super) const ROOT: &str = "root-cert.pem";
/// Between attempts to reach the API server at the start.
const PAUSE: Duration = Duration::from_secs(2);
/// How often the Secret is read again.
const PERIOD: Duration = Duration::from_secs(10);

/// Where the CA is, and what was there last.
pub(crate) struct CaSecret {
    api: ApiServer,
    namespace: String,
    held: (&'static str, SecretData),
}

impl CaSecret {
    /// The CA: the one plugged in, or the own one, whose Secret is made if there is none. Waits for the API server.
    ///
    /// # Errors
    /// If the Secret holds something else.
    pub(crate) async fn first(api: &ApiServer, namespace: &str) -> Result<(Authority, CaSecret), CaError> {
        let (key, root) = Authority::generate()?;
        let new = || {
            let (key, root) = (key.clone().into_bytes(), root.clone().into_bytes());
            let chain = (CHAIN.to_owned(), Vec::new());
            BTreeMap::from([(KEY.to_owned(), key), (CERT.to_owned(), root.clone()), chain, (ROOT.to_owned(), root)])
        };
        loop {
            let found = match look(api, namespace).await {
                Ok(None) => secret_or_new(api, (namespace, OWN), OWN_KIND, new).await.map(|data| (OWN, data)),
                Ok(Some(found)) => Ok(found),
                Err(error) => Err(error),
            };
            match found {
                Ok(held) => {
                    let secret = format!("{namespace}/{}", held.0);
                    tracing::info!(secret, "certificates are signed by the CA in this Secret");
                    let authority = read(&held.1).map_err(|reason| CaError::Secret { secret, reason })?;
                    return Ok((authority, CaSecret { api: api.clone(), namespace: namespace.to_owned(), held }));
                }
                Err(error) => {
                    tracing::warn!(%error, "the CA is not to be had; it is tried again");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Puts what the Secret holds in force, until the drain. What cannot be read, is away or says nothing changes nothing.
    pub(crate) async fn follow(mut self, current: watch::Sender<Arc<Authority>>, mut drain: drain::Watch) {
        loop {
            tokio::select! {
                _ = drain.signaled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
            let found = match look(&self.api, &self.namespace).await {
                Ok(Some(found)) if found != self.held => found,
                Ok(_) => continue,
                Err(error) => {
                    tracing::debug!(%error, "the CA is not to be had; the one in force stays");
                    continue;
                }
            };
            let secret = format!("{}/{}", self.namespace, found.0);
            match read(&found.1) {
                Ok(next) => {
                    let before = current.borrow().root_pem().to_owned();
                    if !next.root_pem().contains(before.trim()) {
                        tracing::warn!(
                            secret,
                            "a root is trusted no more: peers that know it alone are refused from now on"
                        );
                    }
                    tracing::info!(secret, "certificates are signed by another CA from now on");
                    current.send_replace(Arc::new(next));
                }
                Err(reason) => tracing::error!(secret, reason, "this is no CA: the one in force stays"),
            }
            self.held = found;
        }
    }
}

/// The Secret that counts.
async fn look(api: &ApiServer, namespace: &str) -> Result<Option<(&'static str, SecretData)>, SecretError> {
    for name in [PLUGGED_IN, OWN] {
        if let Some(data) = secret(api, (namespace, name)).await? {
            return Ok(Some((name, data)));
        }
    }
    Ok(None)
}

/// Istio's keys of a CA's Secret.
fn read(data: &SecretData) -> Result<Authority, String> {
    let optional = |key: &str| {
        let found = data.get(key).map(|value| String::from_utf8(value.clone()));
        let text = found.transpose().map_err(|_| format!("{key} is no text"))?;
        Ok::<_, String>(text.filter(|text| !text.trim().is_empty()))
    };
    let needed = |key: &str| optional(key)?.ok_or_else(|| format!("{key} is missing or empty"));
    let (key, certificate) = (needed(KEY)?, needed(CERT)?);
    let root = optional(ROOT)?.unwrap_or_else(|| certificate.clone());
    let is_root = root.contains(certificate.trim());
    let intermediates = if is_root { None } else { Some(optional(CHAIN)?.unwrap_or_else(|| certificate.clone())) };
    Authority::new(&key, &certificate, intermediates, root).map_err(|error| error.to_string())
}
