use prost::Message as _;

use http::HeaderValue;
use xds_model::envoy::telemetry::{CollectorHttp, Zipkin};

use super::context::{Caller, TRACEPARENT};
use super::*;
use crate::format::tests::with_record;

fn config(random: f64, overall: f64) -> Tracing {
    Tracing {
        random_sampling: random,
        overall_sampling: overall,
        collector: Some(Collector {
            cluster: "outbound|4317||otel.obs.svc.cluster.local".to_owned(),
            authority: "otel.obs.svc.cluster.local".to_owned(),
            protocol: SpanProtocol::OtlpGrpc,
        }),
        tags: vec![
            ("istio.canonical_service".to_owned(), TagValue::Literal("waypoint".to_owned())),
            ("istio.namespace".to_owned(), TagValue::Literal("shop".to_owned())),
            ("tenant".to_owned(), TagValue::RequestHeader { name: "x-tenant".to_owned(), default: "none".to_owned() }),
            ("agent".to_owned(), TagValue::RequestHeader { name: "user-agent".to_owned(), default: "none".to_owned() }),
            ("code".to_owned(), TagValue::Format("%RESPONSE_CODE%".to_owned())),
            ("from".to_owned(), TagValue::Format("%FILTER_STATE(downstream_peer_obj:FIELD:workload)%".to_owned())),
            ("shadow".to_owned(), TagValue::Metadata { namespace: "rbac".to_owned(), path: vec![] }),
        ],
        max_path_tag_length: Some(4),
        ..Tracing::default()
    }
}

fn tracer(random: f64, overall: f64) -> Tracer {
    Tracer::compile(&config(random, overall)).unwrap().unwrap()
}

fn headers(traceparent: &[&str]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for value in traceparent {
        headers.append(TRACEPARENT, value.parse().unwrap());
    }
    headers.insert(TRACESTATE, "vendor=1".parse().unwrap());
    headers
}

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[test]
fn a_callers_trace_and_decision_go_on() {
    for (flags, sampled) in [("01", true), ("00", false), ("03", true)] {
        let mut headers = headers(&[&format!("{}{flags}", &PARENT[..53])]);
        let context = tracer(0.0, 100.0).begin(&mut headers, || 0x1234);
        assert_eq!((context.parent, context.sampled), (Some(0xb7ad6b7169203331), sampled));
        let told = format!("00-0af7651916cd43dd8448eb211c80319c-0000000000001234-{:02x}", u8::from(sampled));
        assert_eq!(headers[TRACEPARENT], told);
        assert_eq!(headers[TRACESTATE], "vendor=1");
    }
    // A later version, with more to say.
    let mut later = headers(&[&format!("cc{}-more", &PARENT[2..])]);
    assert_eq!(tracer(0.0, 100.0).begin(&mut later, || 1).parent, Some(0xb7ad6b7169203331));
}

#[test]
fn what_is_no_trace_begins_one() {
    let zero_trace = format!("00-{:032x}-b7ad6b7169203331-01", 0);
    let zero_span = format!("00-0af7651916cd43dd8448eb211c80319c-{:016x}-01", 0);
    let upper = PARENT.to_ascii_uppercase();
    let more = format!("{PARENT}-more");
    for bad in [&["nonsense"][..], &[PARENT, PARENT], &[&zero_trace], &[&zero_span], &[&upper], &[&more], &["ff"], &[]]
    {
        let mut headers = headers(bad);
        let context = tracer(100.0, 100.0).begin(&mut headers, || 7);
        assert_eq!((context.parent, context.sampled), (None, true), "{bad:?}");
        let told = "00-00000000000000070000000000000007-0000000000000007-01";
        assert_eq!(headers.get_all(TRACEPARENT).iter().collect::<Vec<_>>(), [told], "{bad:?}");
        assert!(!headers.contains_key(TRACESTATE), "{bad:?}");
    }
}

#[test]
fn new_traces_are_sampled_as_configured() {
    let share = |random, overall| {
        let tracer = tracer(random, overall);
        let mut number = 0u64;
        // Numbers below 10,000 in turn; four are drawn for each trace, the last one decides.
        let mut draw = || {
            number += 1;
            number / 4
        };
        (0..10_000).filter(|_| tracer.begin(&mut HeaderMap::new(), &mut draw).sampled).count()
    };
    for (random, overall, expected) in [(100.0, 100.0, 10_000), (0.0, 100.0, 0), (1.0, 100.0, 100), (50.0, 50.0, 2_500)]
    {
        assert!(share(random, overall).abs_diff(expected) <= 1, "{random} {overall}");
    }
}

