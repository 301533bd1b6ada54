//! HTTPRoutes and GRPCRoutes attached to a Service -> routes; TCPRoutes and TLSRoutes -> clusters. More exact conditions come first, whatever the order of writing.
mod grpc;

use std::borrow::Cow;
use std::cmp::Reverse;

use compat_objects::gateway::{
    BackendRef, Cors, FilterType, HeaderModifier, HttpHeaderMatch, HttpRouteMatch, HttpRouteRule, ParentReference,
    PathMatchType, PathModifier, PathModifierType, RequestMirror, RequestRedirect, RouteFilter, ValueMatchType,
};
use compat_objects::istio::{Destination, PortSelector};
use compat_objects::{HasMeta, Kind, ObjectKey};

use super::Builder;
use super::destinations::From;
use super::routes::{Rule, decorator, default_retry, mirror, operation, origin, response_code, valid_regex};
use crate::mesh::{DOMAIN, Service, ServicePort, host_covers};
use crate::pb::{
    add_header, any, boolv, core, duration, exact, ext, hundred_percent, matcher, regex, regex_match, route, seconds,
    set_header, u32v,
};
use route::route_action::{ClusterNotFoundResponseCode, ClusterSpecifier};
use route::route_match::PathSpecifier;

/// Field and reason.
type Refused = (String, String);

/// How exact a match is: kind of path, its length, method, headers, query parameters. Smaller is more exact.
type Exactness = (u8, Reverse<usize>, u8, Reverse<usize>, Reverse<usize>);

impl Builder<'_, '_> {
    /// The routes of all HTTPRoutes attached to the service (of its own namespace); `None` without one.
    pub(crate) fn gateway_routes(&self, service: &Service, port: &ServicePort) -> Option<Vec<route::Route>> {
        let mut found: Vec<(Exactness, route::Route)> = Vec::new();
        let mut attached = false;
        let http = self.mesh.objects.http_routes_in(&service.namespace);
        let http = http.map(|r| (Kind::HTTPRoute, r.name(), &r.spec.parent_refs, Cow::Borrowed(&r.spec.rules)));
        let grpc = self.mesh.objects.grpc_routes_in(&service.namespace);
        let grpc = grpc.map(|r| (Kind::GRPCRoute, r.name(), &r.spec.parent_refs, Cow::Owned(grpc::as_http(&r.spec))));
        for (kind, name, parents, rules) in http.chain(grpc) {
            if !is_attached(parents, service, port) {
                continue;
            }
            let key = ObjectKey::new(kind, service.namespace.as_str(), name);
            match self.http_route(service, port, &key, &rules) {
                Ok(routes) => {
                    attached = true;
                    found.extend(routes);
                }
                Err((field, reason)) => self.error(&key, &field, reason),
            }
        }
        // Stable: equally exact conditions keep the order of writing.
        found.sort_by_key(|(exactness, _)| *exactness);
        attached.then(|| found.into_iter().map(|(_, route)| route).collect())
    }

    fn http_route(
        &self,
        service: &Service,
        port: &ServicePort,
        key: &ObjectKey,
        rules: &[HttpRouteRule],
    ) -> Result<Vec<(Exactness, route::Route)>, Refused> {
        let mut routes = Vec::new();
        for (index, rule) in rules.iter().enumerate() {
            let at = Rule { object: key, field: format!("spec.rules[{index}]"), port: port.number };
            let name = rule.name.clone().unwrap_or_else(|| format!("{}.{}.{index}", key.namespace, key.name));
            let everything = [HttpRouteMatch::default()];
            let matches = if rule.matches.is_empty() { &everything[..] } else { &rule.matches };
            for (index, found) in matches.iter().enumerate() {
                let matched =
                    convert(found).map_err(|(field, reason)| (at.at(&format!("matches[{index}].{field}")), reason))?;
                let mut built = self.gateway_rule(service, &at, rule, &matched)?;
                built.name.clone_from(&name);
                built.r#match = Some(matched);
                routes.push((exactness(found), built));
            }
        }
        Ok(routes)
    }

