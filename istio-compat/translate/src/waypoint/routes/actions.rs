//! What a VirtualService rule does with a request.
mod delegates;
mod filters;

use compat_objects::istio::{
    Destination, HeaderOperations, Headers, HttpMatchRequest, HttpRedirect, HttpRetry, HttpRoute, HttpRouteDestination,
    RedirectPortSelection,
};

use super::matches::valid_regex;
use super::{Rule, decorator, operation, origin};
use crate::mesh::Service;
use crate::pb::{
    add_header, any, boolv, core, duration, ext, hundred_percent, matcher, millionths, regex, route, seconds,
    set_header, types, u32v,
};
use crate::waypoint::Builder;
use crate::waypoint::destinations::From;
pub(super) use delegates::merge_delegate;
use filters::per_filter;
use route::route_action::ClusterSpecifier;

/// Field and reason.
type Refused = (String, String);

const DEFAULT_RETRY_ON: &str = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";

impl Builder<'_, '_> {
    /// The route of one alternative.
    pub(super) fn route(
        &self,
        _service: &Service,
        at: &Rule<'_>,
        rule: &HttpRoute,
        found: route::RouteMatch,
        alternative: Option<&HttpMatchRequest>,
    ) -> Result<route::Route, Refused> {
        let mut built = route::Route {
            name: rule.name.clone(),
            metadata: Some(origin(at.object)),
            stat_prefix: alternative.map(|a| a.stat_prefix.clone()).unwrap_or_default(),
            ..Default::default()
        };
        let mut subject = at.object.name.clone();
        if let Some(headers) = &rule.headers {
            route_headers(&mut built, headers);
        }
        let action = if let Some(redirect) = &rule.redirect {
            route::route::Action::Redirect(self::redirect(redirect).map_err(|reason| (at.at("redirect"), reason))?)
        } else if let Some(direct) = &rule.direct_response {
            route::route::Action::DirectResponse(direct_response(direct))
        } else {
            let (action, host) = self.forward(at, rule, &mut built)?;
            if let Some(host) = host {
                subject = host;
            }
            route::route::Action::Route(action)
        };
        // The decorator of a single destination has that destination's port.
        let (subject, port) = subject
            .rsplit_once('|')
            .map_or((subject.as_str(), at.port), |(host, port)| (host, port.parse().unwrap_or(at.port)));
        built.decorator = Some(decorator(operation(subject, port, &found)));
        built.r#match = Some(found);
        built.action = Some(action);
        built.typed_per_filter_config = per_filter(rule, at)?;
        Ok(built)
    }

    /// Forwarding; and, for a single destination, `host|port`.
    #[allow(deprecated, reason = "istiod sends it, and data planes read it")]
    fn forward(
        &self,
        at: &Rule<'_>,
        rule: &HttpRoute,
        built: &mut route::Route,
    ) -> Result<(route::RouteAction, Option<String>), Refused> {
        let timeout = rule.timeout.map_or(seconds(0), |t| duration(t.0));
        let mut action = route::RouteAction {
            timeout,
            max_grpc_timeout: timeout,
            retry_policy: retry(rule.retries.as_ref()).map_err(|reason| (at.at("retries.retryOn"), reason))?,
            ..Default::default()
        };
        let headers = rule.headers.as_ref().and_then(|headers| headers.request.as_ref());
        action.host_rewrite_specifier = authority(headers).map(rewrite_host);
        if let Some(rewrite) = &rule.rewrite {
            if let Some(pattern) = &rewrite.uri_regex_rewrite {
                valid_regex(&pattern.pattern).map_err(|reason| (at.at("rewrite.uriRegexRewrite.match"), reason))?;
                action.regex_rewrite = Some(matcher::RegexMatchAndSubstitute {
                    pattern: Some(regex(&pattern.pattern)),
                    substitution: pattern.rewrite.clone(),
                });
            } else {
                action.prefix_rewrite.clone_from(&rewrite.uri);
            }
            if !rewrite.authority.is_empty() {
                action.host_rewrite_specifier = Some(rewrite_host(rewrite.authority.clone()));
            }
        }
        action.request_mirror_policies = self.mirrors(at, rule);
        action.hash_policy = self.route_hash(at, &rule.route);
        let host = match rule.route.as_slice() {
            [] => return Err((at.at("route"), "the rule has neither route, redirect nor directResponse".into())),
            [only] => {
                let field = at.at("route[0].destination");
                let from = From { object: at.object, field: &field };
                let cluster = self.cluster_for(&only.destination, "http", at.port, from);
                if let Some(headers) = &only.headers {
                    route_headers(built, headers);
                    if let Some(host) = authority(headers.request.as_ref()) {
                        action.host_rewrite_specifier = Some(rewrite_host(host));
                    }
                }
                let host = host_and_port(&cluster);
                action.cluster_specifier = Some(ClusterSpecifier::Cluster(cluster));
                Some(host)
            }
            many => {
                action.cluster_specifier = Some(ClusterSpecifier::WeightedClusters(self.weighted(at, many)?));
                None
            }
        };
        Ok((action, host))
    }

