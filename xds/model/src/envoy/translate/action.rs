//! What a forwarding route does: targets, retries, hashing, mirrors, per-route filters.
use std::collections::HashMap;
use std::mem::take;
use std::time::Duration;

use xds_proto::envoy::envoy::config::core::v3::RoutingPriority;
use xds_proto::envoy::envoy::config::route::v3 as wire;
use xds_proto::envoy::envoy::extensions::retry::priority::previous_priorities::v3 as previous;
use xds_proto::envoy::google::protobuf as wkt;

use super::common::{
    header, is_true, opt_duration, runtime_fraction, substitution, timeout, type_name, u32_of, unpack,
};
use super::headers::mutations;
use super::report::{At, Refusable, Refusal, Report, refuse_rest};
use super::route::{DEFAULT_TIMEOUT, rewrite_template};
use super::{ext_authz, filter};
use crate::envoy::matcher::Fraction;
use crate::envoy::route::{
    Forward, HashKey, HashPolicy, HostRewrite, Mirror, PathRewrite, RetryOn, RetryPolicy, RouteFilters, Target,
    WeightedCluster,
};

/// A forwarding action.
pub(super) fn forward(mut message: wire::RouteAction, report: &mut Report) -> Refusable<Forward> {
    use wire::route_action::ClusterNotFoundResponseCode as NotFound;
    let target = target(message.cluster_specifier.take(), report)?;
    let cluster_not_found_status = match NotFound::try_from(take(&mut message.cluster_not_found_response_code)) {
        Ok(NotFound::ServiceUnavailable) => 503,
        Ok(NotFound::NotFound) => 404,
        Ok(NotFound::InternalServerError) => 500,
        Err(_) => return Err(Refusal::new("cluster_not_found_response_code", "unknown")),
    };
    let path_rewrite = path_rewrite(&mut message)?;
    let host_rewrite = host_rewrite(message.host_rewrite_specifier.take())?;
    let timeout = timeout("timeout", message.timeout.take(), Some(DEFAULT_TIMEOUT))?;
    let mut grpc_timeout_max = opt_duration("max_grpc_timeout", message.max_grpc_timeout.take())?;
    // Obsolete and 0 unless the deadline is to be shortened.
    let mut max_stream_duration = None;
    if let Some(wire::route_action::MaxStreamDuration {
        max_stream_duration: max,
        grpc_timeout_header_max,
        grpc_timeout_header_offset,
    }) = message.max_stream_duration.take()
    {
        if grpc_timeout_header_offset.is_some() {
            report.ignored("max_stream_duration.grpc_timeout_header_offset", "has no effect in Strata");
        }
        max_stream_duration = super::common::timeout("max_stream_duration", max, None)?;
        grpc_timeout_max = opt_duration("grpc_timeout_header_max", grpc_timeout_header_max)?.or(grpc_timeout_max);
    }
    let forward = Forward {
        target,
        cluster_not_found_status,
        path_rewrite,
        host_rewrite,
        timeout,
        idle_timeout: opt_duration("idle_timeout", message.idle_timeout.take())?,
        grpc_timeout_max,
        max_stream_duration,
        retry: message.retry_policy.take().map(|policy| retry(policy, report)).transpose().at("retry_policy")?,
        hash: take(&mut message.hash_policy).into_iter().map(hash).collect::<Refusable<_>>().at("hash_policy")?,
        mirrors: take(&mut message.request_mirror_policies)
            .into_iter()
            .map(|policy| mirror(policy, report))
            .collect::<Refusable<_>>()
            .at("request_mirror_policies")?,
        high_priority: RoutingPriority::try_from(take(&mut message.priority)) == Ok(RoutingPriority::High),
        upgrades: take(&mut message.upgrade_configs)
            .into_iter()
            .map(|upgrade| (upgrade.upgrade_type.to_ascii_lowercase(), upgrade.enabled.is_none_or(|flag| flag.value)))
            .collect(),
    };
    refuse_rest(&message)?;
    Ok(forward)
}

