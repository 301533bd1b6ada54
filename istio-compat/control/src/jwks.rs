//! Keys behind `jwksUri`, fetched here so that waypoints need no way out.
//!
//! What was fetched last stays in force while a server does not answer. Without keys nothing is accepted, which is
//! the translator's doing.
mod http;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use compat_objects::core::IntOrString;
use compat_objects::{ObjectSet, is_ready};
use compat_translate::Jwks;
use strata_runtime::{drain, task};
use tokio::sync::watch;
use tokio::time::Instant;

/// How often keys are fetched again (istiod's default).
const REFRESH: Duration = Duration::from_secs(20 * 60);
/// First and longest pause after a failure.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// What to fetch, and where each URI's host is if it is a service of the mesh.
type Wanted = Arc<BTreeMap<String, Option<SocketAddr>>>;

/// Fetches in the background.
pub(crate) struct Fetcher {
    wanted: watch::Sender<Wanted>,
    fetched: watch::Receiver<BTreeMap<String, Jwks>>,
}

impl Fetcher {
    pub(crate) fn start(drain: drain::Watch) -> Self {
        let (wanted, wanted_rx) = watch::channel(Wanted::default());
        let (fetched_tx, fetched) = watch::channel(BTreeMap::new());
        task::spawn("jwks", run(wanted_rx, fetched_tx, drain));
        Self { wanted, fetched }
    }

    /// Tells which URIs are in use.
    pub(crate) fn wanted(&self, uris: &BTreeSet<String>, objects: &ObjectSet) {
        let wanted: BTreeMap<_, _> = uris.iter().map(|uri| (uri.clone(), in_mesh(uri, objects))).collect();
        self.wanted.send_if_modified(|current| {
            let changed = **current != wanted;
            if changed {
                *current = Arc::new(wanted);
            }
            changed
        });
    }

    /// What has been fetched.
    pub(crate) fn keys(&mut self) -> BTreeMap<String, Jwks> {
        self.fetched.borrow_and_update().clone()
    }

    /// Resolves when [`Fetcher::keys`] gives something else.
    pub(crate) async fn changed(&mut self) {
        if self.fetched.changed().await.is_err() {
            // The task is gone with the process's end.
            std::future::pending::<()>().await;
        }
    }
}

/// One URI's next attempt.
struct Attempt {
    at: Instant,
    pause: Duration,
}

async fn run(
    mut wanted: watch::Receiver<Wanted>,
    fetched: watch::Sender<BTreeMap<String, Jwks>>,
    mut drain: drain::Watch,
) {
    let mut attempts: BTreeMap<String, Attempt> = BTreeMap::new();
    loop {
        let now = Instant::now();
        let uris = wanted.borrow_and_update().clone();
        attempts.retain(|uri, _| uris.contains_key(uri));
        for uri in uris.keys() {
            attempts.entry(uri.clone()).or_insert(Attempt { at: now, pause: RETRY.0 });
        }
        for (uri, attempt) in attempts.iter_mut().filter(|(_, attempt)| attempt.at <= now) {
            let answer = http::get(uri, uris.get(uri).copied().flatten()).await.and_then(|text| checked(&text));
            match &answer {
                Ok(_) => *attempt = Attempt { at: Instant::now() + REFRESH, pause: RETRY.0 },
                Err(_) => {
                    attempt.at = Instant::now() + attempt.pause;
                    attempt.pause = (attempt.pause * 2).min(RETRY.1);
                }
            }
            record(&fetched, uri, answer);
        }
        let next = attempts.values().map(|attempt| attempt.at).min();
        let sleep = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = drain.signaled() => return,
            () = sleep => {}
            changed = wanted.changed() => if changed.is_err() { return },
        }
    }
}

fn record(fetched: &watch::Sender<BTreeMap<String, Jwks>>, uri: &str, answer: Result<String, String>) {
    fetched.send_if_modified(|all| {
        let entry = all.entry(uri.to_owned()).or_default();
        let before = entry.clone();
        match answer {
            Ok(keys) => *entry = Jwks { keys: Some(keys), error: None },
            Err(error) => {
                tracing::warn!(uri, error, "JWKS not fetched");
                entry.error = Some(error);
            }
        }
        *entry != before
    });
}

/// The text, if it is a key set.
fn checked(text: &str) -> Result<String, String> {
    let set: serde_json::Value = serde_json::from_str(text).map_err(|error| format!("no JSON: {error}"))?;
    match set.get("keys").and_then(serde_json::Value::as_array) {
        Some(keys) if !keys.is_empty() => Ok(text.to_owned()),
        Some(_) => Err("the key set is empty".to_owned()),
        None => Err("no key set: `keys` is missing".to_owned()),
    }
}

/// Where a host of the form `NAME.NAMESPACE.svc[.cluster.local]` is: the control plane stands outside the mesh's name
/// service and service addresses, so it goes to a ready pod.
fn in_mesh(uri: &str, objects: &ObjectSet) -> Option<SocketAddr> {
    let parsed: ::http::Uri = uri.parse().ok()?;
    let host = parsed.host()?;
    let host = host.strip_suffix(".cluster.local").unwrap_or(host).strip_suffix(".svc")?;
    let (name, namespace) = host.split_once('.')?;
    let spec = objects.service(namespace, name)?.spec.as_ref()?;
    let selector = spec.selector.as_ref().filter(|selector| !selector.is_empty())?;
    let asked = parsed.port_u16().unwrap_or(if parsed.scheme_str() == Some("https") { 443 } else { 80 });
    let port = spec.ports.iter().flatten().find(|port| port.port == i32::from(asked))?;
    objects.pods_in(namespace).find_map(|pod| {
        let labels = pod.metadata.labels.as_ref()?;
        let status = pod.status.as_ref()?;
        if !is_ready(status) || selector.iter().any(|(key, value)| labels.get(key) != Some(value)) {
            return None;
        }
        let target = match &port.target_port {
            None => asked,
            Some(IntOrString::Int(number)) => u16::try_from(*number).ok()?,
            Some(IntOrString::String(name)) => {
                let ports = pod.spec.iter().flat_map(|spec| &spec.containers).flat_map(|c| c.ports.iter().flatten());
                let found = ports.into_iter().find(|port| port.name.as_deref() == Some(name))?;
                u16::try_from(found.container_port).ok()?
            }
        };
        Some(SocketAddr::new(status.pod_ip.as_deref()?.parse().ok()?, target))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_key_set_with_keys_is_taken() {
        assert!(checked(r#"{"keys":[{"kty":"RSA"}]}"#).is_ok());
        for bad in ["", "<html>", "{}", r#"{"keys":{}}"#, r#"{"keys":[]}"#] {
            assert!(checked(bad).is_err(), "{bad}");
        }
    }
}
