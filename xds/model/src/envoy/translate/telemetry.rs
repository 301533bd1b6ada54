//! Access logs, tracing and statistics. Nothing here can be refused: what is not served is noticed.
use std::mem::take;

use xds_proto::envoy::envoy::config::accesslog::v3 as wire;
use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::config::core::v3::http_uri;
use xds_proto::envoy::envoy::config::trace::v3 as trace;
use xds_proto::envoy::envoy::extensions::access_loggers::file::v3 as file;
use xds_proto::envoy::envoy::extensions::access_loggers::filters::cel::v3 as cel;
use xds_proto::envoy::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use xds_proto::envoy::envoy::r#type::tracing::v3 as tag;
use xds_proto::envoy::google::protobuf::Any;
use xds_proto::istio::stats::{MetricConfig, PluginConfig};

use super::common::{format_text, inline_text, json, type_name, u32_of, unpack};
use super::report::{Refusable, Refusal, Report};
use crate::envoy::telemetry::{
    AccessLog, AccessLogFilter, AccessLogFormat, AccessLogSink, Collector, CollectorHttp, MetricOverride, SpanProtocol,
    StatsFilter, TagValue, Tracing, Zipkin,
};

/// Access logs of one place.
pub(super) fn access_logs(list: Vec<wire::AccessLog>, report: &mut Report) -> Vec<AccessLog> {
    list.into_iter()
        .filter_map(|message| {
            let name = message.name.clone();
            access_log(message, report)
                .map_err(|Refusal(reason)| report.ignored(format!("access_log {name}"), reason))
                .ok()
        })
        .collect()
}

fn access_log(message: wire::AccessLog, report: &mut Report) -> Refusable<AccessLog> {
    let wire::AccessLog { name, filter, config_type } = message;
    let Some(wire::access_log::ConfigType::TypedConfig(any)) = config_type else {
        return Err(Refusal::new("typed_config", "missing"));
    };
    let sink = match type_name(&any.type_url) {
        "envoy.extensions.access_loggers.file.v3.FileAccessLog" => {
            let file::FileAccessLog { path, access_log_format } = unpack(&any)?;
            AccessLogSink::File { path, format: format(access_log_format, report)? }
        }
        other => {
            report.ignored(format!("access_log {name}"), format!("{other} is not served"));
            AccessLogSink::Other { name, type_url: any.type_url.clone() }
        }
    };
    Ok(AccessLog { sink, filter: filter.map(|filter| log_filter(filter, report)) })
}

fn format(message: Option<file::file_access_log::AccessLogFormat>, report: &mut Report) -> Refusable<AccessLogFormat> {
    use core::substitution_format_string::Format;
    use file::file_access_log::AccessLogFormat as Wire;
    let json_format = |fields, omit_empty| AccessLogFormat::Json { fields: json(fields), omit_empty };
    Ok(match message {
        None => AccessLogFormat::Default,
        Some(Wire::Format(text)) => AccessLogFormat::Text(text),
        Some(Wire::JsonFormat(fields) | Wire::TypedJsonFormat(fields)) => json_format(fields, false),
        Some(Wire::LogFormat(mut format)) => {
            // Extra operators (CEL and the like); unknown operators print as "-".
            for formatter in take(&mut format.formatters) {
                report.ignored(format!("access_log.formatters {}", formatter.name), "its operators print \"-\"");
            }
            let omit = take(&mut format.omit_empty_values);
            let chosen = format.format.take();
            report.ignore_rest("access_log.log_format", &format);
            match chosen {
                Some(Format::TextFormat(text)) => AccessLogFormat::Text(text),
                Some(Format::TextFormatSource(source)) => AccessLogFormat::Text(inline_text(source)?),
                Some(Format::JsonFormat(fields)) => json_format(fields, omit),
                None => AccessLogFormat::Default,
            }
        }
    })
}

