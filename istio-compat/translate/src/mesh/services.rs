//! Services, as Kubernetes and ServiceEntries declare them; those of Kubernetes are read here.
use std::collections::BTreeMap;
use std::net::IpAddr;

use compat_objects::core as k8s;
use compat_objects::k8s_openapi::jiff::Timestamp;
use compat_objects::{HasMeta, Kind, ObjectKey, ObjectSet};
use ipnet::IpNet;
use xds_proto::istio::workload as wds;

use super::ports::{AppProtocol, ServicePort, Target};
use super::waypoints::{self, Traffic, Waypoint, WaypointKey};
use super::{DOMAIN, Workload};
use crate::Faults;

/// A service, whatever it was declared as.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    /// The object it was read from.
    pub(crate) object: ObjectKey,
    pub(crate) name: String,
    pub(crate) namespace: String,
    /// `*.suffix` for a ServiceEntry's wildcard.
    pub(crate) hostname: String,
    /// Virtual addresses; blocks only where a ServiceEntry says so.
    pub(crate) vips: Vec<IpNet>,
    pub(crate) ports: Vec<ServicePort>,
    /// Pods of the same namespace with all of these labels are endpoints; empty: there is no selector.
    pub(crate) selector: BTreeMap<String, String>,
    pub(crate) waypoint: Option<WaypointKey>,
    pub(crate) load_balancing: Option<wds::LoadBalancing>,
    pub(crate) ip_families: wds::IpFamilies,
    pub(crate) publish_not_ready: bool,
    pub(crate) resolution: Resolution,
    /// Who may see it, if it says.
    pub(crate) export_to: Vec<String>,
    /// Who its endpoints may be.
    pub(crate) subject_alt_names: Vec<String>,
    pub(crate) endpoints: Vec<Endpoint>,
}

/// How the way to a service's endpoints is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resolution {
    /// They are known by their addresses.
    Static,
    /// By their names in DNS; all addresses of a name, or the one it has now.
    Dns { round_robin: bool },
    /// Connections go on to where the caller sent them.
    Passthrough,
    /// By the name in each request.
    PerRequest,
}

/// One workload's part in a service.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    /// Key in the mesh's workloads.
    pub(crate) uid: String,
    pub(crate) addresses: Vec<IpAddr>,
    /// Service port -> port of the workload.
    pub(crate) ports: BTreeMap<u16, u16>,
    pub(crate) healthy: bool,
}

impl Service {
    /// Resource name in the workload discovery service.
    pub(crate) fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname)
    }

    pub(crate) fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.number == number)
    }

    /// TCP ports, in the order of declaration.
    pub(crate) fn tcp_ports(&self) -> impl Iterator<Item = &ServicePort> {
        self.ports.iter().filter(|port| port.protocol != AppProtocol::Udp)
    }

    /// Whether the service has addresses of this kind: its endpoints do too, then.
    pub(crate) fn has_family(&self, ip: IpAddr) -> bool {
        match self.ip_families {
            wds::IpFamilies::Ipv4Only => ip.is_ipv4(),
            wds::IpFamilies::Ipv6Only => ip.is_ipv6(),
            wds::IpFamilies::Dual | wds::IpFamilies::Automatic => true,
        }
    }

    pub(crate) fn selects(&self, workload: &Workload) -> bool {
        !self.selector.is_empty()
            && self.namespace == workload.namespace
            && super::selects(&self.selector, &workload.labels)
    }
}

/// Who is first among services of one name: the smallest.
pub(super) fn seniority(objects: &ObjectSet, service: &Service) -> (bool, Option<Timestamp>, String) {
    let entry = service.object.kind == Kind::ServiceEntry;
    let created = objects.get(&service.object).and_then(|object| object.created());
    (entry, created, service.namespace.clone())
}

/// Every Kubernetes Service, by `namespace/hostname`.
pub(super) fn all(
    objects: &ObjectSet,
    waypoints: &BTreeMap<WaypointKey, Waypoint>,
    faults: &mut Faults,
) -> BTreeMap<String, Service> {
    objects
        .services()
        .filter_map(|service| read(objects, waypoints, service, faults))
        .map(|service| (service.key(), service))
        .collect()
}

