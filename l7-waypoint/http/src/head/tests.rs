use std::time::Duration;

use http::Request;
use xds_model::envoy::chain::{ForwardClientCert, PathOptions, ServerHeader};

use super::*;

pub(crate) fn options() -> HttpOptions {
    HttpOptions {
        server_name: "istio-envoy".into(),
        server_header: ServerHeader::Overwrite,
        path: PathOptions::default(),
        upgrades: vec!["websocket".into()],
        stream_idle_timeout: None,
        idle_timeout: Some(Duration::from_secs(3600)),
        request_timeout: None,
        request_headers_timeout: None,
        max_connection_duration: None,
        max_stream_duration: None,
        max_requests_per_connection: None,
        max_request_headers_kb: 60,
        max_headers_count: 100,
        underscores: UnderscoreAction::Allow,
        drain_timeout: Duration::from_secs(5),
        accept_http10: false,
        default_host_http10: None,
        preserve_header_case: false,
        max_concurrent_streams: None,
        forward_100_continue: false,
        use_remote_address: false,
        xff_trusted_hops: 0,
        client_cert: ForwardClientCert::Sanitize,
        generate_request_id: true,
        preserve_external_request_id: false,
        always_set_request_id_in_response: false,
        via: None,
        strip_port_from_host: false,
    }
}

fn head(request: http::request::Builder, options: &HttpOptions) -> Result<Head, Reply> {
    Head::new(request.body(()).unwrap().into_parts().0, options, false)
}

fn refused(request: http::request::Builder) -> (u16, String) {
    let reply = head(request, &options()).unwrap_err();
    assert!(reply.close, "a client that breaks framing must not go on: {reply:?}");
    (reply.status.as_u16(), reply.details.into_owned())
}

#[test]
fn ambiguous_framing_and_hosts_are_refused() {
    let get = || Request::get("/");
    let both = get().header("host", "a").header("transfer-encoding", "chunked").header("content-length", "3");
    assert_eq!(refused(both).0, 400);
    assert_eq!(refused(get().header("host", "a").header("transfer-encoding", "gzip, chunked")).0, 501);
    let twice = get().header("host", "a").header("transfer-encoding", "chunked").header("transfer-encoding", "chunked");
    assert_eq!(refused(twice).0, 501);
    let twice = get().header("host", "a").header("content-length", "3").header("content-length", "3");
    assert_eq!(refused(twice).0, 400);
    assert_eq!(refused(get().header("host", "a").header("host", "b")).1, "http1.multiple_host_headers");
    assert_eq!(refused(get()).1, "missing_host_header");
    for host in ["a b", "user@a", "", "a/b"] {
        assert_eq!(refused(get().header("host", host)).1, "http.invalid_authority", "{host:?}");
    }
    assert_eq!(refused(get().version(Version::HTTP_10).header("host", "a")).0, 426);
    let many = (0..101).fold(get().header("host", "a"), |request, number| request.header(format!("x-{number}"), "1"));
    assert_eq!(refused(many).0, 431);
}

#[test]
fn hop_by_hop_headers_go_and_what_others_rely_on_stays() {
    let request = Request::get("http://shop.example/p")
        .header("host", "other")
        .header("connection", "close, x-mine, x-forwarded-for, authorization")
        .header("x-mine", "1")
        .header("x-forwarded-for", "10.0.0.1")
        .header("authorization", "Bearer t")
        .header("te", "trailers")
        .header("keep-alive", "5")
        .header("expect", "100-continue")
        .header("content-type", "application/grpc+proto");
    let head = head(request, &options()).unwrap();
    assert_eq!(head.authority, "shop.example", "the absolute form wins");
    let mut names: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["authorization", "content-type", "te", "x-forwarded-for"]);
    assert!(head.grpc && head.upgrade.is_none());
}

#[test]
fn upgrades_need_both_headers() {
    let with = |connection: &str| {
        let request =
            Request::get("/").header("host", "a").header("upgrade", "WebSocket").header("connection", connection);
        head(request, &options()).unwrap().upgrade
    };
    assert_eq!(with("keep-alive, Upgrade").as_deref(), Some("websocket"));
    assert_eq!(with("keep-alive"), None);
}
