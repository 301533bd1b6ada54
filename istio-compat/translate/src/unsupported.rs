//! Objects that have no effect, or not the one their writer may expect: each is named, none is passed over silently.
use std::collections::BTreeSet;
use std::sync::LazyLock;

use compat_objects::istio::{
    Action, ConnectionPoolSettings, LoadBalancerSettings, MetricsOverrides, OutlierDetection, PolicyTargetReference,
    TagOperation,
};
use compat_objects::{HasMeta, Kind, ObjectKey, ObjectSet};

use crate::Faults;
use crate::mesh::{Mesh, full_hostname, names};
use crate::waypoint::is_metric;

const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

/// Warns.
pub(crate) fn build(mesh: &Mesh<'_>, faults: &mut Faults) {
    kinds(mesh.objects, faults);
    policies(mesh, faults);
    telemetry(mesh, faults);
    routes(mesh.objects, faults);
    sessions(mesh.objects, faults);
    connections(mesh.objects, faults);
    traffic_policies(mesh.objects, faults);
}

/// Sessions that nobody keeps.
fn sessions(objects: &ObjectSet, faults: &mut Faults) {
    let http = objects.http_routes().flat_map(|route| {
        let key = ObjectKey::new(Kind::HTTPRoute, route.namespace(), route.name());
        route.spec.rules.iter().map(move |rule| (key.clone(), rule.session_persistence.is_some())).enumerate()
    });
    let grpc = objects.grpc_routes().flat_map(|route| {
        let key = ObjectKey::new(Kind::GRPCRoute, route.namespace(), route.name());
        route.spec.rules.iter().map(move |rule| (key.clone(), rule.session_persistence.is_some())).enumerate()
    });
    for (index, (key, _)) in http.chain(grpc).filter(|(_, (_, asked))| *asked) {
        let reason = "is not supported: requests of one session may reach different endpoints";
        faults.warning(objects, &key, &format!("spec.rules[{index}].sessionPersistence"), reason);
    }
}

/// Conditions on connections that a waypoint does not look at (nor does Istio's): only ports and, for TLS, the
/// service's own name.
fn connections(objects: &ObjectSet, faults: &mut Faults) {
    for object in objects.virtual_services() {
        let key = ObjectKey::new(Kind::VirtualService, object.namespace(), object.name());
        let mut ignored = |list: &str, rule: usize, index: usize, fields: &[(&str, bool)]| {
            for (field, _) in fields.iter().filter(|(_, set)| *set) {
                let field = format!("spec.{list}[{rule}].match[{index}].{field}");
                faults.warning(objects, &key, &field, "is not looked at by a waypoint: the rest of the match counts");
            }
        };
        for (rule, tcp) in object.spec.tcp.iter().enumerate() {
            for (index, found) in tcp.matches.iter().enumerate() {
                let fields = [
                    ("destinationSubnets", !found.destination_subnets.is_empty()),
                    ("sourceSubnet", !found.source_subnet.is_empty()),
                    ("sourceLabels", !found.source_labels.is_empty()),
                    ("sourceNamespace", !found.source_namespace.is_empty()),
                    ("gateways", !found.gateways.is_empty()),
                ];
                ignored("tcp", rule, index, &fields);
            }
        }
        for (rule, tls) in object.spec.tls.iter().enumerate() {
            for (index, found) in tls.matches.iter().enumerate() {
                let fields = [
                    ("destinationSubnets", !found.destination_subnets.is_empty()),
                    ("sourceLabels", !found.source_labels.is_empty()),
                    ("sourceNamespace", !found.source_namespace.is_empty()),
                    ("gateways", !found.gateways.is_empty()),
                ];
                ignored("tls", rule, index, &fields);
            }
        }
    }
}

/// Parts of traffic policies that are read and have no effect.
fn traffic_policies(objects: &ObjectSet, faults: &mut Faults) {
    for rule in objects.destination_rules() {
        let key = ObjectKey::new(Kind::DestinationRule, rule.namespace(), rule.name());
        let mut warn = |field: &str, reason: &str| faults.warning(objects, &key, field, reason);
        if rule.spec.workload_selector.is_some() {
            warn("spec.workloadSelector", "selects callers' sidecars: the rule has no effect at waypoints");
        }
        let whole = std::iter::once(("spec.trafficPolicy".to_owned(), rule.spec.traffic_policy.as_ref()));
        let subsets = rule.spec.subsets.iter().enumerate();
        let subsets = subsets.map(|(i, s)| (format!("spec.subsets[{i}].trafficPolicy"), s.traffic_policy.as_ref()));
        for (field, policy) in whole.chain(subsets) {
            let Some(policy) = policy else { continue };
            let (pool, lb) = (policy.connection_pool.as_ref(), policy.load_balancer.as_ref());
            without_effect(&field, pool, lb, policy.outlier_detection.as_ref(), &mut warn);
            for (index, port) in policy.port_level_settings.iter().enumerate() {
                let field = format!("{field}.portLevelSettings[{index}]");
                let (pool, lb) = (port.connection_pool.as_ref(), port.load_balancer.as_ref());
                without_effect(&field, pool, lb, port.outlier_detection.as_ref(), &mut warn);
            }
        }
    }
}