    #[allow(deprecated, reason = "istiod sends it, and data planes read it")]
    fn gateway_rule(
        &self,
        service: &Service,
        at: &Rule<'_>,
        rule: &HttpRouteRule,
        matched: &route::RouteMatch,
    ) -> Result<route::Route, Refused> {
        let mut built = route::Route { metadata: Some(origin(at.object)), ..Default::default() };
        let mut action = route::RouteAction {
            cluster_not_found_response_code: ClusterNotFoundResponseCode::InternalServerError as i32,
            timeout: rule.timeouts.and_then(|t| t.request).map_or(seconds(0), |t| duration(t.0)),
            retry_policy: Some(retry(rule)),
            ..Default::default()
        };
        action.max_grpc_timeout = action.timeout;
        let mut subject = format!("{}~{}~{}", service.namespace, at.port, service.hostname);
        let mut redirect = None;
        for (index, filter) in rule.filters.iter().enumerate() {
            let field = at.at(&format!("filters[{index}]"));
            let refused = |reason: String| (field.clone(), reason);
            match filter.kind {
                FilterType::RequestRedirect => {
                    redirect = filter.request_redirect.as_ref().map(self::redirect).transpose().map_err(refused)?;
                }
                FilterType::RequestMirror => {
                    let Some(asked) = &filter.request_mirror else { continue };
                    action.request_mirror_policies.extend(self.gateway_mirror(at, asked, &field));
                }
                _ => apply(filter, &mut built, &mut action, matched).map_err(refused)?,
            }
        }
        if let Some(redirect) = redirect {
            built.action = Some(route::route::Action::Redirect(redirect));
        } else if let Some(only) = self.backends(at, rule, &mut built, &mut action)? {
            subject = only;
            built.action = Some(route::route::Action::Route(action));
        } else if action.cluster_specifier.is_some() {
            built.action = Some(route::route::Action::Route(action));
        } else {
            // No backend at all: the Gateway API asks for 500.
            let status = route::DirectResponseAction { status: 500, ..Default::default() };
            built.action = Some(route::route::Action::DirectResponse(status));
        }
        built.decorator = Some(decorator(operation(&subject, at.port, matched)));
        Ok(built)
    }

    /// Fills in where requests go; for a single backend its host.
    fn backends(
        &self,
        at: &Rule<'_>,
        rule: &HttpRouteRule,
        built: &mut route::Route,
        action: &mut route::RouteAction,
    ) -> Result<Option<String>, Refused> {
        let backends: Vec<(usize, &BackendRef)> =
            rule.backend_refs.iter().enumerate().filter(|(_, backend)| backend.weight != Some(0)).collect();
        let mut clusters = Vec::new();
        let mut host = None;
        for (index, backend) in &backends {
            let field = at.at(&format!("backendRefs[{index}]"));
            let namespace = backend.namespace.as_deref().unwrap_or(&at.object.namespace);
            let kind = backend.kind.as_deref().unwrap_or("Service");
            if kind != "Service" || !backend.group.as_deref().unwrap_or_default().is_empty() {
                return Err((
                    format!("{field}.kind"),
                    format!("{kind} is not supported as a backend, only Service is"),
                ));
            }
            host = Some(format!("{}.{namespace}.svc.{DOMAIN}", backend.name));
            let name = self.backend(at, &backend.name, namespace, backend.port, &field);
            let weight = u32::try_from(backend.weight.unwrap_or(1)).unwrap_or(0);
            let mut part = route::weighted_cluster::ClusterWeight { name, weight: u32v(weight), ..Default::default() };
            for filter in &backend.filters {
                match (filter.kind, &filter.request_header_modifier, &filter.response_header_modifier) {
                    (FilterType::RequestHeaderModifier, Some(modifier), _) => {
                        part.request_headers_to_add.extend(options(modifier));
                        part.request_headers_to_remove.extend(modifier.remove.iter().cloned());
                    }
                    (FilterType::ResponseHeaderModifier, _, Some(modifier)) => {
                        part.response_headers_to_add.extend(options(modifier));
                        part.response_headers_to_remove.extend(modifier.remove.iter().cloned());
                    }
                    (kind, ..) => return Err((format!("{field}.filters"), format!("{kind:?} is not supported here"))),
                }
            }
            clusters.push(part);
        }
        if clusters.len() == 1 {
            let only = clusters.remove(0);
            built.request_headers_to_add.extend(only.request_headers_to_add);
            built.request_headers_to_remove.extend(only.request_headers_to_remove);
            built.response_headers_to_add.extend(only.response_headers_to_add);
            built.response_headers_to_remove.extend(only.response_headers_to_remove);
            action.cluster_specifier = Some(ClusterSpecifier::Cluster(only.name));
            return Ok(host);
        }
        if !clusters.is_empty() {
            let weighted = route::WeightedCluster { clusters, ..Default::default() };
            action.cluster_specifier = Some(ClusterSpecifier::WeightedClusters(weighted));
        }
        Ok(None)
    }

