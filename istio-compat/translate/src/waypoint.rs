//! What waypoints get: listeners, clusters and endpoints in Envoy's language, shaped as istiod shapes them, since one
//! client path consumes both.
mod access;
mod chains;
mod clusters;
mod destinations;
mod endpoints;
mod ext_authz;
mod http_route;
mod jwt;
mod listeners;
mod routes;
mod telemetry;
mod traffic_policy;

pub(crate) use telemetry::is_metric;

use std::cell::RefCell;
use std::collections::BTreeSet;

use xds_proto::type_url;

use crate::mesh::{Mesh, Waypoint};
use crate::{Faults, MeshOutput, WaypointOutput, wire};
use clusters::Referred;

/// One waypoint being translated.
pub(crate) struct Builder<'m, 'o> {
    pub(crate) mesh: &'m Mesh<'o>,
    pub(crate) waypoint: &'m Waypoint,
    pub(crate) faults: RefCell<&'m mut Faults>,
    /// Clusters of services this waypoint does not front that some route or provider leads to.
    pub(crate) outbound: RefCell<BTreeSet<Outbound>>,
    pub(crate) jwks_uris: RefCell<BTreeSet<String>>,
    pub(crate) referred: RefCell<Referred>,
}

/// `outbound|PORT|SUBSET|HOST`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Outbound {
    /// Key of the service in the mesh.
    pub(crate) service: String,
    pub(crate) port: u16,
    pub(crate) subset: String,
}

/// Fills `waypoints`.
pub(crate) fn build(mesh: &Mesh<'_>, output: &mut MeshOutput, faults: &mut Faults) {
    for (key, waypoint) in &mesh.waypoints {
        let builder = Builder {
            mesh,
            waypoint,
            faults: RefCell::new(faults),
            outbound: RefCell::default(),
            jwks_uris: RefCell::default(),
            referred: RefCell::default(),
        };
        let mut found = builder.output();
        let referred = builder.referred.into_inner();
        (found.roots, found.certificates) = (referred.roots, referred.certificates);
        output.referred.extend(referred.objects);
        output.jwks_uris.extend(builder.jwks_uris.into_inner());
        output.waypoints.insert(key.to_string(), found);
    }
}

impl Builder<'_, '_> {
    fn output(&self) -> WaypointOutput {
        let mut output = WaypointOutput::default();
        // Listeners first: their routes say which clusters outside are needed.
        for listener in self.listeners() {
            output.listeners.insert(listener.name.clone(), wire::pack(type_url::LISTENER, &listener));
        }
        for (cluster, endpoints) in self.clusters() {
            if let Some(endpoints) = endpoints {
                let packed = wire::pack(type_url::ENDPOINT, &endpoints);
                output.endpoints.insert(endpoints.cluster_name, packed);
            }
            output.clusters.insert(cluster.name.clone(), wire::pack(type_url::CLUSTER, &cluster));
        }
        output
    }
}