    fn weighted(&self, at: &Rule<'_>, many: &[HttpRouteDestination]) -> Result<route::WeightedCluster, Refused> {
        let asked: Vec<i32> = many.iter().map(|destination| destination.weight).collect();
        let weights = weights(&asked).map_err(|reason| (at.at("route"), reason))?;
        let mut clusters = Vec::new();
        for (index, (destination, weight)) in many.iter().zip(weights).enumerate() {
            let field = at.at(&format!("route[{index}].destination"));
            let from = From { object: at.object, field: &field };
            // Asked for also at weight 0, so that a mistake there is told before the weight is raised.
            let name = self.cluster_for(&destination.destination, "http", at.port, from);
            if weight == 0 {
                continue;
            }
            let mut part = route::weighted_cluster::ClusterWeight { name, weight: u32v(weight), ..Default::default() };
            if let Some(headers) = &destination.headers {
                let changes = changes(headers);
                part.request_headers_to_add = changes.request_add;
                part.request_headers_to_remove = changes.request_remove;
                part.response_headers_to_add = changes.response_add;
                part.response_headers_to_remove = changes.response_remove;
                part.host_rewrite_specifier = authority(headers.request.as_ref())
                    .map(route::weighted_cluster::cluster_weight::HostRewriteSpecifier::HostRewriteLiteral);
            }
            clusters.push(part);
        }
        Ok(route::WeightedCluster { clusters, ..Default::default() })
    }

    fn mirrors(&self, at: &Rule<'_>, rule: &HttpRoute) -> Vec<route::route_action::RequestMirrorPolicy> {
        let mut found = Vec::new();
        let mut push = |destination: &Destination, field: &str, percent: Option<f64>| {
            if percent == Some(0.0) {
                return;
            }
            let field = at.at(field);
            let from = From { object: at.object, field: &field };
            let cluster = self.cluster_for(destination, "http", at.port, from);
            found.push(mirror(cluster, percent.map(millionths)));
        };
        if let Some(destination) = &rule.mirror {
            let percent = rule.mirror_percentage.map(|p| p.value).or(rule.mirror_percent.map(f64::from));
            push(destination, "mirror", percent);
        }
        for (index, entry) in rule.mirrors.iter().enumerate() {
            push(&entry.destination, &format!("mirrors[{index}].destination"), entry.percentage.map(|p| p.value));
        }
        found
    }

    fn route_hash(&self, at: &Rule<'_>, many: &[HttpRouteDestination]) -> Vec<route::route_action::HashPolicy> {
        let mut found: Vec<route::route_action::HashPolicy> = Vec::new();
        for HttpRouteDestination { destination, .. } in many {
            let leads = self.service_of(&destination.host, destination.port, &at.object.namespace, at.port);
            let Some((service, port)) = leads else { continue };
            for policy in self.hash_policies(service, port, &[&destination.subset]) {
                if !found.contains(&policy) {
                    found.push(policy);
                }
            }
        }
        found
    }
}

