//! Filter chains: what happens to the connections of one service port.
use super::Builder;
use super::access::Target;
use super::clusters::dns_cache;
use super::destinations::inbound_vip;
use super::listeners::{peer_metadata, reshare_target, router};
use super::routes::default_route;
use super::telemetry::InForce;
use crate::mesh::{Resolution, Service, ServicePort};
use crate::pb::{
    self, TypedStruct, any, any_as, boolean, boolv, core, ext, http_filter, listener, network_filter, route, structure,
    text,
};
use ext::filters::http::dynamic_forward_proxy::v3 as dynamic;
use ext::filters::network::http_connection_manager::v3 as hcm;
use ext::filters::network::tcp_proxy::v3 as tcp_proxy;

/// Envoy's own limit on direct responses, which istiod raises where it writes routes itself.
const DIRECT_RESPONSE_BYTES: u32 = 1024 * 1024;
/// Istio's filter that counts.
const STATS: &str = "istio.stats";
const STATS_TYPE: &str = "type.googleapis.com/stats.PluginConfig";

/// An HTTP chain before it is put together.
struct Http<'a> {
    name: &'a str,
    /// Of the requests it is for.
    domain: &'a str,
    port: u16,
    http2: bool,
    routes: Vec<route::Route>,
    /// The routes are istiod's own default, not a user's.
    default: bool,
}

impl Builder<'_, '_> {
    /// The chain of one port as HTTP or TCP.
    pub(crate) fn chain(&self, service: &Service, port: &ServicePort, kind: &str) -> listener::FilterChain {
        let name = inbound_vip(port.number, kind, "", &service.hostname);
        let target = Target::Service(service);
        let filters = if kind == "http" {
            let own = self.routes(service, port);
            let default = own.is_none();
            let routes = own.unwrap_or_else(|| {
                let operation = format!("{}:{}/*", service.hostname, port.number);
                vec![default_route(&name, &operation, self.hash_policies(service, port.number, &[""]))]
            });
            // Where the request's host says where it goes, only hosts of the service may.
            let domain = if service.resolution == Resolution::PerRequest { &service.hostname } else { "*" };
            let http2 = port.protocol.is_http2();
            let http = Http { name: &name, domain, port: port.number, http2, routes, default };
            vec![self.http(&target, &http)]
        } else {
            self.tcp(&target, self.tcp_proxy(service, port, &name))
        };
        listener::FilterChain { name, filters, ..Default::default() }
    }

    /// Chains of workloads addressed directly, whatever the port.
    pub(crate) fn direct_chains(&self) -> [listener::FilterChain; 2] {
        let mut tcp = vec![reshare_target()];
        tcp.extend(self.tcp(&Target::Workloads, to_cluster("encap", "encap")));
        let routes = vec![default_route("encap", ":0/*", Vec::new())];
        let http = Http { name: "encap", domain: "*", port: 0, http2: false, routes, default: true };
        let http = vec![reshare_target(), self.http(&Target::Workloads, &http)];
        [
            listener::FilterChain { name: "direct-tcp".into(), filters: tcp, ..Default::default() },
            listener::FilterChain { name: "direct-http".into(), filters: http, ..Default::default() },
        ]
    }

    /// Metadata, who may come in, what is counted and logged, and where it goes.
    fn tcp(&self, target: &Target<'_>, mut proxy: tcp_proxy::TcpProxy) -> Vec<listener::Filter> {
        let telemetry = self.telemetry(target);
        let exchange = TypedStruct {
            type_url: "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange".into(),
            value: Some(structure([("enable_discovery", boolean(true)), ("protocol", text("istio-peer-exchange"))])),
        };
        let mut filters = vec![network_filter("istio.metadata_exchange", any_as(pb::TYPED_STRUCT, &exchange))];
        filters.extend(self.network_access(target));
        filters.extend(self.stats(&telemetry).map(|stats| network_filter(STATS, any_as(STATS_TYPE, &stats))));
        proxy.access_log = self.access_logs(&telemetry);
        filters.push(network_filter("envoy.filters.network.tcp_proxy", any(&proxy)));
        filters
    }

