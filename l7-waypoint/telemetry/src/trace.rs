//! Distributed tracing: whose trace a request belongs to, and the span that tells of it, with Envoy's attributes and
//! Istio's tags.
mod context;
mod zipkin;

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use http::header::{HeaderMap, HeaderName, USER_AGENT};
use xds_model::envoy::telemetry::{Collector, SpanProtocol, TagValue, Tracing};

use crate::format::{Format, FormatError, protocol};
use crate::record::Record;
use otlp::span::SpanKind;
use otlp::status::StatusCode;
use otlp::{KeyValue, Span, Status};

pub use context::TraceContext;
use context::{Propagation, TRACESTATE};
pub use zipkin::zipkin_request;

/// OpenTelemetry's messages for spans.
pub mod otlp {
    pub use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
    pub use opentelemetry_proto::tonic::common::v1::any_value::Value;
    pub use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
    pub use opentelemetry_proto::tonic::resource::v1::Resource;
    pub use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, Status, span, status};
}

/// Envoy's default for what is shown of a path.
const MAX_PATH: u32 = 256;

/// Tracing of an HTTP chain, compiled.
#[derive(Debug)]
pub struct Tracer {
    /// Where spans go.
    pub collector: Arc<Collector>,
    /// `service.name` of the resource.
    pub service: Arc<str>,
    /// Of 10,000 requests without a caller's decision.
    sampled: u64,
    propagation: Propagation,
    /// Traces that begin here have numbers of 64 bits.
    short_ids: bool,
    tags: Vec<(String, Tag)>,
    max_path: usize,
}

#[derive(Debug)]
enum Tag {
    Constant(String),
    Header { name: HeaderName, default: String },
    Format(Format),
}

impl Tracer {
    /// `None` where no spans are sent: without a provider, or with one that is not served.
    ///
    /// # Errors
    /// If a tag's format cannot be read.
    pub fn compile(config: &Tracing) -> Result<Option<Tracer>, FormatError> {
        let Some(collector) = &config.collector else { return Ok(None) };
        let mut tags = Vec::with_capacity(config.tags.len());
        for (name, value) in &config.tags {
            let tag = match value {
                TagValue::Literal(text) => Tag::Constant(text.clone()),
                TagValue::Environment { name, default } => {
                    Tag::Constant(std::env::var(name).unwrap_or_else(|_| default.clone()))
                }
                TagValue::RequestHeader { name, default } => match HeaderName::try_from(name) {
                    Ok(name) => Tag::Header { name, default: default.clone() },
                    Err(_) => Tag::Constant(default.clone()),
                },
                TagValue::Format(text) => Tag::Format(Format::parse(text)?),
                // What filters know of a request is not kept as metadata here; without it Envoy leaves the tag out too.
                TagValue::Metadata { .. } => continue,
            };
            tags.push((name.clone(), tag));
        }
        let (propagation, short_ids) = match &collector.protocol {
            SpanProtocol::OtlpGrpc | SpanProtocol::OtlpHttp(_) => (Propagation::W3c, false),
            SpanProtocol::Zipkin(zipkin) if zipkin.with_w3c => (Propagation::B3AndW3c, zipkin.short_ids),
            SpanProtocol::Zipkin(zipkin) => (Propagation::B3, zipkin.short_ids),
        };
        let share = config.random_sampling.clamp(0.0, 100.0) * config.overall_sampling.clamp(0.0, 100.0);
        Ok(Some(Tracer {
            collector: Arc::new(collector.clone()),
            service: config.service_name.clone().unwrap_or_else(|| own_name(config)).into(),
            sampled: share.round() as u64,
            propagation,
            short_ids,
            tags,
            max_path: config.max_path_tag_length.unwrap_or(MAX_PATH) as usize,
        }))
    }

    /// Joins the caller's trace or begins one, and tells the upstream by the request's headers. A caller's decision
    /// whether spans are kept is followed.
    pub fn begin(&self, headers: &mut HeaderMap, mut random: impl FnMut() -> u64) -> TraceContext {
        let caller = self.propagation.caller(headers);
        let span_id = random().max(1);
        let mut begun = || {
            let high = if self.short_ids { 0 } else { random() };
            (u128::from(high) << 64 | u128::from(random())).max(1)
        };
        let (trace_id, parent) = caller.span.map_or_else(|| (begun(), None), |(trace, span)| (trace, Some(span)));
        let sampled = caller.sampled.unwrap_or_else(|| random() % 10_000 < self.sampled);
        let context = TraceContext { trace_id, parent, span_id, sampled };
        self.propagation.tell(headers, context);
        context
    }

