//! Access logs, tracing and statistics as configured.
use serde::Serialize;

/// One access log.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AccessLog {
    pub sink: AccessLogSink,
    pub filter: Option<AccessLogFilter>,
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum AccessLogSink {
    File {
        path: String,
        format: AccessLogFormat,
    },
    /// Known by name, not served.
    Other {
        name: String,
        type_url: String,
    },
}

/// What lines say. Texts carry Envoy's command operators.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum AccessLogFormat {
    /// Envoy's default line.
    Default,
    Text(String),
    Json {
        fields: serde_json::Value,
        omit_empty: bool,
    },
}

/// Which requests are logged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum AccessLogFilter {
    StatusAtLeast(u32),
    StatusAtMost(u32),
    StatusEqual(u32),
    /// One of these response flags (`NR`, `UF`, ...); empty: any flag at all.
    ResponseFlags(Vec<String>),
    DurationAtLeastMs(u32),
    NotHealthCheck,
    And(Vec<AccessLogFilter>),
    Or(Vec<AccessLogFilter>),
    /// A CEL text.
    Cel(String),
    /// Known by name, not evaluated: everything is logged.
    Unsupported(String),
}

/// `stats.PluginConfig`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct StatsFilter {
    /// An unknown destination service stays unknown instead of taking the host header's name.
    pub disable_host_header_fallback: bool,
    /// In this order; later ones win.
    pub metrics: Vec<MetricOverride>,
}

/// Changes to one metric, or to all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct MetricOverride {
    /// Without the `istio_` prefix (`requests_total`); empty: every metric.
    pub name: String,
    /// label -> CEL text.
    pub dimensions: std::collections::BTreeMap<String, String>,
    /// Labels to leave out.
    pub tags_to_remove: Vec<String>,
    /// Do not report it at all.
    pub drop: bool,
}

/// Tracing of an HTTP chain.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Tracing {
    /// Percent.
    pub client_sampling: f64,
    pub random_sampling: f64,
    pub overall_sampling: f64,
    /// Type URL of the provider's configuration, if there is one.
    pub provider: Option<String>,
    /// Who is sent spans, where the provider is one that is served.
    pub collector: Option<Collector>,
    pub service_name: Option<String>,
    /// tag -> literal or format text.
    pub tags: Vec<(String, TagValue)>,
    pub max_path_tag_length: Option<u32>,
}

/// A collector of spans behind a cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Collector {
    pub cluster: String,
    /// Of the calls.
    pub authority: String,
    pub protocol: SpanProtocol,
}

/// What a collector speaks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum SpanProtocol {
    OtlpGrpc,
    OtlpHttp(CollectorHttp),
    Zipkin(Zipkin),
}

/// Zipkin's API, version 2, in JSON. Traces are handed on in B3 headers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Zipkin {
    pub http: CollectorHttp,
    /// Traces are handed on in W3C's headers as well.
    pub with_w3c: bool,
    /// Traces that begin here have numbers of 64 bits.
    pub short_ids: bool,
}

/// What a request to a collector over HTTP looks like.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct CollectorHttp {
    /// With query.
    pub path: String,
    pub headers: Vec<(String, String)>,
}

/// Value of a custom tag.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum TagValue {
    Literal(String),
    RequestHeader {
        name: String,
        default: String,
    },
    Environment {
        name: String,
        default: String,
    },
    Format(String),
    /// `namespace` and path of request metadata.
    Metadata {
        namespace: String,
        path: Vec<String>,
    },
}