fn target(specifier: Option<wire::route_action::ClusterSpecifier>, report: &mut Report) -> Refusable<Target> {
    use wire::route_action::ClusterSpecifier;
    match specifier {
        Some(ClusterSpecifier::Cluster(name)) => Ok(Target::Cluster(name)),
        Some(ClusterSpecifier::WeightedClusters(message)) => weighted(message, report).at("weighted_clusters"),
        Some(ClusterSpecifier::ClusterHeader(_)) => Err(Refusal::new("cluster_header", "not supported")),
        Some(ClusterSpecifier::ClusterSpecifierPlugin(name)) => {
            Err(Refusal::new("cluster_specifier_plugin", format!("{name} is not supported")))
        }
        Some(ClusterSpecifier::InlineClusterSpecifierPlugin(_)) => {
            Err(Refusal::new("inline_cluster_specifier_plugin", "not supported"))
        }
        None => Err(Refusal::new("cluster_specifier", "missing")),
    }
}

fn weighted(mut message: wire::WeightedCluster, report: &mut Report) -> Refusable<Target> {
    let clusters = take(&mut message.clusters);
    // The sum of the weights is the total; the obsolete field may say nothing else.
    let declared = u32_of(message.total_weight.take());
    refuse_rest(&message)?;
    let clusters = clusters.into_iter().map(|share| weighted_share(share, report)).collect::<Refusable<Vec<_>>>()?;
    let total: u64 = clusters.iter().map(|share| u64::from(share.weight)).sum();
    if declared.is_some_and(|declared| u64::from(declared) != total) {
        return Err(Refusal::new("total_weight", format!("is not the sum of the weights, {total}")));
    }
    if total == 0 {
        return Err(Refusal::new("weight", "all weights are 0"));
    }
    Ok(Target::Weighted(clusters))
}

fn weighted_share(
    mut message: wire::weighted_cluster::ClusterWeight,
    report: &mut Report,
) -> Refusable<WeightedCluster> {
    use wire::weighted_cluster::cluster_weight::HostRewriteSpecifier;
    let share = WeightedCluster {
        name: take(&mut message.name),
        weight: u32_of(message.weight.take()).unwrap_or(0),
        request_headers: mutations(
            take(&mut message.request_headers_to_add),
            take(&mut message.request_headers_to_remove),
        )?,
        response_headers: mutations(
            take(&mut message.response_headers_to_add),
            take(&mut message.response_headers_to_remove),
        )?,
        host_rewrite: message.host_rewrite_specifier.take().map(|HostRewriteSpecifier::HostRewriteLiteral(host)| host),
        filters: filters(take(&mut message.typed_per_filter_config), report)?,
    };
    refuse_rest(&message)?;
    Ok(share)
}

fn path_rewrite(message: &mut wire::RouteAction) -> Refusable<Option<PathRewrite>> {
    if let Some(rewrite) = message.regex_rewrite.take() {
        let (pattern, substitution) = substitution(rewrite)?;
        return Ok(Some(PathRewrite::Regex { pattern, substitution }));
    }
    if let Some(policy) = message.path_rewrite_policy.take() {
        return rewrite_template(policy).map(Some);
    }
    let prefix = take(&mut message.prefix_rewrite);
    let full = take(&mut message.path_rewrite);
    Ok(match (prefix.is_empty(), full.is_empty()) {
        (false, _) => Some(PathRewrite::Prefix(prefix)),
        (true, false) => Some(PathRewrite::Full(full)),
        (true, true) => None,
    })
}

