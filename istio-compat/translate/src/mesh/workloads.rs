//! Pods as workloads.
use std::collections::BTreeMap;
use std::net::IpAddr;

use compat_objects::core as k8s;
use compat_objects::{HasMeta, Kind, ObjectKey, ObjectSet, is_ready};

use super::names;
use super::waypoints::{self, Traffic, Waypoint, WaypointKey};
use crate::{Faults, MeshOptions};

/// Region, zone and subzone; empty where not said.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Locality {
    pub(crate) region: String,
    pub(crate) zone: String,
    pub(crate) subzone: String,
}

/// What says that a workload is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Origin {
    Pod,
    WorkloadEntry,
    /// An endpoint a ServiceEntry lists.
    ServiceEntry,
    /// An address an EndpointSlice lists.
    #[default]
    Slice,
}

/// Something that answers, at its addresses or at those of a name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Workload {
    pub(crate) origin: Origin,
    pub(crate) uid: String,
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) addresses: Vec<IpAddr>,
    /// Where there are no addresses: to be resolved by whoever connects.
    pub(crate) hostname: String,
    /// Its connections arrive through HBONE.
    pub(crate) hbone: bool,
    pub(crate) host_network: bool,
    pub(crate) service_account: String,
    pub(crate) node: String,
    pub(crate) canonical_name: String,
    pub(crate) canonical_revision: String,
    pub(crate) workload_name: String,
    pub(crate) healthy: bool,
    /// Its share among the endpoints of a service; 0: as any.
    pub(crate) weight: u32,
    pub(crate) locality: Locality,
    pub(crate) labels: BTreeMap<String, String>,
    /// Container port numbers by name.
    pub(crate) named_ports: BTreeMap<String, u16>,
    pub(crate) waypoint: Option<WaypointKey>,
    /// Service key -> (service port, port here), in the service's order.
    pub(crate) services: BTreeMap<String, Vec<(u16, u16)>>,
}

/// Every pod with an address that has not ended, by uid.
pub(crate) fn all(
    objects: &ObjectSet,
    options: &MeshOptions,
    waypoints: &BTreeMap<WaypointKey, Waypoint>,
    faults: &mut Faults,
) -> BTreeMap<String, Workload> {
    objects
        .pods()
        .filter_map(|pod| read(objects, options, waypoints, pod, faults))
        .map(|workload| (workload.uid.clone(), workload))
        .collect()
}

fn read(
    objects: &ObjectSet,
    options: &MeshOptions,
    waypoints: &BTreeMap<WaypointKey, Waypoint>,
    pod: &k8s::Pod,
    faults: &mut Faults,
) -> Option<Workload> {
    let (spec, status) = (pod.spec.as_ref()?, pod.status.as_ref()?);
    if compat_objects::has_ended(pod) {
        return None;
    }
    let addresses = addresses(status);
    if addresses.is_empty() {
        return None;
    }
    let object = ObjectKey::new(Kind::Pod, pod.namespace(), pod.name());
    let waypoint = waypoints::bound(objects, waypoints, pod, &object, Traffic::Workload, faults);
    let labels = pod.metadata.labels.clone().unwrap_or_default();
    let workload_name = controller_name(pod);
    let canonical = canonical(&labels, &workload_name);
    let node = spec.node_name.clone().unwrap_or_default();
    let named_ports = spec.containers.iter().flat_map(|c| c.ports.iter().flatten());
    let named_ports = named_ports.filter_map(|p| Some((p.name.clone()?, u16::try_from(p.container_port).ok()?)));
    Some(Workload {
        origin: Origin::Pod,
        uid: format!("{}//Pod/{}/{}", options.cluster_id, pod.namespace(), pod.name()),
        name: pod.name().to_owned(),
        namespace: pod.namespace().to_owned(),
        addresses,
        hbone: pod.annotation(names::REDIRECTION) == Some("enabled"),
        host_network: spec.host_network.unwrap_or(false),
        service_account: service_account(spec).to_owned(),
        locality: locality(objects, &node),
        node,
        canonical_name: canonical.name,
        canonical_revision: canonical.revision,
        workload_name,
        healthy: is_ready(status) && pod.metadata.deletion_timestamp.is_none(),
        named_ports: named_ports.collect(),
        labels,
        waypoint,
        ..Workload::default()
    })
}

/// What telemetry calls a workload.
pub(super) struct Identity {
    pub(super) name: String,
    pub(super) revision: String,
}

/// By the labels, in Istio's order.
pub(super) fn canonical(labels: &BTreeMap<String, String>, name: &str) -> Identity {
    let pick = |keys: [&str; 3], default: &str| {
        let found = keys.iter().find_map(|key| labels.get(*key).filter(|value| !value.is_empty()));
        found.map_or_else(|| default.to_owned(), Clone::clone)
    };
    let revision = ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
    Identity {
        name: pick(["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"], name),
        revision: pick(revision, "latest"),
    }
}

/// The pod's service account; `default` if none is named.
pub(crate) fn service_account(spec: &k8s::PodSpec) -> &str {
    spec.service_account_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("default")
}

fn addresses(status: &k8s::PodStatus) -> Vec<IpAddr> {
    let listed = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok());
    let all: Vec<IpAddr> = listed.collect();
    if all.is_empty() { status.pod_ip.iter().filter_map(|ip| ip.parse().ok()).collect() } else { all }
}

fn locality(objects: &ObjectSet, node: &str) -> Locality {
    let Some(node) = objects.node("", node) else { return Locality::default() };
    let label = |key: &str| node.label(key).unwrap_or_default().to_owned();
    Locality {
        region: label("topology.kubernetes.io/region"),
        zone: label("topology.kubernetes.io/zone"),
        subzone: label("topology.istio.io/subzone"),
    }
}

/// The controller's name: a ReplicaSet's without the template hash, a Job's, or the pod's own.
fn controller_name(pod: &k8s::Pod) -> String {
    let owner = pod.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
    let Some(owner) = owner else { return pod.name().to_owned() };
    match (owner.kind.as_str(), pod.label("pod-template-hash")) {
        ("ReplicaSet", Some(hash)) => {
            owner.name.strip_suffix(hash).and_then(|name| name.strip_suffix('-')).unwrap_or(&owner.name).to_owned()
        }
        _ => owner.name.clone(),
    }
}