    fn tcp_proxy(&self, service: &Service, port: &ServicePort, name: &str) -> tcp_proxy::TcpProxy {
        let Some(clusters) = self.tcp_route(service, port).filter(|clusters| !clusters.is_empty()) else {
            return to_cluster(name, name);
        };
        if let [(only, _)] = clusters.as_slice() {
            return to_cluster(name, only);
        }
        let weight = |(cluster, weight): (String, u32)| tcp_proxy::tcp_proxy::weighted_cluster::ClusterWeight {
            name: cluster,
            weight,
            ..Default::default()
        };
        let weighted = tcp_proxy::tcp_proxy::WeightedCluster { clusters: clusters.into_iter().map(weight).collect() };
        tcp_proxy::TcpProxy {
            stat_prefix: name.to_owned(),
            cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::WeightedClusters(weighted)),
            ..Default::default()
        }
    }

    fn http(&self, target: &Target<'_>, http: &Http<'_>) -> listener::Filter {
        let virtual_host = route::VirtualHost {
            name: format!("inbound|http|{}", http.port),
            domains: vec![http.domain.to_owned()],
            routes: http.routes.clone(),
            ..Default::default()
        };
        let routes = route::RouteConfiguration {
            name: http.name.to_owned(),
            virtual_hosts: vec![virtual_host],
            validate_clusters: boolv(false),
            max_direct_response_body_size_bytes: if http.default { pb::u32v(DIRECT_RESPONSE_BYTES) } else { None },
            ..Default::default()
        };
        let request_id = ext::request_id::uuid::v3::UuidRequestIdConfig {
            use_request_id_for_trace_sampling: boolv(true),
            ..Default::default()
        };
        let escaped = hcm::http_connection_manager::PathWithEscapedSlashesAction::KeepUnchanged as i32;
        let telemetry = self.telemetry(target);
        let manager = hcm::HttpConnectionManager {
            stat_prefix: format!("inbound_0.0.0.0_{};", http.port),
            server_name: "istio-envoy".into(),
            http_filters: self.http_filters(target, &telemetry),
            access_log: self.access_logs(&telemetry),
            tracing: self.tracing(&telemetry),
            http2_protocol_options: http.http2.then(core::Http2ProtocolOptions::default),
            stream_idle_timeout: pb::seconds(0),
            use_remote_address: boolv(false),
            proxy_100_continue: true,
            upgrade_configs: vec![hcm::http_connection_manager::UpgradeConfig {
                upgrade_type: "websocket".into(),
                ..Default::default()
            }],
            normalize_path: boolv(true),
            path_with_escaped_slashes_action: escaped,
            request_id_extension: Some(hcm::RequestIdExtension { typed_config: Some(any(&request_id)) }),
            route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(routes)),
            ..Default::default()
        };
        network_filter("envoy.filters.network.http_connection_manager", any(&manager))
    }

    fn http_filters(&self, target: &Target<'_>, telemetry: &[InForce<'_>]) -> Vec<hcm::HttpFilter> {
        let mut filters = self.custom_http_access(target);
        filters.extend(self.jwt(target));
        filters.extend(self.http_access(target));
        let stats = ext::filters::http::grpc_stats::v3::FilterConfig {
            emit_filter_state: true,
            per_method_stat_specifier: Some(
                ext::filters::http::grpc_stats::v3::filter_config::PerMethodStatSpecifier::StatsForAllMethods(
                    pb::BoolValue { value: false },
                ),
            ),
            ..Default::default()
        };
        let discovery = structure([("workload_discovery", pb::nested(structure([])))]);
        let upstream = structure([("upstream_discovery", pb::list(vec![pb::nested(discovery)]))]);
        filters.extend([
            http_filter("envoy.filters.http.grpc_stats", any(&stats)),
            http_filter("envoy.filters.http.fault", any(&ext::filters::http::fault::v3::HttpFault::default())),
            http_filter("envoy.filters.http.cors", any(&ext::filters::http::cors::v3::Cors {})),
        ]);
        if let Target::Service(service) = target
            && service.resolution == Resolution::PerRequest
        {
            filters.push(http_filter("envoy.filters.http.dynamic_forward_proxy", any(&resolve_host(service))));
        }
        filters.push(http_filter("waypoint_upstream_peer_metadata", peer_metadata(upstream)));
        filters.extend(self.stats(telemetry).map(|stats| http_filter(STATS, any_as(STATS_TYPE, &stats))));
        filters.push(router());
        filters
    }
}

/// Resolves the request's host before it is routed; the cluster of the service has the same cache.
fn resolve_host(service: &Service) -> dynamic::FilterConfig {
    let cache = dynamic::filter_config::ImplementationSpecifier::DnsCacheConfig(dns_cache(service));
    dynamic::FilterConfig { implementation_specifier: Some(cache), ..Default::default() }
}

fn to_cluster(stat_prefix: &str, cluster: &str) -> tcp_proxy::TcpProxy {
    tcp_proxy::TcpProxy {
        stat_prefix: stat_prefix.to_owned(),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster(cluster.to_owned())),
        ..Default::default()
    }
}
