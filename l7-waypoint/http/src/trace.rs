//! Spans on their way to their collectors: gathered by worker, sent in batches over the clusters' own connections, dropped
//! rather than waited for.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Method;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use l7_telemetry::trace::otlp::{ExportTraceServiceResponse, Span};
use l7_telemetry::trace::{TraceContext, Tracer, export_request, zipkin_request};
use l7_telemetry::{Record, SpanOutcome};
use prost::Message;
use xds_model::envoy::telemetry::{Collector, CollectorHttp, SpanProtocol};

use crate::call::{self, grpc};
use crate::engine::Engine;

const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// How long a span waits for others.
const INTERVAL: Duration = Duration::from_secs(1);
/// As many go at once (OpenTelemetry's batch processors have the same default).
const BATCH: usize = 512;
/// As many may wait for one collector.
const ROOM: usize = 4 * BATCH;
/// For a collector to take a batch (the protocol's default).
const TIMEOUT: Duration = Duration::from_secs(10);

/// Spans that wait, by collector and service.
pub(crate) type Spans = BTreeMap<(Arc<Collector>, Arc<str>), Vec<Span>>;

/// A request that belongs to a trace.
pub(crate) struct Traced {
    tracer: Arc<Tracer>,
    context: TraceContext,
    /// The route's name for the request.
    pub(crate) operation: Option<Arc<str>>,
}

impl Traced {
    /// Joins or begins a trace, and writes it into the request's headers.
    pub(crate) fn begin(tracer: &Arc<Tracer>, headers: &mut HeaderMap, engine: &Engine) -> Traced {
        Traced { tracer: tracer.clone(), context: tracer.begin(headers, || engine.seed()), operation: None }
    }

    /// The trace's number, as the request's headers tell.
    pub(crate) fn trace_id<'h>(&self, headers: &'h HeaderMap) -> Option<&'h str> {
        self.tracer.trace_id(headers)
    }

    /// Tells of the finished request, if anybody wants to know.
    pub(crate) fn report(&self, record: &Record<'_>, engine: &Engine) {
        if !self.context.sampled {
            return;
        }
        let mut spans = engine.spans.borrow_mut();
        let waiting = spans.entry((self.tracer.collector.clone(), self.tracer.service.clone())).or_default();
        if waiting.len() < ROOM {
            waiting.push(self.tracer.span(self.context, self.operation.as_deref(), record));
        } else {
            engine.config.shared.telemetry.spans(SpanOutcome::Dropped, 1);
        }
    }
}

/// Sends what waits, again and again. Ends with the engine.
pub(crate) async fn export(engine: Weak<Engine>) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        let Some(engine) = engine.upgrade() else { return };
        let waiting = std::mem::take(&mut *engine.spans.borrow_mut());
        for ((collector, service), mut spans) in waiting {
            while !spans.is_empty() {
                let rest = spans.split_off(spans.len().min(BATCH));
                send(&engine, &collector, &service, std::mem::replace(&mut spans, rest)).await;
            }
        }
    }
}

async fn send(engine: &Rc<Engine>, collector: &Collector, service: &str, spans: Vec<Span>) {
    let count = spans.len() as u64;
    let telemetry = &engine.config.shared.telemetry;
    match taken(engine, collector, service, spans).await {
        Ok(refused) => {
            telemetry.spans(SpanOutcome::Sent, count - refused.min(count));
            telemetry.spans(SpanOutcome::Failed, refused.min(count));
        }
        Err(reason) => {
            tracing::debug!(cluster = collector.cluster, reason, count, "spans are lost");
            telemetry.spans(SpanOutcome::Failed, count);
        }
    }
}

/// How many of them the collector refused.
async fn taken(engine: &Rc<Engine>, collector: &Collector, service: &str, spans: Vec<Span>) -> Result<u64, String> {
    let worker = engine.worker();
    let upstream = engine.upstream(&worker, &collector.cluster);
    let upstream = upstream.ok_or_else(|| format!("cluster {} is not known", collector.cluster))?;
    let host = &collector.authority;
    let question = match &collector.protocol {
        SpanProtocol::OtlpGrpc => {
            grpc::question(EXPORT, host, HeaderMap::new(), TIMEOUT, &export_request(service, spans))?
        }
        SpanProtocol::OtlpHttp(http) => {
            over_http(host, http, "application/x-protobuf", export_request(service, spans).encode_to_vec())?
        }
        SpanProtocol::Zipkin(zipkin) => {
            let body = zipkin_request(service, &spans).map_err(|error| error.to_string())?;
            over_http(host, &zipkin.http, "application/json", body)?
        }
    };
    // No client's destination.
    let original = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let to = call::To {
        engine,
        upstream: &upstream,
        grpc: collector.protocol == SpanProtocol::OtlpGrpc,
        timeout: TIMEOUT,
        original,
    };
    let reached = to.call(&question).await?;
    let response: ExportTraceServiceResponse = match &collector.protocol {
        SpanProtocol::OtlpGrpc => grpc::answer(&reached)?,
        _ if !reached.parts.status.is_success() => return Err(format!("HTTP status {}", reached.parts.status)),
        // What it says besides is not needed: collectors answer in JSON too.
        SpanProtocol::OtlpHttp(_) => ExportTraceServiceResponse::decode(&*reached.body).unwrap_or_default(),
        SpanProtocol::Zipkin(_) => ExportTraceServiceResponse::default(),
    };
    Ok(response.partial_success.map_or(0, |partial| u64::try_from(partial.rejected_spans).unwrap_or(0)))
}

/// The request by which a collector over HTTP is told.
fn over_http(
    authority: &str,
    http: &CollectorHttp,
    content_type: &'static str,
    body: Vec<u8>,
) -> Result<call::Question, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in &http.headers {
        let invalid = |_| format!("{name}: not a header");
        let name: HeaderName = name.parse().map_err(invalid)?;
        headers.insert(name, value.parse().map_err(|_| format!("{value:?}: not a header's value"))?);
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    let body = Bytes::from(body);
    headers.insert(CONTENT_LENGTH, body.len().into());
    Ok(call::Question {
        method: Method::POST,
        authority: authority.parse().map_err(|error| format!("{authority}: {error}"))?,
        path: http.path.parse().map_err(|error| format!("{}: {error}", http.path))?,
        headers,
        body,
    })
}
