//! Short names for the Envoy messages used here, and constructors for their smallest pieces.
pub(crate) use xds_proto::envoy::envoy::config::{
    accesslog::v3 as accesslog, cluster::v3 as cluster, core::v3 as core, endpoint::v3 as endpoint,
    listener::v3 as listener, rbac::v3 as rbac, route::v3 as route, trace::v3 as trace,
};
pub(crate) use xds_proto::envoy::envoy::extensions as ext;
pub(crate) use xds_proto::envoy::envoy::r#type as types;
pub(crate) use xds_proto::envoy::envoy::r#type::matcher::v3 as matcher;
pub(crate) use xds_proto::envoy::envoy::r#type::tracing::v3 as tracing_tag;
pub(crate) use xds_proto::envoy::google::protobuf::{
    Any, BoolValue, Duration, StringValue, Struct, UInt32Value, UInt64Value, Value, value,
};
pub(crate) use xds_proto::envoy::xds::core::v3 as xds_core;
pub(crate) use xds_proto::envoy::xds::r#type::matcher::v3 as xds_matcher;

use core::header_value_option::HeaderAppendAction;
use ext::filters::network::http_connection_manager::v3 as hcm;
use prost::{Message, Name};

/// `xds.type.matcher.v3.IPMatcher`, which the generated crate leaves out. Field numbers are xDS's.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct IpMatcher {
    #[prost(message, repeated, tag = "1")]
    pub(crate) range_matchers: Vec<IpRangeMatcher>,
}

/// `xds.type.matcher.v3.IPMatcher.IPRangeMatcher`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct IpRangeMatcher {
    #[prost(message, repeated, tag = "1")]
    pub(crate) ranges: Vec<xds_core::CidrRange>,
    #[prost(message, optional, tag = "2")]
    pub(crate) on_match: Option<xds_matcher::matcher::OnMatch>,
}

/// `udpa.type.v1.TypedStruct`: a configuration as JSON, for filters whose messages are not public.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct TypedStruct {
    #[prost(string, tag = "1")]
    pub(crate) type_url: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) value: Option<Struct>,
}

pub(crate) const IP_MATCHER: &str = "type.googleapis.com/xds.type.matcher.v3.IPMatcher";
pub(crate) const TYPED_STRUCT: &str = "type.googleapis.com/udpa.type.v1.TypedStruct";

/// Packs under the message's own type URL.
pub(crate) fn any<M: Message + Name>(message: &M) -> Any {
    xds_proto::any::pack(&M::type_url(), message)
}

pub(crate) fn any_as<M: Message>(type_url: &str, message: &M) -> Any {
    xds_proto::any::pack(type_url, message)
}