    fn backend(&self, at: &Rule<'_>, name: &str, namespace: &str, port: Option<u16>, field: &str) -> String {
        let destination = Destination {
            host: format!("{name}.{namespace}.svc.{DOMAIN}"),
            subset: String::new(),
            port: port.map(|number| PortSelector { number }),
        };
        self.cluster_for(&destination, "http", at.port, From { object: at.object, field })
    }

    fn gateway_mirror(
        &self,
        at: &Rule<'_>,
        asked: &RequestMirror,
        field: &str,
    ) -> Option<route::route_action::RequestMirrorPolicy> {
        let share = match (asked.percent, asked.fraction) {
            (Some(percent), _) => Some(f64::from(percent)),
            (None, Some(f)) => Some(100.0 * f64::from(f.numerator) / f64::from(f.denominator.unwrap_or(100).max(1))),
            (None, None) => None,
        };
        if share == Some(0.0) {
            return None;
        }
        let backend = &asked.backend_ref;
        let kind = backend.kind.as_deref().unwrap_or("Service");
        if kind != "Service" || !backend.group.as_deref().unwrap_or_default().is_empty() {
            let reason = format!("{kind} cannot be mirrored to, only a Service can: nothing is mirrored");
            self.error(at.object, &format!("{field}.requestMirror.backendRef.kind"), reason);
            return None;
        }
        let namespace = backend.namespace.as_deref().unwrap_or(&at.object.namespace);
        let field = format!("{field}.requestMirror.backendRef");
        let cluster = self.backend(at, &backend.name, namespace, backend.port, &field);
        Some(mirror(cluster, share.map(crate::pb::millionths)))
    }
}

/// Istio's name for a cluster that is nowhere: what is sent there is closed.
const BLACK_HOLE: &str = "BlackHoleCluster";

/// Whether a route is for a port of a service.
fn is_attached(parents: &[ParentReference], service: &Service, port: &ServicePort) -> bool {
    service.object.kind == Kind::Service
        && parents.iter().any(|parent| {
            parent.kind.as_deref() == Some("Service")
                && matches!(parent.group.as_deref(), Some("" | "core"))
                && parent.name == service.name
                && parent.namespace.as_deref().is_none_or(|namespace| namespace == service.namespace)
                && parent.port.is_none_or(|wanted| wanted == port.number)
        })
}

impl Builder<'_, '_> {
    /// Weighted clusters of a TCPRoute or TLSRoute for a port, the name of the server being the service's own.
    pub(crate) fn gateway_tcp_route(&self, service: &Service, port: &ServicePort) -> Option<Vec<(String, u32)>> {
        let namespace = &service.namespace;
        let tcp = self.mesh.objects.tcp_routes_in(namespace);
        let tcp = tcp.map(|r| (Kind::TCPRoute, r.name(), &r.spec.parent_refs, &r.spec.rules));
        let own_name = |names: &[String]| names.is_empty() || names.iter().any(|n| host_covers(n, &service.hostname));
        let tls = self.mesh.objects.tls_routes_in(namespace).filter(|r| own_name(&r.spec.hostnames));
        let tls = tls.map(|r| (Kind::TLSRoute, r.name(), &r.spec.parent_refs, &r.spec.rules));
        let (kind, name, _, rules) = tcp.chain(tls).find(|(_, _, parents, _)| is_attached(parents, service, port))?;
        let key = ObjectKey::new(kind, namespace.as_str(), name);
        let mut clusters = Vec::new();
        for (index, backend) in rules.first()?.backend_refs.iter().enumerate() {
            let weight = u32::try_from(backend.weight.unwrap_or(1)).unwrap_or(0);
            if weight == 0 {
                continue;
            }
            let field = format!("spec.rules[0].backendRefs[{index}]");
            let kind = backend.kind.as_deref().unwrap_or("Service");
            if kind != "Service" || !backend.group.as_deref().unwrap_or_default().is_empty() {
                let reason = format!(
                    "{kind} is not supported as a backend, only Service is: its share of connections is closed"
                );
                self.error(&key, &format!("{field}.kind"), reason);
                clusters.push((BLACK_HOLE.to_owned(), weight));
                continue;
            }
            let other = backend.namespace.as_deref().unwrap_or(namespace);
            let destination = Destination {
                host: format!("{}.{other}.svc.{DOMAIN}", backend.name),
                subset: String::new(),
                port: backend.port.map(|number| PortSelector { number }),
            };
            let from = From { object: &key, field: &field };
            clusters.push((self.cluster_for(&destination, "tcp", port.number, from), weight));
        }
        Some(clusters)
    }
}

