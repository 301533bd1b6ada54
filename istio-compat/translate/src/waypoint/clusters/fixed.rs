//! The clusters every waypoint has, and the options they share with those of services.
use super::super::Builder;
use super::super::endpoints::ORIGINAL_DST;
use super::HTTP_OPTIONS;
use prost::Message;

use crate::mesh::Service;
use crate::pb::{
    self, Any, any, boolv, cluster, core, endpoint, ext, internal_address, raw_buffer, seconds, transport_socket, u32v,
};
use ext::transport_sockets::internal_upstream::v3 as internal;
use ext::transport_sockets::tls::v3 as tls;
use ext::upstreams::http::v3 as upstream;

/// Waypoints of one family are common, and IPv4 is what they have.
const LOOKUP: cluster::cluster::DnsLookupFamily = cluster::cluster::DnsLookupFamily::V4Preferred;
/// How long an idle HBONE connection stays (mesh config `hboneIdleTimeout`).
const HBONE_IDLE_SECONDS: i64 = 3600;

impl Builder<'_, '_> {
    pub(super) fn connect_originate(&self) -> cluster::Cluster {
        let path = pb::types::metadata::v3::metadata_key::PathSegment {
            segment: Some(pb::types::metadata::v3::metadata_key::path_segment::Segment::Key("waypoint".into())),
        };
        let key = pb::types::metadata::v3::MetadataKey { key: ORIGINAL_DST.into(), path: vec![path] };
        let domain = format!("spiffe://{}/", self.mesh.options.trust_domain);
        let own = format!("{domain}ns/{}/sa/", self.waypoint.key.namespace);
        original_dst("connect_originate", Some(key), &[&domain, &own], false)
    }

    pub(super) fn outer_connect_originate(&self) -> cluster::Cluster {
        let domain = format!("spiffe://{}/", self.mesh.options.trust_domain);
        original_dst("outer_connect_originate", None, &[&domain], true)
    }

    pub(super) fn inner_connect_originate(&self) -> cluster::Cluster {
        let domain = format!("spiffe://{}/", self.mesh.options.trust_domain);
        let mut built = to_listener("inner_connect_originate", "outer_connect_originate");
        let inner = internal::InternalUpstreamTransport {
            transport_socket: Some(transport_socket("tls", any(&upstream_tls(&[&domain])))),
            ..Default::default()
        };
        built.transport_socket = Some(transport_socket("internal_upstream_with_tls", any(&inner)));
        built.typed_extension_protocol_options = hbone_options(true);
        built
    }
}

pub(super) fn discovery(kind: cluster::cluster::DiscoveryType) -> cluster::cluster::ClusterDiscoveryType {
    cluster::cluster::ClusterDiscoveryType::Type(kind as i32)
}

/// The endpoints are names: all addresses of each, or the one it has now.
#[allow(deprecated, reason = "istiod sends it, and data planes read it")]
pub(super) fn resolve(built: &mut cluster::Cluster, round_robin: bool) {
    use cluster::cluster::DiscoveryType;
    let kind = if round_robin { DiscoveryType::LogicalDns } else { DiscoveryType::StrictDns };
    built.cluster_discovery_type = Some(discovery(kind));
    built.eds_cluster_config = None;
    built.dns_lookup_family = LOOKUP as i32;
    built.dns_refresh_rate = seconds(60);
    built.dns_jitter = Some(pb::Duration { seconds: 0, nanos: 100_000_000 });
    built.respect_dns_ttl = true;
}

/// Requests go to what their host resolves to.
pub(super) fn resolve_per_request(built: &mut cluster::Cluster, service: &Service) {
    use ext::clusters::dynamic_forward_proxy::v3::{ClusterConfig, cluster_config::ClusterImplementationSpecifier};
    let cache = ClusterImplementationSpecifier::DnsCacheConfig(dns_cache(service));
    let config = ClusterConfig { cluster_implementation_specifier: Some(cache), ..Default::default() };
    let kind = cluster::cluster::CustomClusterType {
        name: "envoy.clusters.dynamic_forward_proxy".into(),
        typed_config: Some(any(&config)),
    };
    built.cluster_discovery_type = Some(cluster::cluster::ClusterDiscoveryType::ClusterType(kind));
    built.eds_cluster_config = None;
    built.lb_policy = cluster::cluster::LbPolicy::ClusterProvided as i32;
    built.common_lb_config = None;
}

pub(crate) fn dns_cache(service: &Service) -> ext::common::dynamic_forward_proxy::v3::DnsCacheConfig {
    ext::common::dynamic_forward_proxy::v3::DnsCacheConfig {
        name: format!("{}_dfp_dns_cache", service.hostname),
        dns_lookup_family: LOOKUP as i32,
        ..Default::default()
    }
}

