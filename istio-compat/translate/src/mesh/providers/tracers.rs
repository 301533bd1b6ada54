//! Extension providers that take spans.
use std::time::Duration as Timeout;

use compat_objects::Duration;
use serde::Deserialize;

/// Where spans go.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Tracer {
    /// `opentelemetry`
    OpenTelemetry(OpenTelemetry),
    /// `zipkin`
    Zipkin(Zipkin),
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct OpenTelemetry {
    service: String,
    port: u16,
    #[serde(default)]
    max_tag_length: Option<u32>,
    /// OTLP over HTTP instead of gRPC.
    #[serde(default)]
    pub(crate) http: Option<CollectorHttp>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct CollectorHttp {
    pub(crate) path: String,
    #[serde(default)]
    timeout: Option<Duration>,
    #[serde(default)]
    pub(crate) headers: Vec<Header>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Zipkin {
    service: String,
    port: u16,
    #[serde(default)]
    max_tag_length: Option<u32>,
    #[serde(default, rename = "enable64bitTraceId")]
    pub(crate) short_ids: bool,
    #[serde(default = "zipkin_path")]
    pub(crate) path: String,
    #[serde(default)]
    timeout: Option<Duration>,
    #[serde(default)]
    pub(crate) headers: Vec<Header>,
    #[serde(default)]
    pub(crate) trace_context_option: TraceContextOption,
}

/// In which headers traces are handed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum TraceContextOption {
    #[default]
    UseB3,
    UseB3WithW3cPropagation,
}

/// Sent along.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Header {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl Tracer {
    /// Host, with or without a namespace before it, and port.
    pub(crate) fn address(&self) -> (&str, u16) {
        match self {
            Self::OpenTelemetry(tracer) => (&tracer.service, tracer.port),
            Self::Zipkin(tracer) => (&tracer.service, tracer.port),
        }
    }

    pub(crate) fn max_tag_length(&self) -> Option<u32> {
        match self {
            Self::OpenTelemetry(tracer) => tracer.max_tag_length,
            Self::Zipkin(tracer) => tracer.max_tag_length,
        }
    }
}

impl CollectorHttp {
    pub(crate) fn timeout(&self) -> Option<Timeout> {
        self.timeout.map(Into::into)
    }
}

impl Zipkin {
    /// As istiod has it: 5 s.
    pub(crate) fn timeout(&self) -> Timeout {
        self.timeout.map_or(Timeout::from_secs(5), Into::into)
    }
}

/// Where Zipkin takes spans.
fn zipkin_path() -> String {
    "/api/v2/spans".to_owned()
}
