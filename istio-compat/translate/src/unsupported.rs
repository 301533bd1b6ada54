//! Objects that have no effect, or not the one their writer may expect: each is named, none is passed over silently.
use std::collections::BTreeSet;

use compat_objects::istio::{Action, PolicyTargetReference};
use compat_objects::{HasMeta, Kind, ObjectKey, ObjectSet};

use crate::Faults;
use crate::mesh::{Mesh, names};

const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

/// Warns.
pub(crate) fn build(mesh: &Mesh<'_>, faults: &mut Faults) {
    kinds(mesh.objects, faults);
    policies(mesh, faults);
    routes(mesh.objects, faults);
}

/// Kinds that are read and not translated yet.
fn kinds(objects: &ObjectSet, faults: &mut Faults) {
    for (key, _) in objects.iter() {
        let reason = match key.kind {
            Kind::ServiceEntry => "is not translated yet: its hosts are unknown to the mesh",
            Kind::WorkloadEntry => "is not translated yet: the workload is unknown to the mesh",
            Kind::EnvoyFilter => "cannot be honoured: the proxy is not Envoy",
            Kind::Telemetry => "is not translated yet: metrics and access logs are the default ones",
            Kind::Sidecar => "has no effect: there are no sidecars",
            _ => continue,
        };
        faults.warning(objects, key, "", reason);
    }
}

/// Policies that attach to nothing, or to what cannot check them.
fn policies(mesh: &Mesh<'_>, faults: &mut Faults) {
    let objects = mesh.objects;
    for policy in objects.authorization_policies() {
        let key = ObjectKey::new(Kind::AuthorizationPolicy, policy.namespace(), policy.name());
        let spec = &policy.spec;
        targets(mesh, &key, spec.target_ref.as_ref(), &spec.target_refs, faults);
        let attached = spec.target_ref.is_some() || !spec.target_refs.is_empty();
        if !attached && matches!(spec.action, Action::Custom | Action::Audit) {
            let reason = "only waypoints do this: attach the policy by targetRefs, without it has no effect";
            faults.warning(objects, &key, "spec.action", reason);
        }
    }
    for policy in objects.request_authentications() {
        let key = ObjectKey::new(Kind::RequestAuthentication, policy.namespace(), policy.name());
        let spec = &policy.spec;
        targets(mesh, &key, spec.target_ref.as_ref(), &spec.target_refs, faults);
        if spec.target_ref.is_none() && spec.target_refs.is_empty() {
            let reason = "only waypoints look at tokens: attach it by targetRefs, without it has no effect";
            faults.warning(objects, &key, "spec.targetRefs", reason);
        }
    }
}

fn targets(
    mesh: &Mesh<'_>,
    key: &ObjectKey,
    single: Option<&PolicyTargetReference>,
    several: &[PolicyTargetReference],
    faults: &mut Faults,
) {
    for (index, target) in single.into_iter().chain(several).enumerate() {
        let exists = match (target.group.as_str(), target.kind.as_str()) {
            ("" | "core", "Service") => mesh.objects.service(&key.namespace, &target.name).is_some(),
            ("networking.istio.io", "ServiceEntry") => {
                mesh.objects.service_entry(&key.namespace, &target.name).is_some()
            }
            (GATEWAY_GROUP, "Gateway") => mesh.objects.gateway(&key.namespace, &target.name).is_some(),
            (GATEWAY_GROUP, "GatewayClass") => target.name == names::WAYPOINT_CLASS,
            _ => false,
        };
        if !exists {
            let field = format!("spec.targetRefs[{index}]");
            let reason = format!(
                "no {} {}/{}: the policy is attached to nothing there",
                target.kind, key.namespace, target.name
            );
            faults.warning(mesh.objects, key, &field, reason);
        } else if target.kind == "Service" {
            let bound = mesh.services.values().find(|service| {
                service.namespace == key.namespace && service.name == target.name && service.waypoint.is_some()
            });
            if bound.is_none() {
                let field = format!("spec.targetRefs[{index}]");
                let reason =
                    format!("Service {}/{} uses no waypoint, so nothing enforces this", key.namespace, target.name);
                faults.warning(mesh.objects, key, &field, reason);
            }
        }
    }
}

/// Routes that hang on something else than a Service.
fn routes(objects: &ObjectSet, faults: &mut Faults) {
    let http = objects.http_routes().map(|r| (Kind::HTTPRoute, r.namespace(), r.name(), &r.spec.parent_refs));
    let grpc = objects.grpc_routes().map(|r| (Kind::GRPCRoute, r.namespace(), r.name(), &r.spec.parent_refs));
    let tcp = objects.tcp_routes().map(|r| (Kind::TCPRoute, r.namespace(), r.name(), &r.spec.parent_refs));
    let tls = objects.tls_routes().map(|r| (Kind::TLSRoute, r.namespace(), r.name(), &r.spec.parent_refs));
    let mut seen = BTreeSet::new();
    for (kind, namespace, name, parents) in http.chain(grpc).chain(tcp).chain(tls) {
        let key = ObjectKey::new(kind, namespace, name);
        for (index, parent) in parents.iter().enumerate() {
            let own = parent.namespace.as_deref().is_none_or(|other| other == namespace);
            let field = format!("spec.parentRefs[{index}]");
            let reason = match (parent.kind.as_deref(), own) {
                (Some("Service"), true) if objects.service(namespace, &parent.name).is_some() => continue,
                (Some("Service"), true) => format!("no Service {namespace}/{}", parent.name),
                (Some("Service"), false) => {
                    "routes of callers (another namespace's Service) are not supported".to_owned()
                }
                (kind, _) => format!("waypoints take routes of Services, not of a {}", kind.unwrap_or("Gateway")),
            };
            if seen.insert((key.clone(), field.clone())) {
                faults.warning(objects, &key, &field, format!("{reason}: the route has no effect there"));
            }
        }
    }
}
