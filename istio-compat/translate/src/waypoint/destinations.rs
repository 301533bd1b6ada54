//! Destinations of routes -> names of clusters.
use compat_objects::ObjectKey;
use compat_objects::istio::Destination;

use super::{Builder, Outbound};
use crate::mesh::{Service, full_hostname};

/// The rule that leads somewhere, for faults.
#[derive(Clone, Copy)]
pub(crate) struct From<'a> {
    pub(crate) object: &'a ObjectKey,
    /// Path of the destination's field.
    pub(crate) field: &'a str,
}

/// `inbound-vip|PORT|KIND[/SUBSET]|HOST`.
pub(crate) fn inbound_vip(port: u16, kind: &str, subset: &str, hostname: &str) -> String {
    let slash = if subset.is_empty() { "" } else { "/" };
    format!("inbound-vip|{port}|{kind}{slash}{subset}|{hostname}")
}

impl Builder<'_, '_> {
    /// Whether this waypoint fronts the service.
    pub(crate) fn owns(&self, service: &Service) -> bool {
        service.waypoint.as_ref() == Some(&self.waypoint.key)
    }

    /// The cluster a destination means on a chain for `listener_port`. A destination that does not exist gets the
    /// name it would have: the data plane answers with an error there, and the fault says why.
    pub(crate) fn cluster_for(
        &self,
        destination: &Destination,
        kind: &str,
        listener_port: u16,
        from: From<'_>,
    ) -> String {
        let hostname = full_hostname(&destination.host, &from.object.namespace);
        let Some(service) = self.mesh.service_by_hostname(&hostname, &from.object.namespace) else {
            let reason = format!("no Service or ServiceEntry has the host {hostname}; requests for it fail");
            self.error(from.object, &format!("{}.host", from.field), reason);
            return inbound_vip(
                destination.port.map_or(listener_port, |p| p.number),
                kind,
                &destination.subset,
                &hostname,
            );
        };
        let port = self.destination_port(service, destination.port.map(|p| p.number), listener_port);
        let Some(declared) = service.port(port) else {
            let ports: Vec<String> = service.ports.iter().map(|p| p.number.to_string()).collect();
            let reason = format!("{hostname} has no port {port}, only {}; requests for it fail", ports.join(", "));
            self.error(from.object, &format!("{}.port", from.field), reason);
            return inbound_vip(port, kind, &destination.subset, &hostname);
        };
        if !destination.subset.is_empty() && self.subset(service, &destination.subset).is_none() {
            let reason = format!(
                "no DestinationRule for {hostname} defines subset {:?}; requests for it fail",
                destination.subset
            );
            self.error(from.object, &format!("{}.subset", from.field), reason);
        }
        if self.owns(service) {
            let kind = match (declared.protocol.is_http(), declared.protocol.is_unknown()) {
                (true, _) => "http",
                (_, true) => kind,
                _ => "tcp",
            };
            return inbound_vip(port, kind, &destination.subset, &hostname);
        }
        self.outbound_cluster(service, port, &destination.subset)
    }

    /// The cluster of a service this waypoint does not front; it will be among the clusters.
    pub(crate) fn outbound_cluster(&self, service: &Service, port: u16, subset: &str) -> String {
        let outbound = Outbound { service: service.key(), port, subset: subset.to_owned() };
        self.outbound.borrow_mut().insert(outbound);
        format!("outbound|{port}|{subset}|{}", service.hostname)
    }

    /// As asked for, else the only one, else the one the request came to.
    fn destination_port(&self, service: &Service, asked: Option<u16>, listener_port: u16) -> u16 {
        let mut ports = service.tcp_ports();
        match (asked, ports.next(), ports.next()) {
            (Some(port), _, _) => port,
            (None, Some(only), None) => only.number,
            _ => listener_port,
        }
    }

    pub(crate) fn error(&self, object: &ObjectKey, field: &str, reason: impl Into<String>) {
        self.faults.borrow_mut().error(self.mesh.objects, object, field, reason);
    }

    pub(crate) fn warning(&self, object: &ObjectKey, field: &str, reason: impl Into<String>) {
        self.faults.borrow_mut().warning(self.mesh.objects, object, field, reason);
    }
}
