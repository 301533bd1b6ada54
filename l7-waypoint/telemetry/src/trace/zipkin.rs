//! Spans as Zipkin's collectors take them: [API version 2](https://zipkin.io/zipkin-api/), JSON.
use std::collections::BTreeMap;

use serde::Serialize;

use super::context::b3_trace_id;
use super::otlp::{Span, Value};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ZipkinSpan<'s> {
    trace_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_id: Option<String>,
    id: String,
    kind: &'static str,
    name: &'s str,
    /// Microseconds since 1970.
    timestamp: u64,
    /// Microseconds, at least one.
    duration: u64,
    local_endpoint: Endpoint<'s>,
    tags: BTreeMap<&'s str, &'s str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint<'s> {
    service_name: &'s str,
}

/// A batch of spans of one service.
///
/// # Errors
/// None that a span could cause.
pub fn zipkin_request(service: &str, spans: &[Span]) -> serde_json::Result<Vec<u8>> {
    let spans: Vec<_> = spans.iter().map(|span| zipkin_span(service, span)).collect();
    serde_json::to_vec(&spans)
}

fn zipkin_span<'s>(service: &'s str, span: &'s Span) -> ZipkinSpan<'s> {
    let hex = |id: &[u8]| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let tags = span.attributes.iter().filter_map(|attribute| match attribute.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some((attribute.key.as_str(), text.as_str())),
        _ => None,
    });
    ZipkinSpan {
        trace_id: span.trace_id.as_slice().try_into().map(u128::from_be_bytes).map(b3_trace_id).unwrap_or_default(),
        parent_id: Some(hex(&span.parent_span_id)).filter(|id| !id.is_empty()),
        id: hex(&span.span_id),
        kind: "SERVER",
        name: &span.name,
        timestamp: span.start_time_unix_nano / 1_000,
        duration: (span.end_time_unix_nano.saturating_sub(span.start_time_unix_nano) / 1_000).max(1),
        local_endpoint: Endpoint { service_name: service },
        tags: tags.collect(),
    }
}
