//! VirtualService, after Istio's admission.
use std::time::Duration;

use super::Check;
use crate::istio::{
    Destination, Headers, HttpFaultInjection, HttpMatchRequest, HttpRetry, HttpRoute, RouteDestination,
    VirtualServiceSpec,
};
use crate::path::FieldPath;

/// gRPC status names (google.rpc.Code).
const GRPC_CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// What Envoy knows for `retry_on` and `retry_grpc_on`; statuses may stand among them.
const RETRY_ON: [&str; 20] = [
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "envoy-ratelimited",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
    "none",
    "off",
    "unknown",
    "overloaded",
];

pub(super) fn virtual_service(c: &mut Check, spec: &VirtualServiceSpec) {
    let path = FieldPath::spec();
    if spec.http.is_empty() && spec.tls.is_empty() && spec.tcp.is_empty() {
        c.error(&path, "no rule: one of http, tls and tcp is needed");
    }
    for (i, host) in spec.hosts.iter().enumerate() {
        c.host(&path.to("hosts").to(i), host, true);
        if spec.hosts[..i].contains(host) {
            c.error(&path.to("hosts").to(i), format!("{host:?} occurs twice"));
        }
    }
    for (i, route) in spec.http.iter().enumerate() {
        http_route(c, &path.to("http").to(i), route, spec.hosts.is_empty());
    }
    for (i, route) in spec.tls.iter().enumerate() {
        let path = path.to("tls").to(i);
        if route.matches.is_empty() {
            c.error(&path.to("match"), "missing: a TLS rule needs sniHosts");
        }
        for (j, wanted) in route.matches.iter().enumerate() {
            let path = path.to("match").to(j);
            if wanted.sni_hosts.is_empty() {
                c.error(&path.to("sniHosts"), "missing: at least one name is needed");
            }
            wanted.sni_hosts.iter().enumerate().for_each(|(k, host)| c.host(&path.to("sniHosts").to(k), host, true));
            subnets(c, &path, &wanted.destination_subnets);
            c.port(&path.to("port"), wanted.port);
        }
        destinations(c, &path.to("route"), &route.route);
    }
    for (i, route) in spec.tcp.iter().enumerate() {
        let path = path.to("tcp").to(i);
        for (j, wanted) in route.matches.iter().enumerate() {
            let path = path.to("match").to(j);
            subnets(c, &path, &wanted.destination_subnets);
            if !wanted.source_subnet.is_empty() {
                c.block(&path.to("sourceSubnet"), &wanted.source_subnet);
            }
            c.port(&path.to("port"), wanted.port);
        }
        destinations(c, &path.to("route"), &route.route);
    }
}

fn subnets(c: &mut Check, path: &FieldPath, subnets: &[String]) {
    subnets.iter().enumerate().for_each(|(i, subnet)| c.block(&path.to("destinationSubnets").to(i), subnet));
}

fn destinations(c: &mut Check, path: &FieldPath, routes: &[RouteDestination]) {
    if routes.is_empty() {
        c.error(path, "missing: at least one destination is needed");
    }
    routes.iter().enumerate().for_each(|(i, route)| destination(c, &path.to(i).to("destination"), &route.destination));
    c.weights(path, &routes.iter().map(|route| route.weight).collect::<Vec<_>>());
}

fn destination(c: &mut Check, path: &FieldPath, destination: &Destination) {
    c.host(&path.to("host"), &destination.host, false);
    c.port(&path.to("port").to("number"), destination.port.map(|port| port.number));
}

fn http_route(c: &mut Check, path: &FieldPath, route: &HttpRoute, delegated: bool) {
    let ways = [
        ("route", !route.route.is_empty()),
        ("redirect", route.redirect.is_some()),
        ("directResponse", route.direct_response.is_some()),
        ("delegate", route.delegate.is_some()),
    ];
    c.at_most_one(path, &ways);
    if ways.iter().all(|(_, set)| !set) {
        c.error(path, "does nothing: one of route, redirect, directResponse and delegate is needed");
    }
    if delegated && route.delegate.is_some() {
        c.error(&path.to("delegate"), "a delegate (it has no hosts) cannot delegate again");
    }
    if route.rewrite.is_some() && route.redirect.is_some() {
        c.error(&path.to("rewrite"), "a redirect is answered at once: nothing is left to rewrite");
    }
    route.matches.iter().enumerate().for_each(|(i, wanted)| http_match(c, &path.to("match").to(i), wanted));
    for (i, way) in route.route.iter().enumerate() {
        destination(c, &path.to("route").to(i).to("destination"), &way.destination);
        headers(c, &path.to("route").to(i).to("headers"), way.headers.as_ref());
    }
    c.weights(&path.to("route"), &route.route.iter().map(|way| way.weight).collect::<Vec<_>>());
    headers(c, &path.to("headers"), route.headers.as_ref());
    answers(c, path, route);
    if route.timeout.is_some_and(|timeout| !timeout.is_zero() && *timeout < Duration::from_millis(1)) {
        c.error(&path.to("timeout"), "below 1ms");
    }
    if let Some(wanted) = &route.retries {
        retries(c, &path.to("retries"), wanted);
    }
    if let Some(injected) = &route.fault {
        fault(c, &path.to("fault"), injected);
    }
    mirrors(c, path, route);
    cors(c, path, route);
}