/// Shares of the sum; a single destination gets everything, whatever it says.
pub(super) fn weights(asked: &[i32]) -> Result<Vec<u32>, String> {
    if let [_] = asked {
        return Ok(vec![100]);
    }
    let weights: Result<Vec<u32>, _> = asked.iter().map(|weight| u32::try_from(*weight)).collect();
    let weights = weights.map_err(|_| "a weight is negative".to_owned())?;
    match weights.iter().map(|weight| u64::from(*weight)).sum::<u64>() {
        0 => Err("the weights add up to 0: no destination would ever be chosen".to_owned()),
        sum if sum > u64::from(u32::MAX) => Err("the weights add up to more than 4294967295".to_owned()),
        _ => Ok(weights),
    }
}

/// `host|port` of `KIND|port|subset|host`.
fn host_and_port(cluster: &str) -> String {
    let mut parts = cluster.split('|');
    let port = parts.nth(1).unwrap_or_default();
    let host = parts.nth(1).unwrap_or_default();
    format!("{host}|{port}")
}

fn rewrite_host(host: String) -> route::route_action::HostRewriteSpecifier {
    route::route_action::HostRewriteSpecifier::HostRewriteLiteral(host)
}

/// Copies of a share of the requests; all of them without one.
pub(crate) fn mirror(
    cluster: String,
    share: Option<types::v3::FractionalPercent>,
) -> route::route_action::RequestMirrorPolicy {
    let fraction = share.map_or_else(hundred_percent, |share| core::RuntimeFractionalPercent {
        default_value: Some(share),
        ..Default::default()
    });
    route::route_action::RequestMirrorPolicy {
        cluster,
        runtime_fraction: Some(fraction),
        trace_sampled: boolv(false),
        disable_shadow_host_suffix_append: true,
        ..Default::default()
    }
}

/// What a route does about failures if nobody says otherwise.
pub(crate) fn default_retry() -> route::RetryPolicy {
    let config = ext::retry::host::previous_hosts::v3::PreviousHostsPredicate {};
    let previous_hosts = route::retry_policy::RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".into(),
        config_type: Some(route::retry_policy::retry_host_predicate::ConfigType::TypedConfig(any(&config))),
    };
    route::RetryPolicy {
        retry_on: DEFAULT_RETRY_ON.into(),
        num_retries: u32v(2),
        retry_host_predicate: vec![previous_hosts],
        host_selection_retry_max_attempts: 5,
        ..Default::default()
    }
}

fn retry(asked: Option<&HttpRetry>) -> Result<Option<route::RetryPolicy>, String> {
    let Some(asked) = asked else { return Ok(Some(default_retry())) };
    let Ok(attempts @ 1..) = u32::try_from(asked.attempts) else { return Ok(None) };
    let mut policy = default_retry();
    policy.num_retries = u32v(attempts);
    if !asked.retry_on.is_empty() {
        let (codes, conditions): (Vec<&str>, Vec<&str>) =
            asked.retry_on.split(',').map(str::trim).filter(|part| !part.is_empty()).partition(is_number);
        let codes: Result<Vec<u32>, String> = codes
            .into_iter()
            .map(|code| {
                code.parse().ok().filter(|code| (100..600).contains(code)).ok_or(format!("{code} is no status"))
            })
            .collect();
        policy.retriable_status_codes = codes?;
        policy.retry_on = conditions.join(",");
        if !policy.retriable_status_codes.is_empty() && !conditions.contains(&"retriable-status-codes") {
            let comma = if conditions.is_empty() { "" } else { "," };
            policy.retry_on.push_str(comma);
            policy.retry_on.push_str("retriable-status-codes");
        }
    }
    policy.per_try_timeout = asked.per_try_timeout.and_then(|d| duration(d.0));
    policy.retry_back_off = asked
        .backoff
        .map(|backoff| route::retry_policy::RetryBackOff { base_interval: duration(backoff.0), max_interval: None });
    if asked.retry_ignore_previous_hosts == Some(false) {
        policy.retry_host_predicate.clear();
        policy.host_selection_retry_max_attempts = 0;
    }
    if asked.retry_remote_localities == Some(true) {
        let config = ext::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig { update_frequency: 2 };
        policy.retry_priority = Some(route::retry_policy::RetryPriority {
            name: "envoy.retry_priorities.previous_priorities".into(),
            config_type: Some(route::retry_policy::retry_priority::ConfigType::TypedConfig(any(&config))),
        });
    }
    Ok(Some(policy))
}

