//! Joins services and workloads: pods by selector, everything else by EndpointSlice.
//!
//! Pods are taken from the selector directly rather than from slices: one fewer writer between a pod's readiness and
//! the proxies knowing of it.
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use compat_objects::core as k8s;
use compat_objects::{HasMeta, ObjectSet};

use super::ports::{ServicePort, Target};
use super::services::{Endpoint, Service};
use super::workloads::{Origin, Workload};
use super::{DOMAIN, Locality};
use crate::MeshOptions;

/// Workloads by namespace, label and value: a service looks at those that have the rarest pair of its selector.
struct ByLabel<'w>(HashMap<[&'w str; 3], Vec<&'w Workload>>);

impl<'w> ByLabel<'w> {
    fn new(workloads: &'w BTreeMap<String, Workload>) -> Self {
        let mut found: HashMap<_, Vec<_>> = HashMap::new();
        let selectable = |workload: &&Workload| matches!(workload.origin, Origin::Pod | Origin::WorkloadEntry);
        for workload in workloads.values().filter(selectable) {
            for (label, value) in &workload.labels {
                found.entry([workload.namespace.as_str(), label, value]).or_default().push(workload);
            }
        }
        Self(found)
    }

    /// By uid.
    fn selected<'s>(&'s self, service: &'s Service) -> impl Iterator<Item = &'w Workload> + 's {
        let having = |(label, value): (&'s String, &'s String)| {
            let all = self.0.get(&[service.namespace.as_str(), label, value]);
            all.map_or(&[][..], Vec::as_slice)
        };
        let fewest = service.selector.iter().map(having).min_by_key(|all| all.len()).unwrap_or_default();
        fewest.iter().copied().filter(|workload| service.selects(workload))
    }
}

/// Fills in the endpoints of every service and the services of every workload.
pub(crate) fn connect(
    objects: &ObjectSet,
    options: &MeshOptions,
    services: &mut BTreeMap<String, Service>,
    workloads: &mut BTreeMap<String, Workload>,
) {
    let by_label = ByLabel::new(workloads);
    let of = |service: &Service| by_label.selected(service).map(|workload| workload.uid.clone()).collect::<Vec<_>>();
    let selected: Vec<Vec<String>> = services.values().map(of).collect();
    for ((key, service), uids) in services.iter_mut().zip(selected) {
        for uid in uids {
            if let Some(workload) = workloads.get_mut(&uid) {
                add(key, service, workload);
            }
        }
    }
    for slice in objects.endpoint_slices() {
        let Some(name) = slice.label("kubernetes.io/service-name") else { continue };
        let key = format!("{}/{name}.{}.svc.{DOMAIN}", slice.namespace(), slice.namespace());
        if let Some(service) = services.get_mut(&key).filter(|service| service.selector.is_empty()) {
            from_slice(options, &key, service, slice, workloads);
        }
    }
}

/// Makes a workload an endpoint of a service, on the ports that both know.
pub(super) fn add(key: &str, service: &mut Service, workload: &mut Workload) {
    let ports = target_ports(service, workload);
    join(key, service, workload, ports);
}

fn target_ports(service: &Service, workload: &Workload) -> Vec<(u16, u16)> {
    // Entries name their ports as the service does; pods, as the service's ports say.
    let own = |port: &ServicePort| match workload.origin {
        Origin::Pod => None,
        _ => workload.named_ports.get(&port.name).copied(),
    };
    let target = |port: &ServicePort| match &port.target {
        Target::Number(number) => own(port).or(Some(*number)),
        Target::Name(name) => own(port).or_else(|| workload.named_ports.get(name).copied()),
    };
    service.ports.iter().filter_map(|port| Some((port.number, target(port)?))).collect()
}

fn join(key: &str, service: &mut Service, workload: &mut Workload, ports: Vec<(u16, u16)>) {
    service.endpoints.push(Endpoint {
        uid: workload.uid.clone(),
        addresses: workload.addresses.clone(),
        ports: ports.iter().copied().collect(),
        healthy: workload.healthy || service.publish_not_ready,
    });
    workload.services.insert(key.to_owned(), ports);
}

/// Endpoints of a service without a selector. One that names a pod is that pod; others are workloads of their own.
fn from_slice(
    options: &MeshOptions,
    key: &str,
    service: &mut Service,
    slice: &k8s::EndpointSlice,
    workloads: &mut BTreeMap<String, Workload>,
) {
    let ports: Vec<(u16, u16)> = service
        .tcp_ports()
        .filter_map(|port| {
            let named = |p: &&k8s::EndpointPort| p.name.as_deref().unwrap_or_default() == port.name;
            let target = slice.ports.iter().flatten().find(named)?.port?;
            Some((port.number, u16::try_from(target).ok()?))
        })
        .collect();
    for endpoint in slice.endpoints.iter().flatten() {
        let healthy = endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
        let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
        for address in endpoint.addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok()) {
            let uid = match pod {
                Some(pod) => format!(
                    "{}//Pod/{}/{}",
                    options.cluster_id,
                    pod.namespace.as_deref().unwrap_or(slice.namespace()),
                    pod.name.as_deref().unwrap_or_default()
                ),
                None => format!(
                    "{}/discovery.k8s.io/EndpointSlice/{}/{}/{address}",
                    options.cluster_id,
                    slice.namespace(),
                    slice.name()
                ),
            };
            let workload = workloads.entry(uid.clone()).or_insert_with(|| Workload {
                uid,
                name: slice.name().to_owned(),
                namespace: slice.namespace().to_owned(),
                addresses: vec![address],
                // Its address may be a node's own, so it is not looked up by address.
                host_network: true,
                node: endpoint.node_name.clone().unwrap_or_default(),
                healthy,
                locality: Locality { zone: endpoint.zone.clone().unwrap_or_default(), ..Locality::default() },
                ..Workload::default()
            });
            if !workload.services.contains_key(key) {
                join(key, service, workload, ports.clone());
            }
        }
    }
}
