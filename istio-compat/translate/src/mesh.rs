//! The objects as the mesh sees them: services with ports and endpoints, workloads, waypoints and who uses them.
mod drawn;
pub(crate) mod endpoints;
pub(crate) mod ports;
pub(crate) mod providers;
mod service_entries;
pub(crate) mod services;
pub(crate) mod waypoints;
pub(crate) mod workloads;

use std::collections::{BTreeMap, HashMap};

use compat_objects::ObjectSet;
use compat_objects::core::LabelSelector;

use crate::{Faults, MeshOptions};
use drawn::Drawn;
pub(crate) use ports::{AppProtocol, ServicePort};
pub(crate) use providers::Providers;
pub(crate) use services::{Resolution, Service};
pub(crate) use waypoints::{Waypoint, WaypointKey};
pub(crate) use workloads::{Locality, Origin, Workload};

/// DNS suffix of the cluster.
pub(crate) const DOMAIN: &str = "cluster.local";

/// Label and annotation names with a meaning here.
pub(crate) mod names {
    pub(crate) const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
    pub(crate) const MANAGED: &str = "gateway.istio.io/managed";
    pub(crate) const REDIRECTION: &str = "ambient.istio.io/redirection";
    pub(crate) const USE_WAYPOINT: &str = "istio.io/use-waypoint";
    pub(crate) const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
    pub(crate) const WAYPOINT_FOR: &str = "istio.io/waypoint-for";
    pub(crate) const WAYPOINT_CLASS: &str = "istio-waypoint";
}

/// All of it, indexed.
pub(crate) struct Mesh<'a> {
    pub(crate) objects: &'a ObjectSet,
    pub(crate) options: &'a MeshOptions,
    /// By `namespace/hostname`.
    pub(crate) services: BTreeMap<String, Service>,
    /// By uid.
    pub(crate) workloads: BTreeMap<String, Workload>,
    pub(crate) waypoints: BTreeMap<WaypointKey, Waypoint>,
    pub(crate) providers: Providers,
    pub(crate) drawn: Drawn,
    /// Keys in `services` by hostname; more than one only for ServiceEntries, the one that everybody means first.
    by_hostname: HashMap<String, Vec<String>>,
    members: HashMap<WaypointKey, Members>,
}

/// What has to do with one waypoint, by key.
#[derive(Default)]
struct Members {
    /// Those bound to it, by hostname.
    services: Vec<String>,
    /// Those bound to it.
    workloads: Vec<String>,
    /// Its own pods.
    pods: Vec<String>,
}

impl<'a> Mesh<'a> {
    pub(crate) fn build(objects: &'a ObjectSet, options: &'a MeshOptions, faults: &mut Faults) -> Self {
        let waypoints = waypoints::all(objects);
        let mut services = services::all(objects, &waypoints, faults);
        let drawn = Drawn::draw(objects);
        service_entries::add_services(objects, &waypoints, &drawn, &mut services, faults);
        let mut workloads = workloads::all(objects, options, &waypoints, faults);
        service_entries::add_workloads(objects, options, &waypoints, &mut services, &mut workloads, faults);
        endpoints::connect(objects, options, &mut services, &mut workloads);
        let mut by_hostname: HashMap<String, Vec<String>> = HashMap::new();
        for (key, service) in &services {
            by_hostname.entry(service.hostname.clone()).or_default().push(key.clone());
        }
        for keys in by_hostname.values_mut().filter(|keys| keys.len() > 1) {
            // Kubernetes' own first, then the oldest: what comes later does not take a name over.
            keys.sort_by_cached_key(|key| services::seniority(objects, &services[key]));
        }
        let providers = Providers::read(objects, &options.root_namespace, faults);
        let members = members(&services, &workloads);
        Self { objects, options, services, workloads, waypoints, providers, drawn, by_hostname, members }
    }

