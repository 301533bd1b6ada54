//! The listeners of a waypoint: the HBONE server, the inside where services are told apart, and the way out.
use std::collections::BTreeMap;

use ipnet::IpNet;

use super::Builder;
use super::clusters::{downstream_tls, kinds};
use super::destinations::inbound_vip;
use crate::mesh::{AppProtocol, Service, ServicePort};
use crate::pb::{
    self, Any, IpMatcher, IpRangeMatcher, TypedStruct, any, any_as, boolean, boolv, core, ext, http_filter, listener,
    listener_filter, network_filter, route, socket_address, structure, u32v, xds_core, xds_matcher, xds_typed,
};
use ext::filters::common::set_filter_state::v3 as filter_state;
use ext::filters::network::http_connection_manager::v3 as hcm;
use ext::filters::network::tcp_proxy::v3 as tcp_proxy;
use ext::matching::common_inputs::network::v3 as inputs;
use filter_state::filter_state_value::SharedWithUpstream;
use listener::listener_filter_chain_match_predicate as predicate;
use xds_matcher::matcher::matcher_tree::{MatchMap, TreeType};
use xds_matcher::matcher::{MatcherTree, MatcherType, OnMatch, on_match};

/// Factory of filter state objects that can also be hashed (1.29.2 and later).
const HASHABLE: &str = "istio.hashable_string";

impl Builder<'_, '_> {
    /// Every listener.
    pub(crate) fn listeners(&self) -> Vec<listener::Listener> {
        vec![
            self.connect_terminate(),
            self.main_internal(),
            connect_originate(),
            inner_connect_originate(),
            outer_connect_originate(),
        ]
    }