pub(crate) fn unlimited() -> cluster::CircuitBreakers {
    let limit = u32v(u32::MAX);
    cluster::CircuitBreakers {
        thresholds: vec![cluster::circuit_breakers::Thresholds {
            max_connections: limit,
            max_pending_requests: limit,
            max_requests: limit,
            max_retries: limit,
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// Metadata of the host (or cluster) handed to the next internal hop.
pub(super) fn passthrough(names: &[(&str, bool)]) -> Vec<internal::internal_upstream_transport::MetadataValueSource> {
    use pb::types::metadata::v3::{MetadataKind, metadata_kind as kind};
    let source = |(name, of_cluster): &(&str, bool)| internal::internal_upstream_transport::MetadataValueSource {
        kind: Some(MetadataKind {
            kind: Some(if *of_cluster {
                kind::Kind::Cluster(kind::Cluster {})
            } else {
                kind::Kind::Host(kind::Host {})
            }),
        }),
        name: (*name).to_owned(),
    };
    names.iter().map(source).collect()
}

/// A cluster whose only endpoint is one of the waypoint's own listeners.
pub(super) fn to_listener(name: &str, listener: &str) -> cluster::Cluster {
    let host = endpoint::Endpoint { address: Some(internal_address(listener, "")), ..Default::default() };
    let member = endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(host)),
        ..Default::default()
    };
    let locality = endpoint::LocalityLbEndpoints { lb_endpoints: vec![member], ..Default::default() };
    let socket =
        internal::InternalUpstreamTransport { transport_socket: Some(raw_buffer("raw_buffer")), ..Default::default() };
    let mut options = as_downstream();
    options.common_http_protocol_options =
        Some(core::HttpProtocolOptions { idle_timeout: seconds(300), ..Default::default() });
    cluster::Cluster {
        name: name.to_owned(),
        alt_stat_name: format!("{name};"),
        circuit_breakers: Some(unlimited()),
        cluster_discovery_type: Some(discovery(cluster::cluster::DiscoveryType::Static)),
        load_assignment: Some(endpoint::ClusterLoadAssignment {
            cluster_name: name.to_owned(),
            endpoints: vec![locality],
            ..Default::default()
        }),
        transport_socket: Some(transport_socket("internal_upstream", any(&socket))),
        typed_extension_protocol_options: [(HTTP_OPTIONS.to_owned(), any(&options))].into(),
        ..cluster::Cluster::default()
    }
}

fn original_dst(
    name: &str,
    metadata_key: Option<pb::types::metadata::v3::MetadataKey>,
    identities: &[&str],
    one_request: bool,
) -> cluster::Cluster {
    let lb = cluster::cluster::OriginalDstLbConfig {
        upstream_port_override: u32v(crate::mesh::waypoints::HBONE_PORT),
        metadata_key,
        ..Default::default()
    };
    cluster::Cluster {
        name: name.to_owned(),
        alt_stat_name: format!("{name};"),
        circuit_breakers: Some(unlimited()),
        cleanup_interval: seconds(60),
        connect_timeout: seconds(10),
        cluster_discovery_type: Some(discovery(cluster::cluster::DiscoveryType::OriginalDst)),
        lb_policy: cluster::cluster::LbPolicy::ClusterProvided as i32,
        lb_config: Some(cluster::cluster::LbConfig::OriginalDstLbConfig(lb)),
        transport_socket: Some(transport_socket("tls", any(&upstream_tls(identities)))),
        typed_extension_protocol_options: hbone_options(one_request),
        ..cluster::Cluster::default()
    }
}

fn hbone_options(one_request: bool) -> std::collections::HashMap<String, Any> {
    let mut options = http2(true);
    options.common_http_protocol_options = Some(core::HttpProtocolOptions {
        idle_timeout: seconds(HBONE_IDLE_SECONDS),
        max_requests_per_connection: if one_request { u32v(1) } else { None },
        ..Default::default()
    });
    [(HTTP_OPTIONS.to_owned(), any(&options))].into()
}

pub(crate) fn http2(allow_connect: bool) -> upstream::HttpProtocolOptions {
    use upstream::http_protocol_options::{ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config};
    let http2 = core::Http2ProtocolOptions { allow_connect, ..Default::default() };
    let config =
        ExplicitHttpConfig { protocol_config: Some(explicit_http_config::ProtocolConfig::Http2ProtocolOptions(http2)) };
    upstream::HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(config)),
        ..Default::default()
    }
}

pub(crate) fn http1() -> upstream::HttpProtocolOptions {
    use upstream::http_protocol_options::{ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config};
    let config = ExplicitHttpConfig {
        protocol_config: Some(explicit_http_config::ProtocolConfig::HttpProtocolOptions(Default::default())),
    };
    upstream::HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(config)),
        ..Default::default()
    }
}