    /// The service a hostname means to someone in `namespace`.
    pub(crate) fn service_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&Service> {
        let keys = self.by_hostname.get(hostname)?;
        let own = keys.iter().filter_map(|key| self.services.get(key));
        let own = own.filter(|service| exported(&service.export_to, &service.namespace, namespace));
        own.clone().find(|service| service.namespace == namespace).or_else(|| own.clone().next())
    }

    /// Whether this is the service that its hostname means where no other is nearer.
    pub(crate) fn is_canonical(&self, key: &str, service: &Service) -> bool {
        self.by_hostname.get(&service.hostname).and_then(|keys| keys.first()).is_some_and(|first| first == key)
    }

    /// The services bound to a waypoint, by hostname.
    pub(crate) fn services_of(&self, waypoint: &WaypointKey) -> impl Iterator<Item = &Service> {
        self.members.get(waypoint).into_iter().flat_map(|members| &members.services).map(|key| &self.services[key])
    }

    /// The workloads bound to a waypoint, by uid.
    pub(crate) fn workloads_of(&self, waypoint: &WaypointKey) -> impl Iterator<Item = &Workload> {
        self.members.get(waypoint).into_iter().flat_map(|members| &members.workloads).map(|uid| &self.workloads[uid])
    }

    /// The pods that are the waypoint.
    pub(crate) fn pods_of(&self, waypoint: &WaypointKey) -> impl Iterator<Item = &Workload> {
        self.members.get(waypoint).into_iter().flat_map(|members| &members.pods).map(|uid| &self.workloads[uid])
    }
}

fn members(
    services: &BTreeMap<String, Service>,
    workloads: &BTreeMap<String, Workload>,
) -> HashMap<WaypointKey, Members> {
    let mut found: HashMap<WaypointKey, Members> = HashMap::new();
    let mut by_hostname: Vec<(&String, &Service)> = services.iter().collect();
    by_hostname.sort_by(|(_, a), (_, b)| (&a.hostname, &a.namespace).cmp(&(&b.hostname, &b.namespace)));
    for (key, service) in by_hostname {
        if let Some(waypoint) = &service.waypoint {
            found.entry(waypoint.clone()).or_default().services.push(key.clone());
        }
    }
    for (uid, workload) in workloads {
        if let Some(waypoint) = &workload.waypoint {
            found.entry(waypoint.clone()).or_default().workloads.push(uid.clone());
        }
        if let Some(name) = workload.labels.get(names::GATEWAY_NAME) {
            let own = WaypointKey { namespace: workload.namespace.clone(), name: name.clone() };
            found.entry(own).or_default().pods.push(uid.clone());
        }
    }
    found
}

/// `short`, `short.ns`, or a full name, as written in `namespace`, made a full name. Wildcards stay as they are.
pub(crate) fn full_hostname(host: &str, namespace: &str) -> String {
    if host.contains('.') || host == "*" { host.to_owned() } else { format!("{host}.{namespace}.svc.{DOMAIN}") }
}

/// Whether a host pattern (exact, `*.suffix` or `*`) covers a hostname.
pub(crate) fn host_covers(pattern: &str, hostname: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(suffix) => hostname.ends_with(suffix) && (suffix.is_empty() || hostname.len() > suffix.len()),
        None => pattern == hostname,
    }
}

/// Whether labels hold every pair of a selector.
pub(crate) fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether a Kubernetes selector selects these labels; an operator that is not known selects nothing.
pub(crate) fn selected(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let expressions = selector.match_expressions.iter().flatten();
    selector.match_labels.as_ref().is_none_or(|wanted| selects(wanted, labels))
        && expressions.into_iter().all(|expression| {
            let value = labels.get(&expression.key);
            let listed = value.is_some_and(|value| expression.values.iter().flatten().any(|one| one == value));
            match expression.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

/// Whether an object of namespace `own` with this `exportTo` is seen in `viewer`.
pub(crate) fn exported(export_to: &[String], own: &str, viewer: &str) -> bool {
    export_to.is_empty()
        || export_to.iter().any(|to| match to.as_str() {
            "*" => true,
            "." => own == viewer,
            "~" => false,
            namespace => namespace == viewer,
        })
}
