use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue, Method, Version};

use super::*;
use crate::flags::Flags;
use crate::record::Upstream;
use crate::{Peer, Security, ServiceInfo};

/// A finished request handed to `check`.
pub(crate) fn with_record(check: impl FnOnce(Record<'_>)) {
    let mut headers = HeaderMap::new();
    headers.insert("user-agent", HeaderValue::from_static("curl/8"));
    let (source, destination, service) =
        (Arc::new(Peer::default()), Arc::new(Peer::default()), Arc::new(ServiceInfo::default()));
    check(Record {
        start: SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_123),
        duration: Duration::from_micros(1500),
        method: Some(&Method::GET),
        path: "/new?q=1",
        original_path: Some("/old"),
        authority: "reviews",
        scheme: "http",
        version: Some(Version::HTTP_11),
        request_headers: &headers,
        response_headers: None,
        trailers: None,
        status: 503,
        grpc: false,
        grpc_status: None,
        flags: Flags::UPSTREAM_CONNECTION_FAILURE,
        details: "upstream_reset_before_response_started",
        bytes_received: 3,
        bytes_sent: 91,
        messages_received: 2,
        messages_sent: 3,
        downstream_remote: SocketAddr::from(([10, 0, 0, 1], 5000)),
        downstream_local: SocketAddr::from(([10, 255, 0, 1], 80)),
        peer_principal: Some("spiffe://cluster.local/ns/shop/sa/web"),
        local_principal: None,
        route_name: "default",
        upstream: Some(Upstream {
            cluster: "c",
            host: Some("10.0.0.9:8080"),
            local: None,
            service_time: Some(Duration::from_millis(7)),
            transport_failure: None,
            attempts: 2,
        }),
        request_id: Some("id"),
        trace_id: None,
        security: Security::MutualTls,
        source: &source,
        destination: &destination,
        service: &service,
        reasons: &[],
        cookie: None,
    });
}

fn render(text: &str) -> String {
    let mut out = String::new();
    with_record(|record| Format::parse(text).unwrap().write(&record, &mut out));
    out
}

#[test]
fn operators_give_what_envoy_gives() {
    assert_eq!(render("[%START_TIME%] 100%%"), "[2027-01-15T08:00:00.123Z] 100%");
    assert_eq!(render("%START_TIME(%s)% %REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"), "1800000000 GET /old");
    assert_eq!(render("%REQ(:PATH)% %REQ_WITHOUT_QUERY(:PATH)% %PROTOCOL%"), "/new?q=1 /new HTTP/1.1");
    assert_eq!(render("%REQ(X-NONE?USER-AGENT)% %REQ(X-NONE)% %REQ(user-agent):4%"), "curl/8 - curl");
    assert_eq!(render("%RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_SENT% %DURATION%"), "503 UF 91 1");
    assert_eq!(render("%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% %UPSTREAM_HOST% %UPSTREAM_CLUSTER%"), "7 10.0.0.9:8080 c");
    assert_eq!(render("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%|%DOWNSTREAM_LOCAL_PORT%"), "10.0.0.1|80");
    assert_eq!(render("%FILTER_STATE(io.istio.peer_principal:PLAIN)%"), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(render("%FILTER_STATE(upstream_peer_obj:FIELD:workload)% %FILTER_STATE(other:PLAIN)%"), "- -");
    assert_eq!(render("%CEL(x)% %REQUESTED_SERVER_NAME%"), "- -");
    assert_eq!(Format::parse("a%CEL(x)%").unwrap().unknown(), ["CEL"]);
    assert_eq!(Format::parse("plain").unwrap().literal(), Some("plain"));
}

#[test]
fn broken_formats_are_refused() {
    for text in ["%REQ(x", "%", "%REQ%", "%REQ(a b)%", "%DURATION:x%"] {
        assert!(Format::parse(text).is_err(), "{text}");
    }
}