fn host_rewrite(specifier: Option<wire::route_action::HostRewriteSpecifier>) -> Refusable<Option<HostRewrite>> {
    use wire::route_action::HostRewriteSpecifier;
    Ok(match specifier {
        None => None,
        Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => Some(HostRewrite::Literal(host)),
        Some(HostRewriteSpecifier::AutoHostRewrite(flag)) => flag.value.then_some(HostRewrite::Auto),
        Some(HostRewriteSpecifier::HostRewriteHeader(name)) => Some(HostRewrite::Header(name.to_ascii_lowercase())),
        Some(HostRewriteSpecifier::HostRewritePathRegex(rewrite)) => {
            let (pattern, substitution) = substitution(rewrite)?;
            Some(HostRewrite::PathRegex { pattern, substitution })
        }
        Some(HostRewriteSpecifier::HostRewrite(_)) => return Err(Refusal::new("host_rewrite", "not supported")),
    })
}

/// A retry policy.
pub(super) fn retry(mut message: wire::RetryPolicy, report: &mut Report) -> Refusable<RetryPolicy> {
    let attempts = u32::try_from(take(&mut message.host_selection_retry_max_attempts)).unwrap_or(0);
    let mut avoid_previous_hosts = None;
    for predicate in take(&mut message.retry_host_predicate) {
        if predicate.name == "envoy.retry_host_predicates.previous_hosts" {
            // Envoy's default is one more choice.
            avoid_previous_hosts = Some(attempts.max(1));
        } else {
            report.ignored(format!("retry_host_predicate {}", predicate.name), "not supported; any host is retried");
        }
    }
    let previous_priorities = match message.retry_priority.take() {
        Some(wire::retry_policy::RetryPriority {
            name: _,
            config_type: Some(wire::retry_policy::retry_priority::ConfigType::TypedConfig(any)),
        }) if type_name(&any.type_url).ends_with("PreviousPrioritiesConfig") => {
            let previous::PreviousPrioritiesConfig { update_frequency } = unpack(&any)?;
            Some(u32::try_from(update_frequency).unwrap_or(0))
        }
        Some(other) => {
            report.ignored(format!("retry_priority {}", other.name), "not supported");
            None
        }
        None => None,
    };
    let (base, max) = match message.retry_back_off.take() {
        Some(wire::retry_policy::RetryBackOff { base_interval, max_interval }) => {
            (opt_duration("base_interval", base_interval)?, opt_duration("max_interval", max_interval)?)
        }
        None => (None, None),
    };
    let base_interval = base.unwrap_or(Duration::from_millis(25));
    let policy = RetryPolicy {
        retry_on: retry_on(&take(&mut message.retry_on), report),
        num_retries: u32_of(message.num_retries.take()).unwrap_or(1),
        per_try_timeout: timeout("per_try_timeout", message.per_try_timeout.take(), None)?,
        per_try_idle_timeout: timeout("per_try_idle_timeout", message.per_try_idle_timeout.take(), None)?,
        avoid_previous_hosts,
        previous_priorities,
        retriable_status_codes: take(&mut message.retriable_status_codes)
            .into_iter()
            .filter_map(|code| u16::try_from(code).ok())
            .collect(),
        retriable_headers: take(&mut message.retriable_headers).into_iter().map(header).collect::<Refusable<_>>()?,
        retriable_request_headers: take(&mut message.retriable_request_headers)
            .into_iter()
            .map(header)
            .collect::<Refusable<_>>()?,
        base_interval,
        max_interval: max.unwrap_or(base_interval * 10),
    };
    report.ignore_rest("retry_policy", &message);
    Ok(policy)
}

fn retry_on(text: &str, report: &mut Report) -> Vec<RetryOn> {
    let mut conditions = Vec::new();
    for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        let condition = match word {
            "5xx" => RetryOn::FiveXx,
            "gateway-error" => RetryOn::GatewayError,
            "reset" => RetryOn::Reset,
            "reset-before-request" => RetryOn::ResetBeforeRequest,
            "connect-failure" => RetryOn::ConnectFailure,
            "envoy-ratelimited" => RetryOn::EnvoyRateLimited,
            "retriable-4xx" => RetryOn::Retriable4xx,
            "refused-stream" => RetryOn::RefusedStream,
            "retriable-status-codes" => RetryOn::RetriableStatusCodes,
            "retriable-headers" => RetryOn::RetriableHeaders,
            "http3-post-connect-failure" => RetryOn::Http3PostConnectFailure,
            "cancelled" => RetryOn::Cancelled,
            "deadline-exceeded" => RetryOn::DeadlineExceeded,
            "internal" => RetryOn::Internal,
            "resource-exhausted" => RetryOn::ResourceExhausted,
            "unavailable" => RetryOn::Unavailable,
            other => {
                report.ignored(format!("retry_policy.retry_on {other}"), "unknown condition");
                continue;
            }
        };
        if !conditions.contains(&condition) {
            conditions.push(condition);
        }
    }
    conditions
}

