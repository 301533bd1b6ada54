//! What a probe cannot find out by itself.
use crate::fields::Field;

pub(crate) const HEAD: &str = "\
# Which fields of Istio and the Gateway API are in force
Made by a test that tries every field of the CRDs against the embedded control plane and looks at what proxies are sent and what is said
(`UPDATE_DOCS=1 cargo test --workspace --test compatibility`; the fields are listed by `integration/scripts/crd-fields.py`). Not written by hand.

- **honoured**: what proxies are sent changes with the field. (That the engine serves what it is sent is other tests' business.)
- **approximated**: in force, not quite as with Envoy.
- **refused**: an error names the field; what would be wrong without it is closed or left out, never opened.
- **ignored, with a warning**: the object is in force without the field, and says so.
- **no effect**: there is nothing here that the field could mean.

Each field is tried with one value, at a waypoint; a policy with a `selector` is tried at the node, where conditions on requests (`paths`, `methods`,
`hosts`) cannot be checked: DENY rules lose them, ALLOW rules with them are left out, as with ztunnel.

Under **istiod** the same YAML is read by istiod itself, and Strata's proxies serve what it makes of it: there every field that istiod honours for
waypoints arrives, and what the engine does not serve is named at the waypoint (`strata status`, its log, and for the recorded cases
`l7-waypoint/route/tests/snapshots`). The embedded control plane's output is compared with istiod's, resource by resource, for the recorded cases.

**Not tried field by field**, said by hand: Sidecar and EnvoyFilter are read and named as not translated by the embedded control plane,
WasmPlugin closes what it applies to, BackendTLSPolicy is in force, other kinds are unknown to it. Of MeshConfig `extensionProviders` that authorize, log to a file or take spans by
OTLP, `defaultProviders`, and `accessLogFile` with its format and encoding are read, other keys are named. The lower layer honours NetworkPolicy whole, and of Services ClusterIP, ports, EndpointSlices,
`externalIPs`, LoadBalancer addresses, `internalTrafficPolicy`, session affinity and traffic distribution, node ports,
`externalTrafficPolicy` with `healthCheckNodePort`, and `loadBalancerSourceRanges`.

Repeated below other fields and not listed twice: `spec.subsets[].trafficPolicy` and `spec.trafficPolicy.portLevelSettings[]` of DestinationRule,
`spec.rules[].backendRefs[].filters[]` of routes (there only header modifiers are honoured, others are refused).
";

/// Kind (or `*`), beginning of the path, why it means nothing here.
const WITHOUT: [(&str, &str, &str); 23] = [
    ("Telemetry", "spec.metrics[].reportingInterval", "metrics are those of the moment they are fetched"),
    ("ServiceEntry", "spec.location", "who is in the mesh is known of each workload, as in ambient mode"),
    ("ReferenceGrant", "spec.", "routes of Services need none, as with istiod: they are their own namespace's word"),
    ("Gateway", "spec.listeners[].tls.", "a waypoint has one listener, for HBONE"),
    ("Gateway", "spec.listeners[].hostname", "a waypoint has one listener, for HBONE"),
    ("Gateway", "spec.listeners[].name", "a waypoint has one listener, for HBONE"),
    ("Gateway", "spec.listeners[].port", "a waypoint has one listener, for HBONE"),
    ("Gateway", "spec.listeners[].protocol", "a waypoint has one listener, for HBONE"),
    ("Gateway", "spec.listeners[].allowedRoutes.kinds", "a waypoint takes routes of every kind"),
    ("Gateway", "spec.tls.", "a waypoint has one listener, for HBONE"),
    ("Gateway", "spec.allowedListeners.", "a waypoint has one listener, for HBONE"),
    ("Gateway", "spec.defaultScope", "routes hang on Services"),
    ("Gateway", "spec.infrastructure.", "for whoever makes the waypoint's Deployment (istiod)"),
    (
        "Gateway",
        "spec.addresses[]",
        "for whoever makes the waypoint's Deployment (istiod): with an address it is your own",
    ),
    ("*", "spec.useDefaultGateways", "routes hang on Services"),
    ("*", "spec.parentRefs[].sectionName", "a Service's ports are told apart by `port`"),
    ("HTTPRoute", "spec.hostnames[]", "routes of a Service take all hosts (Gateway API, GAMMA)"),
    ("GRPCRoute", "spec.hostnames[]", "routes of a Service take all hosts (Gateway API, GAMMA)"),
    ("TCPRoute", "spec.rules[].name", "a name for people"),
    ("TLSRoute", "spec.rules[].name", "a name for people"),
    ("VirtualService", "spec.http[].match[].name", "a name for people"),
    (
        "RequestAuthentication",
        "spec.selector.",
        "reaches sidecars; waypoints take targetRefs, and a policy without says that it has no effect",
    ),
    (
        "RequestAuthentication",
        "spec.jwtRules[].timeout",
        "the control plane fetches keys ahead, with a deadline of its own",
    ),
];

/// Fields that mean nothing here, and why.
pub(crate) fn without(field: &Field) -> Option<&'static str> {
    let fits = |kind: &str, prefix: &str| (kind == "*" || kind == field.kind) && field.under(prefix);
    WITHOUT.iter().find(|(kind, prefix, _)| fits(kind, prefix)).map(|(_, _, reason)| *reason)
}

/// Kind, path, how it differs.
const APPROXIMATED: [(&str, &str, &str); 3] = [
    (
        "DestinationRule",
        "spec.trafficPolicy.loadBalancer.consistentHash.minimumRingSize",
        "the ring is built like Envoy's, its points differ",
    ),
    (
        "DestinationRule",
        "spec.trafficPolicy.loadBalancer.consistentHash.ringHash.minimumRingSize",
        "the ring is built like Envoy's, its points differ",
    ),
    (
        "DestinationRule",
        "spec.trafficPolicy.outlierDetection.minHealthPercent",
        "is compared over all endpoints, not by priority",
    ),
];

/// Fields that are in force, not quite as elsewhere.
pub(crate) fn approximated(field: &Field) -> Option<&'static str> {
    let found = APPROXIMATED.iter().find(|(kind, path, _)| *kind == field.kind && *path == field.path);
    found.map(|(_, _, note)| *note)
}
