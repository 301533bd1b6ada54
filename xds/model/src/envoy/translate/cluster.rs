//! Clusters.
use std::mem::take;
use std::time::Duration;

use xds_proto::envoy::envoy::config::cluster::v3 as wire;
use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::extensions::transport_sockets::tls::v3 as tls_v3;
use xds_proto::envoy::envoy::extensions::upstreams::http::v3 as http;

use super::common::{metadata_json, opt_duration, timeout, type_name, u32_of, unpack};
use super::report::{At, Refusable, Refusal, Report, refuse_rest};
use super::{endpoint, tls};
use crate::envoy::cluster::{
    CircuitBreakers, Cluster, Discovery, DnsFamily, ENCAP, LbPolicy, LocalityMode, Originate, OutlierDetection,
    RetryBudget, ServiceName, SlowStart, TcpKeepalive, UpstreamHttp, UpstreamVersion,
};

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
const HBONE_PORT: u16 = 15008;
/// Envoy's default.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// What a cluster message is.
pub(super) enum Read {
    Cluster(Box<Cluster>),
    Originate(Originate),
    /// A hop between internal listeners, which Strata makes itself.
    Internal,
}

/// Reads one cluster.
pub(super) fn cluster(mut message: wire::Cluster, report: &mut Report) -> Refusable<Read> {
    match message.name.as_str() {
        "main_internal" | ENCAP | "inner_connect_originate" | "outer_connect_originate" => Ok(Read::Internal),
        "connect_originate" => originate(message, report).map(Read::Originate),
        _ => {
            let cluster = service_cluster(&mut message, report)?;
            rest(message, report)?;
            Ok(Read::Cluster(Box::new(cluster)))
        }
    }
}

fn service_cluster(message: &mut wire::Cluster, report: &mut Report) -> Refusable<Cluster> {
    let istio = message.metadata.as_ref().and_then(|metadata| metadata_json(metadata, "istio")).unwrap_or_default();
    message.metadata.take();
    let text = |key: &str| istio.get(key).and_then(|value| value.as_str()).map(str::to_owned);
    let service = istio.get("services").and_then(|list| list.get(0)).map(|service| {
        let text = |key: &str| service.get(key).and_then(|value| value.as_str()).unwrap_or_default().to_owned();
        ServiceName { host: text("host"), name: text("name"), namespace: text("namespace") }
    });
    let discovery = discovery(message, report)?;
    let (locality, panic_threshold) = common_lb(message.common_lb_config.take(), report)?;
    let mut transport = match message.transport_socket.take() {
        Some(socket) => tls::upstream(socket, report)?,
        None => tls::Transport::default(),
    };
    transport_matches(message)?;
    let mut keepalive = None;
    if let Some(mut options) = message.upstream_connection_options.take() {
        keepalive = options.tcp_keepalive.take().map(tcp_keepalive);
        report.ignore_rest("upstream_connection_options", &options);
    }
    let (http, names) = upstream_http(message, report)?;
    if let Some(tls) = transport.tls.as_mut() {
        tls.auto_sni |= names.auto_sni;
        tls.auto_san |= names.auto_san;
        // Where ALPN would decide between the versions of HTTP, this side has decided.
        if http.version == UpstreamVersion::Auto {
            tls.alpn = vec!["http/1.1".to_owned()];
        }
    }
    Ok(Cluster {
        name: take(&mut message.name),
        service,
        config: text("config"),
        subset: text("subset"),
        discovery,
        lb: lb_policy(message)?,
        locality,
        panic_threshold,
        connect_timeout: opt_duration("connect_timeout", message.connect_timeout.take())?.unwrap_or(CONNECT_TIMEOUT),
        limits: limits(message.circuit_breakers.take().unwrap_or_default(), report)?,
        outlier: message.outlier_detection.take().map(|message| outlier(message, report)).transpose()?,
        http,
        tls: transport.tls,
        proxy_protocol: transport.proxy_protocol,
        tcp_keepalive: keepalive,
        close_on_health_failure: take(&mut message.close_connections_on_host_health_failure),
    })
}

/// Sidecar-style clusters choose a socket per endpoint. Strata chooses by the endpoint itself: HBONE where it says
/// so, plain where nothing is asked for, and endpoints that want sidecar mutual TLS are not used.
fn transport_matches(message: &mut wire::Cluster) -> Refusable<()> {
    const KNOWN: [&str; 3] = ["hbone", "tlsMode-istio", "tlsMode-disabled"];
    for entry in take(&mut message.transport_socket_matches) {
        if !KNOWN.contains(&entry.name.as_str()) {
            return Err(Refusal::new("transport_socket_matches", format!("{} is not supported", entry.name)));
        }
    }
    Ok(())
}

