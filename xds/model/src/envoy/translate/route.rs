//! Route configurations.
use std::mem::take;
use std::time::Duration;

use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::config::route::v3 as wire;
use xds_proto::envoy::envoy::extensions::path::r#match::uri_template::v3 as uri_template;
use xds_proto::envoy::envoy::extensions::path::rewrite::uri_template::v3 as uri_rewrite;

use super::action;
use super::common::{
    header, inline, metadata, metadata_json, query, regex, runtime_fraction, substitution, type_name, unpack,
};
use super::headers::mutations;
use super::report::{At, Refusable, Refusal, Report, refuse_rest};
use crate::envoy::matcher::PathMatcher;
use crate::envoy::route::{
    DirectResponse, HeaderMutations, PathRewrite, Redirect, RedirectPath, Route, RouteAction, RouteConfig, RouteMatch,
    VirtualHost,
};

/// Status of a route that could not be honoured.
const INVALID_STATUS: u16 = 500;

/// A whole route configuration. Single routes that cannot be honoured become [`RouteAction::Invalid`].
pub(super) fn config(mut message: wire::RouteConfiguration, report: &mut Report) -> Refusable<RouteConfig> {
    // validate_clusters: clusters are looked up per request, as with `false`.
    message.validate_clusters.take();
    message.metadata.take();
    let max_body = super::common::u32_of(message.max_direct_response_body_size_bytes.take()).unwrap_or(4096);
    let mut out = RouteConfig {
        name: take(&mut message.name),
        request_headers: mutations(
            take(&mut message.request_headers_to_add),
            take(&mut message.request_headers_to_remove),
        )?,
        response_headers: mutations(
            take(&mut message.response_headers_to_add),
            take(&mut message.response_headers_to_remove),
        )?,
        ignore_port_in_host: take(&mut message.ignore_port_in_host_matching),
        most_specific_header_mutations_wins: take(&mut message.most_specific_header_mutations_wins),
        virtual_hosts: Vec::new(),
    };
    let hosts = take(&mut message.virtual_hosts);
    refuse_rest(&message).at("route_config")?;
    for host in hosts {
        out.virtual_hosts.push(virtual_host(host, max_body, report)?);
    }
    Ok(out)
}

fn virtual_host(mut message: wire::VirtualHost, max_body: u32, report: &mut Report) -> Refusable<VirtualHost> {
    let name = take(&mut message.name);
    let routes = take(&mut message.routes);
    message.metadata.take();
    let mut read = |report: &mut Report| -> Refusable<VirtualHost> {
        let host = VirtualHost {
            name: name.clone(),
            domains: take(&mut message.domains).iter().map(|domain| domain.to_ascii_lowercase()).collect(),
            routes: Vec::new(),
            request_headers: mutations(
                take(&mut message.request_headers_to_add),
                take(&mut message.request_headers_to_remove),
            )?,
            response_headers: mutations(
                take(&mut message.response_headers_to_add),
                take(&mut message.response_headers_to_remove),
            )?,
            filters: action::filters(take(&mut message.typed_per_filter_config), report)?,
            retry: message.retry_policy.take().map(|policy| action::retry(policy, report)).transpose()?,
            include_attempt_count: take(&mut message.include_request_attempt_count),
        };
        refuse_rest(&message)?;
        Ok(host)
    };
    let mut host = read(report).at(format!("virtual_host {name}"))?;
    for (index, message) in routes.into_iter().enumerate() {
        let label = if message.name.is_empty() { index.to_string() } else { format!("{index} ({})", message.name) };
        let route = report.within(format!("route {label}"), |report| route(message, max_body, report));
        host.routes.push(route);
    }
    Ok(host)
}

