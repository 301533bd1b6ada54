//! The cluster's addresses: pods with their traits, blocks that policies name, nodes.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use compat_objects::core::{NetworkPolicy, Pod};
use compat_objects::{Fault, HasMeta as _, Kind, ObjectKey, ObjectSet};
use strata_abi::{Addr, Identity, identity, identity_flag};

use crate::cidr::{ALL_V4, Cidr};
use crate::compile::Error;
use crate::identity::{IdentityAllocator, IdentityInfo, IdentitySource, PodTraits, pod_uid};
use crate::ports::{NamedPorts, protocol};
use crate::selector::Labels;

/// Label Kubernetes puts on every namespace.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// Identities of everything that has one.
#[derive(Default)]
pub(crate) struct Network {
    pub(crate) pods: BTreeMap<PodTraits, u32>,
    /// Identities that live on this node.
    pub(crate) local: BTreeSet<u32>,
    pub(crate) cidrs: BTreeMap<Cidr, u32>,
    pub(crate) identities: Vec<IdentityInfo>,
    pub(crate) by_address: BTreeMap<(Addr, u32), Identity>,
    pub(crate) pod_identity: BTreeMap<String, u32>,
    pub(crate) faults: Vec<Fault>,
    /// Two pods claim one address.
    pub(crate) clash: bool,
}

/// Whether NetworkPolicy knows the pod: it has (or will have) an address of its own.
pub(crate) fn is_subject(pod: &Pod) -> bool {
    let host = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false);
    !host && !compat_objects::has_ended(pod)
}

/// The pod's addresses; what is no address is left out.
pub(crate) fn addresses(pod: &Pod) -> BTreeSet<IpAddr> {
    let Some(status) = &pod.status else { return BTreeSet::new() };
    let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).chain(status.pod_ip.as_deref());
    all.filter_map(|text| text.parse().ok()).collect()
}

pub(crate) fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

/// A namespace's labels, with the one that is always there.
pub(crate) fn namespace_labels(objects: &ObjectSet, namespace: &str) -> Labels {
    let declared = objects.namespace("", namespace).and_then(|ns| ns.metadata.labels.clone());
    let mut labels = declared.unwrap_or_default();
    labels.insert(NAMESPACE_NAME.to_owned(), namespace.to_owned());
    labels
}

/// The pod's container ports that have names; init containers that keep running (sidecars) count.
pub(crate) fn named_ports(pod: &Pod) -> NamedPorts {
    let Some(spec) = &pod.spec else { return NamedPorts::new() };
    let lasting = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(lasting).flat_map(|container| container.ports.iter().flatten());
    let named = ports.filter_map(|port| {
        let name = port.name.clone().filter(|name| !name.is_empty())?;
        Some(((name, protocol(port.protocol.as_deref())?), u16::try_from(port.container_port).ok()?))
    });
    named.collect()
}

impl Network {
    pub(crate) fn build(objects: &ObjectSet, node: &str, allocator: &mut IdentityAllocator) -> Result<Network, Error> {
        let blocks: BTreeSet<Cidr> = objects.network_policies().flat_map(|policy| blocks(policy)).collect();
        let subjects = objects.pods().filter(|pod| is_subject(pod));
        let pods: Vec<(&Arc<Pod>, PodTraits)> = subjects.map(|pod| (pod, traits(objects, pod, &blocks))).collect();
        let nodes = remote_nodes(objects, node);
        // A node that some block covers may be in one block and not in the other: it needs a number of its own.
        let covered = nodes.keys().filter(|address| blocks.iter().any(|block| block.contains(address)));
        let cidrs: BTreeSet<Cidr> = blocks.iter().chain(covered).copied().collect();
        let wanted = pods.iter().map(|(_, traits)| traits.clone()).collect();
        let (pod_numbers, cidr_numbers) = allocator.assign(wanted, &cidrs).ok_or(Error::OutOfIdentities)?;
        let mut network =
            Network { identities: reserved(), pods: pod_numbers, cidrs: cidr_numbers, ..Network::default() };
        network.add_cidrs(&nodes);
        network.add_pods(&pods, node);
        network.describe_pods();
        Ok(network)
    }

    fn add_cidrs(&mut self, nodes: &BTreeMap<Cidr, String>) {
        for (address, _) in nodes.iter().filter(|(address, _)| !self.cidrs.contains_key(address)) {
            self.by_address.insert(address.key(), Identity { security_id: identity::REMOTE_NODE, flags: 0 });
        }
        for (cidr, id) in &self.cidrs {
            self.by_address.insert(cidr.key(), Identity { security_id: *id, flags: 0 });
            let source = match nodes.get(cidr) {
                Some(node) => IdentitySource::Node(node.clone()),
                None => IdentitySource::Cidr(cidr.to_string()),
            };
            self.identities.push(IdentityInfo { id: *id, source, ..unlabelled() });
        }
        // `::/0` in a policy means IPv6 only, but as a prefix it holds the mapped IPv4 addresses too.
        if self.cidrs.keys().any(Cidr::covers_mapped) {
            self.by_address.entry(ALL_V4).or_insert(Identity { security_id: identity::WORLD, flags: 0 });
        }
    }

