//! Spans to a real collector's interface: gRPC over HTTP/2, behind the engine's own connections.

use std::sync::{Arc, Mutex};

use http_body_util::BodyExt;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::io::DuplexStream;
use tokio_stream::StreamExt;
use xds_model::envoy::WaypointConfig;
use xds_model::envoy::chain::ChainKind;
use xds_model::envoy::telemetry::{Collector as SpanCollector, CollectorHttp, SpanProtocol, TagValue, Tracing, Zipkin};

use crate::config::*;
use crate::support::*;

const APP: &str = "10.0.0.1:80";
const OTEL: &str = "10.0.9.2:4317";

type Collected = Arc<Mutex<Vec<ExportTraceServiceRequest>>>;

struct Collector {
    collected: Collected,
    refuses: bool,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.collected.lock().unwrap().push(request.into_inner());
        match self.refuses {
            true => Err(tonic::Status::unavailable("full")),
            false => Ok(tonic::Response::new(ExportTraceServiceResponse::default())),
        }
    }
}

/// A collector; what it was sent.
fn collector(mesh: &Mesh, refuses: bool) -> Collected {
    let collected = Collected::default();
    let seen = collected.clone();
    let handler: RawHandler = std::rc::Rc::new(move |io: DuplexStream| {
        let service = TraceServiceServer::new(Collector { collected: seen.clone(), refuses });
        let incoming = tokio_stream::once(Ok::<_, std::io::Error>(io)).chain(tokio_stream::pending());
        Box::pin(async move {
            drop(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await);
        })
    });
    mesh.upstreams.services.borrow_mut().push((OTEL.to_owned(), handler));
    collected
}

fn traced(protocol: SpanProtocol) -> WaypointConfig {
    let mut route = to("/", forward("app"));
    route.operation = Some("reviews.shop:80/*".to_owned());
    let mut chain = http_chain(vec![route], vec![]);
    chain.tracing = Some(Tracing {
        random_sampling: 100.0,
        overall_sampling: 100.0,
        collector: Some(SpanCollector { cluster: "otel".to_owned(), authority: "otel.obs".to_owned(), protocol }),
        tags: vec![("team".to_owned(), TagValue::Literal("core".to_owned()))],
        ..Tracing::default()
    });
    config(ChainKind::Http(Box::new(chain)), vec![cluster("app", &[APP]), cluster("otel", &[OTEL])])
}

/// Waits until spans have been sent on: they wait a second for others.
async fn spans(collected: &Collected) -> Vec<Span> {
    for _ in 0..100 {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        if !collected.lock().unwrap().is_empty() {
            break;
        }
    }
    let requests = collected.lock().unwrap();
    requests.iter().flat_map(|one| &one.resource_spans).flat_map(|one| &one.scope_spans[0].spans).cloned().collect()
}

#[test]
fn sampled_requests_leave_spans_and_tell_the_application() {
    run(async || {
        let mesh = Mesh::new(&traced(SpanProtocol::OtlpGrpc));
        let collected = collector(&mesh, false);
        for path in ["/a", "/b"] {
            assert_eq!(mesh.send(get(path)).await.status, 200);
        }
        let spans = spans(&collected).await;
        assert_eq!(spans.len(), 2);
        for (span, seen) in spans.iter().zip(mesh.seen()) {
            assert_eq!(span.name, "reviews.shop:80/*");
            assert!(span.parent_span_id.is_empty());
            let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            let told = format!("00-{}-{}-01", hex(&span.trace_id), hex(&span.span_id));
            assert_eq!(seen.headers["traceparent"], told);
        }
        let metrics = mesh.registry.encode();
        assert!(metrics.contains("strata_spans_total{outcome=\"sent\"} 2"), "{metrics}");
    });
}

