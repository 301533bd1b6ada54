//! What callers outside the cluster reach on this node: node ports, external and load balancers' addresses, pods' host
//! ports.
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use compat_objects::core::{Pod, Service, ServiceSpec};
use compat_objects::{Fault, HasMeta as _, Kind, ObjectKey, ObjectSet, has_ended};
use ipnet::IpNet;
use strata_abi::{Backend, ServiceKey, backend_flag, service_flag};

use crate::services::{
    Compiler, INGRESS, LOOPBACK, NODE_PORT_ENTRIES, addresses_of, affinity_seconds, external_addresses, port_name,
    port_number, protocol_number,
};

/// Where callers knock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Published {
    /// `None`: any address of the node.
    pub address: Option<IpAddr>,
    pub v6: bool,
    pub proto: u8,
    pub port: u16,
}

/// Who answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outside {
    /// `namespace/name:port` of the Service, `namespace/name` of the pod.
    pub name: String,
    /// Never empty. With `externalTrafficPolicy: Local` those of this node only.
    pub backends: Vec<SocketAddr>,
    /// A caller's connections go to the same backend (`sessionAffinity: ClientIP`).
    pub sticky: bool,
    /// Who may call (`loadBalancerSourceRanges`); empty: everybody.
    pub sources: Vec<IpNet>,
}

/// Whether a load balancer should send this node what is for a service with `externalTrafficPolicy: Local`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    pub namespace: String,
    pub name: String,
    /// Its ready pods on this node.
    pub local: usize,
}

impl Compiler<'_, '_> {
    /// What this node publishes of a service. What has no backend is left out: nobody listens there.
    pub(crate) fn outside(&mut self, service: &Service) {
        let Some(spec) = &service.spec else { return };
        let key = ObjectKey::new(Kind::Service, service.namespace(), service.name());
        let local_only = spec.external_traffic_policy.as_deref() == Some("Local");
        if local_only && spec.type_.as_deref() == Some("LoadBalancer") {
            self.health_check(service, spec);
        }
        let ranges = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
        let sources: Vec<IpNet> = ranges.iter().filter_map(|range| range.trim().parse().ok()).collect();
        if sources.len() != ranges.len() {
            // Fewer ranges let fewer in, but none would let everybody in.
            let reason = "not a list of address ranges: nobody is let in at the load balancer's address";
            self.fault_of(&key, Fault::error(key.to_string(), "spec.loadBalancerSourceRanges", reason));
        }
        let addresses: Vec<(IpAddr, bool)> = external_addresses(service, spec)
            .filter_map(|(ip, field)| Some((ip.parse().ok()?, field == INGRESS && !ranges.is_empty())))
            .collect();
        for port in spec.ports.iter().flatten() {
            if port.node_port.is_none() && addresses.is_empty() {
                continue;
            }
            let Some(proto) = protocol_number(port.protocol.as_deref()) else { continue };
            for v6 in [false, true] {
                let backends = self.endpoints.backends(service, port, v6, local_only);
                let backends: Vec<SocketAddr> =
                    backends.iter().map(|backend| SocketAddr::new(backend.addr.into(), backend.port)).collect();
                if backends.is_empty() {
                    continue;
                }
                let sticky = affinity_seconds(spec) > 0;
                let answer =
                    |sources| Outside { name: port_name(service, port), backends: backends.clone(), sticky, sources };
                if let Some(port) = port.node_port.and_then(port_number) {
                    let published = Published { address: None, v6, proto, port };
                    self.publish_outside(&key, "spec.ports.nodePort", published, answer(Vec::new()));
                }
                let Some(port) = port_number(port.port) else { continue };
                for (address, restricted) in addresses.iter().filter(|(address, _)| address.is_ipv6() == v6) {
                    let in_family = |range: &&IpNet| *restricted && range.addr().is_ipv6() == v6;
                    let sources: Vec<IpNet> = sources.iter().filter(in_family).copied().collect();
                    if *restricted && sources.is_empty() {
                        continue;
                    }
                    let published = Published { address: Some(*address), v6, proto, port };
                    self.publish_outside(&key, "spec.ports", published, answer(sources));
                }
            }
        }
    }

    fn health_check(&mut self, service: &Service, spec: &ServiceSpec) {
        let Some(port) = spec.health_check_node_port.and_then(port_number) else { return };
        // A pod has an address of each family: counted once.
        let local = [false, true].map(|v6| {
            let ports = spec.ports.iter().flatten();
            ports.flat_map(|port| self.endpoints.ready_here(service, port, v6)).collect::<BTreeSet<_>>().len()
        });
        let local = local[0].max(local[1]);
        let check = HealthCheck { namespace: service.namespace().into(), name: service.name().into(), local };
        match self.compiled.health.get(&port) {
            Some(owner) => {
                let reason = format!("{}/{} has port {port} already; it keeps it", owner.namespace, owner.name);
                let key = ObjectKey::new(Kind::Service, service.namespace(), service.name());
                self.fault_of(&key, Fault::error(key.to_string(), "spec.healthCheckNodePort", reason));
            }
            None => drop(self.compiled.health.insert(port, check)),
        }
    }

