//! What istiod does in a cluster besides serving: the root certificate in every namespace, the Deployment of every
//! waypoint, and what became of the objects people wrote, in their status.
pub(crate) mod authority;
mod parameters;
mod statuses;
pub(crate) mod waypoint;

use std::collections::BTreeMap;
use std::time::Duration;

use compat_kubernetes::{ApiServer, Kept, KeptId, Looked, Others, StatusWriter, Stream, Troubles, Upkeep, Wanted};
use compat_objects::gateway::Gateway;
use compat_objects::{HasMeta as _, Kind, ObjectKey, ObjectSet};
use compat_translate::MeshOutput;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::ca::Current;
use authority::ROOT;
pub use waypoint::WaypointConfig;

/// Audience of the tokens clients show (istiod's).
pub(crate) const AUDIENCE: &str = "istio-ca";
/// Account of the node proxies, the one istiod trusts.
pub(crate) const NODE_PROXY: &str = "ztunnel";
/// Where everybody finds the root.
const ROOT_CONFIG_MAP: &str = "istio-ca-root-cert";
/// istiod's as well: of what one of them has made, nothing is left that the other does not want when it takes over.
const FIELD_MANAGER: &str = "istio.io/gateway-controller";
/// On what is made for a waypoint; what lacks it is somebody else's.
const MANAGED: &str = "gateway.istio.io/managed";
/// The class of waypoints, and by whom it is served: Istio's names, which an istiod that comes later takes over.
const WAYPOINT_CLASS: &str = "istio-waypoint";
const CLASS_CONTROLLER: &str = "istio.io/mesh-controller";

/// So long after the start waypoints are left as they are. Node proxies that heard from a predecessor come back in this time; before
/// that they would not hear where a waypoint that is made anew has gone.
const CLIENTS_COME: Duration = Duration::from_secs(10);

/// How the control plane works in a cluster.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// The namespace it runs in.
    pub namespace: String,
    /// Whether waypoints get their Deployments from here.
    pub deploy_waypoints: bool,
    pub waypoint: WaypointConfig,
}

/// Writes to the API server what follows from the objects.
pub(crate) struct Cluster {
    config: ClusterConfig,
    authority: Current,
    /// When waypoints may be changed; `None`: they may.
    waypoints_from: Option<Instant>,
    upkeep: Upkeep,
    troubles: watch::Receiver<Troubles>,
    statuses: StatusWriter,
}

impl Cluster {
    pub(crate) fn start(api: &ApiServer, config: ClusterConfig, authority: Current) -> Cluster {
        let named = format!("metadata.name={ROOT_CONFIG_MAP}");
        let mut looked = vec![Looked { kind: Kept::ConfigMap, fields: named, labels: String::new() }];
        looked.extend(parameters::kinds().map(|kind| Looked {
            kind,
            fields: String::new(),
            labels: MANAGED.to_owned(),
        }));
        let upkeep = Upkeep::start(api, FIELD_MANAGER, looked);
        let troubles = upkeep.troubles();
        let waypoints_from = Some(Instant::now() + CLIENTS_COME);
        Cluster { config, authority, waypoints_from, upkeep, troubles, statuses: StatusWriter::start(api) }
    }

    /// Takes in what is in force now.
    pub(crate) fn follow(&mut self, objects: &ObjectSet, output: &MeshOutput) {
        let mut wanted = self.roots(objects);
        wanted.extend([class()]);
        let may_change = self.config.deploy_waypoints && self.waypoints_from.is_none();
        let mut unusable = BTreeMap::new();
        for gateway in deployed(objects) {
            match parameters::read(gateway, objects, &self.config.namespace) {
                Ok(parameters) if may_change => {
                    wanted.extend(waypoint::objects(gateway, &self.config.waypoint, &parameters));
                }
                Ok(_) => {}
                // It is left as it is; its status says why.
                Err(reason) => {
                    unusable.insert(ObjectKey::new(Kind::Gateway, gateway.namespace(), gateway.name()), reason);
                }
            }
        }
        self.upkeep.set(wanted);
        let troubles = self.troubles.borrow_and_update().clone();
        self.statuses.set(statuses::all(objects, output, &troubles, &unusable));
    }

    /// Resolves when something else than the objects has changed: what cannot be written, which statuses tell, the root, or whether
    /// waypoints may be changed.
    pub(crate) async fn changed(&mut self) {
        let from = self.waypoints_from;
        let ended = tokio::select! {
            () = tokio::time::sleep_until(from.unwrap_or_else(Instant::now)), if from.is_some() => {
                self.waypoints_from = None;
                false
            }
            troubles = self.troubles.changed() => troubles.is_err(),
            authority = self.authority.changed() => authority.is_err(),
        };
        if ended {
            std::future::pending().await
        }
    }

    /// The ConfigMap with the root, in every namespace that is there to stay.
    fn roots(&mut self, objects: &ObjectSet) -> BTreeMap<KeptId, Wanted> {
        let staying = objects.namespaces().filter(|namespace| namespace.metadata.deletion_timestamp.is_none());
        let trusted = self.authority.borrow_and_update().root_pem().to_owned();
        let root = |namespace: &str| {
            let name = ROOT_CONFIG_MAP.to_owned();
            let fields = json!({
                "metadata": {"labels": {"istio.io/config": "true"}},
                "data": {ROOT: trusted},
            });
            let id = KeptId { kind: Kept::ConfigMap, namespace: namespace.to_owned(), name };
            (id, Wanted { fields, others: Others::Overwritten })
        };
        staying.map(|namespace| root(namespace.name())).collect()
    }
}

/// Waypoints whose Deployments are made here.
fn deployed(objects: &ObjectSet) -> impl Iterator<Item = &Gateway> {
    let served = objects.gateways().map(|gateway| &**gateway).filter(|gateway| waypoint::is_served(gateway));
    served.filter(|gateway| waypoint::is_ours_to_deploy(gateway))
}

/// What has to be read besides, to make them.
pub(crate) fn referred(objects: &ObjectSet) -> impl Iterator<Item = ObjectKey> {
    deployed(objects).filter_map(parameters::reference)
}

/// What has to be read for all waypoints: ConfigMaps in the control plane's namespace.
pub(crate) fn defaults(system: &str) -> Stream {
    let labels = parameters::DEFAULTS_FOR_CLASS.to_owned();
    Stream { labels, namespace: Some(system.to_owned()), ..Stream::all(Kind::ConfigMap) }
}

fn class() -> (KeptId, Wanted) {
    let id = KeptId { kind: Kept::GatewayClass, namespace: String::new(), name: WAYPOINT_CLASS.to_owned() };
    // At most 64 bytes.
    let description = "Governs requests to services and workloads of the mesh";
    let fields = json!({"spec": {"controllerName": CLASS_CONTROLLER, "description": description}});
    (id, Wanted { fields, others: Others::Overwritten })
}
