//! What the agent reads out of the objects: pure functions.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use compat_objects::core::{Node, Pod, PodIP, PodStatus};
use compat_objects::{HasMeta as _, Object, ObjectKey, ObjectSet};
use ipnet::IpNet;
use l4_netns::NodeRoute;

use crate::ipam::Lease;

/// Label that says how a pod takes part in the mesh (Istio's); on the pod it wins over the namespace's.
const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Labels of a waypoint's pods (Gateway API's and Istio's).
const GATEWAY_LABELS: [&str; 2] = ["gateway.networking.k8s.io/gateway-name", "gateway.istio.io/managed"];

/// What the Node objects say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct NodeFacts {
    /// Ranges of this node's pods; empty if the node's object is missing or has none.
    pub(crate) pod_ranges: Vec<IpNet>,
    /// This node's internal addresses.
    pub(crate) addresses: Vec<IpAddr>,
    /// Routes this node needs.
    pub(crate) routes: Vec<NodeRoute>,
    /// Names by internal address, all nodes.
    pub(crate) names: BTreeMap<IpAddr, String>,
    /// Fields that make no sense, in words.
    pub(crate) problems: Vec<String>,
}

/// Reads every Node. `uplink`: index of the device towards the others, if one was named.
pub(crate) fn node_facts(objects: &ObjectSet, node: &str, uplink: Option<u32>) -> NodeFacts {
    let mut facts = NodeFacts::default();
    let mut nodes: Vec<&Arc<Node>> = objects.nodes().collect();
    // Whoever had a range first keeps it, and this node its own: a mistake made later must not lead packets astray.
    let age = |node: &Node| node.metadata.creation_timestamp.as_ref().map(|time| time.0);
    nodes.sort_by(|a, b| (a.name() != node, age(a), a.name()).cmp(&(b.name() != node, age(b), b.name())));
    let mut owners: Vec<(IpNet, &str)> = Vec::new();
    for object in nodes {
        let mut ranges = ranges(object, &mut facts.problems);
        ranges.retain(|range| {
            let overlaps = |other: &IpNet| other.contains(range) || range.contains(other);
            let Some((other, owner)) = owners.iter().find(|(other, _)| overlaps(other)) else { return true };
            let name = object.name();
            facts.problems.push(format!(
                "Node {name}: spec.podCIDRs: {range} overlaps {other} of Node {owner}, its pods there cannot be reached"
            ));
            false
        });
        owners.extend(ranges.iter().map(|range| (*range, object.name())));
        let addresses = addresses(object, &mut facts.problems);
        facts.names.extend(addresses.iter().map(|address| (*address, object.name().to_owned())));
        if object.name() == node {
            facts.routes.extend(ranges.iter().map(|range| NodeRoute::Own { pods: *range }));
            facts.pod_ranges = ranges;
            facts.addresses = addresses;
            continue;
        }
        for pods in ranges {
            let Some(via) = addresses.iter().find(|address| address.is_ipv4() == pods.addr().is_ipv4()) else {
                let family = if pods.addr().is_ipv4() { "IPv4" } else { "IPv6" };
                let name = object.name();
                facts
                    .problems
                    .push(format!("Node {name}: no {family} InternalIP, its pods in {pods} cannot be reached"));
                continue;
            };
            facts.routes.push(NodeRoute::Via { pods, node: *via, device: uplink });
        }
    }
    facts
}

fn ranges(node: &Node, problems: &mut Vec<String>) -> Vec<IpNet> {
    let Some(spec) = &node.spec else { return Vec::new() };
    let list = spec.pod_cidrs.iter().flatten().map(String::as_str);
    let all: Vec<&str> = match list.clone().next() {
        Some(_) => list.collect(),
        None => spec.pod_cidr.as_deref().into_iter().collect(),
    };
    let parse = |text: &str| match text.parse::<IpNet>() {
        Ok(range) => Some(range.trunc()),
        Err(_) => {
            problems.push(format!("Node {}: spec.podCIDRs: {text:?} is not a range of addresses", node.name()));
            None
        }
    };
    all.into_iter().filter_map(parse).collect()
}

fn addresses(node: &Node, problems: &mut Vec<String>) -> Vec<IpAddr> {
    let parse = |text: &str| match text.parse() {
        Ok(address) => Some(address),
        Err(_) => {
            problems.push(format!("Node {}: status.addresses: {text:?} is not an address", node.name()));
            None
        }
    };
    compat_objects::internal_addresses(node).filter_map(parse).collect()
}