    /// Pods' host ports: this node's for callers outside, and everybody's for callers inside, at their nodes' addresses.
    pub(crate) fn host_ports(&mut self, node: &str) {
        let all = host_ports(self.objects);
        let inside_everywhere = all.len() <= NODE_PORT_ENTRIES;
        for port in all {
            let local = port.node == node;
            if local {
                let published =
                    Published { address: port.address, v6: port.pod.is_ipv6(), proto: port.proto, port: port.number };
                let answer =
                    Outside { name: port.name(), backends: vec![port.pod], sticky: false, sources: Vec::new() };
                self.publish_outside(&port.key, "spec.containers.ports.hostPort", published, answer);
            }
            if local || inside_everywhere {
                self.host_port_inside(&port, local);
            }
        }
    }

    /// Whom a connection goes to is decided at its beginning, as with node ports. If the port is somebody's already, its own
    /// node's agent says so.
    fn host_port_inside(&mut self, port: &HostPort, local: bool) {
        let flags = if local { backend_flag::LOCAL } else { 0 };
        let backend_set = self.publish(&[Backend { addr: port.pod.ip().into(), port: port.pod.port(), flags }]);
        let service =
            strata_abi::Service { backend_set, backend_count: 1, affinity_seconds: 0, flags: service_flag::OUTSIDE };
        let objects = self.objects;
        let of_node = objects.node("", &port.node).into_iter().flat_map(|node| addresses_of(node));
        // Another node's loopback is nothing here.
        let of_node: BTreeSet<IpAddr> = of_node.chain(LOOPBACK.into_iter().filter(|_| local)).collect();
        // A `hostIP` that is not its node's would take what is meant for others.
        let asked = |address: &IpAddr| {
            port.address.is_none_or(|asked| asked == *address) && address.is_ipv6() == port.pod.is_ipv6()
        };
        for address in of_node.into_iter().filter(asked) {
            let key = ServiceKey { addr: address.into(), port: port.number, proto: port.proto, _pad: 0 };
            self.own(key, service, port.name());
        }
    }

    fn publish_outside(&mut self, key: &ObjectKey, field: &str, published: Published, answer: Outside) {
        match self.compiled.outside.get(&published) {
            Some(owner) => {
                let reason = format!("{} has port {} already; it keeps it", owner.name, published.port);
                self.fault_of(key, Fault::error(key.to_string(), field, reason));
            }
            None => drop(self.compiled.outside.insert(published, answer)),
        }
    }
}

/// A port of a pod's node that leads to the pod, in one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    key: ObjectKey,
    node: String,
    /// `hostIP`; `None`: any address of the node.
    address: Option<IpAddr>,
    number: u16,
    proto: u8,
    pod: SocketAddr,
}

impl HostPort {
    fn name(&self) -> String {
        format!("{}/{}", self.key.namespace, self.key.name)
    }
}

/// Those of all nodes' pods.
pub fn host_ports(objects: &ObjectSet) -> Vec<HostPort> {
    objects.pods().flat_map(|pod| host_ports_of(pod)).collect()
}

fn host_ports_of(pod: &Pod) -> Vec<HostPort> {
    let (Some(spec), Some(status)) = (&pod.spec, &pod.status) else { return Vec::new() };
    let Some(node) = spec.node_name.as_deref().filter(|_| spec.host_network != Some(true) && !has_ended(pod)) else {
        return Vec::new();
    };
    let ips: Vec<IpAddr> = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut found = Vec::new();
    for port in containers.flat_map(|container| container.ports.iter().flatten()) {
        let (Some(number), Some(in_pod)) = (port.host_port.and_then(port_number), port_number(port.container_port))
        else {
            continue;
        };
        let Some(proto) = protocol_number(port.protocol.as_deref()) else { continue };
        let address: Option<IpAddr> = port.host_ip.as_deref().and_then(|ip| ip.parse().ok());
        let address = address.filter(|ip| !ip.is_unspecified());
        for ip in ips.iter().filter(|ip| address.is_none_or(|host| host.is_ipv6() == ip.is_ipv6())) {
            let key = ObjectKey::new(Kind::Pod, pod.namespace(), pod.name());
            found.push(HostPort {
                key,
                node: node.to_owned(),
                address,
                number,
                proto,
                pod: SocketAddr::new(*ip, in_pod),
            });
        }
    }
    found
}
