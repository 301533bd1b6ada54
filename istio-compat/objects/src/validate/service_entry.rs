//! ServiceEntry and WorkloadEntry, after Istio's admission.
use std::net::IpAddr;

use super::Check;
use crate::istio::{Resolution, ServiceEntrySpec, WorkloadEntrySpec};
use crate::path::FieldPath;

const PROTOCOLS: [&str; 13] =
    ["", "HTTP", "HTTPS", "GRPC", "GRPC-WEB", "HTTP2", "MONGO", "TCP", "TLS", "MYSQL", "REDIS", "UDP", "HTTP_PROXY"];

pub(super) fn service_entry(c: &mut Check, spec: &ServiceEntrySpec) {
    let path = FieldPath::spec();
    if spec.hosts.is_empty() {
        c.error(&path.to("hosts"), "missing: at least one host is needed");
    }
    for (i, host) in spec.hosts.iter().enumerate() {
        let path = path.to("hosts").to(i);
        c.host(&path, host, true);
        if host == "*" {
            c.error(&path, "* alone would take over every host");
        }
        let wild = host.starts_with('*');
        let known_by_address = matches!(spec.resolution, Resolution::None | Resolution::DynamicDns);
        if wild && !known_by_address && spec.endpoints.is_empty() && spec.workload_selector.is_none() {
            c.error(
                &path,
                "a wildcard host cannot be resolved: resolution NONE or DYNAMIC_DNS, or endpoints are needed",
            );
        }
        if !wild && spec.resolution == Resolution::DynamicDns {
            c.error(&path, "resolution DYNAMIC_DNS is for wildcard hosts");
        }
    }
    spec.addresses.iter().enumerate().for_each(|(i, address)| c.block(&path.to("addresses").to(i), address));
    ports(c, &path, spec);
    endpoints(c, &path, spec);
}

fn ports(c: &mut Check, path: &FieldPath, spec: &ServiceEntrySpec) {
    if spec.ports.is_empty() {
        c.error(&path.to("ports"), "missing: at least one port is needed");
    }
    for (i, port) in spec.ports.iter().enumerate() {
        let path = path.to("ports").to(i);
        c.port(&path.to("number"), Some(port.number));
        c.require(&path.to("name"), &port.name);
        if !PROTOCOLS.contains(&port.protocol.to_uppercase().as_str()) {
            c.error(&path.to("protocol"), format!("{:?} is no protocol Istio knows", port.protocol));
        }
        if spec.ports[..i].iter().any(|other| other.number == port.number) {
            c.error(&path.to("number"), format!("{} occurs twice", port.number));
        }
        if spec.ports[..i].iter().any(|other| other.name == port.name) {
            c.error(&path.to("name"), format!("{:?} occurs twice", port.name));
        }
    }
}

fn endpoints(c: &mut Check, path: &FieldPath, spec: &ServiceEntrySpec) {
    let selects = spec.workload_selector.is_some();
    c.at_most_one(path, &[("endpoints", !spec.endpoints.is_empty()), ("workloadSelector", selects)]);
    if matches!(spec.resolution, Resolution::None | Resolution::DynamicDns) && !spec.endpoints.is_empty() {
        c.error(&path.to("endpoints"), "with this resolution connections go where the caller says: no endpoints");
    }
    if spec.resolution == Resolution::DnsRoundRobin && spec.endpoints.len() > 1 {
        c.error(&path.to("endpoints"), "DNS_ROUND_ROBIN takes one endpoint at most");
    }
    for (i, endpoint) in spec.endpoints.iter().enumerate() {
        let path = path.to("endpoints").to(i);
        workload_entry(c, &path, endpoint);
        let numeric = endpoint.address.parse::<IpAddr>().is_ok() || endpoint.address.starts_with("unix://");
        if spec.resolution == Resolution::Static && !numeric && !endpoint.address.is_empty() {
            c.error(
                &path.to("address"),
                format!("{:?} is no IP address, as resolution STATIC needs", endpoint.address),
            );
        }
        for name in endpoint.ports.keys().filter(|name| spec.ports.iter().all(|port| port.name != **name)) {
            c.error(&path.to("ports").to(name), "no port of the service has this name");
        }
    }
}

pub(super) fn workload_entry(c: &mut Check, path: &FieldPath, entry: &WorkloadEntrySpec) {
    let address = path.to("address");
    if entry.address.is_empty() {
        if entry.network.is_empty() {
            c.error(&address, "missing: an address (or a network) is needed");
        }
    } else if let Some(socket) = entry.address.strip_prefix("unix://") {
        if !socket.starts_with(['/', '@']) {
            c.error(&address, "a unix socket needs an absolute path");
        }
    } else {
        c.host(&address, &entry.address.replace(':', "-"), false);
        if entry.address.contains(':') && entry.address.parse::<IpAddr>().is_err() {
            c.error(&address, format!("{:?} is neither an address nor a name", entry.address));
        }
    }
    for (name, port) in &entry.ports {
        c.port(&path.to("ports").to(name), Some(*port));
    }
}
