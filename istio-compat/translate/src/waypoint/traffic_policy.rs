//! DestinationRule traffic policies onto clusters.
use compat_objects::ObjectKey;
use compat_objects::istio::{
    ConnectionPoolSettings, ConsistentHashLb, H2UpgradePolicy, LoadBalancerSettings, OutlierDetection, SimpleLb,
    Subset, TrafficPolicy, WarmupConfiguration,
};

use super::{Builder, clusters};
use crate::mesh::AppProtocol;
use crate::pb::{cluster, core, duration, route, types, u32v};
use cluster::cluster as c;

/// What holds for one port of a host or subset: the subset's settings replace the host's one by one, a port's replace
/// all of them.
pub(crate) fn effective(host: Option<&TrafficPolicy>, subset: Option<&Subset>, port: u16) -> Option<TrafficPolicy> {
    let host = host.map(|policy| at_port(policy, port));
    let subset = subset.and_then(|subset| subset.traffic_policy.as_ref()).map(|policy| at_port(policy, port));
    match (host, subset) {
        (None, None) => None,
        (Some(host), None) => Some(host),
        (None, Some(subset)) => Some(subset),
        (Some(host), Some(subset)) => Some(TrafficPolicy {
            load_balancer: subset.load_balancer.or(host.load_balancer),
            connection_pool: subset.connection_pool.or(host.connection_pool),
            outlier_detection: subset.outlier_detection.or(host.outlier_detection),
            tls: subset.tls.or(host.tls),
            port_level_settings: Vec::new(),
            tunnel: subset.tunnel.or(host.tunnel),
            proxy_protocol: subset.proxy_protocol.or(host.proxy_protocol),
            retry_budget: subset.retry_budget.or(host.retry_budget),
        }),
    }
}

fn at_port(policy: &TrafficPolicy, port: u16) -> TrafficPolicy {
    let level = policy.port_level_settings.iter().find(|level| level.port.is_some_and(|p| p.number == port));
    match level {
        Some(level) => TrafficPolicy {
            load_balancer: level.load_balancer.clone(),
            connection_pool: level.connection_pool.clone(),
            outlier_detection: level.outlier_detection.clone(),
            tls: level.tls.clone(),
            port_level_settings: Vec::new(),
            tunnel: policy.tunnel.clone(),
            proxy_protocol: policy.proxy_protocol,
            retry_budget: policy.retry_budget.clone(),
        },
        None => policy.clone(),
    }
}

/// Applies a policy to a cluster.
pub(crate) fn apply(
    builder: &Builder<'_, '_>,
    built: &mut cluster::Cluster,
    policy: &TrafficPolicy,
    object: &ObjectKey,
    protocol: AppProtocol,
) {
    connection_pool(built, policy.connection_pool.as_ref(), protocol);
    if let Some(outlier) = &policy.outlier_detection {
        outlier_detection(built, outlier);
    }
    if let Some(lb) = &policy.load_balancer {
        load_balancer(builder, built, lb, policy.outlier_detection.is_some(), object);
    }
    if let Some(budget) = &policy.retry_budget {
        let percent = types::v3::Percent { value: budget.percent.unwrap_or(20.0) };
        if let Some(thresholds) = built.circuit_breakers.as_mut().and_then(|b| b.thresholds.first_mut()) {
            thresholds.retry_budget = Some(cluster::circuit_breakers::thresholds::RetryBudget {
                budget_percent: Some(percent),
                min_retry_concurrency: u32v(budget.min_retry_concurrency),
                budget_interval: budget.budget_interval.and_then(|d| duration(d.0)),
            });
        }
    }
    if policy.tunnel.is_some() {
        builder.warning(object, "spec.trafficPolicy.tunnel", "is not supported at waypoints and is ignored");
    }
}