    fn connect_terminate(&self) -> listener::Listener {
        let domain = format!("spiffe://{}/", self.mesh.options.trust_domain);
        let connect =
            hcm::http_connection_manager::UpgradeConfig { upgrade_type: "CONNECT".into(), ..Default::default() };
        let manager = hcm::HttpConnectionManager {
            stat_prefix: "connect_terminate".into(),
            server_name: "istio-envoy".into(),
            http2_protocol_options: Some(core::Http2ProtocolOptions {
                allow_connect: true,
                max_concurrent_streams: u32v(100),
                connection_keepalive: Some(core::KeepaliveSettings {
                    interval: pb::seconds(10),
                    timeout: pb::seconds(20),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            http_filters: vec![
                http_filter("waypoint_downstream_peer_metadata", downstream_peer_metadata()),
                http_filter("connect_authority", connect_authority()),
                router(),
            ],
            stream_idle_timeout: pb::seconds(0),
            upgrade_configs: vec![connect],
            use_remote_address: boolv(false),
            forward_client_cert_details: hcm::http_connection_manager::ForwardClientCertDetails::AppendForward as i32,
            set_current_client_cert_details: Some(hcm::http_connection_manager::SetCurrentClientCertDetails {
                subject: boolv(true),
                dns: true,
                uri: true,
                ..Default::default()
            }),
            route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(to_main_internal())),
            ..Default::default()
        };
        let chain = listener::FilterChain {
            name: "default".into(),
            filters: vec![network_filter("envoy.filters.network.http_connection_manager", any(&manager))],
            transport_socket: Some(downstream_tls(&[&domain])),
            ..Default::default()
        };
        let balance = listener::listener::connection_balance_config::ExactBalance {};
        listener::Listener {
            name: "connect_terminate".into(),
            address: Some(socket_address("0.0.0.0", crate::mesh::waypoints::HBONE_PORT)),
            filter_chains: vec![chain],
            connection_balance_config: Some(listener::listener::ConnectionBalanceConfig {
                balance_type: Some(listener::listener::connection_balance_config::BalanceType::ExactBalance(balance)),
            }),
            ..Default::default()
        }
    }

    fn main_internal(&self) -> listener::Listener {
        let services: Vec<&Service> = self.mesh.services_of(&self.waypoint.key).collect();
        let mut filter_chains = Vec::new();
        let mut ranges = Vec::new();
        for service in &services {
            let mut ports = BTreeMap::new();
            for port in super::clusters::governed(service) {
                filter_chains.extend(kinds(port.protocol).iter().map(|kind| self.chain(service, port, kind)));
                ports.insert(port.number.to_string(), by_protocol(service, port));
            }
            // A service without a virtual address is not met here by address.
            if ports.is_empty() || service.vips.is_empty() {
                continue;
            }
            ranges.push(IpRangeMatcher {
                ranges: service.vips.iter().map(cidr).collect(),
                on_match: Some(tree("port", any(&inputs::DestinationPortInput {}), ports, None)),
            });
        }
        filter_chains.extend(self.direct_chains());
        let workloads = self.mesh.workloads_of(&self.waypoint.key);
        let workloads: Vec<xds_core::CidrRange> =
            workloads.flat_map(|workload| workload.addresses.iter().map(|ip| cidr(&IpNet::from(*ip)))).collect();
        let any_workload = !workloads.is_empty();
        if any_workload {
            ranges.push(IpRangeMatcher { ranges: workloads, on_match: Some(sniffed("direct-http", "direct-tcp")) });
        }
        let matcher = IpMatcher { range_matchers: ranges };
        let matcher_tree = MatcherTree {
            input: Some(xds_typed("ip", any(&inputs::DestinationIpInput {}))),
            tree_type: Some(TreeType::CustomMatch(xds_typed("ip", any_as(pb::IP_MATCHER, &matcher)))),
        };
        listener::Listener {
            name: "main_internal".into(),
            filter_chains,
            filter_chain_matcher: Some(xds_matcher::Matcher {
                on_no_match: None,
                matcher_type: Some(MatcherType::MatcherTree(matcher_tree)),
            }),
            listener_filters: inspectors(&services, any_workload),
            traffic_direction: core::TrafficDirection::Inbound as i32,
            listener_specifier: Some(listener::listener::ListenerSpecifier::InternalListener(
                listener::listener::InternalListenerConfig {},
            )),
            ..Default::default()
        }
    }
}

pub(crate) fn router() -> hcm::HttpFilter {
    http_filter("envoy.filters.http.router", any(&ext::filters::http::router::v3::Router::default()))
}

fn to_main_internal() -> route::RouteConfiguration {
    use route::route_action::upgrade_config::ConnectConfig;
    let action = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster("main_internal".into())),
        upgrade_configs: vec![route::route_action::UpgradeConfig {
            upgrade_type: "CONNECT".into(),
            connect_config: Some(ConnectConfig::default()),
            ..Default::default()
        }],
        ..Default::default()
    };
    let connect = route::route_match::PathSpecifier::ConnectMatcher(route::route_match::ConnectMatcher {});
    let only = route::Route {
        r#match: Some(route::RouteMatch { path_specifier: Some(connect), ..Default::default() }),
        action: Some(route::route::Action::Route(action)),
        ..Default::default()
    };
    let host = route::VirtualHost {
        name: "default".into(),
        domains: vec!["*".into()],
        routes: vec![only],
        ..Default::default()
    };
    route::RouteConfiguration { name: "default".into(), virtual_hosts: vec![host], ..Default::default() }
}

/// Finds the caller's workload by its address, for telemetry.
fn downstream_peer_metadata() -> Any {
    let discovery = structure([("workload_discovery", pb::nested(structure([])))]);
    let value = structure([
        ("downstream_discovery", pb::list(vec![pb::nested(discovery)])),
        ("shared_with_upstream", boolean(true)),
    ]);
    peer_metadata(value)
}

pub(crate) fn peer_metadata(value: pb::Struct) -> Any {
    let type_url = "type.googleapis.com/io.istio.http.peer_metadata.Config".to_owned();
    any_as(pb::TYPED_STRUCT, &TypedStruct { type_url, value: Some(value) })
}

/// The whole trusted context of the inside: target, caller's address, both identities.
fn connect_authority() -> Any {
    let authority = "%REQ(:AUTHORITY)%";
    let once = SharedWithUpstream::Once;
    let config = ext::filters::http::set_filter_state::v3::Config {
        on_request_headers: vec![
            set("envoy.filters.listener.original_dst.local_ip", "", authority, once),
            set("io.istio.connect_authority", HASHABLE, authority, once),
            set("envoy.filters.listener.original_dst.remote_ip", "", "%DOWNSTREAM_REMOTE_ADDRESS%", once),
            set("io.istio.peer_principal", HASHABLE, "%DOWNSTREAM_PEER_URI_SAN%", once),
            set("io.istio.local_principal", HASHABLE, "%DOWNSTREAM_LOCAL_URI_SAN%", once),
        ],
        ..Default::default()
    };
    any(&config)
}

pub(crate) fn set(
    key: &str,
    factory: &str,
    format: &str,
    shared: SharedWithUpstream,
) -> filter_state::FilterStateValue {
    let source = core::DataSource {
        specifier: Some(core::data_source::Specifier::InlineString(format.to_owned())),
        ..Default::default()
    };
    let format = core::SubstitutionFormatString {
        format: Some(core::substitution_format_string::Format::TextFormatSource(source)),
        ..Default::default()
    };
    filter_state::FilterStateValue {
        factory_key: factory.to_owned(),
        shared_with_upstream: shared as i32,
        key: Some(filter_state::filter_state_value::Key::ObjectKey(key.to_owned())),
        value: Some(filter_state::filter_state_value::Value::FormatString(format)),
        ..Default::default()
    }
}

fn cidr(net: &IpNet) -> xds_core::CidrRange {
    xds_core::CidrRange { address_prefix: net.network().to_string(), prefix_len: u32v(u32::from(net.prefix_len())) }
}

fn to_chain(name: &str) -> OnMatch {
    let value = pb::StringValue { value: name.to_owned() };
    let action = xds_typed(name, any_as("type.googleapis.com/google.protobuf.StringValue", &value));
    OnMatch { on_match: Some(on_match::OnMatch::Action(action)), ..Default::default() }
}

fn tree(name: &str, input: Any, map: BTreeMap<String, OnMatch>, no_match: Option<OnMatch>) -> OnMatch {
    let matcher = xds_matcher::Matcher {
        on_no_match: no_match.map(Box::new),
        matcher_type: Some(MatcherType::MatcherTree(MatcherTree {
            input: Some(xds_typed(name, input)),
            tree_type: Some(TreeType::ExactMatchMap(MatchMap { map: map.into_iter().collect() })),
        })),
    };
    OnMatch { on_match: Some(on_match::OnMatch::Matcher(Box::new(matcher))), ..Default::default() }
}

/// By what the first bytes look like. The quotes are part of the values.
fn sniffed(http: &str, tcp: &str) -> OnMatch {
    let map = ["'h2c'", "'http/1.1'"].into_iter().map(|protocol| (protocol.to_owned(), to_chain(http))).collect();
    tree("application-protocol", any(&inputs::ApplicationProtocolInput {}), map, Some(to_chain(tcp)))
}

fn by_protocol(service: &Service, port: &ServicePort) -> OnMatch {
    let name = |kind| inbound_vip(port.number, kind, "", &service.hostname);
    match kinds(port.protocol) {
        [only] => to_chain(&name(only)),
        _ => sniffed(&name("http"), &name("tcp")),
    }
}

/// Looks at first bytes only where that can decide something: a server that speaks first would wait for nothing.
fn inspectors(services: &[&Service], any_workload: bool) -> Vec<listener::ListenerFilter> {
    let original_dst = ext::filters::listener::original_dst::v3::OriginalDst::default();
    let mut http = listener_filter(
        "envoy.filters.listener.http_inspector",
        any(&ext::filters::listener::http_inspector::v3::HttpInspector::default()),
    );
    let mut all: BTreeMap<u16, Vec<AppProtocol>> = BTreeMap::new();
    for port in services.iter().flat_map(|service| &service.ports) {
        all.entry(port.number).or_default().push(port.protocol);
    }
    let ports = |wanted: fn(&AppProtocol) -> bool| -> Vec<u16> {
        all.iter().filter(|(_, protocols)| protocols.iter().all(wanted)).map(|(port, _)| *port).collect()
    };
    if !any_workload {
        http.filter_disabled = disabled(&ports(|protocol| !protocol.is_unknown()));
    }
    let mut filters = vec![listener_filter("envoy.filters.listener.original_dst", any(&original_dst)), http];
    let is_tls = |protocol: &AppProtocol| matches!(protocol, AppProtocol::Tls | AppProtocol::Https);
    if all.values().flatten().any(is_tls) {
        let inspector = ext::filters::listener::tls_inspector::v3::TlsInspector {
            initial_read_buffer_size: u32v(512),
            ..Default::default()
        };
        let mut tls = listener_filter("envoy.filters.listener.tls_inspector", any(&inspector));
        tls.filter_disabled = disabled(&ports(|p| !matches!(p, AppProtocol::Tls | AppProtocol::Https)));
        filters.push(tls);
    }
    filters
}

fn disabled(ports: &[u16]) -> Option<listener::ListenerFilterChainMatchPredicate> {
    let rule = |port: &u16| listener::ListenerFilterChainMatchPredicate {
        rule: Some(predicate::Rule::DestinationPortRange(pb::types::v3::Int32Range {
            start: i32::from(*port),
            end: i32::from(*port) + 1,
        })),
    };
    let mut rules: Vec<_> = ports.iter().map(rule).collect();
    match rules.len() {
        0 => None,
        1 => rules.pop(),
        _ => Some(listener::ListenerFilterChainMatchPredicate {
            rule: Some(predicate::Rule::OrMatch(predicate::MatchSet { rules })),
        }),
    }
}

/// A listener only the waypoint itself connects to.
fn internal(name: &str, filters: Vec<listener::Filter>, restore: bool) -> listener::Listener {
    let original_dst = ext::filters::listener::original_dst::v3::OriginalDst::default();
    let restore = restore.then(|| listener_filter("envoy.filters.listener.original_dst", any(&original_dst)));
    listener::Listener {
        name: name.to_owned(),
        use_original_dst: boolv(false),
        filter_chains: vec![listener::FilterChain { filters, ..Default::default() }],
        listener_filters: restore.into_iter().collect(),
        listener_specifier: Some(listener::listener::ListenerSpecifier::InternalListener(
            listener::listener::InternalListenerConfig {},
        )),
        ..Default::default()
    }
}

/// A TCP proxy that tunnels through CONNECT.
fn tunnel(cluster: &str, hostname: &str, header: Option<(&str, &str)>) -> listener::Filter {
    let header = header.map(|(key, value)| pb::set_header(key, value));
    let proxy = tcp_proxy::TcpProxy {
        stat_prefix: cluster.to_owned(),
        tunneling_config: Some(tcp_proxy::tcp_proxy::TunnelingConfig {
            hostname: hostname.to_owned(),
            headers_to_add: header.into_iter().collect(),
            ..Default::default()
        }),
        cluster_specifier: Some(tcp_proxy::tcp_proxy::ClusterSpecifier::Cluster(cluster.to_owned())),
        ..Default::default()
    };
    network_filter("envoy.filters.network.tcp_proxy", any(&proxy))
}

fn connect_originate() -> listener::Listener {
    internal("connect_originate", vec![tunnel("connect_originate", "%DOWNSTREAM_LOCAL_ADDRESS%", None)], true)
}

const DOUBLE: &str = "%FILTER_STATE(istio.double_hbone.hbone_target_address:PLAIN)%";

fn inner_connect_originate() -> listener::Listener {
    let transitive = SharedWithUpstream::Transitive;
    let config = ext::filters::network::set_filter_state::v3::Config {
        on_new_connection: vec![
            set(
                "envoy.filters.listener.original_dst.local_ip",
                "",
                "%DYNAMIC_METADATA(envoy.filters.listener.original_dst:local)%",
                transitive,
            ),
            set(
                "istio.double_hbone.hbone_target_address",
                HASHABLE,
                "%DYNAMIC_METADATA(istio:double_hbone:hbone_target_address)%",
                transitive,
            ),
        ],
        ..Default::default()
    };
    let filters = vec![
        network_filter("propagate_endpoint_metadata", any(&config)),
        tunnel("inner_connect_originate", DOUBLE, Some(("x-forwarded-network", ""))),
    ];
    internal("inner_connect_originate", filters, false)
}

fn outer_connect_originate() -> listener::Listener {
    let filters = vec![tunnel("outer_connect_originate", DOUBLE, Some(("x-istio-source", "waypoint")))];
    internal("outer_connect_originate", filters, true)
}

/// Hands the target on to the next internal hop.
pub(crate) fn reshare_target() -> listener::Filter {
    let config = ext::filters::network::set_filter_state::v3::Config {
        on_new_connection: vec![set(
            "envoy.filters.listener.original_dst.local_ip",
            "",
            "%FILTER_STATE(envoy.filters.listener.original_dst.local_ip:PLAIN)%",
            SharedWithUpstream::Once,
        )],
        ..Default::default()
    };
    network_filter("connect_authority", any(&config))
}
