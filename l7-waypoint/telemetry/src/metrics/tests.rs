use strata_runtime::metrics::Registry;

use super::*;
use crate::RequestEvent;
use crate::format::tests::with_record;

#[test]
fn requests_are_counted_under_istios_labels_in_istios_order() {
    let registry = Registry::new();
    let telemetry = Telemetry::new(&registry);
    let mut recorder = Recorder::new(telemetry);
    with_record(|record| {
        recorder.request(&record);
        recorder.request(&Record {
            status: 200,
            flags: Flags::default(),
            grpc: true,
            grpc_status: Some(5),
            ..record.clone()
        });
        recorder.request(&record);
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
        let opened = recorder.connection_opened(&record);
        recorder.connection_closed(opened, &record);
    });
    let text = registry.encode();
    let line = text.lines().find(|line| line.starts_with("istio_tcp_sent_bytes_total")).unwrap();
    assert!(line.contains(r#"request_protocol="tcp",response_flags="-""#) && line.ends_with(" 91"), "{line}");
}

#[test]
fn events_are_built_for_listeners_only_and_bounded() {
    let telemetry = Telemetry::new(&Registry::new());
    let mut recorder = Recorder::new(telemetry.clone());
    with_record(|record| recorder.request(&record));
    let mut ring = telemetry.events().subscribe();
    with_record(|record| (0..1000).for_each(|_| recorder.request(&record)));
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
