//! Kubernetes' own objects, as far as Strata reads them.
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::Check;
use crate::path::FieldPath;

const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];

fn is_port(number: i32) -> bool {
    (1..=65535).contains(&number)
}

impl Check {
    fn number(&mut self, path: &FieldPath, number: i32) {
        if !is_port(number) {
            self.error(path, format!("{number} is no port (1 to 65535)"));
        }
    }

    fn protocol(&mut self, path: &FieldPath, protocol: Option<&str>) {
        if let Some(other) = protocol.filter(|protocol| !PROTOCOLS.contains(protocol)) {
            self.error(path, format!("{other:?} is none of {}", PROTOCOLS.join(", ")));
        }
    }

    fn address(&mut self, path: &FieldPath, text: &str) {
        if text.parse::<IpAddr>().is_err() {
            self.error(path, format!("{text:?} is no IP address"));
        }
    }

    fn label_selector(&mut self, path: &FieldPath, selector: &LabelSelector) {
        for (i, expression) in selector.match_expressions.iter().flatten().enumerate() {
            let path = path.to("matchExpressions").to(i);
            let values = expression.values.as_ref().is_some_and(|values| !values.is_empty());
            match expression.operator.as_str() {
                "In" | "NotIn" if !values => self.error(&path.to("values"), "missing: at least one value is needed"),
                "Exists" | "DoesNotExist" if values => {
                    self.error(&path.to("values"), format!("{} takes no values", expression.operator));
                }
                "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
                other => {
                    self.error(&path.to("operator"), format!("{other:?} is none of In, NotIn, Exists, DoesNotExist"))
                }
            }
            self.require(&path.to("key"), &expression.key);
        }
    }
}

pub(super) fn pod(c: &mut Check, pod: &Pod) {
    let Some(spec) = &pod.spec else {
        return c.error(&FieldPath::spec(), "missing: a pod needs a spec");
    };
    for (i, container) in spec.containers.iter().enumerate() {
        let ports = FieldPath::spec().to("containers").to(i).to("ports");
        for (j, port) in container.ports.iter().flatten().enumerate() {
            c.number(&ports.to(j).to("containerPort"), port.container_port);
            c.protocol(&ports.to(j).to("protocol"), port.protocol.as_deref());
        }
    }
    let status = FieldPath::default().to("status");
    let Some(observed) = &pod.status else { return };
    if let Some(address) = observed.pod_ip.as_deref().filter(|address| !address.is_empty()) {
        c.address(&status.to("podIP"), address);
    }
    for (i, address) in observed.pod_ips.iter().flatten().enumerate() {
        c.address(&status.to("podIPs").to(i).to("ip"), &address.ip);
    }
}

pub(super) fn service(c: &mut Check, service: &Service) {
    let spec = FieldPath::spec();
    let Some(wanted) = &service.spec else { return c.error(&spec, "missing: a service needs a spec") };
    let external = wanted.type_.as_deref() == Some("ExternalName");
    if external {
        c.host(&spec.to("externalName"), wanted.external_name.as_deref().unwrap_or_default(), false);
    }
    let ports: Vec<_> = wanted.ports.iter().flatten().collect();
    for (i, port) in ports.iter().enumerate() {
        let path = spec.to("ports").to(i);
        c.number(&path.to("port"), port.port);
        c.protocol(&path.to("protocol"), port.protocol.as_deref());
        if let Some(IntOrString::Int(target)) = &port.target_port {
            c.number(&path.to("targetPort"), *target);
        }
        if ports.len() > 1 && port.name.as_deref().unwrap_or_default().is_empty() {
            c.error(&path.to("name"), "missing: several ports need names");
        }
        let twin = ports[..i].iter().any(|other| {
            other.port == port.port
                && other.protocol.as_deref().unwrap_or("TCP") == port.protocol.as_deref().unwrap_or("TCP")
        });
        if twin {
            c.error(&path.to("port"), format!("{} occurs twice for one protocol", port.port));
        }
        if ports[..i].iter().any(|other| other.name == port.name) && port.name.is_some() {
            c.error(&path.to("name"), format!("{:?} occurs twice", port.name.as_deref().unwrap_or_default()));
        }
    }
    if let Some(address) = wanted.cluster_ip.as_deref().filter(|address| !address.is_empty() && *address != "None") {
        c.address(&spec.to("clusterIP"), address);
    }
    for (i, address) in wanted.cluster_ips.iter().flatten().enumerate().filter(|(_, address)| *address != "None") {
        c.address(&spec.to("clusterIPs").to(i), address);
    }
    for (i, address) in wanted.external_ips.iter().flatten().enumerate() {
        c.address(&spec.to("externalIPs").to(i), address);
    }
}

