//! Waypoint Gateways, and which of them a service or pod uses.
use std::collections::BTreeMap;
use std::net::IpAddr;

use compat_objects::core::LabelSelector;
use compat_objects::gateway::{FromNamespaces, Gateway};
use compat_objects::{HasMeta, ObjectKey, ObjectSet};
use xds_proto::istio::workload as wds;

use super::{DOMAIN, names};
use crate::Faults;

/// Port every waypoint listens on.
pub(crate) const HBONE_PORT: u32 = 15008;

/// Namespace and name of a Gateway.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct WaypointKey {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl std::fmt::Display for WaypointKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A Gateway of class `istio-waypoint`.
#[derive(Debug, Clone)]
pub(crate) struct Waypoint {
    pub(crate) key: WaypointKey,
    pub(crate) address: Destination,
    pub(crate) for_services: bool,
    pub(crate) for_workloads: bool,
    allowed: FromNamespaces,
    /// Of namespaces; without one none is selected.
    selector: Option<LabelSelector>,
}

/// Where a waypoint is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    Hostname { namespace: String, hostname: String },
    Address(IpAddr),
}

/// What may be bound to a waypoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Traffic {
    Service,
    Workload,
}

impl Waypoint {
    /// As the workload discovery service names it.
    pub(crate) fn gateway_address(&self) -> wds::GatewayAddress {
        let destination = match &self.address {
            Destination::Hostname { namespace, hostname } => {
                wds::gateway_address::Destination::Hostname(wds::NamespacedHostname {
                    namespace: namespace.clone(),
                    hostname: hostname.clone(),
                })
            }
            Destination::Address(ip) => wds::gateway_address::Destination::Address(wds::NetworkAddress {
                network: String::new(),
                address: super::services::octets(*ip).into(),
                length: None,
            }),
        };
        wds::GatewayAddress { destination: Some(destination), hbone_mtls_port: HBONE_PORT }
    }

    fn takes(&self, traffic: Traffic) -> bool {
        match traffic {
            Traffic::Service => self.for_services,
            Traffic::Workload => self.for_workloads,
        }
    }

    fn allows(&self, namespace: &str, labels: Option<&BTreeMap<String, String>>) -> bool {
        match self.allowed {
            FromNamespaces::All => true,
            FromNamespaces::Same => namespace == self.key.namespace,
            FromNamespaces::Selector => {
                self.selector.as_ref().zip(labels).is_some_and(|(selector, labels)| super::selected(selector, labels))
            }
            FromNamespaces::None => false,
        }
    }
}

/// Every waypoint Gateway.
pub(crate) fn all(objects: &ObjectSet) -> BTreeMap<WaypointKey, Waypoint> {
    objects
        .gateways()
        .filter(|gateway| gateway.spec.gateway_class_name == names::WAYPOINT_CLASS)
        .map(|gateway| read(objects, gateway))
        .map(|waypoint| (waypoint.key.clone(), waypoint))
        .collect()
}

fn read(objects: &ObjectSet, gateway: &Gateway) -> Waypoint {
    let key = WaypointKey { namespace: gateway.namespace().to_owned(), name: gateway.name().to_owned() };
    let class = objects.gateway_class("", names::WAYPOINT_CLASS);
    let wanted =
        gateway.label(names::WAYPOINT_FOR).or_else(|| class.and_then(|class| class.label(names::WAYPOINT_FOR)));
    let (for_services, for_workloads) = match wanted {
        Some("all") => (true, true),
        Some("workload") => (false, true),
        Some("none") => (false, false),
        _ => (true, false),
    };
    let namespaces = gateway
        .spec
        .listeners
        .iter()
        .find(|listener| listener.protocol == "HBONE")
        .and_then(|listener| listener.allowed_routes.as_ref())
        .and_then(|routes| routes.namespaces.as_ref());
    let selector = namespaces.and_then(|n| n.selector.clone());
    Waypoint {
        address: address(gateway, &key),
        key,
        for_services,
        for_workloads,
        allowed: namespaces.and_then(|n| n.from).unwrap_or_default(),
        selector,
    }
}

/// From the spec, else from the status, else the Service that is named like the Gateway.
fn address(gateway: &Gateway, key: &WaypointKey) -> Destination {
    let from_status = || {
        let first = gateway.status.as_ref()?.get("addresses")?.get(0)?;
        first.get("value")?.as_str().map(str::to_owned)
    };
    let value = gateway.spec.addresses.first().map(|a| a.value.clone()).or_else(from_status);
    let value = value.unwrap_or_else(|| format!("{}.{}.svc.{DOMAIN}", key.name, key.namespace));
    match value.parse() {
        Ok(ip) => Destination::Address(ip),
        Err(_) => {
            let namespace = value.split('.').nth(1).unwrap_or(&key.namespace).to_owned();
            Destination::Hostname { namespace, hostname: value }
        }
    }
}

/// The waypoint an object uses: its own labels decide, then its namespace's.
pub(crate) fn bound(
    objects: &ObjectSet,
    waypoints: &BTreeMap<WaypointKey, Waypoint>,
    object: &(impl HasMeta + ?Sized),
    key: &ObjectKey,
    traffic: Traffic,
    faults: &mut Faults,
) -> Option<WaypointKey> {
    // Gateways are not reached through waypoints.
    if object.label(names::MANAGED).is_some() {
        return None;
    }
    let namespace = objects.namespace("", object.namespace());
    let own = object.label(names::USE_WAYPOINT).map(|name| (name, object.label(names::USE_WAYPOINT_NAMESPACE), true));
    let inherited = || {
        let namespace = namespace?;
        Some((namespace.label(names::USE_WAYPOINT)?, namespace.label(names::USE_WAYPOINT_NAMESPACE), false))
    };
    let (name, in_namespace, direct) = own.or_else(inherited)?;
    if name == "none" {
        return None;
    }
    let wanted =
        WaypointKey { namespace: in_namespace.unwrap_or(object.namespace()).to_owned(), name: name.to_owned() };
    let label = format!("metadata.labels[{}]", names::USE_WAYPOINT);
    let Some(waypoint) = waypoints.get(&wanted) else {
        let reason = format!("no Gateway {wanted} of class {}; no waypoint is in use", names::WAYPOINT_CLASS);
        faults.warning(objects, key, &label, reason);
        return None;
    };
    if !waypoint.allows(object.namespace(), namespace.and_then(|n| n.metadata.labels.as_ref())) {
        let reason = format!("Gateway {wanted} takes no traffic for namespace {}", object.namespace());
        faults.warning(objects, key, &label, reason);
        return None;
    }
    if !waypoint.takes(traffic) {
        // An inherited label is for whichever kind the waypoint serves.
        if direct {
            let reason = format!("Gateway {wanted} is not labelled to serve this kind of traffic");
            faults.warning(objects, key, &label, reason);
        }
        return None;
    }
    Some(wanted)
}