fn is_number(part: &&str) -> bool {
    part.chars().all(|c| c.is_ascii_digit())
}

/// The redirect code as Envoy names it.
pub(crate) fn response_code(code: u32) -> Option<i32> {
    use route::redirect_action::RedirectResponseCode as Code;
    Some(match code {
        0 | 301 => Code::MovedPermanently,
        302 => Code::Found,
        303 => Code::SeeOther,
        307 => Code::TemporaryRedirect,
        308 => Code::PermanentRedirect,
        _ => return None,
    } as i32)
}

fn redirect(asked: &HttpRedirect) -> Result<route::RedirectAction, String> {
    use route::redirect_action::{PathRewriteSpecifier, SchemeRewriteSpecifier};
    let path = if asked.prefix_rewrite.is_empty() {
        PathRewriteSpecifier::PathRedirect(asked.uri.clone())
    } else {
        PathRewriteSpecifier::PrefixRewrite(asked.prefix_rewrite.clone())
    };
    let by_scheme = match asked.scheme.as_str() {
        "http" => 80,
        "https" => 443,
        _ => 0,
    };
    let port_redirect = match (asked.port, asked.derive_port) {
        (Some(port), _) => u32::from(port),
        (None, Some(RedirectPortSelection::FromProtocolDefault)) => by_scheme,
        _ => 0,
    };
    let response_code = response_code(asked.redirect_code)
        .ok_or_else(|| format!("redirectCode {} is none of 301, 302, 303, 307, 308", asked.redirect_code))?;
    Ok(route::RedirectAction {
        host_redirect: asked.authority.clone(),
        port_redirect,
        response_code,
        scheme_rewrite_specifier: (!asked.scheme.is_empty())
            .then(|| SchemeRewriteSpecifier::SchemeRedirect(asked.scheme.clone())),
        path_rewrite_specifier: Some(path),
        ..Default::default()
    })
}

fn direct_response(asked: &compat_objects::istio::HttpDirectResponse) -> route::DirectResponseAction {
    let body = asked.body.as_ref().and_then(|body| match (&body.string, &body.bytes) {
        (Some(text), _) => Some(core::data_source::Specifier::InlineString(text.clone())),
        (None, Some(bytes)) => Some(core::data_source::Specifier::InlineBytes(bytes.0.clone())),
        _ => None,
    });
    route::DirectResponseAction {
        status: asked.status,
        body: body.map(|specifier| core::DataSource { specifier: Some(specifier), ..Default::default() }),
        ..Default::default()
    }
}

/// Header changes in Envoy's form.
#[derive(Default)]
struct Changes {
    request_add: Vec<core::HeaderValueOption>,
    request_remove: Vec<String>,
    response_add: Vec<core::HeaderValueOption>,
    response_remove: Vec<String>,
}

/// Pseudo headers and `host` are no headers: they change the authority.
fn is_authority(key: &str) -> bool {
    key.eq_ignore_ascii_case(":authority") || key.eq_ignore_ascii_case("host")
}

fn authority(operations: Option<&HeaderOperations>) -> Option<String> {
    operations?.set.iter().find(|(key, _)| is_authority(key)).map(|(_, value)| value.clone())
}

fn changes(headers: &Headers) -> Changes {
    let options = |operations: &HeaderOperations| {
        let set = operations.set.iter().filter(|(key, _)| !is_authority(key)).map(|(k, v)| set_header(k, v));
        let add = operations.add.iter().filter(|(key, _)| !is_authority(key)).map(|(k, v)| add_header(k, v));
        set.chain(add).collect::<Vec<_>>()
    };
    let mut changes = Changes::default();
    if let Some(request) = &headers.request {
        changes.request_add = options(request);
        changes.request_remove.clone_from(&request.remove);
    }
    if let Some(response) = &headers.response {
        changes.response_add = options(response);
        changes.response_remove.clone_from(&response.remove);
    }
    changes
}

fn route_headers(built: &mut route::Route, headers: &Headers) {
    let changes = changes(headers);
    built.request_headers_to_add.extend(changes.request_add);
    built.request_headers_to_remove.extend(changes.request_remove);
    built.response_headers_to_add.extend(changes.response_add);
    built.response_headers_to_remove.extend(changes.response_remove);
}