    fn add_pods(&mut self, pods: &[(&Arc<Pod>, PodTraits)], node: &str) {
        let mut owners: BTreeMap<IpAddr, &Arc<Pod>> = BTreeMap::new();
        for (pod, traits) in pods {
            // Every pod's traits were numbered.
            let Some(id) = self.pods.get(traits).copied() else { continue };
            self.pod_identity.insert(pod_uid(pod.namespace(), pod.name()), id);
            let is_local = node_of(pod) == Some(node);
            if is_local {
                self.local.insert(id);
            }
            let flags = if is_local { identity_flag::LOCAL_POD } else { 0 };
            for address in addresses(pod) {
                let key = Cidr::of_address(address).key();
                let clash = owners.insert(address, pod).filter(|owner| !Arc::ptr_eq(owner, pod));
                let security_id = if let Some(owner) = clash {
                    // Whose packets these are cannot be told: neither pod's rights are given.
                    let object = ObjectKey::new(Kind::Pod, pod.namespace(), pod.name()).to_string();
                    let reason = format!("{address} is also the address of pod {}/{}", owner.namespace(), owner.name());
                    self.faults.push(Fault::error(object, "status.podIPs", reason));
                    self.clash = true;
                    identity::UNMANAGED
                } else {
                    id
                };
                self.by_address.insert(key, Identity { security_id, flags });
            }
        }
    }

    fn describe_pods(&mut self) {
        let described = self.pods.iter().map(|(traits, id)| IdentityInfo {
            id: *id,
            source: IdentitySource::Pods,
            namespace: traits.namespace.clone(),
            labels: traits.labels.clone(),
            namespace_labels: traits.namespace_labels.clone(),
        });
        self.identities.extend(described);
        self.identities.sort_by_key(|info| info.id);
    }
}

fn traits(objects: &ObjectSet, pod: &Pod, blocks: &BTreeSet<Cidr>) -> PodTraits {
    let addresses: Vec<Cidr> = match blocks.is_empty() {
        true => Vec::new(),
        false => addresses(pod).into_iter().map(Cidr::of_address).collect(),
    };
    let holds = |block: &&Cidr| addresses.iter().any(|address| block.contains(address));
    PodTraits {
        blocks: blocks.iter().filter(holds).copied().collect(),
        namespace: pod.namespace().to_owned(),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        namespace_labels: namespace_labels(objects, pod.namespace()),
        named_ports: named_ports(pod),
    }
}

/// Addresses of the other nodes, with their names.
fn remote_nodes(objects: &ObjectSet, node: &str) -> BTreeMap<Cidr, String> {
    let others = objects.nodes().filter(|other| other.name() != node);
    let all = others.flat_map(|other| {
        let addresses = other.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let addresses = addresses.filter_map(|address| address.address.parse::<IpAddr>().ok());
        addresses.map(|address| (Cidr::of_address(address), other.name().to_owned())).collect::<Vec<_>>()
    });
    all.collect()
}

/// Every block a policy names, excepted ones too. Malformed ones are told where rules are compiled.
fn blocks(policy: &NetworkPolicy) -> Vec<Cidr> {
    let Some(spec) = &policy.spec else { return Vec::new() };
    let from = spec.ingress.iter().flatten().flat_map(|rule| rule.from.iter().flatten());
    let to = spec.egress.iter().flatten().flat_map(|rule| rule.to.iter().flatten());
    let named = from.chain(to).filter_map(|peer| peer.ip_block.as_ref());
    named
        .flat_map(|block| std::iter::once(&block.cidr).chain(block.except.iter().flatten()))
        .filter_map(|text| Cidr::parse(text).ok())
        .collect()
}

fn unlabelled() -> IdentityInfo {
    IdentityInfo {
        id: 0,
        source: IdentitySource::Reserved("unknown"),
        namespace: String::new(),
        labels: BTreeMap::new(),
        namespace_labels: BTreeMap::new(),
    }
}

fn reserved() -> Vec<IdentityInfo> {
    let all = [
        (identity::UNKNOWN, "unknown"),
        (identity::HOST, "host"),
        (identity::WORLD, "world"),
        (identity::UNMANAGED, "unmanaged"),
        (identity::HEALTH, "health"),
        (identity::REMOTE_NODE, "remote-node"),
    ];
    all.map(|(id, name)| IdentityInfo { id, source: IdentitySource::Reserved(name), ..unlabelled() }).to_vec()
}
