//! What became of Gateways, routes and policies, in the conditions their specifications name; and the addresses of ServiceEntries.
use std::collections::BTreeMap;

use compat_kubernetes::{KeptId, Said, Status, Troubles};
use compat_objects::core::Pod;
use compat_objects::gateway::{AnyRoute, Gateway, ParentReference};
use compat_objects::{Fault, HasMeta, Kind, ObjectKey, ObjectSet, Severity, is_ready};
use compat_translate::MeshOutput;
use serde_json::{Map, Value, json};

use super::parameters;
use super::waypoint::{self, GATEWAY_NAME};

/// Istio's name for who serves routes of the mesh; an istiod that comes later goes on with our entries.
const ROUTE_CONTROLLER: &str = "istio.io/gateway-controller";

/// All statuses. `unusable` says which waypoints' parameters cannot be used, and why.
pub(super) fn all(
    objects: &ObjectSet,
    output: &MeshOutput,
    troubles: &Troubles,
    unusable: &BTreeMap<ObjectKey, String>,
) -> BTreeMap<ObjectKey, Status> {
    let mut found = BTreeMap::new();
    let view = View { objects, faults: faults(output), troubles, unusable };
    for gateway in objects.gateways().filter(|gateway| waypoint::is_served(gateway)) {
        let key = ObjectKey::new(Kind::Gateway, gateway.namespace(), gateway.name());
        let said = view.gateway(gateway, &key);
        found.insert(key, Status::of(gateway, said));
    }
    found.extend(objects.routes().filter_map(|route| view.route(route)));
    for status in &output.statuses {
        let policy = objects.authorization_policy(&status.key.namespace, &status.key.name);
        // The set in force may be older than what was written; then what is said is of that.
        let Some(policy) = policy.filter(|_| status.key.kind == Kind::AuthorizationPolicy) else { continue };
        let conditions =
            status.conditions.iter().filter_map(|condition| serde_json::to_value(condition).ok()).collect();
        let said = Said::Conditions { conditions, members: Map::new() };
        found.insert(status.key.clone(), Status::of(policy, said));
    }
    for (key, addresses) in output.drawn_addresses.iter().filter(|(_, addresses)| !addresses.is_empty()) {
        let Some(entry) = objects.service_entry(&key.namespace, &key.name) else { continue };
        // Kept here, so that a host's address is the same for as long as the object is there.
        let addresses: Value = addresses.iter().map(|(host, value)| json!({"host": host, "value": value})).collect();
        let members = Map::from_iter([("addresses".to_owned(), addresses)]);
        found.insert(key.clone(), Status::of(entry, Said::Conditions { conditions: Vec::new(), members }));
    }
    found
}

/// What is to be said of each object, as its users wrote it.
fn faults(output: &MeshOutput) -> BTreeMap<&ObjectKey, Vec<&Fault>> {
    let mut faults: BTreeMap<&ObjectKey, Vec<&Fault>> = BTreeMap::new();
    for found in &output.faults {
        faults.entry(&found.key).or_default().push(&found.fault);
    }
    faults
}

struct View<'a> {
    objects: &'a ObjectSet,
    faults: BTreeMap<&'a ObjectKey, Vec<&'a Fault>>,
    troubles: &'a Troubles,
    unusable: &'a BTreeMap<ObjectKey, String>,
}