fn hash(message: wire::route_action::HashPolicy) -> Refusable<HashPolicy> {
    use wire::route_action::hash_policy::{Cookie, PolicySpecifier};
    let wire::route_action::HashPolicy { terminal, policy_specifier } = message;
    let key = match policy_specifier {
        Some(PolicySpecifier::Header(header)) => {
            if header.regex_rewrite.is_some() {
                return Err(Refusal::new("header.regex_rewrite", "not supported"));
            }
            HashKey::Header(header.header_name.to_ascii_lowercase())
        }
        Some(PolicySpecifier::Cookie(Cookie { name, ttl, path, attributes })) => HashKey::Cookie {
            name,
            ttl: opt_duration("ttl", ttl)?,
            path,
            attributes: attributes.into_iter().map(|attribute| (attribute.name, attribute.value)).collect(),
        },
        Some(PolicySpecifier::ConnectionProperties(properties)) if properties.source_ip => HashKey::SourceIp,
        Some(PolicySpecifier::ConnectionProperties(_)) => {
            return Err(Refusal::new("connection_properties", "nothing to hash"));
        }
        Some(PolicySpecifier::QueryParameter(parameter)) => HashKey::Query(parameter.name),
        Some(PolicySpecifier::FilterState(state)) => {
            return Err(Refusal::new("filter_state", format!("{} is not supported", state.key)));
        }
        None => return Err(Refusal::new("policy_specifier", "missing")),
    };
    Ok(HashPolicy { key, terminal })
}

fn mirror(mut message: wire::route_action::RequestMirrorPolicy, report: &mut Report) -> Refusable<Mirror> {
    let mirror = Mirror {
        cluster: take(&mut message.cluster),
        fraction: message.runtime_fraction.take().map(runtime_fraction).transpose()?.unwrap_or(Fraction::ALWAYS),
        shadow_suffix: !take(&mut message.disable_shadow_host_suffix_append),
        host_rewrite: Some(take(&mut message.host_rewrite_literal)).filter(|host| !host.is_empty()),
    };
    if is_true(message.trace_sampled.take()) {
        report.ignored("trace_sampled", "copies are traced as their original is");
    }
    refuse_rest(&message)?;
    Ok(mirror)
}

/// `typed_per_filter_config`.
pub(super) fn filters(configs: HashMap<String, wkt::Any>, report: &mut Report) -> Refusable<RouteFilters> {
    let mut out = RouteFilters::default();
    for (name, any) in configs {
        match type_name(&any.type_url) {
            "envoy.extensions.filters.http.cors.v3.CorsPolicy" => {
                out.cors = Some(filter::cors_policy(unpack(&any)?).at(&name)?);
            }
            "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
                out.fault = filter::fault(unpack(&any)?, report).at(&name)?;
            }
            "envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute" => {
                out.ext_authz = Some(ext_authz::per_route(unpack(&any)?).at(&name)?);
            }
            // Emitted for sidecars too; a waypoint's chain has no such filter, so it has no effect in Envoy either.
            "envoy.extensions.filters.http.stateful_session.v3.StatefulSessionPerRoute" => {
                report.ignored(name, "stateful sessions are not served on waypoints");
            }
            other => return Err(Refusal::new(name, format!("{other} is not supported"))),
        }
    }
    Ok(out)
}