fn connection_pool(built: &mut cluster::Cluster, pool: Option<&ConnectionPoolSettings>, protocol: AppProtocol) {
    let Some(pool) = pool else { return };
    let positive = |value: i32| u32::try_from(value).ok().filter(|value| *value > 0);
    let mut common = core::HttpProtocolOptions::default();
    if let Some(tcp) = &pool.tcp {
        if let Some(timeout) = tcp.connect_timeout {
            built.connect_timeout = duration(timeout.0);
        }
        if let Some(keepalive) = &tcp.tcp_keepalive {
            let whole = |d: Option<compat_objects::Duration>| {
                d.and_then(|d| u32v(u32::try_from(d.as_secs()).unwrap_or(u32::MAX)))
            };
            built.upstream_connection_options = Some(cluster::UpstreamConnectionOptions {
                tcp_keepalive: Some(core::TcpKeepalive {
                    keepalive_probes: if keepalive.probes > 0 { u32v(keepalive.probes) } else { None },
                    keepalive_time: whole(keepalive.time),
                    keepalive_interval: whole(keepalive.interval),
                }),
                ..Default::default()
            });
        }
        common.max_connection_duration = tcp.max_connection_duration.and_then(|d| duration(d.0));
    }
    let http = pool.http.clone().unwrap_or_default();
    if let Some(t) = built.circuit_breakers.as_mut().and_then(|breakers| breakers.thresholds.first_mut()) {
        let mut set = |slot: fn(&mut cluster::circuit_breakers::Thresholds) -> &mut Option<_>, value: Option<u32>| {
            if let Some(value) = value {
                *slot(t) = u32v(value);
            }
        };
        set(|t| &mut t.max_connections, pool.tcp.as_ref().and_then(|tcp| positive(tcp.max_connections)));
        set(|t| &mut t.max_pending_requests, positive(http.http1_max_pending_requests));
        set(|t| &mut t.max_requests, positive(http.http2_max_requests));
        set(|t| &mut t.max_retries, positive(http.max_retries));
    }
    common.idle_timeout = http.idle_timeout.and_then(|d| duration(d.0));
    common.max_requests_per_connection = positive(http.max_requests_per_connection).and_then(u32v);
    let upgrade = http.h2_upgrade_policy == H2UpgradePolicy::Upgrade && protocol == AppProtocol::Http;
    let asks = common != core::HttpProtocolOptions::default();
    if !(asks || upgrade || http.use_client_protocol) || !(protocol.is_http() || protocol.is_unknown()) {
        return;
    }
    let mut options = if http.use_client_protocol || protocol.is_unknown() {
        clusters::as_downstream()
    } else if upgrade || protocol.is_http2() {
        clusters::http2(false)
    } else {
        clusters::http1()
    };
    options.common_http_protocol_options = asks.then_some(common);
    clusters::set_http_options(built, &options);
}

fn outlier_detection(built: &mut cluster::Cluster, outlier: &OutlierDetection) {
    let mut out = cluster::OutlierDetection {
        enforcing_success_rate: u32v(0),
        interval: outlier.interval.and_then(|d| duration(d.0)),
        base_ejection_time: outlier.base_ejection_time.and_then(|d| duration(d.0)),
        split_external_local_origin_errors: outlier.split_external_local_origin_errors,
        ..cluster::OutlierDetection::default()
    };
    // Zero turns a check off; Envoy wants that said twice.
    let enforcing = |count: u32| u32v(if count > 0 { 100 } else { 0 });
    let nonzero = |count: u32| if count > 0 { u32v(count) } else { None };
    if let Some(count) = outlier.consecutive_5xx_errors {
        (out.consecutive_5xx, out.enforcing_consecutive_5xx) = (nonzero(count), enforcing(count));
    }
    if let Some(count) = outlier.consecutive_gateway_errors {
        (out.consecutive_gateway_failure, out.enforcing_consecutive_gateway_failure) =
            (nonzero(count), enforcing(count));
    }
    if outlier.split_external_local_origin_errors {
        out.enforcing_local_origin_success_rate = u32v(0);
        if let Some(count) = outlier.consecutive_local_origin_failures {
            out.consecutive_local_origin_failure = u32v(count);
            out.enforcing_consecutive_local_origin_failure = enforcing(count);
        }
    }
    if let Ok(percent) = u32::try_from(outlier.max_ejection_percent)
        && percent > 0
    {
        out.max_ejection_percent = u32v(percent);
    }
    built.outlier_detection = Some(out);
    let minimum = f64::from(outlier.min_health_percent.max(0));
    common(built).healthy_panic_threshold = Some(types::v3::Percent { value: minimum });
}

fn common(built: &mut cluster::Cluster) -> &mut c::CommonLbConfig {
    built.common_lb_config.get_or_insert_default()
}

/// Endpoints by the weight of their locality.
pub(crate) fn locality_weighted() -> c::common_lb_config::LocalityConfigSpecifier {
    c::common_lb_config::LocalityConfigSpecifier::LocalityWeightedLbConfig(
        c::common_lb_config::LocalityWeightedLbConfig {},
    )
}