fn log_filter(message: wire::AccessLogFilter, report: &mut Report) -> AccessLogFilter {
    use wire::access_log_filter::FilterSpecifier;
    use wire::comparison_filter::Op;
    let all = |list: Vec<wire::AccessLogFilter>, report: &mut Report| {
        list.into_iter().map(|one| log_filter(one, report)).collect()
    };
    let compare = |comparison: Option<wire::ComparisonFilter>| {
        let comparison = comparison.unwrap_or_default();
        (Op::try_from(comparison.op).unwrap_or(Op::Eq), comparison.value.map_or(0, |value| value.default_value))
    };
    let unsupported = |what: &str, report: &mut Report| {
        report.ignored(format!("access_log.filter {what}"), "not evaluated; everything is logged");
        AccessLogFilter::Unsupported(what.to_owned())
    };
    match message.filter_specifier {
        Some(FilterSpecifier::StatusCodeFilter(filter)) => match compare(filter.comparison) {
            (Op::Ge, value) => AccessLogFilter::StatusAtLeast(value),
            (Op::Le, value) => AccessLogFilter::StatusAtMost(value),
            (Op::Eq, value) => AccessLogFilter::StatusEqual(value),
            (Op::Ne, _) => unsupported("status_code_filter NE", report),
        },
        Some(FilterSpecifier::DurationFilter(filter)) => match compare(filter.comparison) {
            (Op::Ge, value) => AccessLogFilter::DurationAtLeastMs(value),
            _ => unsupported("duration_filter other than GE", report),
        },
        Some(FilterSpecifier::ResponseFlagFilter(filter)) => AccessLogFilter::ResponseFlags(filter.flags),
        Some(FilterSpecifier::NotHealthCheckFilter(_)) => AccessLogFilter::NotHealthCheck,
        Some(FilterSpecifier::AndFilter(filter)) => AccessLogFilter::And(all(filter.filters, report)),
        Some(FilterSpecifier::OrFilter(filter)) => AccessLogFilter::Or(all(filter.filters, report)),
        Some(FilterSpecifier::ExtensionFilter(filter)) => match expression(&filter) {
            Some(text) => AccessLogFilter::Cel(text),
            None => unsupported(&filter.name, report),
        },
        Some(FilterSpecifier::TraceableFilter(_)) => unsupported("traceable_filter", report),
        Some(FilterSpecifier::RuntimeFilter(_)) => unsupported("runtime_filter", report),
        Some(FilterSpecifier::HeaderFilter(_)) => unsupported("header_filter", report),
        Some(FilterSpecifier::GrpcStatusFilter(_)) => unsupported("grpc_status_filter", report),
        Some(FilterSpecifier::MetadataFilter(_)) => unsupported("metadata_filter", report),
        Some(FilterSpecifier::LogTypeFilter(_)) => unsupported("log_type_filter", report),
        None => unsupported("without a specifier", report),
    }
}

/// The text of a CEL filter.
fn expression(filter: &wire::ExtensionFilter) -> Option<String> {
    let Some(wire::extension_filter::ConfigType::TypedConfig(any)) = &filter.config_type else { return None };
    let is_cel = type_name(&any.type_url) == "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter";
    let found: cel::ExpressionFilter = is_cel.then(|| unpack(any).ok())??;
    Some(found.expression)
}

/// Tracing of an HTTP chain.
pub(super) fn tracing(mut message: hcm::http_connection_manager::Tracing, report: &mut Report) -> Tracing {
    let mut out = Tracing {
        client_sampling: message.client_sampling.take().map_or(100.0, |percent| percent.value),
        random_sampling: message.random_sampling.take().map_or(100.0, |percent| percent.value),
        overall_sampling: message.overall_sampling.take().map_or(100.0, |percent| percent.value),
        max_path_tag_length: u32_of(message.max_path_tag_length.take()),
        tags: take(&mut message.custom_tags).into_iter().filter_map(custom_tag).collect(),
        ..Tracing::default()
    };
    if let Some(provider) = message.provider.take()
        && let Some(trace::tracing::http::ConfigType::TypedConfig(any)) = provider.config_type
    {
        out.provider = Some(any.type_url.clone());
        let read = match type_name(&any.type_url) {
            "envoy.config.trace.v3.OpenTelemetryConfig" => open_telemetry(&any, &mut out, report),
            "envoy.config.trace.v3.ZipkinConfig" => zipkin(&any, &mut out, report),
            _ => Err(Refusal::new(&provider.name, "not served; no spans are sent")),
        };
        if let Err(Refusal(reason)) = read {
            report.ignored("tracing.provider", reason);
        }
    }
    report.ignore_rest("tracing", &message);
    out
}

