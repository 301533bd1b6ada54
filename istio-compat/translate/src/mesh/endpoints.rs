//! Joins services and workloads: pods by selector, everything else by EndpointSlice.
//!
//! Pods are taken from the selector directly rather than from slices: one fewer writer between a pod's readiness and
//! the proxies knowing of it.
use std::collections::BTreeMap;
use std::net::IpAddr;

use compat_objects::core as k8s;
use compat_objects::{HasMeta, ObjectSet};

use super::ports::{ServicePort, Target};
use super::services::{Endpoint, Service};
use super::workloads::Workload;
use super::{DOMAIN, Locality};
use crate::MeshOptions;

/// Fills in the endpoints of every service and the services of every workload.
pub(crate) fn connect(
    objects: &ObjectSet,
    options: &MeshOptions,
    services: &mut BTreeMap<String, Service>,
    workloads: &mut BTreeMap<String, Workload>,
) {
    for (key, service) in services.iter_mut() {
        for workload in workloads.values_mut() {
            if service.selects(workload) {
                let ports = target_ports(service, workload);
                join(key, service, workload, ports);
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

fn target_ports(service: &Service, workload: &Workload) -> Vec<(u16, u16)> {
    let target = |port: &ServicePort| match &port.target {
        Target::Number(number) => Some(*number),
        Target::Name(name) => workload.named_ports.get(name).copied(),
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
                is_pod: false,
                ..Workload::default()
            });
            if !workload.services.contains_key(key) {
                join(key, service, workload, ports.clone());
            }
        }
    }
}
