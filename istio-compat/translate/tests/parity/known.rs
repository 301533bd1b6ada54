//! Where our output differs from istiod's on purpose.

/// Case (`*`: all), a part of the difference's line, reason.
pub(crate) const DIFFERENCES: &[(&str, &str, &str)] = &[
    (
        "*",
        "outbound|8000||authz.outside.svc.cluster.local: only istiod's",
        "istiod sends clusters of every extension provider, we those that are used",
    ),
    (
        "*",
        "outbound|9000||authz.outside.svc.cluster.local: only istiod's",
        "istiod sends clusters of every extension provider, we those that are used",
    ),
    (
        "*",
        "filter_metadata.istio.workload: ours",
        "telemetry: istiod numbers the endpoints of ServiceEntries, whose revision is empty",
    ),
    ("13", "transport_socket_match: ours null, istiod's {\"tlsMode\"", "no tlsMode-istio, as below"),
    ("*", "typed_dns_resolver_config: ours null", "a bound on Envoy's own resolver"),
    (
        "*",
        "dns_lookup_family",
        "the recorded waypoint announced an IPv4 address only, ours asks for both and prefers that",
    ),
    (
        "17",
        "filter_metadata.istio.config: ours null",
        "istiod names the DestinationRule it made of the BackendTLSPolicy",
    ),
    (
        "14",
        "outbound|9901||payments.bank",
        "istiod sends every port of a service some route leads to, we the ones used",
    ),
    ("18", "connect_originate", "tunnels are logged by the node proxies, the waypoint's requests by its chains"),
    ("18", "connect_terminate", "tunnels are logged by the node proxies, the waypoint's requests by its chains"),
    ("18", "main_internal.access_log", "the engine logs no connection that no chain takes; it counts them"),
    (
        "18",
        "inbound-vip|80|http|reviews.shop.svc.cluster.local].filters[0 envoy.filters.network.http_connection_manager].typed_config.access_log",
        "istiod leaves a Service's own Telemetry out of its logs, we do as it says",
    ),
    ("18", ".transport_socket_matches[", "no tlsMode-istio: there are no sidecars to speak it with"),
    ("18", "authz.outside.svc.cluster.local.filters:", "metadata exchange is telemetry of sidecars"),
    ("10", ".transport_socket_matches[", "no tlsMode-istio: there are no sidecars to speak it with"),
    ("10", "authz.outside.svc.cluster.local.filters:", "metadata exchange is telemetry of sidecars"),
    ("14", ".transport_socket_matches[", "no tlsMode-istio: there are no sidecars to speak it with"),
    ("14", "payments.bank.svc.cluster.local.filters:", "metadata exchange is telemetry of sidecars"),
    (
        "14",
        "filter_metadata.istio.config: ours",
        "our path names the HTTPRoute, istiod's the VirtualService it made of it",
    ),
    (
        "15",
        "filter_metadata.istio.config: ours",
        "our path names the GRPCRoute, istiod's the VirtualService it made of it",
    ),
    ("22", "local_jwks.inline_string: ours", "without keys istiod sends a key nobody has, so do we, another one"),
    (
        "24",
        "match.dynamic_metadata[1].value",
        "istiod's matcher for an absent claim is one that Envoy refuses; ours means it",
    ),
];

/// Address ranges of the dispatcher left out of the comparison: beginning, reason.
pub(crate) const RANGES: &[(&str, &str)] = &[
    ("2001:2:", "as below, of addresses drawn for ServiceEntries"),
    ("fd00:96:", "the recorded waypoint announced an IPv4 address only, we serve both families of a service"),
    ("0.0.0.0", "istiod's stand-in for the address of a headless service, which nothing can be sent to"),
];

pub(crate) fn is_known(case: &str, difference: &str) -> bool {
    DIFFERENCES.iter().any(|(of, part, _)| (*of == "*" || *of == case) && difference.contains(part))
}
