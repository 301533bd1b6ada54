//! What callers outside the cluster reach on this node: node ports, external and load balancers' addresses, pods' host
//! ports.
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use compat_objects::core::{Pod, Service, ServiceSpec};
use compat_objects::{Fault, HasMeta as _, Kind, ObjectKey, ObjectSet};
use ipnet::IpNet;
use strata_abi::proto;

use crate::endpoints::Endpoints;
use crate::services::{affinity_seconds, port_name};

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

/// Compiles what this node publishes. What has no backend is left out: nobody listens there.
pub(crate) fn outside(
    objects: &ObjectSet,
    node: &str,
    endpoints: &Endpoints<'_>,
) -> (BTreeMap<Published, Outside>, Vec<Fault>) {
    let mut found = Found::default();
    for service in objects.services() {
        if let Some(spec) = &service.spec {
            found.service(objects, service, spec, endpoints);
        }
    }
    for pod in objects.pods() {
        found.host_ports(objects, pod, node);
    }
    (found.published, found.faults)
}

#[derive(Default)]
struct Found {
    published: BTreeMap<Published, Outside>,
    faults: Vec<Fault>,
}

impl Found {
    fn service(&mut self, objects: &ObjectSet, service: &Service, spec: &ServiceSpec, endpoints: &Endpoints<'_>) {
        let key = ObjectKey::new(Kind::Service, service.namespace(), service.name());
        let local_only = spec.external_traffic_policy.as_deref() == Some("Local");
        let sources: Vec<IpNet> =
            spec.load_balancer_source_ranges.iter().flatten().filter_map(|range| range.trim().parse().ok()).collect();
        if sources.len() != spec.load_balancer_source_ranges.iter().flatten().count() {
            // Fewer ranges let fewer in, but none would let everybody in.
            let reason = "not a list of address ranges: nobody is let in at the load balancer's address";
            self.fault(objects, &key, "spec.loadBalancerSourceRanges", reason.to_owned());
        }
        let restricted = spec.load_balancer_source_ranges.as_ref().is_some_and(|ranges| !ranges.is_empty());
        let balancer = service.status.iter().flat_map(|status| &status.load_balancer);
        let ingress = balancer.flat_map(|status| status.ingress.iter().flatten());
        let ingress = ingress.filter(|i| i.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip.as_deref());
        let external = spec.external_ips.iter().flatten().map(String::as_str);
        let addresses = external.map(|ip| (ip, false)).chain(ingress.map(|ip| (ip, restricted)));
        let addresses: Vec<(IpAddr, bool)> =
            addresses.filter_map(|(ip, restricted)| Some((ip.parse().ok()?, restricted))).collect();
        for port in spec.ports.iter().flatten() {
            if port.node_port.is_none() && addresses.is_empty() {
                continue;
            }
            let Some(proto) = protocol(port.protocol.as_deref()) else { continue };
            for v6 in [false, true] {
                let backends = endpoints.backends(service, port, v6, local_only);
                let backends: Vec<SocketAddr> =
                    backends.iter().map(|backend| SocketAddr::new(backend.addr.into(), backend.port)).collect();
                if backends.is_empty() {
                    continue;
                }
                let sticky = affinity_seconds(spec) > 0;
                let answer = |sources: &[IpNet]| Outside {
                    name: port_name(service, port),
                    backends: backends.clone(),
                    sticky,
                    sources: sources.to_vec(),
                };
                if let Some(number) = number(port.node_port) {
                    let published = Published { address: None, v6, proto, port: number };
                    self.insert(objects, &key, "spec.ports.nodePort", published, answer(&[]));
                }
                let Some(number) = number(Some(port.port)) else { continue };
                for (address, restricted) in addresses.iter().filter(|(address, _)| address.is_ipv6() == v6) {
                    let sources: Vec<IpNet> =
                        sources.iter().copied().filter(|range| range.addr().is_ipv6() == v6 && *restricted).collect();
                    if *restricted && sources.is_empty() {
                        continue;
                    }
                    let published = Published { address: Some(*address), v6, proto, port: number };
                    self.insert(objects, &key, "spec.ports", published, answer(&sources));
                }
            }
        }
    }

    fn host_ports(&mut self, objects: &ObjectSet, pod: &Pod, node: &str) {
        let (Some(spec), Some(status)) = (&pod.spec, &pod.status) else { return };
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        if spec.node_name.as_deref() != Some(node) || spec.host_network == Some(true) || ended {
            return;
        }
        let key = ObjectKey::new(Kind::Pod, pod.namespace(), pod.name());
        let ips: Vec<IpAddr> = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        for port in containers.flat_map(|container| container.ports.iter().flatten()) {
            let (Some(host_port), Some(port_in_pod)) = (number(port.host_port), number(Some(port.container_port)))
            else {
                continue;
            };
            let Some(proto) = protocol(port.protocol.as_deref()) else { continue };
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
                self.insert(objects, &key, "spec.containers.ports.hostPort", published, answer);
            }
        }
    }

    fn insert(&mut self, objects: &ObjectSet, key: &ObjectKey, field: &str, published: Published, answer: Outside) {
        match self.published.get(&published) {
            Some(owner) => {
                let reason = format!("{} has port {} already; it keeps it", owner.name, published.port);
                self.fault(objects, key, field, reason);
            }
            None => drop(self.published.insert(published, answer)),
        }
    }

    fn fault(&mut self, objects: &ObjectSet, key: &ObjectKey, field: &str, reason: String) {
        let mut fault = Fault::error(key.to_string(), field.to_owned(), reason);
        if let Some(location) = objects.location(key) {
            fault = fault.at(location);
        }
        if !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
    }
}

fn number(port: Option<i32>) -> Option<u16> {
    port.and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0)
}

fn protocol(name: Option<&str>) -> Option<u8> {
    match name.unwrap_or("TCP") {
        "TCP" => Some(proto::TCP),
        "UDP" => Some(proto::UDP),
        _ => None,
    }
}