fn rest(mut message: wire::Cluster, report: &mut Report) -> Refusable<()> {
    take(&mut message.alt_stat_name);
    message.cleanup_interval.take();
    message.typed_dns_resolver_config.take();
    message.dns_failure_refresh_rate.take();
    message.dns_jitter.take();
    for (set, field) in [
        (message.transport_socket_matcher.take().is_some(), "transport_socket_matcher"),
        (message.lb_subset_config.take().is_some(), "lb_subset_config"),
        (message.upstream_config.take().is_some(), "upstream_config"),
        (message.upstream_bind_config.take().is_some(), "upstream_bind_config"),
    ] {
        if set {
            return Err(Refusal::new(field, "not supported"));
        }
    }
    for filter in take(&mut message.filters) {
        if filter.name == "istio.metadata_exchange" {
            // Telemetry between sidecars; endpoints carry their workload themselves.
            continue;
        }
        report.ignored(format!("filters {}", filter.name), "cluster filters are not served");
    }
    report.ignore_rest("", &message);
    Ok(())
}

fn discovery(message: &mut wire::Cluster, report: &mut Report) -> Refusable<Discovery> {
    use wire::cluster::{ClusterDiscoveryType, CustomClusterType, DiscoveryType};
    let family = dns_family(take(&mut message.dns_lookup_family))?;
    let refresh = opt_duration("dns_refresh_rate", message.dns_refresh_rate.take())?.unwrap_or(Duration::from_secs(5));
    let respect_ttl = take(&mut message.respect_dns_ttl);
    let assignment = message.load_assignment.take();
    let kind = match message.cluster_discovery_type.take() {
        None => DiscoveryType::Static,
        Some(ClusterDiscoveryType::Type(kind)) => {
            DiscoveryType::try_from(kind).map_err(|_| Refusal::new("type", "unknown"))?
        }
        Some(ClusterDiscoveryType::ClusterType(CustomClusterType { name, typed_config: _ })) => {
            return match name.as_str() {
                "envoy.clusters.dynamic_forward_proxy" => Ok(Discovery::DynamicForward { family }),
                other => Err(Refusal::new("cluster_type", format!("{other} is not supported"))),
            };
        }
    };
    Ok(match kind {
        DiscoveryType::Eds => {
            let config = message.eds_cluster_config.take().unwrap_or_default();
            let name = if config.service_name.is_empty() { message.name.clone() } else { config.service_name };
            Discovery::Eds(name)
        }
        DiscoveryType::Static => {
            Discovery::Static(assignment.map(|it| endpoint::assignment(it, report)).transpose()?.unwrap_or_default())
        }
        DiscoveryType::StrictDns | DiscoveryType::LogicalDns => Discovery::Dns {
            hosts: assignment.map(endpoint::dns_hosts).transpose()?.unwrap_or_default(),
            logical: kind == DiscoveryType::LogicalDns,
            refresh,
            respect_ttl,
            family,
        },
        DiscoveryType::OriginalDst => Discovery::OriginalDestination { port_override: original_dst_port(message)? },
    })
}

fn original_dst_port(message: &mut wire::Cluster) -> Refusable<Option<u16>> {
    match message.lb_config.take() {
        Some(wire::cluster::LbConfig::OriginalDstLbConfig(mut config)) => {
            let port = u32_of(config.upstream_port_override.take());
            config.metadata_key.take();
            refuse_rest(&config).at("original_dst_lb_config")?;
            port.map(|port| u16::try_from(port).map_err(|_| Refusal::new("upstream_port_override", "is no port")))
                .transpose()
        }
        other => {
            message.lb_config = other;
            Ok(None)
        }
    }
}

fn dns_family(value: i32) -> Refusable<DnsFamily> {
    use wire::cluster::DnsLookupFamily as Family;
    Ok(match Family::try_from(value) {
        Ok(Family::Auto) => DnsFamily::Auto,
        Ok(Family::V4Only) => DnsFamily::V4Only,
        Ok(Family::V6Only) => DnsFamily::V6Only,
        Ok(Family::V4Preferred) => DnsFamily::V4Preferred,
        Ok(Family::All) => DnsFamily::All,
        Err(_) => return Err(Refusal::new("dns_lookup_family", "unknown")),
    })
}