/// Redirects, fixed answers and rewrites.
fn answers(c: &mut Check, path: &FieldPath, route: &HttpRoute) {
    if let Some(redirect) = &route.redirect {
        let path = path.to("redirect");
        if ![0, 301, 302, 303, 307, 308].contains(&redirect.redirect_code) {
            c.error(&path.to("redirectCode"), format!("{} is none of 301, 302, 303, 307, 308", redirect.redirect_code));
        }
        c.at_most_one(&path, &[("port", redirect.port.is_some()), ("derivePort", redirect.derive_port.is_some())]);
        c.at_most_one(
            &path,
            &[("uri", !redirect.uri.is_empty()), ("prefixRewrite", !redirect.prefix_rewrite.is_empty())],
        );
        c.port(&path.to("port"), redirect.port);
        if !["", "http", "https"].contains(&redirect.scheme.as_str()) {
            c.error(&path.to("scheme"), format!("{:?} is neither http nor https", redirect.scheme));
        }
    }
    if let Some(direct) = &route.direct_response {
        let path = path.to("directResponse");
        if !(200..=599).contains(&direct.status) {
            c.error(&path.to("status"), format!("{} is no status between 200 and 599", direct.status));
        }
        if let Some(body) = &direct.body {
            c.at_most_one(&path.to("body"), &[("string", body.string.is_some()), ("bytes", body.bytes.is_some())]);
        }
    }
    if let Some(rewrite) = &route.rewrite {
        let path = path.to("rewrite");
        let regex = rewrite.uri_regex_rewrite.as_ref();
        c.at_most_one(&path, &[("uri", !rewrite.uri.is_empty()), ("uriRegexRewrite", regex.is_some())]);
        if let Some(regex) = regex {
            c.require(&path.to("uriRegexRewrite").to("match"), &regex.pattern);
            c.pattern(&path.to("uriRegexRewrite").to("match"), &regex.pattern);
        } else if rewrite.uri.is_empty() && rewrite.authority.is_empty() {
            c.error(&path, "rewrites nothing: uri, uriRegexRewrite or authority is needed");
        }
    }
}

fn http_match(c: &mut Check, path: &FieldPath, wanted: &HttpMatchRequest) {
    let named = [
        ("uri", &wanted.uri),
        ("scheme", &wanted.scheme),
        ("method", &wanted.method),
        ("authority", &wanted.authority),
    ];
    for (name, condition) in named {
        if let Some(condition) = condition {
            if condition.exact.is_none() && condition.prefix.is_none() && condition.regex.is_none() {
                c.error(&path.to(name), "one of exact, prefix and regex is needed");
            }
            c.string_match(&path.to(name), condition);
        }
    }
    let maps = [
        ("headers", &wanted.headers),
        ("withoutHeaders", &wanted.without_headers),
        ("queryParams", &wanted.query_params),
    ];
    for (name, conditions) in maps {
        for (key, condition) in conditions {
            let path = path.to(name).to(key);
            if name != "queryParams" {
                header_name(c, &path, key, true);
            }
            c.string_match(&path, condition);
        }
    }
    c.port(&path.to("port"), wanted.port);
}

/// `:authority` and Istio's `@request.auth.claims...` count as names where `special`.
fn header_name(c: &mut Check, path: &FieldPath, name: &str, special: bool) {
    let fine = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    let plain = name.strip_prefix(':').unwrap_or(name);
    if special && name.starts_with('@') {
        if !name.starts_with("@request.auth.claims") {
            c.error(path, format!("{name:?} is no attribute; @request.auth.claims.NAME is"));
        }
    } else if plain.is_empty() || !plain.bytes().all(fine) {
        c.error(path, format!("{name:?} is no header name"));
    }
}