fn open_telemetry(any: &Any, out: &mut Tracing, report: &mut Report) -> Refusable<()> {
    use core::grpc_service::TargetSpecifier;
    let mut config: trace::OpenTelemetryConfig = unpack(any)?;
    let grpc = config.grpc_service.take().and_then(|service| service.target_specifier);
    out.collector = match (grpc, config.http_service.take()) {
        (Some(TargetSpecifier::EnvoyGrpc(target)), _) => {
            Some(collector(target.cluster_name, target.authority, SpanProtocol::OtlpGrpc))
        }
        (_, Some(service)) => over_http(service, SpanProtocol::OtlpHttp, report),
        _ => None,
    };
    out.service_name = Some(take(&mut config.service_name)).filter(|name| !name.is_empty());
    report.ignore_rest("tracing.provider", &config);
    Ok(())
}

fn zipkin(any: &Any, out: &mut Tracing, report: &mut Report) -> Refusable<()> {
    use trace::zipkin_config::{CollectorEndpointVersion, TraceContextOption};
    let mut config: trace::ZipkinConfig = unpack(any)?;
    let (cluster, host) = (take(&mut config.collector_cluster), take(&mut config.collector_hostname));
    let path = take(&mut config.collector_endpoint);
    if take(&mut config.collector_endpoint_version) != CollectorEndpointVersion::HttpJson as i32 {
        report.ignored("tracing.provider.collector_endpoint_version", "spans are sent as JSON of version 2");
    }
    if config.shared_span_context.take().is_none_or(|shared| shared.value) {
        report.ignored("tracing.provider.shared_span_context", "a span is not shared with the caller's");
    }
    let both = TraceContextOption::UseB3WithW3cPropagation as i32;
    let with_w3c = take(&mut config.trace_context_option) == both;
    let short_ids = !take(&mut config.trace_id_128bit);
    let protocol = |http| SpanProtocol::Zipkin(Zipkin { http, with_w3c, short_ids });
    out.collector = match config.collector_service.take() {
        Some(service) => over_http(service, protocol, report),
        None if cluster.is_empty() || path.is_empty() => None,
        None => Some(collector(cluster, host, protocol(CollectorHttp { path, headers: Vec::new() }))),
    };
    report.ignore_rest("tracing.provider", &config);
    Ok(())
}

/// The cluster's name stands in for a host that is not given.
fn collector(cluster: String, authority: String, protocol: SpanProtocol) -> Collector {
    let authority = if authority.is_empty() { cluster.clone() } else { authority };
    Collector { cluster, authority, protocol }
}

/// A collector over HTTP: `uri` names host and path, `cluster` where that is.
fn over_http(
    service: core::HttpService,
    protocol: impl FnOnce(CollectorHttp) -> SpanProtocol,
    report: &mut Report,
) -> Option<Collector> {
    let target = service.http_uri?;
    let http_uri::HttpUpstreamType::Cluster(cluster) = target.http_upstream_type?;
    let rest = target.uri.split_once("://").map_or(target.uri.as_str(), |(_, rest)| rest);
    let (authority, path) = rest.find('/').map_or((rest, "/"), |slash| rest.split_at(slash));
    let mut headers = Vec::new();
    for header in service.request_headers_to_add.into_iter().filter_map(|option| option.header) {
        if header.value.contains('%') {
            report.ignored(
                format!("tracing.provider header {}", header.key),
                "formats are not served here; it is not sent",
            );
        } else {
            headers.push((header.key, header.value));
        }
    }
    let http = CollectorHttp { path: path.to_owned(), headers };
    Some(collector(cluster, authority.to_owned(), protocol(http)))
}