fn lb_policy(message: &mut wire::Cluster) -> Refusable<LbPolicy> {
    use wire::cluster::{LbConfig, LbPolicy as Wire};
    let config = message.lb_config.take();
    Ok(match (Wire::try_from(take(&mut message.lb_policy)), config) {
        (Ok(Wire::RoundRobin | Wire::LoadBalancingPolicyConfig), Some(LbConfig::RoundRobinLbConfig(config))) => {
            LbPolicy::RoundRobin { slow_start: config.slow_start_config.map(slow_start).transpose()? }
        }
        (Ok(Wire::RoundRobin | Wire::LoadBalancingPolicyConfig), None) => LbPolicy::RoundRobin { slow_start: None },
        (Ok(Wire::LeastRequest), Some(LbConfig::LeastRequestLbConfig(config))) => LbPolicy::LeastRequest {
            choices: u32_of(config.choice_count).unwrap_or(2),
            slow_start: config.slow_start_config.map(slow_start).transpose()?,
        },
        (Ok(Wire::LeastRequest), None) => LbPolicy::LeastRequest { choices: 2, slow_start: None },
        (Ok(Wire::Random), None) => LbPolicy::Random,
        (Ok(Wire::RingHash), config) => {
            let (mut minimum, mut maximum) = (1024, 8 * 1024 * 1024);
            if let Some(LbConfig::RingHashLbConfig(config)) = config {
                minimum = config.minimum_ring_size.map_or(minimum, |size| size.value);
                maximum = config.maximum_ring_size.map_or(maximum, |size| size.value);
            }
            LbPolicy::RingHash { minimum, maximum }
        }
        (Ok(Wire::Maglev), config) => {
            let mut table_size = 65_537;
            if let Some(LbConfig::MaglevLbConfig(config)) = config {
                table_size = config.table_size.map_or(table_size, |size| size.value);
            }
            LbPolicy::Maglev { table_size }
        }
        (Ok(Wire::ClusterProvided), _) => LbPolicy::ClusterProvided,
        (policy, config) => {
            return Err(Refusal::new("lb_policy", format!("{policy:?} with {config:?} is not supported")));
        }
    })
}

fn slow_start(message: wire::cluster::SlowStartConfig) -> Refusable<SlowStart> {
    let wire::cluster::SlowStartConfig { slow_start_window, aggression, min_weight_percent } = message;
    Ok(SlowStart {
        window: opt_duration("slow_start_window", slow_start_window)?.unwrap_or_default(),
        aggression: aggression.map_or(1.0, |number| number.default_value),
        min_weight: min_weight_percent.map_or(10.0, |percent| percent.value),
    })
}

fn common_lb(message: Option<wire::cluster::CommonLbConfig>, report: &mut Report) -> Refusable<(LocalityMode, f64)> {
    use wire::cluster::common_lb_config::LocalityConfigSpecifier;
    let mut message = message.unwrap_or_default();
    let panic = message.healthy_panic_threshold.take().map_or(50.0, |percent| percent.value);
    let locality = match message.locality_config_specifier.take() {
        None => LocalityMode::None,
        Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => LocalityMode::Weighted,
        Some(LocalityConfigSpecifier::ZoneAwareLbConfig(_)) => LocalityMode::ZoneAware,
    };
    report.ignore_rest("common_lb_config", &message);
    Ok((locality, panic))
}

/// Envoy's defaults where a threshold is missing.
fn limits(message: wire::CircuitBreakers, report: &mut Report) -> Refusable<CircuitBreakers> {
    use core::RoutingPriority;
    let mut limits = CircuitBreakers {
        max_connections: 1024,
        max_pending_requests: 1024,
        max_requests: 1024,
        max_retries: 3,
        retry_budget: None,
    };
    for mut threshold in message.thresholds {
        if RoutingPriority::try_from(threshold.priority) == Ok(RoutingPriority::High) {
            report.ignored("circuit_breakers.thresholds HIGH", "one set of limits for all priorities");
            continue;
        }
        limits.max_connections = u32_of(threshold.max_connections.take()).unwrap_or(limits.max_connections);
        limits.max_pending_requests =
            u32_of(threshold.max_pending_requests.take()).unwrap_or(limits.max_pending_requests);
        limits.max_requests = u32_of(threshold.max_requests.take()).unwrap_or(limits.max_requests);
        limits.max_retries = u32_of(threshold.max_retries.take()).unwrap_or(limits.max_retries);
        limits.retry_budget = threshold.retry_budget.take().map(|budget| RetryBudget {
            percent: budget.budget_percent.map_or(20.0, |percent| percent.value),
            min_concurrency: u32_of(budget.min_retry_concurrency).unwrap_or(3),
        });
        take(&mut threshold.track_remaining);
        report.ignore_rest("circuit_breakers", &threshold);
    }
    if !message.per_host_thresholds.is_empty() {
        report.ignored("circuit_breakers.per_host_thresholds", "has no effect in Strata");
    }
    Ok(limits)
}