/// One route, always: what can't be honoured answers with an error.
fn route(mut message: wire::Route, max_body: u32, report: &mut Report) -> Route {
    let config = message
        .metadata
        .take()
        .and_then(|metadata| metadata_json(&metadata, "istio"))
        .and_then(|istio| istio.get("config").and_then(|path| path.as_str()).map(str::to_owned));
    let mut refusal = None;
    let matcher = route_match(message.r#match.take().unwrap_or_default(), &mut refusal);
    let mut route = Route {
        name: take(&mut message.name),
        config,
        matcher,
        action: RouteAction::Invalid { status: INVALID_STATUS, reason: String::new() },
        request_headers: HeaderMutations::default(),
        response_headers: HeaderMutations::default(),
        filters: crate::envoy::route::RouteFilters::default(),
        operation: message.decorator.take().map(|decorator| decorator.operation),
        stat_prefix: Some(take(&mut message.stat_prefix)).filter(|prefix| !prefix.is_empty()),
    };
    let outcome = match refusal {
        Some(refusal) => Err(refusal.at("match")),
        None => rest_of_route(message, max_body, report, &mut route),
    };
    if let Err(Refusal(reason)) = outcome {
        report.fails_closed("", format!("answers {INVALID_STATUS}: {reason}"));
        route.action = RouteAction::Invalid { status: INVALID_STATUS, reason };
        route.request_headers = HeaderMutations::default();
        route.response_headers = HeaderMutations::default();
    }
    route
}

fn rest_of_route(mut message: wire::Route, max_body: u32, report: &mut Report, route: &mut Route) -> Refusable<()> {
    route.request_headers =
        mutations(take(&mut message.request_headers_to_add), take(&mut message.request_headers_to_remove))?;
    route.response_headers =
        mutations(take(&mut message.response_headers_to_add), take(&mut message.response_headers_to_remove))?;
    route.filters = action::filters(take(&mut message.typed_per_filter_config), report)?;
    if let Some(tracing) = message.tracing.take() {
        report.ignore_rest("tracing", &tracing);
    }
    route.action = match message.action.take() {
        Some(wire::route::Action::Route(forward)) => {
            RouteAction::Forward(Box::new(action::forward(forward, report).at("route")?))
        }
        Some(wire::route::Action::Redirect(target)) => RouteAction::Redirect(redirect(target).at("redirect")?),
        Some(wire::route::Action::DirectResponse(response)) => {
            RouteAction::Respond(direct_response(response, max_body).at("direct_response")?)
        }
        Some(wire::route::Action::FilterAction(_)) => return Err(Refusal::new("filter_action", "not supported")),
        Some(wire::route::Action::NonForwardingAction(_)) => {
            return Err(Refusal::new("non_forwarding_action", "not supported"));
        }
        None => return Err(Refusal::new("action", "missing")),
    };
    refuse_rest(&message)
}

/// The part of a match that is understood; the first part that is not is put into `refusal`. Leaving a
/// condition out only makes the match wider, and a route with a refusal answers with an error.
pub(super) fn route_match(mut message: wire::RouteMatch, refusal: &mut Option<Refusal>) -> RouteMatch {
    fn keep<T>(result: Refusable<T>, refusal: &mut Option<Refusal>) -> Option<T> {
        result.map_err(|reason| refusal.get_or_insert(reason)).ok()
    }
    let path = keep(path_match(message.path_specifier.take()), refusal);
    let headers = take(&mut message.headers).into_iter().map(|test| header(test).at("headers"));
    let headers = headers.filter_map(|test| keep(test, refusal)).collect();
    let queries = take(&mut message.query_parameters).into_iter().map(|test| query(test).at("query_parameters"));
    let query = queries.filter_map(|test| keep(test, refusal)).collect();
    let metadatas = take(&mut message.dynamic_metadata).into_iter().map(|test| metadata(test).at("dynamic_metadata"));
    let metadata = metadatas.filter_map(|test| keep(test, refusal)).collect();
    let fraction = message.runtime_fraction.take().and_then(|share| keep(runtime_fraction(share), refusal));
    let grpc = message.grpc.take().is_some();
    let case_sensitive = message.case_sensitive.take().is_none_or(|flag| flag.value);
    keep(refuse_rest(&message), refusal);
    let path = path.unwrap_or_else(|| PathMatcher::Prefix(String::new()));
    RouteMatch { path, case_sensitive, headers, query, metadata, fraction, grpc }
}

fn path_match(specifier: Option<wire::route_match::PathSpecifier>) -> Refusable<PathMatcher> {
    use wire::route_match::PathSpecifier;
    Ok(match specifier {
        Some(PathSpecifier::Prefix(prefix)) => PathMatcher::Prefix(prefix),
        Some(PathSpecifier::Path(path)) => PathMatcher::Exact(path),
        Some(PathSpecifier::PathSeparatedPrefix(prefix)) => PathMatcher::SeparatedPrefix(prefix),
        Some(PathSpecifier::SafeRegex(text)) => PathMatcher::Regex(regex(text)?),
        Some(PathSpecifier::ConnectMatcher(wire::route_match::ConnectMatcher {})) => PathMatcher::Connect,
        Some(PathSpecifier::PathMatchPolicy(policy)) => PathMatcher::UriTemplate(template(policy)?),
        None => return Err(Refusal::new("path_specifier", "missing")),
    })
}

/// The template of a `uri_template` extension.
pub(super) fn template(message: core::TypedExtensionConfig) -> Refusable<String> {
    let core::TypedExtensionConfig { name, typed_config } = message;
    let any = typed_config.ok_or_else(|| Refusal::new(&name, "no configuration"))?;
    match type_name(&any.type_url) {
        "envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig" => {
            let uri_template::UriTemplateMatchConfig { path_template } = unpack(&any)?;
            Ok(path_template)
        }
        other => Err(Refusal::new(name, format!("{other} is not supported"))),
    }
}

/// The template of a `uri_template` rewrite.
pub(super) fn rewrite_template(message: core::TypedExtensionConfig) -> Refusable<PathRewrite> {
    let core::TypedExtensionConfig { name, typed_config } = message;
    let any = typed_config.ok_or_else(|| Refusal::new(&name, "no configuration"))?;
    match type_name(&any.type_url) {
        "envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig" => {
            let uri_rewrite::UriTemplateRewriteConfig { path_template_rewrite } = unpack(&any)?;
            Ok(PathRewrite::UriTemplate(path_template_rewrite))
        }
        other => Err(Refusal::new(name, format!("{other} is not supported"))),
    }
}

fn redirect(mut message: wire::RedirectAction) -> Refusable<Redirect> {
    use wire::redirect_action::{PathRewriteSpecifier, RedirectResponseCode as Code, SchemeRewriteSpecifier};
    let status = match Code::try_from(take(&mut message.response_code)) {
        Ok(Code::MovedPermanently) => 301,
        Ok(Code::Found) => 302,
        Ok(Code::SeeOther) => 303,
        Ok(Code::TemporaryRedirect) => 307,
        Ok(Code::PermanentRedirect) => 308,
        Err(_) => return Err(Refusal::new("response_code", "unknown")),
    };
    let (scheme, https) = match message.scheme_rewrite_specifier.take() {
        Some(SchemeRewriteSpecifier::HttpsRedirect(https)) => (None, https),
        Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => (Some(scheme).filter(|text| !text.is_empty()), false),
        None => (None, false),
    };
    let path = match message.path_rewrite_specifier.take() {
        Some(PathRewriteSpecifier::PathRedirect(path)) if path.is_empty() => None,
        Some(PathRewriteSpecifier::PathRedirect(path) | PathRewriteSpecifier::PathRewrite(path)) => {
            Some(RedirectPath::Full(path))
        }
        Some(PathRewriteSpecifier::PrefixRewrite(prefix)) => Some(RedirectPath::Prefix(prefix)),
        Some(PathRewriteSpecifier::RegexRewrite(rewrite)) => {
            let (pattern, substitution) = substitution(rewrite)?;
            Some(RedirectPath::Regex { pattern, substitution })
        }
        None => None,
    };
    let port = match take(&mut message.port_redirect) {
        0 => None,
        port => Some(u16::try_from(port).map_err(|_| Refusal::new("port_redirect", format!("{port} is no port")))?),
    };
    let host = Some(take(&mut message.host_redirect)).filter(|host| !host.is_empty());
    let strip_query = take(&mut message.strip_query);
    refuse_rest(&message)?;
    Ok(Redirect { status, scheme, https, host, port, path, strip_query })
}

fn direct_response(message: wire::DirectResponseAction, max_body: u32) -> Refusable<DirectResponse> {
    let wire::DirectResponseAction { status, body, body_format } = message;
    if body_format.is_some() {
        return Err(Refusal::new("body_format", "not supported"));
    }
    let body = body.map(inline).transpose().at("body")?.unwrap_or_default();
    if body.len() > max_body as usize {
        return Err(Refusal::new("body", format!("{} bytes are more than {max_body}", body.len())));
    }
    let status = u16::try_from(status).ok().filter(|code| (200..600).contains(code));
    let status = status.ok_or_else(|| Refusal::new("status", "outside 200 to 599"))?;
    Ok(DirectResponse { status, body })
}

/// Envoy's default for routes without a timeout.
pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);
