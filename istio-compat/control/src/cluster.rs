//! What istiod does in a cluster besides serving: the root certificate in every namespace, the Deployment of every
//! waypoint, and what became of the objects people wrote, in their status.
mod statuses;
mod waypoint;

use std::collections::BTreeMap;
use std::time::Duration;

use compat_kubernetes::{
    ApiServer, Kept, KeptId, Looked, Others, StatusWriter, Troubles, Upkeep, Wanted, secret_or_new,
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
/// Where istiod keeps the root it signs with, so that an istiod which comes later goes on with it.
const CA_SECRET: &str = "istio-ca-secret";
const CA_SECRET_KIND: &str = "istio.io/ca-root";
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

/// The root, from its Secret, which is made if there is none. Waits for the API server.
///
/// # Errors
/// If the Secret holds something else.
pub(crate) async fn authority(api: &ApiServer, namespace: &str) -> Result<Authority, CaError> {
    let (key, root) = Authority::generate()?;
    loop {
        let new = || {
            let (key, root) = (key.clone().into_bytes(), root.clone().into_bytes());
            let chain = ("cert-chain.pem".to_owned(), Vec::new());
            let root_copy = ("root-cert.pem".to_owned(), root.clone());
            BTreeMap::from([("ca-key.pem".to_owned(), key), ("ca-cert.pem".to_owned(), root), chain, root_copy])
        };
        match secret_or_new(api, (namespace, CA_SECRET), CA_SECRET_KIND, new).await {
            Ok(data) => {
                let text = |key: &'static str| {
                    let found = data.get(key).and_then(|value| String::from_utf8(value.clone()).ok());
                    found.filter(|text| !text.is_empty()).ok_or_else(|| CaError::Secret {
                        secret: format!("{namespace}/{CA_SECRET}"),
                        reason: format!("{key} is missing, empty or no text"),
                    })
                };
                return Authority::new(&text("ca-key.pem")?, text("ca-cert.pem")?).map_err(|error| CaError::Secret {
                    secret: format!("{namespace}/{CA_SECRET}"),
                    reason: format!("{error} (a PKCS #8 key and its own certificate are read, no intermediate)"),
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the root is not to be had; it is tried again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
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
        wanted.insert(class().0, class().1);
        let served: Vec<_> = objects.gateways().filter(|gateway| waypoint::is_served(gateway)).collect();
        for gateway in served.iter().filter(|gateway| waypoint::is_ours_to_deploy(gateway)) {
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
                "data": {"root-cert.pem": self.root_pem},
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