fn outlier(mut message: wire::OutlierDetection, report: &mut Report) -> Refusable<OutlierDetection> {
    // A detector enforced at 0 % only counts; enforced at less than 100 % it is taken as fully enforced.
    let mut detector = |name: &str, count: Option<u32>, default: u32, enforcing: Option<u32>, enforced: u32| {
        let share = enforcing.unwrap_or(enforced);
        if share > 0 && share < 100 {
            report.ignored(format!("outlier_detection.{name}"), format!("{share} % is taken as 100 %"));
        }
        if share == 0 { 0 } else { count.unwrap_or(default) }
    };
    let consecutive_5xx = detector(
        "enforcing_consecutive_5xx",
        u32_of(message.consecutive_5xx.take()),
        5,
        u32_of(message.enforcing_consecutive_5xx.take()),
        100,
    );
    let consecutive_gateway_failure = detector(
        "enforcing_consecutive_gateway_failure",
        u32_of(message.consecutive_gateway_failure.take()),
        5,
        u32_of(message.enforcing_consecutive_gateway_failure.take()),
        0,
    );
    let consecutive_local_origin_failure = detector(
        "enforcing_consecutive_local_origin_failure",
        u32_of(message.consecutive_local_origin_failure.take()),
        5,
        u32_of(message.enforcing_consecutive_local_origin_failure.take()),
        100,
    );
    if u32_of(message.enforcing_success_rate.take()) != Some(0) {
        report.ignored("outlier_detection.enforcing_success_rate", "success-rate ejection is not served");
    }
    message.enforcing_local_origin_success_rate.take();
    let base =
        opt_duration("base_ejection_time", message.base_ejection_time.take())?.unwrap_or(Duration::from_secs(30));
    let out = OutlierDetection {
        consecutive_5xx,
        consecutive_gateway_failure,
        consecutive_local_origin_failure,
        split_external_local_origin: take(&mut message.split_external_local_origin_errors),
        interval: opt_duration("interval", message.interval.take())?.unwrap_or(Duration::from_secs(10)),
        base_ejection: base,
        max_ejection: opt_duration("max_ejection_time", message.max_ejection_time.take())?
            .unwrap_or(Duration::from_secs(300))
            .max(base),
        max_ejection_percent: u32_of(message.max_ejection_percent.take()).unwrap_or(10),
    };
    report.ignore_rest("outlier_detection", &message);
    Ok(out)
}

/// TLS names taken from the request.
#[derive(Default)]
struct AutoNames {
    auto_sni: bool,
    auto_san: bool,
}

fn upstream_http(message: &mut wire::Cluster, report: &mut Report) -> Refusable<(UpstreamHttp, AutoNames)> {
    let mut names = AutoNames::default();
    let mut out = UpstreamHttp {
        version: UpstreamVersion::Http1,
        idle_timeout: Some(IDLE_TIMEOUT),
        max_connection_duration: None,
        max_requests_per_connection: None,
        max_concurrent_streams: None,
        preserve_header_case: false,
        override_host: message
            .load_balancing_policy
            .take()
            .is_some_and(|policy| policy.policies.iter().any(|one| is_override_host(one, report))),
    };
    let mut options = take(&mut message.typed_extension_protocol_options);
    let Some(any) = options.remove(HTTP_OPTIONS) else {
        if let Some(name) = options.into_keys().next() {
            return Err(Refusal::new("typed_extension_protocol_options", format!("{name} is not supported")));
        }
        return Ok((out, names));
    };
    let mut options: http::HttpProtocolOptions = unpack(&any)?;
    if let Some(mut common) = options.common_http_protocol_options.take() {
        out.idle_timeout = timeout("idle_timeout", common.idle_timeout.take(), Some(IDLE_TIMEOUT))?;
        out.max_connection_duration = opt_duration("max_connection_duration", common.max_connection_duration.take())?;
        out.max_requests_per_connection = u32_of(common.max_requests_per_connection.take()).filter(|count| *count > 0);
        report.ignore_rest("common_http_protocol_options", &common);
    }
    protocol(options.upstream_protocol_options.take(), &mut out)?;
    if let Some(mut upstream) = options.upstream_http_protocol_options.take() {
        names.auto_sni = take(&mut upstream.auto_sni);
        names.auto_san = take(&mut upstream.auto_san_validation);
        refuse_rest(&upstream).at("upstream_http_protocol_options")?;
    }
    report.ignore_rest("http_protocol_options", &options);
    Ok((out, names))
}