impl View<'_> {
    fn errors(&self, key: &ObjectKey) -> Vec<&Fault> {
        let faults = self.faults.get(key).into_iter().flatten();
        faults.copied().filter(|fault| fault.severity == Severity::Error).collect()
    }

    fn gateway(&self, gateway: &Gateway, key: &ObjectKey) -> Said {
        let accepted = match (self.errors(key).as_slice(), self.unusable.get(key)) {
            ([], None) => condition("Accepted", true, "Accepted", "Resource accepted"),
            ([], Some(reason)) => condition("Accepted", false, "InvalidParameters", reason),
            (errors, _) => condition("Accepted", false, "Invalid", &sentence(errors)),
        };
        let host = format!("{}.{}.svc.cluster.local", gateway.name(), gateway.namespace());
        let programmed = match self.missing(gateway) {
            Some((reason, message)) => condition("Programmed", false, reason, &message),
            None => {
                let message = format!("Resource programmed, assigned to service(s) {host}:15008");
                condition("Programmed", true, "Programmed", &message)
            }
        };
        let attached = self.attached(gateway);
        let listeners: Vec<Value> = gateway
            .spec
            .listeners
            .iter()
            .map(|listener| {
                let conditions = [
                    condition("Accepted", true, "Accepted", "No errors found"),
                    condition("Conflicted", false, "NoConflicts", "No errors found"),
                    programmed.clone(),
                    condition("ResolvedRefs", true, "ResolvedRefs", "No errors found"),
                ];
                json!({
                    "name": listener.name, "attachedRoutes": attached,
                    "supportedKinds": [], "conditions": conditions,
                })
            })
            .collect();
        let address = self.service_address(gateway);
        let address = address.map_or_else(|| ("Hostname", host), |address| ("IPAddress", address));
        let members = Map::from_iter([
            ("addresses".to_owned(), json!([{"type": address.0, "value": address.1}])),
            ("listeners".to_owned(), Value::Array(listeners)),
        ]);
        Said::Conditions { conditions: vec![accepted, programmed], members }
    }

    /// Why a waypoint does not serve: reason and sentence.
    fn missing(&self, gateway: &Gateway) -> Option<(&'static str, String)> {
        if !waypoint::is_ours_to_deploy(gateway) {
            return None;
        }
        let (namespace, name) = (gateway.namespace(), gateway.name());
        let kept = |kind| KeptId { kind, namespace: namespace.to_owned(), name: name.to_owned() };
        for id in parameters::kinds().map(kept) {
            if let Some(trouble) = self.troubles.get(&id) {
                return Some(("Invalid", format!("{id}: {trouble}")));
            }
        }
        let serves = |pod: &&Pod| {
            let ready = pod.status.as_ref().is_some_and(is_ready) && pod.metadata.deletion_timestamp.is_none();
            ready && pod.label(GATEWAY_NAME) == Some(name)
        };
        if self.objects.pods_in(namespace).any(|pod| serves(&&**pod)) {
            return None;
        }
        Some(("Pending", format!("no pod of Deployment {namespace}/{name} is ready")))
    }

    fn service_address(&self, gateway: &Gateway) -> Option<String> {
        let service = self.objects.service(gateway.namespace(), gateway.name())?;
        let address = service.spec.as_ref()?.cluster_ip.clone()?;
        Some(address).filter(|address| address.parse::<std::net::IpAddr>().is_ok())
    }

    /// How many routes name the Gateway.
    fn attached(&self, gateway: &Gateway) -> usize {
        let names = |route: &AnyRoute<'_>| {
            let mut meant = route.parent_refs.iter().filter_map(|parent| self.waypoint_of(route.namespace(), parent));
            meant.any(|found| std::ptr::eq(found, gateway))
        };
        self.objects.routes().filter(names).count()
    }

    /// The waypoint a parent reference means.
    fn waypoint_of(&self, namespace: &str, parent: &ParentReference) -> Option<&Gateway> {
        let group = parent.group.as_deref().unwrap_or("gateway.networking.k8s.io");
        if (group, parent.kind.as_deref().unwrap_or("Gateway")) != ("gateway.networking.k8s.io", "Gateway") {
            return None;
        }
        let gateway = self.objects.gateway(parent.namespace.as_deref().unwrap_or(namespace), &parent.name)?;
        Some(&**gateway).filter(|gateway| waypoint::is_served(gateway))
    }

    /// None: no parent of the route is ours to speak of.
    fn route(&self, route: AnyRoute<'_>) -> Option<(ObjectKey, Status)> {
        let key = route.key();
        let (unresolved, refused): (Vec<&Fault>, Vec<&Fault>) =
            self.errors(&key).into_iter().partition(|fault| fault.field.contains("backendRefs"));
        let mut said = Vec::new();
        for (index, parent) in route.parent_refs.iter().enumerate() {
            let of_service = matches!(parent.kind.as_deref(), Some("Service" | "ServiceEntry"));
            if !of_service && self.waypoint_of(route.namespace(), parent).is_none() {
                continue;
            }
            // A parent that is not there, or takes no such route.
            let field = format!("spec.parentRefs[{index}]");
            let lost = self.faults.get(&key).into_iter().flatten().find(|fault| fault.field == field);
            let accepted = if let Some(fault) = lost {
                condition("Accepted", false, "NoMatchingParent", &fault.reason)
            } else if refused.is_empty() {
                condition("Accepted", true, "Accepted", "Route was valid")
            } else {
                condition("Accepted", false, "UnsupportedValue", &sentence(&refused))
            };
            let resolved = match unresolved.as_slice() {
                [] => condition("ResolvedRefs", true, "ResolvedRefs", "All references resolved"),
                faults => condition("ResolvedRefs", false, "BackendNotFound", &sentence(faults)),
            };
            said.push((reference(parent), vec![accepted, resolved]));
        }
        // What was said of a parent that is named no more must go.
        let stale = route.status.is_some_and(|status| {
            status["parents"].as_array().into_iter().flatten().any(|entry| entry["controllerName"] == ROUTE_CONTROLLER)
        });
        if said.is_empty() && !stale {
            return None;
        }
        let said = Said::Parents { controller: ROUTE_CONTROLLER, parents: said };
        let (meta, api_version) = (route.metadata.clone(), route.api_version.to_owned());
        Some((key, Status { said, meta, api_version, present: route.status.cloned() }))
    }
}

fn condition(kind: &str, holds: bool, reason: &str, message: &str) -> Value {
    json!({"type": kind, "status": if holds { "True" } else { "False" }, "reason": reason, "message": message})
}

/// As the route's author wrote it, with the API server's defaults.
fn reference(parent: &ParentReference) -> Value {
    let mut written = Map::new();
    let group = parent.group.as_deref().unwrap_or("gateway.networking.k8s.io");
    written.insert("group".to_owned(), group.into());
    written.insert("kind".to_owned(), parent.kind.as_deref().unwrap_or("Gateway").into());
    written.insert("name".to_owned(), parent.name.as_str().into());
    let optional = [("namespace", &parent.namespace), ("sectionName", &parent.section_name)];
    for (name, value) in optional.into_iter().filter_map(|(name, value)| Some((name, value.as_ref()?))) {
        written.insert(name.to_owned(), value.as_str().into());
    }
    if let Some(port) = parent.port {
        written.insert("port".to_owned(), port.into());
    }
    Value::Object(written)
}

/// All faults in one text; a condition's message has at most 32768 characters.
fn sentence(faults: &[&Fault]) -> String {
    let told = |fault: &&Fault| match fault.field.as_str() {
        "" => fault.reason.clone(),
        field => format!("{field}: {}", fault.reason),
    };
    let text = faults.iter().map(told).collect::<Vec<_>>().join("; ");
    text.chars().take(4096).collect()
}

#[cfg(test)]
mod tests;