fn exactness(found: &HttpRouteMatch) -> Exactness {
    let (kind, length) = match &found.path {
        Some(path) => match path.kind {
            PathMatchType::Exact => (0, path.value.len()),
            PathMatchType::PathPrefix => (1, path.value.len()),
            PathMatchType::RegularExpression => (2, path.value.len()),
        },
        None => (1, 1),
    };
    let method = u8::from(found.method.is_none());
    (kind, Reverse(length), method, Reverse(found.headers.len()), Reverse(found.query_params.len()))
}

fn convert(found: &HttpRouteMatch) -> Result<route::RouteMatch, Refused> {
    let path = match &found.path {
        None => PathSpecifier::Prefix("/".into()),
        Some(path) => match path.kind {
            PathMatchType::Exact => PathSpecifier::Path(path.value.clone()),
            PathMatchType::PathPrefix if path.value == "/" => PathSpecifier::Prefix("/".into()),
            PathMatchType::PathPrefix => {
                PathSpecifier::PathSeparatedPrefix(path.value.trim_end_matches('/').to_owned())
            }
            PathMatchType::RegularExpression => {
                valid_regex(&path.value).map_err(|reason| ("path.value".to_owned(), reason))?;
                PathSpecifier::SafeRegex(regex(&path.value))
            }
        },
    };
    let value = |asked: &HttpHeaderMatch, field: &str| match asked.kind {
        ValueMatchType::Exact => Ok::<matcher::StringMatcher, Refused>(exact(&asked.value)),
        ValueMatchType::RegularExpression => {
            valid_regex(&asked.value).map_err(|reason| (format!("{field}[{}].value", asked.name), reason))?;
            Ok(regex_match(&asked.value))
        }
    };
    let mut sorted: Vec<&HttpHeaderMatch> = found.headers.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut headers = Vec::new();
    let header = |name: &str, matched| route::HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::StringMatch(matched)),
        ..Default::default()
    };
    for asked in sorted {
        headers.push(header(&asked.name, value(asked, "headers")?));
    }
    if let Some(method) = &found.method {
        headers.push(header(":method", exact(method)));
    }
    let mut query_parameters = Vec::new();
    for asked in &found.query_params {
        let matched = value(asked, "queryParams")?;
        query_parameters.push(route::QueryParameterMatcher {
            name: asked.name.clone(),
            query_parameter_match_specifier: Some(
                route::query_parameter_matcher::QueryParameterMatchSpecifier::StringMatch(matched),
            ),
        });
    }
    Ok(route::RouteMatch {
        path_specifier: Some(path),
        case_sensitive: boolv(true),
        headers,
        query_parameters,
        ..Default::default()
    })
}

fn retry(rule: &HttpRouteRule) -> route::RetryPolicy {
    let mut policy = default_retry();
    if let Some(asked) = &rule.retry {
        if let Some(attempts) = asked.attempts.and_then(|attempts| u32::try_from(attempts).ok()) {
            policy.num_retries = u32v(attempts);
        }
        policy.retriable_status_codes = asked.codes.iter().map(|code| u32::from(*code)).collect();
        policy.retry_back_off = asked.backoff.map(|backoff| route::retry_policy::RetryBackOff {
            base_interval: duration(backoff.0),
            max_interval: None,
        });
    }
    policy.per_try_timeout = rule.timeouts.and_then(|t| t.backend_request).and_then(|t| duration(t.0));
    policy
}

fn options(modifier: &HeaderModifier) -> Vec<core::HeaderValueOption> {
    let set = modifier.set.iter().map(|header| set_header(&header.name, &header.value));
    set.chain(modifier.add.iter().map(|header| add_header(&header.name, &header.value))).collect()
}

/// The prefix a path match asks for.
fn matched_prefix(matched: &route::RouteMatch) -> &str {
    match &matched.path_specifier {
        Some(PathSpecifier::PathSeparatedPrefix(prefix) | PathSpecifier::Prefix(prefix)) => prefix,
        _ => "",
    }
}

