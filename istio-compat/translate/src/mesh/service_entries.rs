//! ServiceEntries and WorkloadEntries: services and workloads that Kubernetes does not know.
use std::collections::BTreeMap;
use std::net::IpAddr;

use compat_objects::istio::{self, ServiceEntry, ServiceEntrySpec, WorkloadEntry, WorkloadEntrySpec};
use compat_objects::{HasMeta, Kind, ObjectKey, ObjectSet};
use ipnet::IpNet;
use xds_proto::istio::workload as wds;

use super::drawn::Drawn;
use super::ports::{AppProtocol, ServicePort, Target};
use super::services::{Resolution, Service};
use super::waypoints::{self, Traffic, Waypoint, WaypointKey};
use super::workloads::{Identity, Origin, Workload, canonical};
use super::{Locality, endpoints};
use crate::node::block;
use crate::{Faults, MeshOptions};

/// Sockets of the file system.
const UNIX: &str = "unix:";

/// What is declared, by `namespace/hostname`.
type Services = BTreeMap<String, Service>;

/// Adds a service for every host. What belongs to somebody else already stays theirs: a host of the namespace, and the address of a
/// Service of Kubernetes, whose callers an entry of any namespace could lead away.
pub(super) fn add_services(
    objects: &ObjectSet,
    waypoints: &BTreeMap<WaypointKey, Waypoint>,
    drawn: &Drawn,
    services: &mut Services,
    faults: &mut Faults,
) {
    let owners: BTreeMap<IpNet, ObjectKey> =
        services.values().flat_map(|service| service.vips.iter().map(|vip| (*vip, service.object.clone()))).collect();
    for entry in objects.service_entries() {
        let object = ObjectKey::new(Kind::ServiceEntry, entry.namespace(), entry.name());
        let waypoint = waypoints::bound(objects, waypoints, &**entry, &object, Traffic::Service, faults);
        let mut given: Vec<IpNet> = Vec::new();
        for (index, address) in entry.spec.addresses.iter().enumerate() {
            let Ok(block) = block(address) else { continue };
            // A block around one is no harm: the longest prefix counts.
            match owners.get(&block) {
                Some(owner) => {
                    let reason = format!("{address} is {owner}'s: connections to it are not led here");
                    faults.error(objects, &object, &format!("spec.addresses[{index}]"), reason);
                }
                None => given.push(block),
            }
        }
        for (index, host) in entry.spec.hosts.iter().enumerate() {
            let mut service = service(entry, object.clone(), host, drawn, waypoint.clone());
            service.vips.extend(&given);
            if let Some(first) = services.get(&service.key()) {
                let reason = format!("{host} is {}'s: here it adds nothing", first.object);
                faults.warning(objects, &object, &format!("spec.hosts[{index}]"), reason);
                continue;
            }
            services.insert(service.key(), service);
        }
    }
}

/// With the addresses drawn for it, which are none where it has its own.
fn service(
    entry: &ServiceEntry,
    object: ObjectKey,
    host: &str,
    drawn: &Drawn,
    waypoint: Option<WaypointKey>,
) -> Service {
    let spec = &entry.spec;
    let resolution = resolution(spec);
    Service {
        name: entry.name().to_owned(),
        namespace: entry.namespace().to_owned(),
        hostname: host.to_owned(),
        vips: drawn.of(&object, host).map(IpNet::from).collect(),
        ports: spec.ports.iter().map(port).collect(),
        selector: spec.workload_selector.as_ref().map(|selector| selector.labels.clone()).unwrap_or_default(),
        waypoint,
        load_balancing: (resolution == Resolution::Passthrough).then(|| wds::LoadBalancing {
            mode: wds::load_balancing::Mode::Passthrough as i32,
            health_policy: wds::load_balancing::HealthPolicy::AllowAll as i32,
            ..wds::LoadBalancing::default()
        }),
        ip_families: wds::IpFamilies::Automatic,
        publish_not_ready: false,
        resolution,
        export_to: spec.export_to.clone(),
        subject_alt_names: spec.subject_alt_names.clone(),
        endpoints: Vec::new(),
        object,
    }
}

fn resolution(spec: &ServiceEntrySpec) -> Resolution {
    match spec.resolution {
        istio::Resolution::None => Resolution::Passthrough,
        istio::Resolution::Static => Resolution::Static,
        istio::Resolution::Dns => Resolution::Dns { round_robin: false },
        istio::Resolution::DnsRoundRobin => Resolution::Dns { round_robin: true },
        istio::Resolution::DynamicDns => Resolution::PerRequest,
    }
}

fn port(port: &istio::ServicePort) -> ServicePort {
    let target = if port.target_port == 0 { port.number } else { port.target_port };
    ServicePort {
        name: port.name.clone(),
        number: port.number,
        target: Target::Number(target),
        protocol: AppProtocol::declared(&port.protocol, port.number, &port.name),
    }
}