pub(crate) fn u32v(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

pub(crate) fn boolv(value: bool) -> Option<BoolValue> {
    Some(BoolValue { value })
}

pub(crate) fn seconds(seconds: i64) -> Option<Duration> {
    Some(Duration { seconds, nanos: 0 })
}

pub(crate) fn duration(value: std::time::Duration) -> Option<Duration> {
    // u64 seconds from a parsed text never come near i64's end; nanos are below a thousand million.
    Some(Duration {
        seconds: i64::try_from(value.as_secs()).unwrap_or(i64::MAX),
        nanos: value.subsec_nanos().cast_signed(),
    })
}

pub(crate) fn text(value: &str) -> Value {
    Value { kind: Some(value::Kind::StringValue(value.to_owned())) }
}

pub(crate) fn structure<const N: usize>(fields: [(&str, Value); N]) -> Struct {
    Struct { fields: fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() }
}

pub(crate) fn nested(value: Struct) -> Value {
    Value { kind: Some(value::Kind::StructValue(value)) }
}

pub(crate) fn list(values: Vec<Value>) -> Value {
    Value { kind: Some(value::Kind::ListValue(xds_proto::envoy::google::protobuf::ListValue { values })) }
}

pub(crate) fn boolean(value: bool) -> Value {
    Value { kind: Some(value::Kind::BoolValue(value)) }
}

pub(crate) fn metadata<const N: usize>(entries: [(&str, Struct); N]) -> core::Metadata {
    core::Metadata {
        filter_metadata: entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        ..core::Metadata::default()
    }
}

/// In the place of what the header was.
pub(crate) fn set_header(key: &str, value: &str) -> core::HeaderValueOption {
    core::HeaderValueOption {
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd as i32,
        ..add_header(key, value)
    }
}

/// Beside what the header was.
pub(crate) fn add_header(key: &str, value: &str) -> core::HeaderValueOption {
    core::HeaderValueOption {
        header: Some(core::HeaderValue { key: key.to_owned(), value: value.to_owned(), ..Default::default() }),
        append_action: HeaderAppendAction::AppendIfExistsOrAdd as i32,
        ..Default::default()
    }
}

/// A network filter.
pub(crate) fn network_filter(name: &str, config: Any) -> listener::Filter {
    listener::Filter { name: name.to_owned(), config_type: Some(listener::filter::ConfigType::TypedConfig(config)) }
}

/// An HTTP filter.
pub(crate) fn http_filter(name: &str, config: Any) -> hcm::HttpFilter {
    hcm::HttpFilter {
        name: name.to_owned(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(config)),
        ..hcm::HttpFilter::default()
    }
}

pub(crate) fn listener_filter(name: &str, config: Any) -> listener::ListenerFilter {
    listener::ListenerFilter {
        name: name.to_owned(),
        config_type: Some(listener::listener_filter::ConfigType::TypedConfig(config)),
        ..listener::ListenerFilter::default()
    }
}

pub(crate) fn typed(name: &str, config: Any) -> core::TypedExtensionConfig {
    core::TypedExtensionConfig { name: name.to_owned(), typed_config: Some(config) }
}

pub(crate) fn xds_typed(name: &str, config: Any) -> xds_core::TypedExtensionConfig {
    // `xds.core.v3` has its own copy of the message.
    xds_core::TypedExtensionConfig { name: name.to_owned(), typed_config: Some(config) }
}

pub(crate) fn transport_socket(name: &str, config: Any) -> core::TransportSocket {
    core::TransportSocket {
        name: name.to_owned(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(config)),
    }
}

pub(crate) fn regex(regex: &str) -> matcher::RegexMatcher {
    matcher::RegexMatcher { regex: regex.to_owned(), ..matcher::RegexMatcher::default() }
}

pub(crate) fn string_match(pattern: matcher::string_matcher::MatchPattern) -> matcher::StringMatcher {
    matcher::StringMatcher { match_pattern: Some(pattern), ..matcher::StringMatcher::default() }
}

pub(crate) fn exact(value: &str) -> matcher::StringMatcher {
    string_match(matcher::string_matcher::MatchPattern::Exact(value.to_owned()))
}

pub(crate) fn prefix(value: &str) -> matcher::StringMatcher {
    string_match(matcher::string_matcher::MatchPattern::Prefix(value.to_owned()))
}

pub(crate) fn suffix(value: &str) -> matcher::StringMatcher {
    string_match(matcher::string_matcher::MatchPattern::Suffix(value.to_owned()))
}

pub(crate) fn regex_match(value: &str) -> matcher::StringMatcher {
    string_match(matcher::string_matcher::MatchPattern::SafeRegex(regex(value)))
}

/// A percentage in millionths, as Istio gives fractions of a percent.
pub(crate) fn millionths(percent: f64) -> types::v3::FractionalPercent {
    // Clamped: the float is between 0 and 1 000 000.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=1e6")]
    let numerator = (percent * 10_000.0).round().clamp(0.0, 1_000_000.0) as u32;
    types::v3::FractionalPercent {
        numerator,
        denominator: types::v3::fractional_percent::DenominatorType::Million as i32,
    }
}

pub(crate) fn hundred_percent() -> core::RuntimeFractionalPercent {
    core::RuntimeFractionalPercent {
        default_value: Some(types::v3::FractionalPercent { numerator: 100, denominator: 0 }),
        ..core::RuntimeFractionalPercent::default()
    }
}

pub(crate) fn internal_address(listener: &str, endpoint_id: &str) -> core::Address {
    let internal = core::EnvoyInternalAddress {
        endpoint_id: endpoint_id.to_owned(),
        address_name_specifier: Some(core::envoy_internal_address::AddressNameSpecifier::ServerListenerName(
            listener.to_owned(),
        )),
    };
    core::Address { address: Some(core::address::Address::EnvoyInternalAddress(internal)) }
}

pub(crate) fn socket_address(address: &str, port: u32) -> core::Address {
    let socket = core::SocketAddress {
        address: address.to_owned(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(port)),
        ..core::SocketAddress::default()
    };
    core::Address { address: Some(core::address::Address::SocketAddress(socket)) }
}

pub(crate) fn raw_buffer(name: &str) -> core::TransportSocket {
    transport_socket(name, any(&ext::transport_sockets::raw_buffer::v3::RawBuffer {}))
}

/// Aggregated discovery as a config source.
pub(crate) fn ads() -> core::ConfigSource {
    core::ConfigSource {
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(core::AggregatedConfigSource {})),
        initial_fetch_timeout: seconds(0),
        resource_api_version: core::ApiVersion::V3 as i32,
        ..core::ConfigSource::default()
    }
}
