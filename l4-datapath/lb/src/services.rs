//! Services -> map entries.
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use compat_objects::core::{Node, Service as Object, ServicePort, ServiceSpec};
use compat_objects::{Fault, HasMeta as _, Kind, ObjectKey, ObjectSet, internal_addresses};
use strata_abi::{Addr, Backend, BackendKey, Service, ServiceKey, proto, service_flag};

use crate::BackendSets;
use crate::endpoints::Endpoints;
use crate::outside::{HealthCheck, Outside, Published};

/// Entries that node ports may take for callers inside the cluster, and pods' host ports as many again. With more, only
/// the own node's addresses get them.
pub(crate) const NODE_PORT_ENTRIES: usize = 16_384;

/// Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

/// What the service and backend maps of one node should hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compiled {
    /// Service ports, and for each cluster address a marker with port 0 and protocol 0.
    pub services: BTreeMap<ServiceKey, Service>,
    pub backends: BTreeMap<BackendKey, Backend>,
    /// `namespace/name:port` for each key of `services` (`namespace/name` for markers).
    pub names: BTreeMap<ServiceKey, String>,
    /// What callers outside the cluster reach on this node.
    pub outside: BTreeMap<Published, Outside>,
    /// What load balancers are told that ask at a port of this node (`healthCheckNodePort`).
    pub health: BTreeMap<u16, HealthCheck>,
    /// Services or ports left out, and why.
    pub faults: Vec<Fault>,
}

/// Compiles what `node` needs. `sets` is kept by the caller from one compilation to the next.
pub fn compile(objects: &ObjectSet, node: &str, sets: &mut BackendSets) -> Compiled {
    let endpoints = Endpoints::new(objects, node);
    let nodes = nodes_with_ports(objects, node);
    let compiled = Compiled::default();
    let mut compiler = Compiler { objects, endpoints, nodes, sets, compiled, owners: BTreeMap::new() };
    for service in objects.services() {
        compiler.service(service);
    }
    objects.services().for_each(|service| compiler.outside(service));
    compiler.host_ports(node);
    let used: BTreeSet<u32> = compiler.compiled.services.values().map(|service| service.backend_set).collect();
    compiler.sets.retain(&used);
    compiler.compiled
}

/// The addresses of all nodes (`InternalIP`); node ports are served on each.
pub fn node_addresses(objects: &ObjectSet) -> BTreeSet<IpAddr> {
    objects.nodes().flat_map(|node| addresses_of(node)).collect()
}

pub(crate) fn addresses_of(node: &Node) -> impl Iterator<Item = IpAddr> {
    internal_addresses(node).filter_map(|address| address.parse().ok())
}

/// Where a node's own processes find its ports besides.
pub(crate) const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

fn nodes_with_ports(objects: &ObjectSet, node: &str) -> BTreeSet<IpAddr> {
    let ports = objects.services().filter_map(|service| service.spec.as_ref()).flat_map(|spec| spec.ports.iter());
    let ports = ports.flatten().filter(|port| port.node_port.is_some()).count();
    let all = node_addresses(objects);
    let named = if all.len() * ports <= NODE_PORT_ENTRIES {
        all
    } else {
        objects.node("", node).into_iter().flat_map(|node| addresses_of(node)).collect()
    };
    named.into_iter().chain(LOOPBACK).collect()
}

pub(crate) struct Compiler<'a, 's> {
    pub(crate) objects: &'a ObjectSet,
    pub(crate) endpoints: Endpoints<'a>,
    /// Addresses that node ports are served on.
    nodes: BTreeSet<IpAddr>,
    sets: &'s mut BackendSets,
    pub(crate) compiled: Compiled,
    /// Which service has an address, to tell two services apart that claim the same.
    owners: BTreeMap<ServiceKey, String>,
}

/// An address of a service: whether it is the cluster's own, so that undefined ports of it are refused and the mesh knows it, and
/// whether only local backends serve it.
struct Front {
    address: IpAddr,
    field: &'static str,
    of_cluster: bool,
    local_only: bool,
}

