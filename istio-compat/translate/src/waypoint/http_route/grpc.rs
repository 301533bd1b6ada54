//! GRPCRoutes as the HTTPRoutes they are: a call is a POST to `/SERVICE/METHOD`.
use compat_objects::gateway::{
    GrpcMethodMatch, GrpcRouteMatch, GrpcRouteSpec, HttpPathMatch, HttpRouteMatch, HttpRouteRule, PathMatchType,
    ValueMatchType,
};

/// One path element of any text.
const ANY: &str = "[^/]+";

pub(super) fn as_http(spec: &GrpcRouteSpec) -> Vec<HttpRouteRule> {
    let rule = |rule: &compat_objects::gateway::GrpcRouteRule| HttpRouteRule {
        name: rule.name.clone(),
        matches: rule.matches.iter().map(convert).collect(),
        filters: rule.filters.clone(),
        backend_refs: rule.backend_refs.clone(),
        session_persistence: rule.session_persistence.clone(),
        ..HttpRouteRule::default()
    };
    spec.rules.iter().map(rule).collect()
}

fn convert(found: &GrpcRouteMatch) -> HttpRouteMatch {
    HttpRouteMatch {
        path: found.method.as_ref().and_then(path),
        headers: found.headers.clone(),
        ..HttpRouteMatch::default()
    }
}

fn path(found: &GrpcMethodMatch) -> Option<HttpPathMatch> {
    let (kind, value) = match (found.kind, found.service.as_deref(), found.method.as_deref()) {
        (_, None, None) => return None,
        (ValueMatchType::Exact, Some(service), Some(method)) => (PathMatchType::Exact, format!("/{service}/{method}")),
        (ValueMatchType::Exact, Some(service), None) => (PathMatchType::PathPrefix, format!("/{service}")),
        (ValueMatchType::Exact, None, Some(method)) => {
            (PathMatchType::RegularExpression, format!("/{ANY}/{}", ::regex::escape(method)))
        }
        (ValueMatchType::RegularExpression, service, method) => {
            let value = format!("/{}/{}", service.unwrap_or(ANY), method.unwrap_or(ANY));
            (PathMatchType::RegularExpression, value)
        }
    };
    Some(HttpPathMatch { kind, value })
}