fn without_effect(
    field: &str,
    pool: Option<&ConnectionPoolSettings>,
    lb: Option<&LoadBalancerSettings>,
    outlier: Option<&OutlierDetection>,
    warn: &mut impl FnMut(&str, &str),
) {
    let http = pool.and_then(|pool| pool.http.as_ref());
    if http.is_some_and(|http| http.http2_keep_alive.is_some()) {
        warn(&format!("{field}.connectionPool.http.http2KeepAlive"), "is not built here yet and is ignored");
    }
    if http.is_some_and(|http| http.max_concurrent_streams != 0) {
        warn(&format!("{field}.connectionPool.http.maxConcurrentStreams"), "is not built here yet and is ignored");
    }
    if pool.and_then(|pool| pool.tcp.as_ref()).is_some_and(|tcp| tcp.idle_timeout.is_some()) {
        warn(&format!("{field}.connectionPool.tcp.idleTimeout"), "is not built here yet and is ignored");
    }
    if lb.is_some_and(|lb| lb.zone_aware_lb_setting.is_some()) {
        warn(&format!("{field}.loadBalancer.zoneAwareLbSetting"), "is not built here yet and is ignored");
    }
    if outlier.is_some_and(|outlier| !outlier.outlier_detection_http_error_codes.is_empty()) {
        let field = format!("{field}.outlierDetection.outlierDetectionHttpErrorCodes");
        warn(&field, "is not supported: every status of 500 and above counts");
    }
}

/// Kinds that are read and not translated yet.
fn kinds(objects: &ObjectSet, faults: &mut Faults) {
    for (key, _) in objects.iter() {
        let reason = match key.kind {
            Kind::EnvoyFilter => "cannot be honoured: the proxy is not Envoy",
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

/// What of a Telemetry no waypoint will do. The rest is told by the waypoint that does it.
fn telemetry(mesh: &Mesh<'_>, faults: &mut Faults) {
    for object in mesh.objects.telemetries() {
        let key = ObjectKey::new(Kind::Telemetry, object.namespace(), object.name());
        let spec = &object.spec;
        targets(mesh, &key, spec.target_ref.as_ref(), &spec.target_refs, faults);
        if spec.selector.is_some() {
            let reason = "selects workloads with sidecars: at waypoints the object has no effect without targetRefs";
            faults.warning(mesh.objects, &key, "spec.selector", reason);
        }
        for (index, metrics) in spec.metrics.iter().enumerate() {
            let field = |rest: &str| format!("spec.metrics[{index}].{rest}");
            for provider in &metrics.providers {
                if let Err(reason) = mesh.providers.fetches_metrics(&provider.name) {
                    faults.warning(mesh.objects, &key, &field("providers"), reason);
                }
            }
            for (index, change) in metrics.overrides.iter().enumerate() {
                overrides(mesh, &key, &field(&format!("overrides[{index}]")), change, faults);
            }
        }
        for (index, log) in spec.access_logging.iter().enumerate() {
            if let Some(Err(reason)) = log.filter.as_ref().map(|filter| readable(&filter.expression)) {
                let reason = format!("{reason}: everything is logged");
                faults.warning(mesh.objects, &key, &format!("spec.accessLogging[{index}].filter.expression"), reason);
            }
        }
    }
}

fn overrides(mesh: &Mesh<'_>, key: &ObjectKey, field: &str, change: &MetricsOverrides, faults: &mut Faults) {
    let selector = change.selector.clone().unwrap_or_default();
    if let Some(name) = selector.custom_metric.filter(|name| !is_metric(name)) {
        let reason = format!("there is no metric {name} here");
        faults.warning(mesh.objects, key, &format!("{field}.match.customMetric"), reason);
    }
    for (name, tag) in &change.tag_overrides {
        if tag.operation == TagOperation::Upsert
            && let Err(reason) = readable(&tag.value)
        {
            let field = format!("{field}.tagOverrides[{name}].value");
            faults.warning(mesh.objects, key, &field, format!("{reason}: it is shown as unknown"));
        }
    }
}

static FUNCTIONS: LazyLock<cel::Env> = LazyLock::new(cel::Env::stdlib);

/// Whether a text is CEL, as far as can be said without a request.
fn readable(text: &str) -> Result<(), String> {
    // Waypoints refuse longer ones: a parser goes as deep as a text is long.
    if text.len() > 1024 {
        return Err("is longer than 1024 bytes".to_owned());
    }
    FUNCTIONS.compile(text).map(drop).map_err(|error| error.to_string())
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
            let hostname = full_hostname(&target.name, &key.namespace);
            let service = mesh.service_by_hostname(&hostname, &key.namespace);
            if service.is_none_or(|service| service.waypoint.is_none()) {
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
    let rules = objects.tcp_routes().map(|r| (Kind::TCPRoute, r.namespace(), r.name(), r.spec.rules.len()));
    let rules =
        rules.chain(objects.tls_routes().map(|r| (Kind::TLSRoute, r.namespace(), r.name(), r.spec.rules.len())));
    for (kind, namespace, name, _) in rules.filter(|(_, _, _, count)| *count > 1) {
        let reason = "a connection has nothing to be told apart by: only the first rule is in force";
        faults.warning(objects, &ObjectKey::new(kind, namespace, name), "spec.rules[1]", reason);
    }
    let mut seen = BTreeSet::new();
    for route in objects.routes() {
        let (key, namespace) = (route.key(), route.namespace());
        for (index, parent) in route.parent_refs.iter().enumerate() {
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
