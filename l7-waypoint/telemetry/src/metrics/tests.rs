use strata_runtime::metrics::Registry;
use xds_model::envoy::telemetry::{MetricOverride, StatsFilter};

use super::*;
use crate::RequestEvent;
use crate::format::tests::with_record;

fn plain() -> Arc<MetricRules> {
    Arc::default()
}

#[test]
fn requests_are_counted_under_istios_labels_in_istios_order() {
    let registry = Registry::new();
    let telemetry = Telemetry::new(&registry);
    let mut recorder = Recorder::new(telemetry);
    let plain = plain();
    with_record(|record| {
        recorder.request(&record, &plain);
        let grpc = Record { status: 200, flags: Flags::default(), grpc: true, grpc_status: Some(5), ..record.clone() };
        recorder.request(&grpc, &plain);
        recorder.request(&record, &plain);
    });
    assert_eq!(recorder.cache.len(), 2, "one set of handles per outcome");
    let text = registry.encode();
    let line = text.lines().find(|line| line.starts_with("istio_requests_total") && line.contains("503")).unwrap();
    let names: Vec<&str> =
        line.split(['{', ',', '}']).filter_map(|part| part.split_once('=')).map(|(name, _)| name).collect();
    assert_eq!(names.first(), Some(&"reporter"));
    assert_eq!(
        &names[names.len() - 5..],
        ["request_protocol", "response_code", "grpc_response_status", "response_flags", "connection_security_policy"]
    );
    assert_eq!(names.len(), 25);
    assert!(line.contains(r#"source_principal="spiffe://cluster.local/ns/shop/sa/web""#), "{line}");
    assert!(line.ends_with(" 2"), "{line}");
    assert!(text.contains(r#"request_protocol="grpc",response_code="200",grpc_response_status="5""#), "{text}");
    let messages: Vec<_> =
        ["request", "response"].map(|way| series(&text, &format!("istio_{way}_messages_total"))).concat();
    assert_eq!(messages.len(), 2, "of gRPC alone: {messages:#?}");
    assert!(messages[0].ends_with(" 2") && messages[1].ends_with(" 3"), "{messages:#?}");
    let sum =
        text.lines().find(|line| line.starts_with("istio_request_duration_milliseconds_sum") && line.contains("503"));
    assert!(sum.unwrap().ends_with(" 3.0"), "{sum:?}");
}

#[test]
fn connections_have_tcp_labels() {
    let registry = Registry::new();
    let mut recorder = Recorder::new(Telemetry::new(&registry));
    with_record(|record| {
        let record = Record { method: None, status: 0, flags: Flags::default(), ..record };
        let opened = recorder.connection_opened(&record, &plain());
        recorder.connection_closed(opened, &record, &plain());
    });
    let text = registry.encode();
    let line = text.lines().find(|line| line.starts_with("istio_tcp_sent_bytes_total")).unwrap();
    assert!(line.contains(r#"request_protocol="tcp",response_flags="-""#) && line.ends_with(" 91"), "{line}");
}

#[test]
fn events_are_built_for_listeners_only_and_bounded() {
    let telemetry = Telemetry::new(&Registry::new());
    let mut recorder = Recorder::new(telemetry.clone());
    with_record(|record| recorder.request(&record, &plain()));
    let mut ring = telemetry.events().subscribe();
    with_record(|record| (0..1000).for_each(|_| recorder.request(&record, &plain())));
    let mut events = Vec::new();
    while let Ok(text) = ring.try_recv() {
        events.push(serde_json::from_str::<RequestEvent>(&text).unwrap());
    }
    assert_eq!(events.len(), 200, "failures beyond the sample, but not all");
    let event = &events[0];
    assert_eq!((event.layer.as_str(), event.status, event.flags.as_slice()), ("request", 503, &["UF".to_owned()][..]));
    assert_eq!(event.source.identity.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/web"));
    assert_eq!((event.endpoint.as_deref(), event.latency_ms), (Some("10.0.0.9:8080"), 1.5));
}

fn change(name: &str, dimensions: &[(&str, &str)], tags_to_remove: &[&str], drop: bool) -> MetricOverride {
    let dimensions = dimensions.iter().map(|(tag, value)| ((*tag).to_owned(), (*value).to_owned())).collect();
    let tags_to_remove = tags_to_remove.iter().map(|tag| (*tag).to_owned()).collect();
    MetricOverride { name: name.to_owned(), dimensions, tags_to_remove, drop }
}

/// What is exposed after requests with these methods.
fn counted(metrics: Vec<MetricOverride>, methods: &[http::Method]) -> String {
    let registry = Registry::new();
    let mut recorder = Recorder::new(Telemetry::new(&registry));
    let config = StatsFilter { metrics, ..StatsFilter::default() };
    let rules = Arc::new(MetricRules::compile(&config));
    with_record(|record| {
        for method in methods {
            recorder.request(&Record { method: Some(method), ..record.clone() }, &rules);
        }
    });
    registry.encode()
}

fn series<'t>(text: &'t str, name: &str) -> Vec<&'t str> {
    text.lines().filter(|line| line.starts_with(&format!("{name}{{"))).collect()
}

#[test]
fn labels_are_added_replaced_and_removed() {
    let text = counted(
        vec![
            change(
                "requests_total",
                &[("request_method", "request.method")],
                &["response_code", "response_flags"],
                false,
            ),
            change("", &[("source_app", "downstream_peer.workload + '/' + string(destination.port)")], &[], false),
        ],
        &[http::Method::GET, http::Method::POST, http::Method::GET],
    );
    let requests = series(&text, "istio_requests_total");
    assert_eq!(requests.len(), 2, "one for each method: {requests:#?}");
    let gets = requests.iter().find(|line| line.contains(r#"request_method="GET""#)).unwrap();
    assert!(gets.ends_with(" 2"), "{gets}");
    for line in &requests {
        assert!(!line.contains("response_code=") && !line.contains("response_flags="), "{line}");
        assert!(line.contains(r#"source_app="unknown/80""#), "{line}");
    }
    let durations = series(&text, "istio_request_duration_milliseconds_count");
    assert!(durations.iter().all(|line| line.contains("response_code=") && !line.contains("request_method=")));
}

#[test]
fn what_cannot_be_told_is_unknown_and_what_can_be_no_label_is_left_out() {
    let dimensions = [
        ("a", "request.headers['x-none']"),
        ("b", "response.code >="),
        ("c", "metadata.x"),
        ("d", "request.headers"),
        ("e-f", "request.method"),
        ("__name__", "request.method"),
    ];
    let text = counted(vec![change("requests_total", &dimensions, &[], false)], &[http::Method::GET]);
    let line = series(&text, "istio_requests_total")[0];
    for unknown in ["a", "b", "c", "d"] {
        assert!(line.contains(&format!(r#",{unknown}="unknown""#)), "{line}");
    }
    assert!(!line.contains("e-f") && !line.contains("__name__"), "{line}");
}

#[test]
fn metrics_are_turned_off_one_by_one_or_all() {
    let text = counted(vec![change("request_bytes", &[], &[], true)], &[http::Method::GET]);
    assert!(series(&text, "istio_request_bytes_count").is_empty());
    assert_eq!(series(&text, "istio_response_bytes_count").len(), 1);
    let later = vec![change("", &[], &[], true), change("requests_total", &[], &[], false)];
    let text = counted(later, &[http::Method::GET]);
    assert_eq!(
        (series(&text, "istio_requests_total").len(), series(&text, "istio_response_bytes_count").len()),
        (1, 0)
    );
}

#[test]
fn senders_cannot_make_time_series_without_end() {
    let values = rules::Values::default();
    let one = |text: String| vec![Arc::from(text)];
    for number in 0..20_000 {
        values.bounded(&one(number.to_string()));
    }
    assert_eq!(&*values.bounded(&one("7".into()))[0], "7", "what is known stays");
    assert_eq!(&*values.bounded(&one("19999".into()))[0], "unknown");
    let long = vec![change("requests_total", &[("host", "request.host + request.host")], &[], false)];
    let registry = Registry::new();
    let mut recorder = Recorder::new(Telemetry::new(&registry));
    let rules = Arc::new(MetricRules::compile(&StatsFilter { metrics: long, ..StatsFilter::default() }));
    let host = "ä".repeat(500);
    with_record(|record| recorder.request(&Record { authority: &host, ..record.clone() }, &rules));
    assert!(registry.encode().contains(&format!("host=\"{}\"", "ä".repeat(128))));
}