impl Compiler<'_, '_> {
    fn service(&mut self, service: &Object) {
        let Some(spec) = &service.spec else { return };
        let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
        if kind == "ExternalName" || spec.cluster_ip.as_deref() == Some("None") {
            return;
        }
        let fronts = self.fronts(service, spec);
        let families: BTreeSet<bool> = fronts.iter().map(|front| front.address.is_ipv6()).collect();
        let affinity_seconds = affinity_seconds(spec);
        let label = format!("{}/{}", service.namespace(), service.name());
        for front in &fronts {
            let addr = Addr::from(front.address);
            if front.of_cluster {
                let key = ServiceKey { addr, port: 0, proto: proto::ANY, _pad: 0 };
                self.insert(service, front.field, key, Service::default(), label.clone());
            }
            for (i, port) in spec.ports.iter().flatten().enumerate() {
                let field = format!("spec.ports[{i}]");
                let Some((number, protocol)) = self.port(service, port, &field) else { continue };
                let flags = if front.of_cluster { 0 } else { service_flag::OUTSIDE };
                let value = self.balanced(service, port, front.address.is_ipv6(), front.local_only, affinity_seconds);
                let value = Service { flags, ..value };
                let key = ServiceKey { addr, port: number, proto: protocol, _pad: 0 };
                self.insert(service, &field, key, value, port_name(service, port));
            }
        }
        for (i, port) in spec.ports.iter().flatten().enumerate() {
            self.node_port(service, port, &format!("spec.ports[{i}]"), &families, affinity_seconds);
        }
    }

    /// A node port for callers inside the cluster. Whom a connection goes to is decided at its beginning, so it takes
    /// no detour by the node it names, and `externalTrafficPolicy` has nothing to say (KEP-3685).
    fn node_port(
        &mut self,
        service: &Object,
        port: &ServicePort,
        field: &str,
        families: &BTreeSet<bool>,
        affinity_seconds: u32,
    ) {
        let Some(number) = port.node_port.and_then(port_number) else { return };
        let Some((_, protocol)) = self.port(service, port, field) else { return };
        for v6 in families {
            let value = self.balanced(service, port, *v6, false, affinity_seconds);
            let value = Service { flags: service_flag::OUTSIDE, ..value };
            let nodes: Vec<IpAddr> = self.nodes.iter().copied().filter(|node| node.is_ipv6() == *v6).collect();
            for node in nodes {
                let key = ServiceKey { addr: node.into(), port: number, proto: protocol, _pad: 0 };
                self.insert(service, &format!("{field}.nodePort"), key, value, port_name(service, port));
            }
        }
    }

    fn balanced(
        &mut self,
        service: &Object,
        port: &ServicePort,
        v6: bool,
        local_only: bool,
        affinity_seconds: u32,
    ) -> Service {
        let backends = self.endpoints.backends(service, port, v6, local_only);
        let backend_set = self.publish(&backends);
        // A set that large cannot exist: the input's objects would not fit into memory.
        let backend_count = u32::try_from(backends.len()).unwrap_or(u32::MAX);
        Service { backend_set, backend_count, affinity_seconds, flags: 0 }
    }

    fn fronts(&mut self, service: &Object, spec: &ServiceSpec) -> Vec<Front> {
        let local_only = spec.internal_traffic_policy.as_deref() == Some("Local");
        let cluster: Vec<&String> = match spec.cluster_ips.as_deref() {
            Some(addresses) if !addresses.is_empty() => addresses.iter().collect(),
            _ => spec.cluster_ip.iter().collect(),
        };
        let cluster: Vec<&String> = cluster.into_iter().filter(|address| !address.is_empty()).collect();
        if cluster.is_empty() {
            let reason = "missing: the service has no address, so nothing can connect to it by address";
            self.fault(Fault::warning, service, "spec.clusterIP", reason.to_owned());
        }
        let all = cluster
            .into_iter()
            .map(|address| (address.as_str(), "spec.clusterIPs", true, local_only))
            .chain(external_addresses(service, spec).map(|(address, field)| (address, field, false, false)));
        let mut fronts: Vec<Front> = Vec::new();
        for (text, field, of_cluster, local_only) in all {
            match text.parse() {
                Ok(address) if fronts.iter().all(|front| front.address != address) => {
                    fronts.push(Front { address, field, of_cluster, local_only });
                }
                Ok(_) => {}
                Err(_) => self.fault(Fault::error, service, field, format!("{text:?} is no IP address")),
            }
        }
        fronts
    }