fn apply(
    filter: &RouteFilter,
    built: &mut route::Route,
    action: &mut route::RouteAction,
    matched: &route::RouteMatch,
) -> Result<(), String> {
    match filter.kind {
        FilterType::RequestHeaderModifier => {
            if let Some(modifier) = &filter.request_header_modifier {
                built.request_headers_to_add.extend(options(modifier));
                built.request_headers_to_remove.extend(modifier.remove.iter().cloned());
            }
        }
        FilterType::ResponseHeaderModifier => {
            if let Some(modifier) = &filter.response_header_modifier {
                built.response_headers_to_add.extend(options(modifier));
                built.response_headers_to_remove.extend(modifier.remove.iter().cloned());
            }
        }
        FilterType::UrlRewrite => {
            let Some(rewrite) = &filter.url_rewrite else { return Ok(()) };
            if let Some(hostname) = &rewrite.hostname {
                action.host_rewrite_specifier =
                    Some(route::route_action::HostRewriteSpecifier::HostRewriteLiteral(hostname.clone()));
            }
            if let Some(path) = &rewrite.path {
                rewrite_path(path, action, matched);
            }
        }
        FilterType::Cors => {
            let Some(asked) = &filter.cors else { return Ok(()) };
            built.typed_per_filter_config.insert("envoy.filters.http.cors".to_owned(), any(&cors_policy(asked)));
        }
        kind => return Err(format!("filter {kind:?} is not supported")),
    }
    Ok(())
}

fn rewrite_path(path: &PathModifier, action: &mut route::RouteAction, matched: &route::RouteMatch) {
    let whole = |pattern: &str, substitution: &str| matcher::RegexMatchAndSubstitute {
        pattern: Some(regex(pattern)),
        substitution: substitution.to_owned(),
    };
    match path.kind {
        PathModifierType::ReplaceFullPath => {
            action.regex_rewrite = Some(whole("/.*", path.replace_full_path.as_deref().unwrap_or("/")));
        }
        PathModifierType::ReplacePrefixMatch => {
            let by = path.replace_prefix_match.as_deref().unwrap_or("/").trim_end_matches('/');
            if by.is_empty() {
                // Without the prefix the rest would lose its slash.
                let pattern = format!("^{}(/?)(.*)", ::regex::escape(matched_prefix(matched).trim_end_matches('/')));
                action.regex_rewrite = Some(whole(&pattern, "/\\2"));
            } else {
                action.prefix_rewrite = by.to_owned();
            }
        }
    }
}

fn redirect(asked: &RequestRedirect) -> Result<route::RedirectAction, String> {
    use route::redirect_action::{PathRewriteSpecifier, SchemeRewriteSpecifier};
    let code = u32::from(asked.status_code.unwrap_or(302));
    let path = asked.path.as_ref().map(|path| match path.kind {
        PathModifierType::ReplaceFullPath => {
            PathRewriteSpecifier::PathRedirect(path.replace_full_path.clone().unwrap_or_default())
        }
        PathModifierType::ReplacePrefixMatch => {
            PathRewriteSpecifier::PrefixRewrite(path.replace_prefix_match.clone().unwrap_or_default())
        }
    });
    let by_scheme = match asked.scheme.as_deref() {
        Some("http") => 80,
        Some("https") => 443,
        _ => 0,
    };
    Ok(route::RedirectAction {
        host_redirect: asked.hostname.clone().unwrap_or_default(),
        port_redirect: asked.port.map_or(by_scheme, u32::from),
        response_code: response_code(code).ok_or_else(|| format!("statusCode {code} is no redirect"))?,
        scheme_rewrite_specifier: asked.scheme.clone().map(SchemeRewriteSpecifier::SchemeRedirect),
        path_rewrite_specifier: path,
        ..Default::default()
    })
}

fn cors_policy(asked: &Cors) -> ext::filters::http::cors::v3::CorsPolicy {
    let origin = |origin: &String| match origin.as_str() {
        "*" => regex_match(".*"),
        pattern if pattern.contains('*') => {
            // Only dots are special among what an origin may hold.
            regex_match(&format!("^{}$", pattern.replace('.', "\\.").replace('*', ".*")))
        }
        plain => exact(plain),
    };
    ext::filters::http::cors::v3::CorsPolicy {
        allow_origin_string_match: asked.allow_origins.iter().map(origin).collect(),
        allow_methods: asked.allow_methods.join(","),
        allow_headers: asked.allow_headers.join(","),
        expose_headers: asked.expose_headers.join(","),
        max_age: asked.max_age.map(|seconds| seconds.to_string()).unwrap_or_default(),
        allow_credentials: asked.allow_credentials.and_then(boolv),
        filter_enabled: Some(hundred_percent()),
        forward_not_matching_preflights: boolv(false),
        ..Default::default()
    }
}