#[test]
fn a_span_says_what_envoys_says() {
    let tracer = tracer(100.0, 100.0);
    assert_eq!(&*tracer.service, "waypoint.shop");
    let context = tracer.begin(&mut headers(&[PARENT]), || 9);
    let mut span = Span::default();
    with_record(|record| span = tracer.span(context, Some("reviews.shop:80/*"), &record));
    // As a collector reads it.
    let bytes = export_request("waypoint.shop", vec![span]).encode_to_vec();
    let read = otlp::ExportTraceServiceRequest::decode(bytes.as_slice()).unwrap();
    let [resource] = read.resource_spans.as_slice() else { panic!("{read:?}") };
    assert_eq!(resource.resource.as_ref().unwrap().attributes, [attribute("service.name", "waypoint.shop")]);
    let [span] = resource.scope_spans[0].spans.as_slice() else { panic!("{read:?}") };
    assert_eq!((span.name.as_str(), span.kind()), ("reviews.shop:80/*", SpanKind::Server));
    assert_eq!((span.trace_id.len(), span.span_id.as_slice()), (16, &[0, 0, 0, 0, 0, 0, 0, 9][..]));
    assert_eq!(span.parent_span_id, 0xb7ad6b7169203331u64.to_be_bytes());
    assert_eq!(span.end_time_unix_nano - span.start_time_unix_nano, 1_500_000);
    assert_eq!(span.status.as_ref().unwrap().code(), StatusCode::Error);
    let said = |name: &str| {
        let found = span.attributes.iter().find(|attribute| attribute.key == name)?;
        match found.value.as_ref()?.value.as_ref()? {
            otlp::Value::StringValue(text) => Some(text.as_str()),
            other => panic!("{other:?}"),
        }
    };
    for (name, value) in [
        ("http.url", "http://reviews/old"),
        ("http.method", "GET"),
        ("http.protocol", "HTTP/1.1"),
        ("http.status_code", "503"),
        ("response_flags", "UF"),
        ("upstream_cluster", "c"),
        ("upstream_address", "10.0.0.9:8080"),
        ("peer.address", "10.0.0.1"),
        ("guid:x-request-id", "id"),
        ("error", "true"),
        ("tenant", "none"),
        ("agent", "curl/8"),
        ("code", "503"),
    ] {
        assert_eq!(said(name), Some(value), "{name}");
    }
    // Not known, so not said.
    assert_eq!((said("from"), said("shadow"), said("grpc.status_code")), (None, None, None));
}

fn zipkin(with_w3c: bool, short_ids: bool) -> Tracer {
    let mut config = config(100.0, 100.0);
    let http = CollectorHttp { path: "/api/v2/spans".to_owned(), headers: Vec::new() };
    if let Some(collector) = &mut config.collector {
        collector.protocol = SpanProtocol::Zipkin(Zipkin { http, with_w3c, short_ids });
    }
    Tracer::compile(&config).unwrap().unwrap()
}