/// Whether the sources describe the pod: an object without a spec is only the status this agent wrote itself.
pub(crate) fn is_described(pod: &Pod) -> bool {
    pod.spec.is_some()
}

/// A pod the agent wired: namespace, name, addresses.
pub(crate) type LocalPod<'a> = (&'a str, &'a str, &'a Lease);

/// The objects as they are for this node: this node's own pods have the addresses the agent gave them, whatever a
/// (late) status says, and no pod that is not wired here keeps an address of this node.
pub(crate) fn effective(objects: &ObjectSet, node: &str, local: &[LocalPod<'_>]) -> ObjectSet {
    let wired: BTreeMap<(&str, &str), &Lease> =
        local.iter().map(|(namespace, name, lease)| ((*namespace, *name), *lease)).collect();
    let mut changed: Vec<Pod> = Vec::new();
    let mut removed: Vec<ObjectKey> = Vec::new();
    for pod in objects.pods() {
        if !is_described(pod) {
            removed.push(ObjectKey::new(compat_objects::Kind::Pod, pod.namespace(), pod.name()));
            continue;
        }
        let spec_node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        let lease = wired.get(&(pod.namespace(), pod.name())).filter(|_| spec_node.is_none_or(|name| name == node));
        let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
        if host_network || (lease.is_none() && spec_node != Some(node)) {
            continue;
        }
        let ips: Vec<IpAddr> = lease.map(|lease| lease.addresses().collect()).unwrap_or_default();
        if pod_ips(pod) != ips || spec_node.is_none() {
            changed.push(with_addresses(pod, node, &ips));
        }
    }
    let mut objects = objects.clone();
    for key in removed {
        objects.remove(&key);
    }
    for pod in changed {
        let key = ObjectKey::new(compat_objects::Kind::Pod, pod.namespace(), pod.name());
        let location = objects.location(&key).cloned();
        objects.insert(Object::from(pod), location);
    }
    objects
}

fn pod_ips(pod: &Pod) -> Vec<IpAddr> {
    let ips = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
    ips.filter_map(|ip| ip.ip.parse().ok()).collect()
}

fn with_addresses(pod: &Pod, node: &str, ips: &[IpAddr]) -> Pod {
    let mut pod = pod.clone();
    let status = pod.status.get_or_insert_with(PodStatus::default);
    status.pod_ip = ips.first().map(IpAddr::to_string);
    status.pod_ips = Some(ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect());
    if let Some(spec) = &mut pod.spec {
        spec.node_name.get_or_insert_with(|| node.to_owned());
    }
    pod
}

/// The described pod of this name, if it may run on this node.
pub(crate) fn described<'a>(objects: &'a ObjectSet, node: &str, namespace: &str, name: &str) -> Option<&'a Pod> {
    let pod = objects.pod(namespace, name).map(|pod| &**pod).filter(|pod| is_described(pod))?;
    let spec_node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    spec_node.is_none_or(|name| name == node).then_some(pod)
}

/// Whether the pod is a waypoint's: it terminates HBONE itself.
pub(crate) fn is_waypoint(pod: &Pod) -> bool {
    GATEWAY_LABELS.iter().any(|label| pod.label(label).is_some())
}

/// Whether the objects want the pod in the mesh.
pub(crate) fn wants_mesh(objects: &ObjectSet, pod: &Pod) -> bool {
    let namespace = objects.namespace("", pod.namespace());
    let mode = pod.label(DATAPLANE_MODE).or_else(|| namespace.and_then(|namespace| namespace.label(DATAPLANE_MODE)));
    mode == Some("ambient") && !is_waypoint(pod)
}

/// The pod's service account.
pub(crate) fn service_account(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref()).unwrap_or("default")
}

/// What a pod belongs to: its controller's name (a ReplicaSet's without the hash), else what its labels say it is.
pub(crate) fn workload(pod: &Pod) -> &str {
    let owner = pod.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
    if let Some(owner) = owner {
        return match owner.kind.as_str() {
            "ReplicaSet" => owner.name.rsplit_once('-').map_or(owner.name.as_str(), |(deployment, _)| deployment),
            _ => &owner.name,
        };
    }
    let labels = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
    labels.iter().find_map(|label| pod.label(label)).unwrap_or_else(|| pod.name())
}

#[cfg(test)]
mod tests;