#[test]
fn collectors_are_reached_over_http_too() {
    run(async || {
        let headers = vec![("authorization".to_owned(), "Bearer x".to_owned())];
        let http = CollectorHttp { path: "/v1/traces".to_owned(), headers };
        let mesh = Mesh::new(&traced(SpanProtocol::OtlpHttp(http)));
        let collected = Collected::default();
        let taken = collected.clone();
        mesh.handler(move |endpoint, request| {
            let taken = taken.clone();
            async move {
                if endpoint == OTEL {
                    let head = (request.uri().path().to_owned(), request.headers().clone());
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    assert_eq!(
                        (head.0.as_str(), &head.1["authorization"]),
                        ("/v1/traces", &"Bearer x".parse().unwrap())
                    );
                    assert_eq!(
                        (&head.1["content-type"], &head.1["host"]),
                        (&"application/x-protobuf".parse().unwrap(), &"otel.obs".parse().unwrap())
                    );
                    taken.lock().unwrap().push(ExportTraceServiceRequest::decode(body).unwrap());
                }
                status(200)
            }
        });
        assert_eq!(mesh.send(get("/a")).await.status, 200);
        assert_eq!(spans(&collected).await.len(), 1);
    });
}

#[test]
fn zipkin_is_told_in_json_and_the_application_in_b3() {
    run(async || {
        let http = CollectorHttp { path: "/api/v2/spans".to_owned(), headers: Vec::new() };
        let zipkin = Zipkin { http, with_w3c: false, short_ids: false };
        let mesh = Mesh::new(&traced(SpanProtocol::Zipkin(zipkin)));
        let told: Arc<Mutex<Vec<serde_json::Value>>> = Arc::default();
        let taken = told.clone();
        mesh.handler(move |endpoint, request| {
            let taken = taken.clone();
            async move {
                if endpoint != OTEL {
                    return status(200);
                }
                assert_eq!(
                    (request.uri().path(), request.headers()["content-type"].to_str().unwrap()),
                    ("/api/v2/spans", "application/json")
                );
                let body = request.into_body().collect().await.unwrap().to_bytes();
                taken.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
                status(202)
            }
        });
        let caller = "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1";
        assert_eq!(mesh.send(with(get("/a"), "b3", caller)).await.status, 200);
        let seen = mesh.seen()[0].headers.clone();
        for _ in 0..100 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            if mesh.registry.encode().contains("strata_spans_total{outcome=\"sent\"} 1") {
                break;
            }
        }
        let told = told.lock().unwrap();
        let span = &told[0][0];
        assert_eq!(
            (&span["traceId"], &span["parentId"]),
            (&seen["x-b3-traceid"].to_str().unwrap().into(), &caller[33..49].into())
        );
        assert_eq!(
            (&span["id"], &span["tags"]["team"]),
            (&seen["x-b3-spanid"].to_str().unwrap().into(), &"core".into())
        );
        assert!(!seen.contains_key("traceparent"));
    });
}

#[test]
fn a_callers_no_is_heeded() {
    run(async || {
        let mesh = Mesh::new(&traced(SpanProtocol::OtlpGrpc));
        let collected = collector(&mesh, false);
        let unwanted = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
        mesh.send(with(get("/"), "traceparent", unwanted)).await;
        let told = mesh.seen()[0].headers["traceparent"].to_str().unwrap().to_owned();
        assert!(told.starts_with(&unwanted[..36]) && told.ends_with("-00") && told != unwanted, "{told}");
        mesh.send(with(get("/"), "traceparent", &format!("{}01", &unwanted[..53]))).await;
        let spans = spans(&collected).await;
        assert_eq!(spans.len(), 1);
        assert_eq!(spans[0].parent_span_id, 0xb7ad6b7169203331u64.to_be_bytes());
    });
}

#[test]
fn a_collector_that_refuses_or_is_away_costs_requests_nothing() {
    run(async || {
        let mesh = Mesh::new(&traced(SpanProtocol::OtlpGrpc));
        let collected = collector(&mesh, true);
        assert_eq!(mesh.send(get("/")).await.status, 200);
        assert_eq!(spans(&collected).await.len(), 1);
        mesh.upstreams.down.borrow_mut().push(OTEL.to_owned());
        assert_eq!(mesh.send(get("/")).await.status, 200);
        for _ in 0..100 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            if mesh.registry.encode().contains("strata_spans_total{outcome=\"failed\"} 2") {
                return;
            }
        }
        panic!("{}", mesh.registry.encode());
    });
}
