//! A collector of spans: takes them over OTLP/gRPC and shows what it has.
use std::net::SocketAddr;

use anyhow::Context;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyValue;
use serde_json::{Map, Value, json};

/// Take spans over OTLP/gRPC and print each as a line of JSON
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(long, default_value = "127.0.0.1:4317")]
    listen: SocketAddr,
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
    let service = TraceServiceServer::new(Collector);
    let server = tonic::transport::Server::builder().add_service(service).serve(args.listen);
    server.await.with_context(|| format!("listening on {}", args.listen))
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
