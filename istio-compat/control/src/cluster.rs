//! What istiod does in a cluster besides serving: the root certificate in every namespace, the Deployment of every
//! waypoint, and what became of the objects people wrote, in their status.
mod statuses;
pub(crate) mod waypoint;

use std::collections::BTreeMap;
use std::time::Duration;

use compat_kubernetes::{
    ApiServer, Kept, KeptId, Looked, Others, SecretData, StatusWriter, Troubles, Upkeep, Wanted, secret, secret_or_new,
};
use compat_objects::{HasMeta as _, ObjectSet};
use compat_translate::MeshOutput;
use serde_json::json;
use tokio::sync::watch;

use crate::ca::{Authority, CaError};
pub use waypoint::WaypointConfig;

/// Audience of the tokens clients show (istiod's).
pub(crate) const AUDIENCE: &str = "istio-ca";
/// Account of the node proxies, the one istiod trusts.
pub(crate) const NODE_PROXY: &str = "ztunnel";
/// A CA of the user's own, and where istiod keeps the one it makes itself: an istiod which comes later goes on with either.
const PLUGGED_IN: &str = "cacerts";
const CA_SECRET: &str = "istio-ca-secret";
const CA_SECRET_KIND: &str = "istio.io/ca-root";
/// Keys of both.
const KEY: &str = "ca-key.pem";
const CERT: &str = "ca-cert.pem";
const CHAIN: &str = "cert-chain.pem";
const ROOT: &str = "root-cert.pem";
/// Where everybody finds the root.
const ROOT_CONFIG_MAP: &str = "istio-ca-root-cert";
const FIELD_MANAGER: &str = "strata-control";
/// On what is made for a waypoint; what lacks it is somebody else's.
const MANAGED: &str = "gateway.istio.io/managed";
/// The class of waypoints, and by whom it is served: Istio's names, which an istiod that comes later takes over.
const WAYPOINT_CLASS: &str = "istio-waypoint";
const CLASS_CONTROLLER: &str = "istio.io/mesh-controller";
/// Between attempts to reach the API server at the start.
const PAUSE: Duration = Duration::from_secs(2);

/// How the control plane works in a cluster.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// The namespace it runs in.
    pub namespace: String,
    pub waypoint: WaypointConfig,
}

/// The CA: the one plugged in, or the own one, whose Secret is made if there is none. Waits for the API server.
///
/// # Errors
/// If the Secret holds something else.
pub(crate) async fn authority(api: &ApiServer, namespace: &str) -> Result<Authority, CaError> {
    let (key, root) = Authority::generate()?;
    loop {
        let new = || {
            let (key, root) = (key.clone().into_bytes(), root.clone().into_bytes());
            let chain = (CHAIN.to_owned(), Vec::new());
            BTreeMap::from([(KEY.to_owned(), key), (CERT.to_owned(), root.clone()), chain, (ROOT.to_owned(), root)])
        };
        let found = match secret(api, (namespace, PLUGGED_IN)).await {
            Ok(Some(data)) => Ok((PLUGGED_IN, data)),
            Ok(None) => {
                secret_or_new(api, (namespace, CA_SECRET), CA_SECRET_KIND, new).await.map(|data| (CA_SECRET, data))
            }
            Err(error) => Err(error),
        };
        match found {
            Ok((name, data)) => {
                let secret = format!("{namespace}/{name}");
                tracing::info!(secret, "certificates are signed by the CA in this Secret");
                return read(&data).map_err(|reason| CaError::Secret { secret, reason });
            }
            Err(error) => {
                tracing::warn!(%error, "the CA is not to be had; it is tried again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
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

/// Writes to the API server what follows from the objects.
pub(crate) struct Cluster {
    config: ClusterConfig,
    root_pem: String,
    upkeep: Upkeep,
    troubles: watch::Receiver<Troubles>,
    statuses: StatusWriter,
}

impl Cluster {
    pub(crate) fn start(api: &ApiServer, config: ClusterConfig, root_pem: String) -> Cluster {
        let named = format!("metadata.name={ROOT_CONFIG_MAP}");
        let mut looked = vec![Looked { kind: Kept::ConfigMap, fields: named, labels: String::new() }];
        let managed = [Kept::ServiceAccount, Kept::Service, Kept::Deployment];
        looked.extend(managed.map(|kind| Looked { kind, fields: String::new(), labels: MANAGED.to_owned() }));
        let upkeep = Upkeep::start(api, FIELD_MANAGER, looked);
        let troubles = upkeep.troubles();
        Cluster { config, root_pem, upkeep, troubles, statuses: StatusWriter::start(api) }
    }

    /// Takes in what is in force now.
    pub(crate) fn follow(&mut self, objects: &ObjectSet, output: &MeshOutput) {
        let mut wanted = self.roots(objects);
        wanted.extend([class()]);
        let served = objects.gateways().filter(|gateway| waypoint::is_served(gateway));
        for gateway in served.filter(|gateway| waypoint::is_ours_to_deploy(gateway)) {
            wanted.extend(waypoint::objects(gateway, &self.config.waypoint));
        }
        self.upkeep.set(wanted);
        let troubles = self.troubles.borrow_and_update().clone();
        self.statuses.set(statuses::all(objects, output, &troubles));
    }

    /// Resolves when what cannot be written has changed, which statuses tell.
    pub(crate) async fn changed(&mut self) {
        if self.troubles.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// The ConfigMap with the root, in every namespace that is there to stay.
    fn roots(&self, objects: &ObjectSet) -> BTreeMap<KeptId, Wanted> {
        let staying = objects.namespaces().filter(|namespace| namespace.metadata.deletion_timestamp.is_none());
        let root = |namespace: &str| {
            let name = ROOT_CONFIG_MAP.to_owned();
            let fields = json!({
                "metadata": {"labels": {"istio.io/config": "true"}},
                "data": {ROOT: self.root_pem},
            });
            let id = KeptId { kind: Kept::ConfigMap, namespace: namespace.to_owned(), name };
            (id, Wanted { fields, others: Others::Overwritten })
        };
        staying.map(|namespace| root(namespace.name())).collect()
    }
}

fn class() -> (KeptId, Wanted) {
    let id = KeptId { kind: Kept::GatewayClass, namespace: String::new(), name: WAYPOINT_CLASS.to_owned() };
    // At most 64 bytes.
    let description = "Governs requests to services and workloads of the mesh";
    let fields = json!({"spec": {"controllerName": CLASS_CONTROLLER, "description": description}});
    (id, Wanted { fields, others: Others::Overwritten })
}
