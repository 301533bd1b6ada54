//! Configuration built by hand.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use xds_model::envoy::WaypointConfig;
use xds_model::envoy::chain::*;
use xds_model::envoy::cluster::*;
use xds_model::envoy::filter::{HttpFilter, HttpFilterKind, Router};
use xds_model::envoy::matcher::PathMatcher;
use xds_model::envoy::route::*;

pub(crate) const VIP: &str = "10.96.1.13:80";

pub(crate) fn vip() -> SocketAddr {
    VIP.parse().unwrap()
}

pub(crate) fn options() -> HttpOptions {
    HttpOptions {
        server_name: "istio-envoy".into(),
        server_header: ServerHeader::Overwrite,
        path: PathOptions { normalize: true, merge_slashes: false, escaped_slashes: EscapedSlashes::Keep },
        upgrades: vec!["websocket".into()],
        stream_idle_timeout: None,
        idle_timeout: Some(Duration::from_secs(3600)),
        request_timeout: None,
        request_headers_timeout: None,
        max_connection_duration: None,
        max_stream_duration: None,
        max_requests_per_connection: None,
        max_request_headers_kb: 60,
        max_headers_count: 100,
        underscores: UnderscoreAction::Allow,
        drain_timeout: Duration::from_secs(5),
        accept_http10: false,
        default_host_http10: None,
        preserve_header_case: false,
        max_concurrent_streams: None,
        forward_100_continue: false,
        use_remote_address: false,
        xff_trusted_hops: 0,
        client_cert: ForwardClientCert::Sanitize,
        generate_request_id: true,
        preserve_external_request_id: false,
        always_set_request_id_in_response: false,
        via: None,
        strip_port_from_host: false,
    }
}

pub(crate) fn endpoint(address: &str) -> Endpoint {
    Endpoint {
        target: EndpointTarget::Plain { address: address.parse().unwrap(), additional: Vec::new() },
        weight: 1,
        priority: 0,
        locality: Locality::default(),
        health: Health::Healthy,
        hostname: None,
        workload: None,
    }
}

pub(crate) fn cluster(name: &str, endpoints: &[&str]) -> Cluster {
    let assignment = Assignment {
        name: name.into(),
        endpoints: endpoints.iter().map(|address| endpoint(address)).collect(),
        localities: Vec::new(),
        overprovisioning: 140,
    };
    Cluster {
        name: name.into(),
        service: Some(ServiceName {
            host: format!("{name}.shop.svc.cluster.local"),
            name: name.into(),
            namespace: "shop".into(),
        }),
        config: None,
        subset: None,
        discovery: Discovery::Static(assignment),
        lb: LbPolicy::RoundRobin { slow_start: None },
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
    }
}

pub(crate) fn forward(cluster: &str) -> Forward {
    Forward {
        target: Target::Cluster(cluster.into()),
        cluster_not_found_status: 503,
        path_rewrite: None,
        host_rewrite: None,
        timeout: None,
        idle_timeout: None,
        grpc_timeout_max: None,
        max_stream_duration: None,
        retry: None,
        hash: Vec::new(),
        mirrors: Vec::new(),
        high_priority: false,
        upgrades: Vec::new(),
    }
}

pub(crate) fn retry(on: &[RetryOn], retries: u32) -> RetryPolicy {
    RetryPolicy {
        retry_on: on.to_vec(),
        num_retries: retries,
        per_try_timeout: None,
        per_try_idle_timeout: None,
        avoid_previous_hosts: Some(5),
        previous_priorities: None,
        retriable_status_codes: Vec::new(),
        retriable_headers: Vec::new(),
        retriable_request_headers: Vec::new(),
        base_interval: Duration::from_millis(25),
        max_interval: Duration::from_millis(250),
    }
}

pub(crate) fn route(prefix: &str, action: RouteAction) -> Route {
    Route {
        name: prefix.trim_matches('/').into(),
        config: None,
        matcher: RouteMatch {
            path: PathMatcher::Prefix(prefix.into()),
            case_sensitive: true,
            headers: Vec::new(),
            query: Vec::new(),
            metadata: Vec::new(),
            fraction: None,
            grpc: false,
        },
        action,
        request_headers: HeaderMutations::default(),
        response_headers: HeaderMutations::default(),
        filters: RouteFilters::default(),
        operation: None,
        stat_prefix: None,
    }
}

pub(crate) fn to(prefix: &str, forward: Forward) -> Route {
    route(prefix, RouteAction::Forward(Box::new(forward)))
}

pub(crate) fn http_chain(routes: Vec<Route>, filters: Vec<HttpFilterKind>) -> HttpChain {
    let host = VirtualHost { name: "any".into(), domains: vec!["*".into()], routes, ..VirtualHost::default() };
    let filters = filters.into_iter().chain([HttpFilterKind::Router(Router::default())]);
    HttpChain {
        options: options(),
        filters: filters
            .enumerate()
            .map(|(index, kind)| HttpFilter { name: format!("filter-{index}"), kind })
            .collect(),
        routes: RouteConfig { name: "routes".into(), virtual_hosts: vec![host], ..RouteConfig::default() },
        access_logs: Vec::new(),
        tracing: None,
    }
}

/// One chain for everything.
pub(crate) fn config(chain: ChainKind, clusters: Vec<Cluster>) -> WaypointConfig {
    let rule = DispatchRule {
        networks: vec!["0.0.0.0/0".parse().unwrap()],
        ports: BTreeMap::new(),
        any_port: Some(ByProtocol::always("chain")),
    };
    WaypointConfig {
        dispatch: vec![rule],
        chains: [("chain".to_owned(), Chain { name: "chain".into(), kind: chain })].into(),
        clusters: clusters.into_iter().map(|cluster| (cluster.name.clone(), cluster)).collect(),
        ..WaypointConfig::default()
    }
}

pub(crate) fn http(routes: Vec<Route>, clusters: Vec<Cluster>) -> WaypointConfig {
    config(ChainKind::Http(Box::new(http_chain(routes, Vec::new()))), clusters)
}