/// Adds every WorkloadEntry, and the endpoints that ServiceEntries list or, where they list none and names are resolved, their hosts.
pub(super) fn add_workloads(
    objects: &ObjectSet,
    options: &MeshOptions,
    waypoints: &BTreeMap<WaypointKey, Waypoint>,
    services: &mut Services,
    workloads: &mut BTreeMap<String, Workload>,
    faults: &mut Faults,
) {
    for entry in objects.workload_entries().filter(|entry| !entry.spec.address.starts_with(UNIX)) {
        let workload = of_entry(objects, options, waypoints, entry, faults);
        workloads.insert(workload.uid.clone(), workload);
    }
    for entry in objects.service_entries() {
        let object = ObjectKey::new(Kind::ServiceEntry, entry.namespace(), entry.name());
        let uid = |address: &str| {
            let (cluster, namespace, name) = (&options.cluster_id, entry.namespace(), entry.name());
            format!("{cluster}/networking.istio.io/ServiceEntry/{namespace}/{name}/{address}")
        };
        // What is wrong with the label has been said of the entry's services.
        let said = &mut Faults::default();
        let waypoint = waypoints::bound(objects, waypoints, &**entry, &object, Traffic::Workload, said);
        for (index, endpoint) in entry.spec.endpoints.iter().enumerate() {
            remarks(objects, &object, &format!("spec.endpoints[{index}]"), endpoint, faults);
        }
        let mut add = |spec: &WorkloadEntrySpec, waypoint: Option<WaypointKey>, hosts: &[String]| {
            let mut workload = workload(spec, entry.name(), entry.namespace(), spec.labels.clone());
            workload.uid = uid(&spec.address);
            workload.origin = Origin::ServiceEntry;
            workload.waypoint = waypoint;
            for host in hosts {
                let key = format!("{}/{host}", entry.namespace());
                if let Some(service) = services.get_mut(&key).filter(|service| service.object == object) {
                    endpoints::add(&key, service, &mut workload);
                }
            }
            workloads.insert(workload.uid.clone(), workload);
        };
        for endpoint in entry.spec.endpoints.iter().filter(|endpoint| !endpoint.address.starts_with(UNIX)) {
            add(endpoint, waypoint.clone(), &entry.spec.hosts);
        }
        let named = matches!(resolution(&entry.spec), Resolution::Dns { .. } | Resolution::PerRequest);
        if named && entry.spec.endpoints.is_empty() && entry.spec.workload_selector.is_none() {
            for host in &entry.spec.hosts {
                let spec = WorkloadEntrySpec { address: host.clone(), ..WorkloadEntrySpec::default() };
                add(&spec, None, std::slice::from_ref(host));
            }
        }
    }
}

fn of_entry(
    objects: &ObjectSet,
    options: &MeshOptions,
    waypoints: &BTreeMap<WaypointKey, Waypoint>,
    entry: &WorkloadEntry,
    faults: &mut Faults,
) -> Workload {
    let object = ObjectKey::new(Kind::WorkloadEntry, entry.namespace(), entry.name());
    let mut labels = entry.metadata.labels.clone().unwrap_or_default();
    labels.extend(entry.spec.labels.clone());
    let mut workload = workload(&entry.spec, entry.name(), entry.namespace(), labels);
    workload.uid =
        format!("{}/networking.istio.io/WorkloadEntry/{}/{}", options.cluster_id, entry.namespace(), entry.name());
    workload.origin = Origin::WorkloadEntry;
    workload.waypoint = waypoints::bound(objects, waypoints, entry, &object, Traffic::Workload, faults);
    remarks(objects, &object, "spec", &entry.spec, faults);
    workload
}

/// What of an entry is not in force.
fn remarks(objects: &ObjectSet, object: &ObjectKey, at: &str, spec: &WorkloadEntrySpec, faults: &mut Faults) {
    if !spec.network.is_empty() {
        let reason = "is not looked at: all addresses of this mesh are on one network";
        faults.warning(objects, object, &format!("{at}.network"), reason);
    }
    if spec.address.starts_with(UNIX) {
        let reason = "a unix socket is its own host's: nobody else can be led there, and the endpoint is left out";
        faults.warning(objects, object, &format!("{at}.address"), reason);
    }
}

/// Something at an address that an entry says.
fn workload(spec: &WorkloadEntrySpec, name: &str, namespace: &str, labels: BTreeMap<String, String>) -> Workload {
    let address = spec.address.parse::<IpAddr>().ok();
    let mut parts = spec.locality.split('/').map(str::to_owned);
    let mut part = || parts.next().unwrap_or_default();
    let locality = Locality { region: part(), zone: part(), subzone: part() };
    let Identity { name: canonical_name, revision: canonical_revision } = canonical(&labels, name);
    Workload {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        addresses: address.into_iter().collect(),
        hostname: if address.is_none() { spec.address.clone() } else { String::new() },
        hbone: labels.get("networking.istio.io/tunnel").is_some_and(|tunnel| tunnel == "http"),
        service_account: spec.service_account.clone(),
        canonical_name,
        canonical_revision,
        workload_name: name.to_owned(),
        healthy: true,
        weight: spec.weight.max(1),
        locality,
        named_ports: spec.ports.clone(),
        labels,
        ..Workload::default()
    }
}