fn custom_tag(message: tag::CustomTag) -> Option<(String, TagValue)> {
    use tag::custom_tag::Type;
    use xds_proto::envoy::envoy::r#type::metadata::v3::metadata_key::path_segment::Segment;
    let value = match message.r#type? {
        Type::Literal(literal) => TagValue::Literal(literal.value),
        Type::Environment(env) => TagValue::Environment { name: env.name, default: env.default_value },
        Type::RequestHeader(header) => {
            TagValue::RequestHeader { name: header.name.to_ascii_lowercase(), default: header.default_value }
        }
        Type::Metadata(metadata) => {
            let key = metadata.metadata_key?;
            let path = key.path.into_iter().filter_map(|segment| match segment.segment? {
                Segment::Key(key) => Some(key),
                Segment::Index(index) => Some(index.to_string()),
            });
            TagValue::Metadata { namespace: key.key, path: path.collect() }
        }
        Type::Value(format) => TagValue::Format(format),
    };
    Some((message.tag, value))
}

/// A format string that must be a text.
pub(super) fn text(message: Option<core::SubstitutionFormatString>) -> Refusable<String> {
    format_text(message.ok_or_else(|| Refusal::new("format_string", "missing"))?)
}

/// Reads the statistics filter.
pub(super) fn stats(message: PluginConfig, report: &mut Report) -> StatsFilter {
    // A waypoint always reports as one.
    let PluginConfig { disable_host_header_fallback, tcp_reporting_duration, metrics, reporter: _ } = message;
    if tcp_reporting_duration.is_some() {
        report.ignored("stats.tcp_reporting_duration", "TCP metrics are reported at open and close");
    }
    let metrics = metrics
        .into_iter()
        .map(|MetricConfig { dimensions, name, tags_to_remove, r#match, drop }| {
            if !r#match.is_empty() {
                report.ignored(format!("stats.metrics {name}.match"), "applies to all requests");
            }
            MetricOverride { name, dimensions, tags_to_remove, drop }
        })
        .collect();
    StatsFilter { disable_host_header_fallback, metrics }
}

