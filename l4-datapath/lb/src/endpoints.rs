//! Which endpoints of a service take connections from this node, by kube-proxy's rules.
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use compat_objects::core::{Endpoint, EndpointSlice, Service, ServicePort};
use compat_objects::{HasMeta as _, ObjectSet};
use strata_abi::{Addr, Backend, backend_flag};

/// Label of an EndpointSlice that names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label of a Node that names its zone.
const ZONE: &str = "topology.kubernetes.io/zone";

/// EndpointSlices by the Service they belong to, and what is local.
pub(crate) struct Endpoints<'a> {
    slices: BTreeMap<(&'a str, &'a str), Vec<&'a Arc<EndpointSlice>>>,
    local_addresses: BTreeSet<IpAddr>,
    node: &'a str,
    zone: Option<&'a str>,
}

/// One endpoint address that may be chosen.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    address: IpAddr,
    port: u16,
    endpoint: &'a Endpoint,
}

impl<'a> Endpoints<'a> {
    pub(crate) fn new(objects: &'a ObjectSet, node: &'a str) -> Endpoints<'a> {
        let mut slices: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for slice in objects.endpoint_slices() {
            if let Some(service) = slice.label(SERVICE_NAME) {
                slices.entry((slice.namespace(), service)).or_default().push(slice);
            }
        }
        let local_pods =
            objects.pods().filter(|pod| pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node));
        let local_addresses = local_pods
            .filter_map(|pod| pod.status.as_ref())
            .flat_map(|status| {
                let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
                all.chain(status.pod_ip.as_deref())
            })
            .filter_map(|ip| ip.parse().ok())
            .collect();
        let zone = objects.node("", node).and_then(|node| node.label(ZONE));
        Endpoints { slices, local_addresses, node, zone }
    }

    /// The backends of one port for addresses of one family, sorted. `local_only`: of this node only.
    pub(crate) fn backends(&self, service: &Service, port: &ServicePort, v6: bool, local_only: bool) -> Vec<Backend> {
        let candidates: Vec<Candidate<'_>> = self.candidates(service, port, v6);
        let all_ready = publishes_not_ready(service);
        let is_local = |c: &Candidate<'_>| self.is_local(c);
        let in_scope: Vec<_> = candidates.into_iter().filter(|c| !local_only || is_local(c)).collect();
        let ready: Vec<_> = in_scope.iter().copied().filter(|c| all_ready || is_ready(c.endpoint)).collect();
        let chosen = if ready.is_empty() {
            in_scope.into_iter().filter(|c| is_draining(c.endpoint)).collect()
        } else if local_only {
            ready
        } else {
            self.close(ready)
        };
        let backends = chosen.iter().map(|c| Backend {
            addr: Addr::from(c.address),
            port: c.port,
            flags: if is_local(c) { backend_flag::LOCAL } else { 0 },
        });
        // Sorted and without repetition: the same address may be in two slices while one replaces the other.
        backends.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// This node's ready addresses: what a load balancer is told of. Draining ones are to get no new connections from it.
    pub(crate) fn ready_here(&self, service: &Service, port: &ServicePort, v6: bool) -> BTreeSet<IpAddr> {
        let all_ready = publishes_not_ready(service);
        let here = self.candidates(service, port, v6).into_iter().filter(|c| self.is_local(c));
        here.filter(|c| all_ready || is_ready(c.endpoint)).map(|c| c.address).collect()
    }

    fn candidates(&self, service: &Service, port: &ServicePort, v6: bool) -> Vec<Candidate<'a>> {
        let family = if v6 { "IPv6" } else { "IPv4" };
        let slices = self.slices.get(&(service.namespace(), service.name())).into_iter().flatten();
        let mut found = Vec::new();
        for slice in slices.filter(|slice| slice.address_type == family) {
            let numbers = slice.ports.iter().flatten().filter(|candidate| {
                candidate.name.as_deref().unwrap_or_default() == port.name.as_deref().unwrap_or_default()
                    && candidate.protocol.as_deref().unwrap_or("TCP") == port.protocol.as_deref().unwrap_or("TCP")
            });
            for number in numbers.filter_map(|port| port.port.and_then(|number| u16::try_from(number).ok())) {
                for endpoint in slice.endpoints.iter().flatten() {
                    // Only the first address counts (discovery/v1: consumers need not read more).
                    let address = endpoint.addresses.first().and_then(|address| address.parse::<IpAddr>().ok());
                    if let Some(address) = address.filter(|address| address.is_ipv6() == v6) {
                        found.push(Candidate { address, port: number, endpoint });
                    }
                }
            }
        }
        found
    }

    fn is_local(&self, candidate: &Candidate<'_>) -> bool {
        match candidate.endpoint.node_name.as_deref() {
            Some(node) => node == self.node,
            None => self.local_addresses.contains(&candidate.address),
        }
    }

    /// Those the hints give to this node or zone, if every endpoint has a hint and some are ours
    /// (Kubernetes, "Topology Aware Routing": anything less and hints are not followed).
    fn close<'e>(&self, ready: Vec<Candidate<'e>>) -> Vec<Candidate<'e>> {
        let for_node = |c: &Candidate<'_>| {
            let nodes = c.endpoint.hints.as_ref().and_then(|hints| hints.for_nodes.as_ref());
            nodes.filter(|nodes| !nodes.is_empty()).map(|nodes| nodes.iter().any(|node| node.name == self.node))
        };
        let for_zone = |c: &Candidate<'_>| {
            let zones = c.endpoint.hints.as_ref().and_then(|hints| hints.for_zones.as_ref());
            zones
                .filter(|zones| !zones.is_empty())
                .map(|zones| zones.iter().any(|z| Some(z.name.as_str()) == self.zone))
        };
        let hinted = |hint: &dyn Fn(&Candidate<'_>) -> Option<bool>| -> Option<Vec<Candidate<'e>>> {
            if !ready.iter().all(|c| hint(c).is_some()) {
                return None;
            }
            let ours: Vec<_> = ready.iter().copied().filter(|c| hint(c) == Some(true)).collect();
            (!ours.is_empty()).then_some(ours)
        };
        hinted(&for_node).or_else(|| hinted(&for_zone)).unwrap_or(ready)
    }
}

fn publishes_not_ready(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| spec.publish_not_ready_addresses == Some(true))
}

/// Unknown readiness counts as ready (discovery/v1).
fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
}

/// Terminating, but still answering: better than nobody (KEP-1669).
fn is_draining(endpoint: &Endpoint) -> bool {
    let Some(conditions) = &endpoint.conditions else { return false };
    conditions.serving.or(conditions.ready).unwrap_or(true) && conditions.terminating.unwrap_or(false)
}