fn load_balancer(
    builder: &Builder<'_, '_>,
    built: &mut cluster::Cluster,
    lb: &LoadBalancerSettings,
    outlier: bool,
    object: &ObjectKey,
) {
    let warmup = lb.warmup.or_else(|| {
        let duration = lb.warmup_duration_secs?;
        Some(WarmupConfiguration { duration: Some(duration), ..WarmupConfiguration::default() })
    });
    let slow_start = warmup.map(slow_start);
    if let Some(hash) = &lb.consistent_hash {
        consistent_hash(built, hash);
    } else {
        let policy = match lb.simple {
            Some(SimpleLb::Random) => c::LbPolicy::Random,
            Some(SimpleLb::RoundRobin) => c::LbPolicy::RoundRobin,
            Some(SimpleLb::Passthrough) => {
                clusters::as_original_dst(built);
                return;
            }
            _ => c::LbPolicy::LeastRequest,
        };
        built.lb_policy = policy as i32;
        built.lb_config = match (policy, slow_start) {
            (c::LbPolicy::RoundRobin, Some(slow)) => {
                Some(c::LbConfig::RoundRobinLbConfig(c::RoundRobinLbConfig { slow_start_config: Some(slow) }))
            }
            (c::LbPolicy::LeastRequest, Some(slow)) => {
                Some(c::LbConfig::LeastRequestLbConfig(c::LeastRequestLbConfig {
                    slow_start_config: Some(slow),
                    ..Default::default()
                }))
            }
            _ => None,
        };
    }
    if let Some(locality) = &lb.locality_lb_setting {
        let wanted =
            !locality.distribute.is_empty() || !locality.failover.is_empty() || !locality.failover_priority.is_empty();
        if wanted && locality.enabled != Some(false) && outlier {
            common(built).locality_config_specifier = Some(locality_weighted());
            if !locality.distribute.is_empty() {
                let reason = "shares by locality are not built here yet: endpoints get equal shares";
                builder.warning(object, "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute", reason);
            }
        }
    }
}

fn slow_start(warmup: WarmupConfiguration) -> c::SlowStartConfig {
    c::SlowStartConfig {
        slow_start_window: warmup.duration.and_then(|d| duration(d.0)),
        aggression: warmup
            .aggression
            .map(|value| core::RuntimeDouble { default_value: value, runtime_key: "(".into() }),
        min_weight_percent: warmup.minimum_percent.map(|value| types::v3::Percent { value }),
    }
}

fn consistent_hash(built: &mut cluster::Cluster, hash: &ConsistentHashLb) {
    use crate::pb::UInt64Value;
    if let Some(maglev) = hash.maglev {
        built.lb_policy = c::LbPolicy::Maglev as i32;
        let size = (maglev.table_size > 0).then_some(UInt64Value { value: maglev.table_size });
        built.lb_config = Some(c::LbConfig::MaglevLbConfig(c::MaglevLbConfig { table_size: size }));
        return;
    }
    let ring = hash.ring_hash.map(|ring| ring.minimum_ring_size).or(hash.minimum_ring_size);
    built.lb_policy = c::LbPolicy::RingHash as i32;
    built.lb_config = Some(c::LbConfig::RingHashLbConfig(c::RingHashLbConfig {
        minimum_ring_size: Some(UInt64Value { value: ring.filter(|size| *size > 0).unwrap_or(1024) }),
        ..Default::default()
    }));
}

/// What a route hashes for a consistent-hash cluster.
pub(crate) fn hash_policy(hash: &ConsistentHashLb) -> Option<route::route_action::HashPolicy> {
    use route::route_action::hash_policy as hp;
    let specifier = if let Some(name) = &hash.http_header_name {
        hp::PolicySpecifier::Header(hp::Header { header_name: name.clone(), ..Default::default() })
    } else if let Some(cookie) = &hash.http_cookie {
        let attributes = cookie
            .attributes
            .iter()
            .map(|attribute| hp::CookieAttribute { name: attribute.name.clone(), value: attribute.value.clone() });
        hp::PolicySpecifier::Cookie(hp::Cookie {
            name: cookie.name.clone(),
            path: cookie.path.clone(),
            ttl: cookie.ttl.and_then(|ttl| duration(ttl.0)),
            attributes: attributes.collect(),
        })
    } else if hash.use_source_ip == Some(true) {
        hp::PolicySpecifier::ConnectionProperties(hp::ConnectionProperties { source_ip: true })
    } else if let Some(name) = &hash.http_query_parameter_name {
        hp::PolicySpecifier::QueryParameter(hp::QueryParameter { name: name.clone() })
    } else {
        return None;
    };
    Some(route::route_action::HashPolicy { terminal: false, policy_specifier: Some(specifier) })
}
