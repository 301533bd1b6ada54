//! A collector of spans: takes them over OTLP/gRPC, or in Zipkin's JSON, and shows what it has.
use std::convert::Infallible;
use std::net::SocketAddr;

use anyhow::Context;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyValue;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;

use crate::http1;

/// Take spans and print each as a line of JSON
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// For OTLP/gRPC
    #[arg(long, default_value = "127.0.0.1:4317")]
    listen: SocketAddr,
    /// For Zipkin's JSON too (API version 2), for example 127.0.0.1:9411
    #[arg(long)]
    zipkin: Option<SocketAddr>,
}

struct Collector;

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        for of_service in request.into_inner().resource_spans {
            let resource = of_service.resource.map(|resource| attributes(&resource.attributes)).unwrap_or_default();
            for span in of_service.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let line = json!({
                    "service": resource.get("service.name"),
                    "name": span.name,
                    "trace_id": hex(&span.trace_id),
                    "span_id": hex(&span.span_id),
                    "parent_span_id": hex(&span.parent_span_id),
                    "micros": span.end_time_unix_nano.saturating_sub(span.start_time_unix_nano) / 1_000,
                    "attributes": attributes(&span.attributes),
                });
                println!("{line}");
            }
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Until the process is told to end.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    if let Some(addr) = args.zipkin {
        let listener = TcpListener::bind(addr).await.with_context(|| format!("listening on {addr}"))?;
        tokio::spawn(http1::serve(listener, take_zipkin));
    }
    let service = TraceServiceServer::new(Collector);
    let server = tonic::transport::Server::builder().add_service(service).serve(args.listen);
    server.await.with_context(|| format!("listening on {}", args.listen))
}

async fn take_zipkin(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let is_spans = request.uri().path() == "/api/v2/spans";
    let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let (status, answer) = match serde_json::from_slice::<Vec<Value>>(&body) {
        _ if !is_spans => (StatusCode::NOT_FOUND, String::new()),
        Err(error) => (StatusCode::BAD_REQUEST, error.to_string()),
        Ok(spans) => {
            for span in spans {
                let line = json!({
                    "service": span["localEndpoint"]["serviceName"],
                    "name": span["name"],
                    "trace_id": span["traceId"],
                    "span_id": span["id"],
                    "parent_span_id": span["parentId"],
                    "micros": span["duration"],
                    "attributes": span["tags"],
                });
                println!("{line}");
            }
            (StatusCode::ACCEPTED, String::new())
        }
    };
    let mut response = Response::new(Full::from(answer));
    *response.status_mut() = status;
    Ok(response)
}

fn attributes(list: &[KeyValue]) -> Map<String, Value> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref()?.value.as_ref()? {
        AnyValue::StringValue(text) => Some(text.clone()),
        other => Some(format!("{other:?}")),
    };
    list.iter().map(|attribute| (attribute.key.clone(), text(attribute).into())).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
