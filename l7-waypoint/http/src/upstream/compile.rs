//! From configuration to what the balancer works on.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use l7_resilience as resilience;
use l7_resilience::{ClusterSpec, HostSpec, Limits, OutlierConfig, States};
use l7_telemetry::ServiceInfo;
use xds_model::envoy::cluster::{
    Assignment, CircuitBreakers, Cluster, Discovery, ENCAP, Endpoint, EndpointTarget, Health, LbPolicy, Locality,
    LocalityMode, OutlierDetection, SlowStart, UpstreamHttp, UpstreamVersion,
};

use super::{CompiledCluster, Mode};
use crate::pool::Freed;

/// Compiles a cluster with its endpoints. `now` is in monotonic milliseconds.
pub(crate) fn compile<'a>(
    config: &Cluster,
    assignment: &'a Assignment,
    states: &States,
    freed: Freed,
    now: u64,
) -> CompiledCluster {
    let name: Arc<str> = config.name.as_str().into();
    let keys: Vec<Arc<str>> = assignment.endpoints.iter().map(|endpoint| endpoint_key(endpoint).into()).collect();
    let mut localities: HashMap<&'a Locality, u32> = HashMap::new();
    let mut host = |(endpoint, key): (&'a Endpoint, &Arc<str>)| {
        let next = localities.len() as u32;
        let locality = *localities.entry(&endpoint.locality).or_insert(next);
        let group = |weight: &&xds_model::envoy::cluster::LocalityWeight| {
            weight.priority == endpoint.priority && weight.locality == endpoint.locality
        };
        let locality_weight = assignment.localities.iter().find(group).map_or(1, |group| group.weight.max(1));
        HostSpec {
            key: key.clone(),
            weight: endpoint.weight,
            priority: endpoint.priority,
            locality,
            locality_weight,
            health: health(endpoint),
        }
    };
    let hosts = assignment.endpoints.iter().zip(&keys).map(&mut host).collect();
    let (policy, slow_start) = policy(&config.lb);
    let spec = ClusterSpec {
        name: name.clone(),
        hosts,
        policy,
        panic_threshold: config.panic_threshold.clamp(0.0, 100.0).round() as u32,
        locality_weighted: config.locality == LocalityMode::Weighted,
        slow_start,
        outlier: config.outlier.as_ref().map(outlier),
        limits: limits(&config.limits),
    };
    let service = config.service.clone().unwrap_or_default();
    let text = |text: String| if text.is_empty() { "unknown".into() } else { Arc::from(text) };
    let service =
        ServiceInfo { host: text(service.host), name: text(service.name), namespace: text(service.namespace) };
    let mode = match config.discovery {
        Discovery::OriginalDestination { port_override } => {
            Mode::OriginalDestination { port: port_override, hbone: false }
        }
        Discovery::DynamicForward { .. } => Mode::ByAuthority,
        Discovery::Eds(_) | Discovery::Static(_) | Discovery::Dns { .. } => Mode::Balanced,
    };
    CompiledCluster {
        config: Arc::new(config.clone()),
        assignment: assignment.clone(),
        keys,
        balancer: resilience::Cluster::build(spec, states, now),
        service: Arc::new(service),
        name,
        freed,
        mode,
    }
}

/// The cluster behind [`ENCAP`]: the address the client asked for, over HBONE.
pub(crate) fn encap(states: &States, freed: Freed) -> CompiledCluster {
    let config = Cluster {
        name: ENCAP.to_owned(),
        service: None,
        config: None,
        subset: None,
        discovery: Discovery::OriginalDestination { port_override: None },
        lb: LbPolicy::ClusterProvided,
        locality: LocalityMode::None,
        panic_threshold: 0.0,
        connect_timeout: Duration::from_secs(10),
        limits: CircuitBreakers {
            max_connections: u32::MAX,
            max_pending_requests: u32::MAX,
            max_requests: u32::MAX,
            max_retries: u32::MAX,
            retry_budget: None,
        },
        outlier: None,
        http: UpstreamHttp {
            version: UpstreamVersion::SameAsDownstream,
            idle_timeout: Some(Duration::from_secs(3600)),
            max_connection_duration: None,
            max_requests_per_connection: None,
            max_concurrent_streams: None,
            preserve_header_case: false,
            override_host: false,
        },
        tls: None,
        proxy_protocol: None,
        tcp_keepalive: None,
        close_on_health_failure: false,
    };
    let mut compiled = compile(&config, &Assignment::default(), states, freed, 0);
    compiled.mode = Mode::OriginalDestination { port: None, hbone: true };
    compiled
}