fn is_override_host(policy: &wire::load_balancing_policy::Policy, report: &mut Report) -> bool {
    let name = policy.typed_extension_config.as_ref().map_or("", |config| config.name.as_str());
    let known = name == "envoy.load_balancing_policies.override_host";
    if !known {
        report.ignored(format!("load_balancing_policy {name}"), "not supported; lb_policy counts");
    }
    known
}

fn protocol(
    message: Option<http::http_protocol_options::UpstreamProtocolOptions>,
    out: &mut UpstreamHttp,
) -> Refusable<()> {
    use http::http_protocol_options::UpstreamProtocolOptions;
    use http::http_protocol_options::explicit_http_config::ProtocolConfig;
    let (version, http1, http2) = match message {
        None => return Ok(()),
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => match explicit.protocol_config {
            Some(ProtocolConfig::HttpProtocolOptions(http1)) => (UpstreamVersion::Http1, Some(http1), None),
            Some(ProtocolConfig::Http2ProtocolOptions(http2)) => (UpstreamVersion::Http2, None, Some(http2)),
            Some(ProtocolConfig::Http3ProtocolOptions(_)) => {
                return Err(Refusal::new("http3_protocol_options", "not supported"));
            }
            None => (UpstreamVersion::Http1, None, None),
        },
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(same)) => {
            (UpstreamVersion::SameAsDownstream, same.http_protocol_options, same.http2_protocol_options)
        }
        Some(UpstreamProtocolOptions::AutoConfig(auto)) => {
            (UpstreamVersion::Auto, auto.http_protocol_options, auto.http2_protocol_options)
        }
    };
    out.version = version;
    out.preserve_header_case = http1.is_some_and(|http1| http1.header_key_format.is_some());
    out.max_concurrent_streams = http2.and_then(|http2| u32_of(http2.max_concurrent_streams));
    Ok(())
}

fn tcp_keepalive(message: core::TcpKeepalive) -> TcpKeepalive {
    let core::TcpKeepalive { keepalive_probes, keepalive_time, keepalive_interval } = message;
    let seconds = |value| u32_of(value).map(|seconds| Duration::from_secs(u64::from(seconds)));
    TcpKeepalive {
        probes: u32_of(keepalive_probes),
        time: seconds(keepalive_time),
        interval: seconds(keepalive_interval),
    }
}

fn originate(mut message: wire::Cluster, report: &mut Report) -> Refusable<Originate> {
    let socket = message.transport_socket.take().ok_or_else(|| Refusal::new("transport_socket", "missing"))?;
    let any = tls::typed(socket)?;
    if type_name(&any.type_url) != "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" {
        return Err(Refusal::new("transport_socket", format!("{} instead of TLS", any.type_url)));
    }
    let mut context: tls_v3::UpstreamTlsContext = unpack(&any)?;
    let common = context.common_tls_context.take().unwrap_or_default();
    let peer_sans = tls::mesh_peer(common, report)?;
    refuse_rest(&context).at("transport_socket")?;
    let mut options: http::HttpProtocolOptions =
        message.typed_extension_protocol_options.get(HTTP_OPTIONS).map(unpack).transpose()?.unwrap_or_default();
    let idle = options.common_http_protocol_options.take().and_then(|common| common.idle_timeout);
    let mut windows = (None, None);
    if let Some(http::http_protocol_options::UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) =
        options.upstream_protocol_options.take()
        && let Some(http::http_protocol_options::explicit_http_config::ProtocolConfig::Http2ProtocolOptions(http2)) =
            explicit.protocol_config
    {
        windows = (u32_of(http2.initial_stream_window_size), u32_of(http2.initial_connection_window_size));
    }
    Ok(Originate {
        peer_sans,
        connect_timeout: opt_duration("connect_timeout", message.connect_timeout.take())?.unwrap_or(CONNECT_TIMEOUT),
        idle_timeout: timeout("idle_timeout", idle, Some(IDLE_TIMEOUT))?,
        port: original_dst_port(&mut message)?.unwrap_or(HBONE_PORT),
        initial_stream_window: windows.0,
        initial_connection_window: windows.1,
    })
}
