//! What callers outside the cluster reach on this node: node ports, external and load balancers' addresses, pods' host
//! ports.
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use compat_objects::core::{Pod, Service, ServiceSpec};
use compat_objects::{Fault, HasMeta as _, Kind, ObjectKey, has_ended};
use ipnet::IpNet;

use crate::services::{
    Compiler, INGRESS, affinity_seconds, external_addresses, port_name, port_number, protocol_number,
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
            let backends = ports.flat_map(|port| self.endpoints.backends(service, port, v6, true));
            backends.map(|backend| backend.addr).collect::<BTreeSet<_>>().len()
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

    /// What this node publishes of its own pods.
    pub(crate) fn host_ports(&mut self, pod: &Pod, node: &str) {
        let (Some(spec), Some(status)) = (&pod.spec, &pod.status) else { return };
        if spec.node_name.as_deref() != Some(node) || spec.host_network == Some(true) || has_ended(pod) {
            return;
        }
        let key = ObjectKey::new(Kind::Pod, pod.namespace(), pod.name());
        let ips: Vec<IpAddr> = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        for port in containers.flat_map(|container| container.ports.iter().flatten()) {
            let host_port = port.host_port.and_then(port_number);
            let (Some(host_port), Some(port_in_pod)) = (host_port, port_number(port.container_port)) else { continue };
            let Some(proto) = protocol_number(port.protocol.as_deref()) else { continue };
            let host_ip: Option<IpAddr> = port.host_ip.as_deref().and_then(|ip| ip.parse().ok());
            let host_ip = host_ip.filter(|ip| !ip.is_unspecified());
            for ip in ips.iter().filter(|ip| host_ip.is_none_or(|host| host.is_ipv6() == ip.is_ipv6())) {
                let published = Published { address: host_ip, v6: ip.is_ipv6(), proto, port: host_port };
                let answer = Outside {
                    name: format!("{}/{}", pod.namespace(), pod.name()),
                    backends: vec![SocketAddr::new(*ip, port_in_pod)],
                    sticky: false,
                    sources: Vec::new(),
                };
                self.publish_outside(&key, "spec.containers.ports.hostPort", published, answer);
            }
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