/// The same, as older control planes send it.
pub(super) fn stats_as_json(report: &mut Report) -> StatsFilter {
    report.ignored("stats", "given as JSON: its overrides have no effect in Strata");
    StatsFilter::default()
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::core;
    use super::*;

    /// What becomes of a provider's configuration of this type, with what was noticed about it.
    fn provider(name: &str, config: &impl Message) -> (Tracing, Vec<String>) {
        let mut report = Report::new("listener");
        let any = Any {
            type_url: format!("type.googleapis.com/envoy.config.trace.v3.{name}"),
            value: config.encode_to_vec(),
        };
        let config_type = Some(trace::tracing::http::ConfigType::TypedConfig(any));
        let provider = Some(trace::tracing::Http { name: name.to_owned(), config_type });
        let out = tracing(hcm::http_connection_manager::Tracing { provider, ..Default::default() }, &mut report);
        (out, report.notices.into_iter().map(|notice| notice.field).collect())
    }

    fn http_service(uri: &str, cluster: &str) -> core::HttpService {
        let http_uri = core::HttpUri {
            uri: uri.to_owned(),
            http_upstream_type: Some(http_uri::HttpUpstreamType::Cluster(cluster.to_owned())),
            ..core::HttpUri::default()
        };
        core::HttpService { http_uri: Some(http_uri), ..core::HttpService::default() }
    }

    #[test]
    fn collectors_over_grpc_and_http() {
        use super::core::grpc_service::{EnvoyGrpc, TargetSpecifier};
        let cluster = || "outbound|4317||otel.obs.svc.cluster.local".to_owned();
        let target = TargetSpecifier::EnvoyGrpc(EnvoyGrpc { cluster_name: cluster(), ..EnvoyGrpc::default() });
        let grpc_service = Some(core::GrpcService { target_specifier: Some(target), ..core::GrpcService::default() });
        let config = trace::OpenTelemetryConfig { grpc_service, ..trace::OpenTelemetryConfig::default() };
        let expected = Collector { cluster: cluster(), authority: cluster(), protocol: SpanProtocol::OtlpGrpc };
        assert_eq!(provider("OpenTelemetryConfig", &config).0.collector, Some(expected));

        let header = |key: &str, value: &str| core::HeaderValueOption {
            header: Some(core::HeaderValue { key: key.to_owned(), value: value.to_owned(), ..Default::default() }),
            ..Default::default()
        };
        let http_service = Some(core::HttpService {
            request_headers_to_add: vec![header("x-key", "k"), header("x-path", "%REQ(:PATH)%")],
            ..http_service("http://otel.obs.svc.cluster.local:4318/v1/traces", &cluster())
        });
        let config = trace::OpenTelemetryConfig { http_service, ..trace::OpenTelemetryConfig::default() };
        let (tracing, noticed) = provider("OpenTelemetryConfig", &config);
        let http = CollectorHttp { path: "/v1/traces".to_owned(), headers: vec![("x-key".to_owned(), "k".to_owned())] };
        let authority = "otel.obs.svc.cluster.local:4318".to_owned();
        let protocol = SpanProtocol::OtlpHttp(http);
        assert_eq!(tracing.collector, Some(Collector { cluster: cluster(), authority, protocol }));
        assert_eq!(noticed, ["tracing.provider header x-path"]);

        let empty = trace::OpenTelemetryConfig::default();
        assert_eq!(provider("OpenTelemetryConfig", &empty).0.collector, None);
    }

    #[test]
    fn zipkin_as_newer_and_older_proxies_are_told() {
        use xds_proto::envoy::google::protobuf::BoolValue;
        let (cluster, host) = ("outbound|9411||zipkin.obs.svc.cluster.local", "zipkin.obs.svc.cluster.local");
        let expected = |with_w3c, short_ids| {
            let http = CollectorHttp { path: "/api/v2/spans".to_owned(), headers: Vec::new() };
            let protocol = SpanProtocol::Zipkin(Zipkin { http, with_w3c, short_ids });
            Some(Collector { cluster: cluster.to_owned(), authority: host.to_owned(), protocol })
        };
        let newer = trace::ZipkinConfig {
            collector_service: Some(http_service(&format!("http://{host}/api/v2/spans"), cluster)),
            collector_endpoint_version: 1,
            trace_id_128bit: true,
            shared_span_context: Some(BoolValue { value: false }),
            trace_context_option: 1,
            ..Default::default()
        };
        let (tracing, noticed) = provider("ZipkinConfig", &newer);
        assert_eq!((tracing.collector, noticed), (expected(true, false), vec![]));
        // As Envoy has it where Istio says nothing.
        let older = trace::ZipkinConfig {
            collector_cluster: cluster.to_owned(),
            collector_endpoint: "/api/v2/spans".to_owned(),
            collector_hostname: host.to_owned(),
            ..Default::default()
        };
        let (tracing, noticed) = provider("ZipkinConfig", &older);
        assert_eq!(tracing.collector, expected(false, true));
        let said =
            ["collector_endpoint_version", "shared_span_context"].map(|field| format!("tracing.provider.{field}"));
        assert_eq!(noticed, said);
        assert_eq!(provider("ZipkinConfig", &trace::ZipkinConfig::default()).0.collector, None);
    }

    #[test]
    fn other_tracers_are_named() {
        let (tracing, noticed) = provider("DatadogConfig", &trace::DatadogConfig::default());
        assert_eq!((tracing.collector, noticed), (None, vec!["tracing.provider".to_owned()]));
    }
}