fn b3(pairs: &[(&'static str, &str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
}

const LONG: &str = "0af7651916cd43dd8448eb211c80319c";
const SHORT: &str = "8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

#[test]
fn b3_is_read_in_one_header_and_in_several() {
    let long = Some((0x0af7651916cd43dd8448eb211c80319c, 0xb7ad6b7169203331));
    let short = Some((0x8448eb211c80319c, 0xb7ad6b7169203331));
    let ids = |trace| [("x-b3-traceid", trace), ("x-b3-spanid", SPAN)];
    let several = |trace, more: &[(&'static str, &str)]| b3(&[&ids(trace)[..], more].concat());
    let single = |text: &str| b3(&[("b3", text)]);
    for (headers, span, sampled) in [
        (several(LONG, &[("x-b3-sampled", "1"), ("x-b3-parentspanid", SHORT)]), long, Some(true)),
        (several(SHORT, &[("x-b3-sampled", "0")]), short, Some(false)),
        (several(LONG, &[("x-b3-flags", "1")]), long, Some(true)),
        (several(LONG, &[]), long, None),
        (b3(&[("x-b3-sampled", "0")]), None, Some(false)),
        (several("00", &[("x-b3-sampled", "yes")]), None, None),
        (single(&format!("{LONG}-{SPAN}-1-{SHORT}")), long, Some(true)),
        (single(&format!("{SHORT}-{SPAN}-d")), short, Some(true)),
        (single(&format!("{SHORT}-{SPAN}")), short, None),
        (single("0"), None, Some(false)),
        // Nothing of one that cannot be read.
        (single(&format!("{LONG}-{SPAN}-7")), None, None),
        (single(&format!("{LONG}-{SPAN}-1-x")), None, None),
        (single(&format!("{LONG}-{SPAN}-1-{SHORT}-more")), None, None),
        (single(&format!("{LONG}-{}", "0".repeat(16))), None, None),
        (b3(&[("traceparent", PARENT)]), None, None),
    ] {
        assert_eq!(zipkin(false, false).propagation.caller(&headers), Caller { span, sampled }, "{headers:?}");
    }
    let w3c = b3(&[("traceparent", PARENT)]);
    assert_eq!(zipkin(true, false).propagation.caller(&w3c), Caller { span: long, sampled: Some(true) });
}

#[test]
fn b3_is_told_as_the_caller_told_it() {
    let told = |headers: &HeaderMap, name: &str| {
        headers.get(name).map(HeaderValue::to_str).map(Result::unwrap).map(str::to_owned)
    };
    let mut headers =
        b3(&[("x-b3-traceid", SHORT), ("x-b3-spanid", SPAN), ("x-b3-sampled", "0"), ("traceparent", PARENT)]);
    let tracer = zipkin(false, false);
    let context = tracer.begin(&mut headers, || 0x1234);
    assert_eq!((context.parent, context.sampled), (Some(0xb7ad6b7169203331), false));
    assert_eq!(tracer.trace_id(&headers), Some(SHORT));
    for (name, value) in [
        ("x-b3-traceid", Some(SHORT)),
        ("x-b3-spanid", Some("0000000000001234")),
        ("x-b3-parentspanid", Some(SPAN)),
        ("x-b3-sampled", Some("0")),
        ("b3", None),
        // Not this tracer's.
        ("traceparent", Some(PARENT)),
    ] {
        assert_eq!(told(&headers, name).as_deref(), value, "{name}");
    }
    // One header in, one header out, or its reader would join the caller's span.
    let mut headers = b3(&[("b3", &format!("{LONG}-{SPAN}-1"))]);
    zipkin(true, false).begin(&mut headers, || 0x1234);
    assert_eq!(told(&headers, "b3"), Some(format!("{LONG}-0000000000001234-1-{SPAN}")));
    assert_eq!(told(&headers, "traceparent"), Some(format!("00-{LONG}-0000000000001234-01")));
    // A trace that begins here.
    for (short_ids, trace) in [(true, "0000000000000007"), (false, "00000000000000070000000000000007")] {
        let mut headers = b3(&[("x-b3-parentspanid", SPAN), ("tracestate", "other=1")]);
        let tracer = zipkin(false, short_ids);
        tracer.begin(&mut headers, || 7);
        assert_eq!((told(&headers, "x-b3-traceid").as_deref(), tracer.trace_id(&headers)), (Some(trace), Some(trace)));
        assert_eq!((told(&headers, "x-b3-parentspanid"), told(&headers, "x-b3-sampled").as_deref()), (None, Some("1")));
        assert!(headers.contains_key(TRACESTATE), "not this tracer's");
    }
}

#[test]
fn a_span_as_zipkin_reads_it() {
    let tracer = zipkin(false, false);
    let context = tracer.begin(&mut b3(&[("b3", &format!("{SHORT}-{SPAN}-1"))]), || 9);
    let mut span = Span::default();
    with_record(|record| span = tracer.span(context, Some("reviews.shop:80/*"), &record));
    let start = span.start_time_unix_nano / 1_000;
    let read: serde_json::Value = serde_json::from_slice(&zipkin_request("waypoint.shop", &[span]).unwrap()).unwrap();
    let [span] = read.as_array().unwrap().as_slice() else { panic!("{read}") };
    for (field, value) in [
        ("traceId", SHORT.into()),
        ("parentId", SPAN.into()),
        ("id", "0000000000000009".into()),
        ("kind", "SERVER".into()),
        ("name", "reviews.shop:80/*".into()),
        ("timestamp", start.into()),
        ("duration", 1_500.into()),
        ("localEndpoint", serde_json::json!({"serviceName": "waypoint.shop"})),
    ] {
        assert_eq!(span[field], value, "{field}");
    }
    assert_eq!((&span["tags"]["http.status_code"], &span["tags"]["error"]), (&"503".into(), &"true".into()));
}

#[test]
fn without_a_collector_there_is_no_tracer() {
    let none = Tracing { collector: None, ..config(100.0, 100.0) };
    assert!(Tracer::compile(&none).unwrap().is_none());
    let broken = Tracing { tags: vec![("x".to_owned(), TagValue::Format("%REQ(".to_owned()))], ..config(100.0, 100.0) };
    assert!(Tracer::compile(&broken).is_err());
}
