//! Objects -> what the maps should hold, compiled again only if what goes into it changed. Pure.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use compat_objects::{Kind, ObjectSet};
use l4_lb::BackendSets;
use l4_policy::IdentityAllocator;

/// Kinds that policy is made of.
const OF_POLICY: [Kind; 4] = [Kind::Pod, Kind::Namespace, Kind::NetworkPolicy, Kind::Node];
/// Kinds that services are made of, besides this node's zone, its pods' addresses, the nodes' addresses, and pods' host ports.
const OF_SERVICES: [Kind; 2] = [Kind::Service, Kind::EndpointSlice];

/// What one compilation was made of and gave.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    objects: ObjectSet,
    /// Addresses of the pods of this node.
    local: BTreeSet<IpAddr>,
    /// Addresses of all nodes.
    nodes: BTreeSet<IpAddr>,
    host_ports: Vec<l4_lb::HostPort>,
    pub(crate) policy: Arc<l4_policy::Compiled>,
    pub(crate) services: Arc<l4_lb::Compiled>,
    pub(crate) allocator: Arc<IdentityAllocator>,
}

/// Both compilers, with what they remember.
#[derive(Debug)]
pub(crate) struct Compiler {
    node: String,
    sets: BackendSets,
    last: Option<Output>,
}

impl Compiler {
    pub(crate) fn new(node: &str, sets: BackendSets) -> Compiler {
        Compiler { node: node.to_owned(), sets, last: None }
    }

    /// Compiles `objects`. `capacity` is the number of entries the policy map holds; `allocator` knows the numbers in
    /// force. What nothing changed for is the very same `Arc` as last time.
    ///
    /// # Errors
    /// Policy cannot be compiled as a whole.
    pub(crate) fn compile(
        &mut self,
        objects: &ObjectSet,
        capacity: usize,
        allocator: &IdentityAllocator,
    ) -> Result<Output, l4_policy::Error> {
        let local = local_addresses(objects, &self.node);
        let same = |last: &Output, kinds: &[Kind]| kinds.iter().all(|kind| last.objects.same_of_kind(objects, *kind));
        let (policy, allocator) = match &self.last {
            Some(last) if same(last, &OF_POLICY) => (last.policy.clone(), last.allocator.clone()),
            _ => {
                let mut allocator = allocator.clone();
                let policy = l4_policy::compile(objects, &self.node, capacity, &mut allocator)?;
                (Arc::new(policy), Arc::new(allocator))
            }
        };
        let nodes = match &self.last {
            Some(last) if same(last, &[Kind::Node]) => last.nodes.clone(),
            _ => l4_lb::node_addresses(objects),
        };
        let host_ports = match &self.last {
            Some(last) if same(last, &[Kind::Pod]) => last.host_ports.clone(),
            _ => l4_lb::host_ports(objects),
        };
        let own = |objects: &ObjectSet| objects.node("", &self.node).cloned();
        let services = match &self.last {
            Some(last)
                if same(last, &OF_SERVICES)
                    && last.local == local
                    && last.nodes == nodes
                    && last.host_ports == host_ports
                    && same_node(own(&last.objects).as_ref(), own(objects).as_ref()) =>
            {
                last.services.clone()
            }
            _ => Arc::new(l4_lb::compile(objects, &self.node, &mut self.sets)),
        };
        let output = Output { objects: objects.clone(), local, nodes, host_ports, policy, services, allocator };
        self.last = Some(output.clone());
        Ok(output)
    }
}

fn same_node<T>(a: Option<&Arc<T>>, b: Option<&Arc<T>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

/// As `l4-lb` tells endpoints of this node that do not say where they are.
fn local_addresses(objects: &ObjectSet, node: &str) -> BTreeSet<IpAddr> {
    let here = objects.pods().filter(|pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node));
    let status = here.filter_map(|pod| pod.status.as_ref());
    let all = status.flat_map(|s| s.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).chain(s.pod_ip.as_deref()));
    all.filter_map(|text| text.parse().ok()).collect()
}

#[cfg(test)]
mod tests;