    fn port(&mut self, service: &Object, port: &ServicePort, field: &str) -> Option<(u16, u8)> {
        let Some(number) = port_number(port.port) else {
            self.fault(Fault::error, service, &format!("{field}.port"), format!("{} is no port", port.port));
            return None;
        };
        let Some(protocol) = protocol_number(port.protocol.as_deref()) else {
            let other = port.protocol.as_deref().unwrap_or_default();
            let reason = format!("{other} is not balanced (TCP and UDP are): the port is left out");
            self.fault(Fault::warning, service, &format!("{field}.protocol"), reason);
            return None;
        };
        Some((number, protocol))
    }

    pub(crate) fn publish(&mut self, backends: &[Backend]) -> u32 {
        let backend_set = self.sets.number(backends);
        for (slot, backend) in (0..).zip(backends) {
            self.compiled.backends.insert(BackendKey { backend_set, slot }, *backend);
        }
        backend_set
    }

    fn insert(&mut self, service: &Object, field: &str, key: ServiceKey, value: Service, name: String) {
        if let Some(owner) = self.owners.get(&key) {
            let reason = format!("{owner} has this address and port already; it keeps them");
            self.fault(Fault::error, service, field, reason);
            return;
        }
        self.own(key, value, name);
    }

    /// Unless somebody has it.
    pub(crate) fn own(&mut self, key: ServiceKey, value: Service, name: String) {
        if self.owners.contains_key(&key) {
            return;
        }
        self.owners.insert(key, name.clone());
        self.compiled.services.insert(key, value);
        self.compiled.names.insert(key, name);
    }

    fn fault(&mut self, make: fn(String, String, String) -> Fault, service: &Object, field: &str, reason: String) {
        let key = ObjectKey::new(Kind::Service, service.namespace(), service.name());
        self.fault_of(&key, make(key.to_string(), field.to_owned(), reason));
    }

    pub(crate) fn fault_of(&mut self, key: &ObjectKey, fault: Fault) {
        let fault = self.objects.located(fault, key);
        if !self.compiled.faults.contains(&fault) {
            self.compiled.faults.push(fault);
        }
    }
}

/// Where the load balancer's addresses stand.
pub(crate) const INGRESS: &str = "status.loadBalancer.ingress";

/// Addresses besides those of the cluster, and where they stand.
pub(crate) fn external_addresses<'o>(
    service: &'o Object,
    spec: &'o ServiceSpec,
) -> impl Iterator<Item = (&'o str, &'static str)> {
    let balancer = service.status.iter().flat_map(|status| &status.load_balancer);
    let ingress = balancer.flat_map(|status| status.ingress.iter().flatten());
    // `Proxy`: the load balancer wants the traffic itself (KEP-1860).
    let ingress = ingress.filter(|i| i.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip.as_deref());
    let external = spec.external_ips.iter().flatten().map(|address| (address.as_str(), "spec.externalIPs"));
    external.chain(ingress.map(|address| (address, INGRESS)))
}

/// `None`: no port.
pub(crate) fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

/// TCP if nothing is said; `None`: not balanced.
pub(crate) fn protocol_number(name: Option<&str>) -> Option<u8> {
    match name.unwrap_or("TCP") {
        "TCP" => Some(proto::TCP),
        "UDP" => Some(proto::UDP),
        _ => None,
    }
}

/// `namespace/name:port`.
pub(crate) fn port_name(service: &Object, port: &ServicePort) -> String {
    let label = format!("{}/{}", service.namespace(), service.name());
    match port.name.as_deref() {
        Some(name) if !name.is_empty() => format!("{label}:{name}"),
        _ => format!("{label}:{}", port.port),
    }
}

pub(crate) fn affinity_seconds(spec: &ServiceSpec) -> u32 {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return 0;
    }
    let configured = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = configured.and_then(|client_ip| client_ip.timeout_seconds);
    seconds.and_then(|seconds| u32::try_from(seconds).ok()).filter(|s| *s > 0).unwrap_or(DEFAULT_AFFINITY_SECONDS)
}