/// The protocol upstream is the one downstream.
pub(crate) fn as_downstream() -> upstream::HttpProtocolOptions {
    use upstream::http_protocol_options::{UpstreamProtocolOptions, UseDownstreamHttpConfig};
    let config = UseDownstreamHttpConfig {
        http_protocol_options: Some(core::Http1ProtocolOptions::default()),
        http2_protocol_options: Some(core::Http2ProtocolOptions::default()),
        ..Default::default()
    };
    upstream::HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(config)),
        ..Default::default()
    }
}

pub(crate) fn set_http_options(built: &mut cluster::Cluster, options: &upstream::HttpProtocolOptions) {
    built.typed_extension_protocol_options.insert(HTTP_OPTIONS.to_owned(), any(options));
}

/// Adds options of HTTP towards upstreams to those there are; without any, HTTP/1.1 is spoken.
pub(super) fn set_upstream_options(built: &mut cluster::Cluster, names: core::UpstreamHttpProtocolOptions) {
    let there = built.typed_extension_protocol_options.get(HTTP_OPTIONS);
    let mut options: upstream::HttpProtocolOptions =
        there.and_then(|options| Message::decode(options.value.as_slice()).ok()).unwrap_or_else(http1);
    options.upstream_http_protocol_options = Some(names);
    set_http_options(built, &options);
}

fn upstream_tls(identities: &[&str]) -> tls::UpstreamTlsContext {
    tls::UpstreamTlsContext { common_tls_context: Some(mesh_tls(identities)), ..Default::default() }
}

/// The waypoint's own certificate, the mesh's roots, and the peers' identities by prefix.
pub(crate) fn mesh_tls(identities: &[&str]) -> tls::CommonTlsContext {
    let names = identities.iter().map(|prefix| tls::SubjectAltNameMatcher {
        san_type: tls::subject_alt_name_matcher::SanType::Uri as i32,
        matcher: Some(pb::prefix(prefix)),
        ..Default::default()
    });
    let validation = tls::common_tls_context::CombinedCertificateValidationContext {
        default_validation_context: Some(tls::CertificateValidationContext {
            match_typed_subject_alt_names: names.collect(),
            ..Default::default()
        }),
        validation_context_sds_secret_config: Some(secret("ROOTCA")),
        ..Default::default()
    };
    let v13 = tls::tls_parameters::TlsProtocol::TlSv13 as i32;
    tls::CommonTlsContext {
        tls_params: Some(tls::TlsParameters {
            tls_minimum_protocol_version: v13,
            tls_maximum_protocol_version: v13,
            ..Default::default()
        }),
        alpn_protocols: vec!["h2".into()],
        tls_certificate_sds_secret_configs: vec![secret("default")],
        validation_context_type: Some(tls::common_tls_context::ValidationContextType::CombinedValidationContext(
            validation,
        )),
        ..Default::default()
    }
}

/// The mesh's own certificate or roots: waited for.
fn secret(name: &str) -> tls::SdsSecretConfig {
    sds(name, seconds(0))
}

/// Key material in the waypoint's own files.
pub(super) fn sds_files(name: &str) -> tls::SdsSecretConfig {
    sds(name, None)
}

/// Key material that this control plane sends.
pub(super) fn sds_sent(name: &str) -> tls::SdsSecretConfig {
    let ads = core::config_source::ConfigSourceSpecifier::Ads(core::AggregatedConfigSource::default());
    let source = core::ConfigSource {
        resource_api_version: core::ApiVersion::V3 as i32,
        config_source_specifier: Some(ads),
        ..Default::default()
    };
    tls::SdsSecretConfig { name: name.to_owned(), sds_config: Some(source) }
}

fn sds(name: &str, initial_fetch_timeout: Option<pb::Duration>) -> tls::SdsSecretConfig {
    let grpc = core::GrpcService {
        target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(core::grpc_service::EnvoyGrpc {
            cluster_name: "sds-grpc".into(),
            ..Default::default()
        })),
        ..Default::default()
    };
    let source = core::ApiConfigSource {
        api_type: core::api_config_source::ApiType::Grpc as i32,
        transport_api_version: core::ApiVersion::V3 as i32,
        grpc_services: vec![grpc],
        set_node_on_first_message_only: true,
        ..Default::default()
    };
    tls::SdsSecretConfig {
        name: name.to_owned(),
        sds_config: Some(core::ConfigSource {
            initial_fetch_timeout,
            resource_api_version: core::ApiVersion::V3 as i32,
            config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::ApiConfigSource(source)),
            ..Default::default()
        }),
    }
}

/// TLS of the waypoint's own listener.
pub(crate) fn downstream_tls(identities: &[&str]) -> core::TransportSocket {
    let context = tls::DownstreamTlsContext {
        common_tls_context: Some(mesh_tls(identities)),
        require_client_certificate: boolv(true),
        ..Default::default()
    };
    transport_socket("tls", any(&context))
}