fn headers(c: &mut Check, path: &FieldPath, headers: Option<&Headers>) {
    let Some(headers) = headers else { return };
    for (way, operations) in [("request", &headers.request), ("response", &headers.response)] {
        let Some(operations) = operations else { continue };
        let path = path.to(way);
        for (name, map) in [("set", &operations.set), ("add", &operations.add)] {
            map.keys().for_each(|key| header_name(c, &path.to(name).to(key), key, false));
        }
        for (i, name) in operations.remove.iter().enumerate() {
            header_name(c, &path.to("remove").to(i), name, false);
        }
    }
}

fn retries(c: &mut Check, path: &FieldPath, retries: &HttpRetry) {
    if retries.attempts < 0 {
        c.error(&path.to("attempts"), format!("{} is negative", retries.attempts));
    }
    if retries.attempts == 0 && (retries.per_try_timeout.is_some() || !retries.retry_on.is_empty()) {
        c.error(&path.to("attempts"), "0 turns retries off, so the other settings mean nothing");
    }
    for condition in retries.retry_on.split(',').map(str::trim).filter(|condition| !condition.is_empty()) {
        let status = condition.parse::<u16>().is_ok_and(|status| (100..600).contains(&status));
        if !status && !RETRY_ON.contains(&condition) {
            c.error(&path.to("retryOn"), format!("{condition:?} is no condition Envoy knows"));
        }
    }
}

fn fault(c: &mut Check, path: &FieldPath, fault: &HttpFaultInjection) {
    if let Some(delay) = &fault.delay {
        let path = path.to("delay");
        if delay.fixed_delay.is_none() || delay.exponential_delay.is_some() {
            c.error(&path, "fixedDelay is needed (exponentialDelay is implemented nowhere)");
        }
        if let Some(percentage) = delay.percentage {
            c.percent(&path.to("percentage").to("value"), percentage.value);
        }
        if let Some(percent) = delay.percent {
            c.percent(&path.to("percent"), f64::from(percent));
        }
    }
    if let Some(abort) = &fault.abort {
        let path = path.to("abort");
        let kinds = [abort.http_status.is_some(), abort.grpc_status.is_some(), abort.http2_error.is_some()];
        if kinds.iter().filter(|set| **set).count() != 1 {
            c.error(&path, "exactly one of httpStatus and grpcStatus is needed");
        }
        if let Some(status) = abort.http_status.filter(|status| !(200..600).contains(status)) {
            c.error(&path.to("httpStatus"), format!("{status} is no status between 200 and 599"));
        }
        if let Some(status) = abort.grpc_status.as_deref().filter(|status| !GRPC_CODES.contains(status)) {
            c.error(&path.to("grpcStatus"), format!("{status:?} is no gRPC status such as UNAVAILABLE"));
        }
        if abort.http2_error.is_some() {
            c.error(&path.to("http2Error"), "is implemented nowhere");
        }
        if let Some(percentage) = abort.percentage {
            c.percent(&path.to("percentage").to("value"), percentage.value);
        }
    }
}

fn mirrors(c: &mut Check, path: &FieldPath, route: &HttpRoute) {
    c.at_most_one(path, &[("mirror", route.mirror.is_some()), ("mirrors", !route.mirrors.is_empty())]);
    if let Some(mirror) = &route.mirror {
        destination(c, &path.to("mirror"), mirror);
    }
    if let Some(percentage) = route.mirror_percentage {
        c.percent(&path.to("mirrorPercentage").to("value"), percentage.value);
    }
    if let Some(percent) = route.mirror_percent {
        c.percent(&path.to("mirrorPercent"), f64::from(percent));
    }
    for (i, mirror) in route.mirrors.iter().enumerate() {
        let path = path.to("mirrors").to(i);
        destination(c, &path.to("destination"), &mirror.destination);
        if let Some(percentage) = mirror.percentage {
            c.percent(&path.to("percentage").to("value"), percentage.value);
        }
    }
}

fn cors(c: &mut Check, path: &FieldPath, route: &HttpRoute) {
    let Some(cors) = &route.cors_policy else { return };
    let path = path.to("corsPolicy");
    c.at_most_one(
        &path,
        &[("allowOrigin", !cors.allow_origin.is_empty()), ("allowOrigins", !cors.allow_origins.is_empty())],
    );
    for (i, origin) in cors.allow_origins.iter().enumerate() {
        c.string_match(&path.to("allowOrigins").to(i), origin);
    }
    if cors.max_age.is_some_and(|age| age.subsec_nanos() != 0) {
        c.error(&path.to("maxAge"), "must be whole seconds");
    }
}