/// What identifies an endpoint, and what logs show as the upstream host.
pub(crate) fn endpoint_key(endpoint: &Endpoint) -> String {
    match &endpoint.target {
        EndpointTarget::Hbone { authority, .. } => authority.to_string(),
        EndpointTarget::Plain { address, .. } => address.to_string(),
        EndpointTarget::Unreachable { reason } => reason.clone(),
    }
}

/// An endpoint that is just an address.
pub(crate) fn endpoint_at(address: SocketAddr, hbone: bool) -> Endpoint {
    let target = if hbone {
        EndpointTarget::Hbone { authority: address, waypoint: None }
    } else {
        EndpointTarget::Plain { address, additional: Vec::new() }
    };
    let (health, locality) = (Health::Healthy, Locality::default());
    Endpoint { target, weight: 1, priority: 0, locality, health, hostname: None, workload: None }
}

fn health(endpoint: &Endpoint) -> resilience::Health {
    match (&endpoint.target, endpoint.health) {
        (EndpointTarget::Unreachable { .. }, _) | (_, Health::Unhealthy) => resilience::Health::Unhealthy,
        (_, Health::Draining) => resilience::Health::Draining,
        (_, Health::Healthy | Health::Degraded) => resilience::Health::Healthy,
    }
}

fn policy(config: &LbPolicy) -> (resilience::LbPolicy, Option<resilience::SlowStart>) {
    let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    match config {
        LbPolicy::RoundRobin { slow_start } => (resilience::LbPolicy::RoundRobin, slow_start.map(ramp)),
        LbPolicy::LeastRequest { slow_start, .. } => (resilience::LbPolicy::LeastRequest, slow_start.map(ramp)),
        LbPolicy::Random => (resilience::LbPolicy::Random, None),
        LbPolicy::RingHash { minimum, maximum } => {
            (resilience::LbPolicy::RingHash { minimum: small(*minimum), maximum: small(*maximum) }, None)
        }
        LbPolicy::Maglev { table_size } => (resilience::LbPolicy::Maglev { table_size: small(*table_size) }, None),
        LbPolicy::ClusterProvided => (resilience::LbPolicy::Random, None),
    }
}

fn ramp(config: SlowStart) -> resilience::SlowStart {
    resilience::SlowStart { window: config.window, min_percent: config.min_weight, aggression: config.aggression }
}

fn outlier(config: &OutlierDetection) -> OutlierConfig {
    let on = |count: u32| (count > 0).then_some(count);
    OutlierConfig {
        consecutive_5xx: on(config.consecutive_5xx),
        consecutive_gateway: on(config.consecutive_gateway_failure),
        consecutive_local: on(config.consecutive_local_origin_failure),
        split_local_origin: config.split_external_local_origin,
        interval: config.interval,
        base_ejection: config.base_ejection,
        max_ejection: config.max_ejection,
        max_ejection_percent: config.max_ejection_percent,
        always_eject_one: false,
    }
}

fn limits(config: &CircuitBreakers) -> Limits {
    let budget = config.retry_budget;
    Limits {
        connections: config.max_connections,
        pending: config.max_pending_requests,
        requests: config.max_requests,
        retries: config.max_retries,
        budget: budget.map(|b| resilience::RetryBudget { percent: b.percent, min_concurrency: b.min_concurrency }),
    }
}