pub(super) fn endpoint_slice(c: &mut Check, slice: &EndpointSlice) {
    let root = FieldPath::default();
    if !["IPv4", "IPv6", "FQDN"].contains(&slice.address_type.as_str()) {
        c.error(&root.to("addressType"), format!("{:?} is none of IPv4, IPv6, FQDN", slice.address_type));
    }
    for (i, port) in slice.ports.iter().flatten().enumerate() {
        let path = root.to("ports").to(i);
        c.protocol(&path.to("protocol"), port.protocol.as_deref());
        if let Some(number) = port.port {
            c.number(&path.to("port"), number);
        }
    }
    for (i, endpoint) in slice.endpoints.iter().flatten().enumerate() {
        for (j, address) in endpoint.addresses.iter().enumerate() {
            let path = root.to("endpoints").to(i).to("addresses").to(j);
            let parsed = address.parse::<IpAddr>();
            let fits = match (slice.address_type.as_str(), &parsed) {
                ("IPv4", Ok(address)) => address.is_ipv4(),
                ("IPv6", Ok(address)) => address.is_ipv6(),
                ("IPv4" | "IPv6", Err(_)) => false,
                _ => true,
            };
            if !fits {
                c.error(&path, format!("{address:?} is no {} address", slice.address_type));
            }
        }
    }
}

pub(super) fn network_policy(c: &mut Check, policy: &NetworkPolicy) {
    let path = FieldPath::spec();
    let Some(spec) = &policy.spec else { return c.error(&path, "missing: without it the policy says nothing") };
    if let Some(selector) = &spec.pod_selector {
        c.label_selector(&path.to("podSelector"), selector);
    }
    for (i, kind) in spec.policy_types.iter().flatten().enumerate() {
        if kind != "Ingress" && kind != "Egress" {
            c.error(&path.to("policyTypes").to(i), format!("{kind:?} is neither Ingress nor Egress"));
        }
    }
    for (i, rule) in spec.ingress.iter().flatten().enumerate() {
        let path = path.to("ingress").to(i);
        peers(c, &path.to("from"), rule.from.as_deref().unwrap_or_default());
        ports(c, &path.to("ports"), rule.ports.as_deref().unwrap_or_default());
    }
    for (i, rule) in spec.egress.iter().flatten().enumerate() {
        let path = path.to("egress").to(i);
        peers(c, &path.to("to"), rule.to.as_deref().unwrap_or_default());
        ports(c, &path.to("ports"), rule.ports.as_deref().unwrap_or_default());
    }
}

fn peers(c: &mut Check, path: &FieldPath, peers: &[NetworkPolicyPeer]) {
    for (i, peer) in peers.iter().enumerate() {
        let path = path.to(i);
        let selects = peer.pod_selector.is_some() || peer.namespace_selector.is_some();
        match &peer.ip_block {
            Some(_) if selects => c.error(&path, "ipBlock stands alone, without podSelector or namespaceSelector"),
            None if !selects => c.error(&path, "names nobody: podSelector, namespaceSelector or ipBlock is needed"),
            _ => {}
        }
        for (name, selector) in [("podSelector", &peer.pod_selector), ("namespaceSelector", &peer.namespace_selector)] {
            if let Some(selector) = selector {
                c.label_selector(&path.to(name), selector);
            }
        }
        if let Some(ip_block) = &peer.ip_block {
            block(c, &path.to("ipBlock"), ip_block);
        }
    }
}

fn block(c: &mut Check, path: &FieldPath, block: &IPBlock) {
    let Ok(whole) = block.cidr.parse::<IpNet>() else {
        return c.error(&path.to("cidr"), format!("{:?} is no CIDR block such as 10.0.0.0/8", block.cidr));
    };
    for (i, text) in block.except.iter().flatten().enumerate() {
        let path = path.to("except").to(i);
        match text.parse::<IpNet>() {
            Ok(except) if whole.contains(&except) && whole.prefix_len() < except.prefix_len() => {}
            Ok(_) => c.error(&path, format!("{text} is no part of {}", block.cidr)),
            Err(_) => c.error(&path, format!("{text:?} is no CIDR block such as 10.0.0.0/8")),
        }
    }
}

fn ports(c: &mut Check, path: &FieldPath, ports: &[NetworkPolicyPort]) {
    for (i, port) in ports.iter().enumerate() {
        let path = path.to(i);
        c.protocol(&path.to("protocol"), port.protocol.as_deref());
        match (&port.port, port.end_port) {
            (Some(IntOrString::Int(first)), last) => {
                c.number(&path.to("port"), *first);
                if let Some(last) = last {
                    c.number(&path.to("endPort"), last);
                    if last < *first {
                        c.error(&path.to("endPort"), format!("{last} is below port {first}"));
                    }
                }
            }
            (Some(IntOrString::String(name)), None) => c.require(&path.to("port"), name),
            (_, Some(_)) => c.error(&path.to("endPort"), "needs a numeric port"),
            (None, None) => {}
        }
    }
}