fn read(
    objects: &ObjectSet,
    waypoints: &BTreeMap<WaypointKey, Waypoint>,
    service: &k8s::Service,
    faults: &mut Faults,
) -> Option<Service> {
    let spec = service.spec.as_ref()?;
    // An alias in DNS: connections never carry its name.
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    let object = ObjectKey::new(Kind::Service, service.namespace(), service.name());
    let waypoint = waypoints::bound(objects, waypoints, service, &object, Traffic::Service, faults);
    let vips = vips(spec);
    Some(Service {
        name: service.name().to_owned(),
        namespace: service.namespace().to_owned(),
        hostname: format!("{}.{}.svc.{DOMAIN}", service.name(), service.namespace()),
        ports: spec.ports.iter().flatten().filter_map(port).collect(),
        selector: spec.selector.clone().unwrap_or_default(),
        waypoint,
        load_balancing: load_balancing(service, spec),
        ip_families: families(spec, &vips),
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        resolution: Resolution::Static,
        export_to: Vec::new(),
        subject_alt_names: Vec::new(),
        endpoints: Vec::new(),
        vips: vips.into_iter().map(IpNet::from).collect(),
        object,
    })
}

fn vips(spec: &k8s::ServiceSpec) -> Vec<IpAddr> {
    let listed = spec.cluster_ips.as_deref().unwrap_or_default();
    let single = spec.cluster_ip.iter();
    let all: Vec<IpAddr> = listed.iter().filter_map(|ip| ip.parse().ok()).collect();
    if all.is_empty() { single.filter_map(|ip| ip.parse().ok()).collect() } else { all }
}

fn port(port: &k8s::ServicePort) -> Option<ServicePort> {
    let number = u16::try_from(port.port).ok()?;
    let name = port.name.as_deref().unwrap_or_default();
    let transport = port.protocol.as_deref().unwrap_or("TCP");
    Some(ServicePort {
        name: name.to_owned(),
        number,
        target: Target::read(port.target_port.as_ref(), number),
        protocol: AppProtocol::detect(number, name, transport, port.app_protocol.as_deref()),
    })
}

fn families(spec: &k8s::ServiceSpec, vips: &[IpAddr]) -> wds::IpFamilies {
    let declared = spec.ip_families.as_deref().unwrap_or_default();
    let is = |name: &str, v4: bool| {
        declared.iter().any(|f| f == name) || (declared.is_empty() && vips.iter().any(|ip| ip.is_ipv4() == v4))
    };
    match (is("IPv4", true), is("IPv6", false)) {
        (true, true) => wds::IpFamilies::Dual,
        (true, false) => wds::IpFamilies::Ipv4Only,
        (false, true) => wds::IpFamilies::Ipv6Only,
        // As the API server defaults them; ours is an IPv4 cluster unless said otherwise.
        (false, false) => wds::IpFamilies::Ipv4Only,
    }
}

fn load_balancing(service: &k8s::Service, spec: &k8s::ServiceSpec) -> Option<wds::LoadBalancing> {
    use wds::load_balancing::{HealthPolicy, Mode, Scope};
    let distribution =
        spec.traffic_distribution.as_deref().or_else(|| service.annotation("networking.istio.io/traffic-distribution"));
    let (preference, mode): (&[Scope], Mode) = if spec.internal_traffic_policy.as_deref() == Some("Local") {
        (&[Scope::Node], Mode::Strict)
    } else {
        match distribution {
            Some("PreferClose" | "PreferSameZone") => (&[Scope::Network, Scope::Region, Scope::Zone], Mode::Failover),
            Some("PreferSameNode") => {
                (&[Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node], Mode::Failover)
            }
            _ => (&[], Mode::UnspecifiedMode),
        }
    };
    let health_policy = match spec.publish_not_ready_addresses {
        Some(true) => HealthPolicy::AllowAll,
        _ => HealthPolicy::OnlyHealthy,
    };
    if preference.is_empty() && health_policy == HealthPolicy::OnlyHealthy {
        return None;
    }
    Some(wds::LoadBalancing {
        routing_preference: preference.iter().map(|scope| *scope as i32).collect(),
        mode: mode as i32,
        health_policy: health_policy as i32,
    })
}

/// Network order, 4 or 16 bytes.
pub(crate) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