    /// The trace's number, as headers tell that went through [`Tracer::begin`].
    pub fn trace_id<'h>(&self, headers: &'h HeaderMap) -> Option<&'h str> {
        self.propagation.trace_id(headers)
    }

    /// The span of a finished request; `operation` is the route's name for it.
    pub fn span(&self, context: TraceContext, operation: Option<&str>, record: &Record<'_>) -> Span {
        let nanos = |at: std::time::Duration| u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
        let start = record.start.duration_since(UNIX_EPOCH).unwrap_or_default();
        let failed = record.status >= 500 || record.status == 0;
        Span {
            trace_id: context.trace_id.to_be_bytes().to_vec(),
            span_id: context.span_id.to_be_bytes().to_vec(),
            trace_state: text(record.request_headers, &TRACESTATE).unwrap_or_default().to_owned(),
            parent_span_id: context.parent.map(|parent| parent.to_be_bytes().to_vec()).unwrap_or_default(),
            name: operation.unwrap_or("ingress").to_owned(),
            kind: SpanKind::Server.into(),
            start_time_unix_nano: nanos(start),
            end_time_unix_nano: nanos(start + record.duration),
            attributes: self.attributes(record, failed),
            status: failed.then(|| Status { message: String::new(), code: StatusCode::Error.into() }),
            ..Span::default()
        }
    }

    fn attributes(&self, record: &Record<'_>, failed: bool) -> Vec<KeyValue> {
        let mut out = Vec::with_capacity(18 + self.tags.len());
        let mut put = |key: &str, value: &str| out.push(attribute(key, value));
        put("component", "proxy");
        let path = record.original_path.unwrap_or(record.path);
        let shown = path.char_indices().nth(self.max_path).map_or(path, |(end, _)| &path[..end]);
        put("http.url", &format!("{}://{}{shown}", record.scheme, record.authority));
        put("http.method", record.method.map_or("", http::Method::as_str));
        put("http.protocol", record.version.map_or("-", protocol));
        put("http.status_code", &record.status.to_string());
        put("user_agent", text(record.request_headers, &USER_AGENT).unwrap_or("-"));
        put("guid:x-request-id", record.request_id.unwrap_or("-"));
        put("request_size", &record.bytes_received.to_string());
        put("response_size", &record.bytes_sent.to_string());
        put("response_flags", &record.flags.to_string());
        put("peer.address", &record.downstream_remote.ip().to_canonical().to_string());
        if let Some(upstream) = &record.upstream {
            put("upstream_cluster", upstream.cluster);
            put("upstream_cluster.name", upstream.cluster);
            upstream.host.into_iter().for_each(|host| put("upstream_address", host));
        }
        if let Some(status) = record.grpc_status.filter(|_| record.grpc) {
            put("grpc.status_code", &status.to_string());
        }
        if failed {
            put("error", "true");
        }
        for (name, tag) in &self.tags {
            match tag {
                Tag::Constant(value) => put(name, value),
                Tag::Header { name: header, default } => {
                    put(name, text(record.request_headers, header).unwrap_or(default));
                }
                Tag::Format(format) => {
                    let mut value = String::new();
                    format.write(record, &mut value);
                    // Envoy has no tag for what is not known.
                    if value != "-" && !value.is_empty() {
                        put(name, &value);
                    }
                }
            }
        }
        out
    }
}

/// The trace's number where no tracer looks at it: the caller's, by W3C's header.
pub fn callers_trace_id(headers: &HeaderMap) -> Option<&str> {
    Propagation::W3c.trace_id(headers)
}

/// Where the configuration gives the proxy no name: what Istio's tags say of it, `waypoint.shop`.
fn own_name(config: &Tracing) -> String {
    let literal = |wanted: &str| {
        config.tags.iter().find_map(|(name, value)| match value {
            TagValue::Literal(text) if name == wanted => Some(text.as_str()),
            _ => None,
        })
    };
    match (literal("istio.canonical_service"), literal("istio.namespace")) {
        (Some(service), Some(namespace)) => format!("{service}.{namespace}"),
        (Some(service), None) => service.to_owned(),
        (None, _) => "strata-proxy".to_owned(),
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn attribute(key: impl Into<String>, value: impl Into<String>) -> KeyValue {
    let value = otlp::AnyValue { value: Some(otlp::Value::StringValue(value.into())) };
    KeyValue { key: key.into(), value: Some(value), ..KeyValue::default() }
}

/// A batch of spans of one service, as a collector takes it.
pub fn export_request(service: &str, spans: Vec<Span>) -> otlp::ExportTraceServiceRequest {
    let resource = otlp::Resource { attributes: vec![attribute("service.name", service)], ..otlp::Resource::default() };
    let scope = otlp::InstrumentationScope {
        name: "strata-proxy".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..otlp::InstrumentationScope::default()
    };
    let scope_spans = vec![otlp::ScopeSpans { scope: Some(scope), spans, ..otlp::ScopeSpans::default() }];
    let of_service = otlp::ResourceSpans { resource: Some(resource), scope_spans, ..otlp::ResourceSpans::default() };
    otlp::ExportTraceServiceRequest { resource_spans: vec![of_service] }
}

#[cfg(test)]
mod tests;
