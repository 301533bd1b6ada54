//! External authorization by a real gRPC server (tonic) behind the engine's own connections.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Request;
use http_body_util::BodyExt;
use tokio::io::DuplexStream;
use tokio_stream::StreamExt;
use tonic::{Code, Status};
use xds_model::envoy::WaypointConfig;
use xds_model::envoy::chain::ChainKind;
use xds_model::envoy::ext_authz::*;
use xds_model::envoy::filter::HttpFilterKind;
use xds_model::envoy::matcher::{PathMatcher, StringMatcher};
use xds_model::envoy::route::{AppendAction, HeaderAdd};
use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::service::auth::v3::authorization_server::{Authorization, AuthorizationServer};
use xds_proto::envoy::envoy::service::auth::v3::check_response::HttpResponse;
use xds_proto::envoy::envoy::service::auth::v3::{CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse};
use xds_proto::envoy::envoy::r#type::v3::HttpStatus;
use xds_proto::envoy::google::{protobuf, rpc};

use crate::config::*;
use crate::support::*;

pub(crate) const APP: &str = "10.0.0.1:80";
pub(crate) const AUTHZ: &str = "10.0.9.1:9000";

type Word = Result<CheckResponse, Status>;
/// How long it takes, and what is said then.
type Answering = dyn Fn(&CheckRequest) -> (Duration, Word) + Send + Sync;

struct Authorizer {
    seen: Arc<Mutex<Vec<CheckRequest>>>,
    answer: Arc<Answering>,
}

#[tonic::async_trait]
impl Authorization for Authorizer {
    async fn check(&self, request: tonic::Request<CheckRequest>) -> Result<tonic::Response<CheckResponse>, Status> {
        let request = request.into_inner();
        self.seen.lock().unwrap().push(request.clone());
        let (wait, word) = (self.answer)(&request);
        tokio::time::sleep(wait).await;
        word.map(tonic::Response::new)
    }
}

pub(crate) type Asked = Arc<Mutex<Vec<CheckRequest>>>;

/// A gRPC authorizer at every endpoint whose address ends with `end`; what it was asked.
pub(crate) fn authorizer(
    mesh: &Mesh,
    end: &str,
    answer: impl Fn(&CheckRequest) -> (Duration, Word) + Send + Sync + 'static,
) -> Asked {
    let (seen, answer): (Asked, Arc<Answering>) = (Asked::default(), Arc::new(answer));
    let asked = seen.clone();
    let handler: RawHandler = std::rc::Rc::new(move |io: DuplexStream| {
        let service = AuthorizationServer::new(Authorizer { seen: seen.clone(), answer: answer.clone() });
        let incoming = tokio_stream::once(Ok::<_, std::io::Error>(io)).chain(tokio_stream::pending());
        Box::pin(async move {
            drop(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await);
        })
    });
    mesh.upstreams.services.borrow_mut().push((end.to_owned(), handler));
    asked
}

fn now(word: CheckResponse) -> (Duration, Word) {
    (Duration::ZERO, Ok(word))
}

pub(crate) fn status_of(code: i32) -> Option<rpc::Status> {
    Some(rpc::Status { code, ..rpc::Status::default() })
}

pub(crate) fn ok() -> (Duration, Word) {
    now(CheckResponse { status: status_of(0), ..CheckResponse::default() })
}

fn allowed(ok: OkHttpResponse) -> (Duration, Word) {
    let http_response = Some(HttpResponse::OkResponse(ok));
    now(CheckResponse { status: status_of(0), http_response, ..CheckResponse::default() })
}

pub(crate) fn denied(code: i32, headers: &[(&str, &str)], body: &str) -> (Duration, Word) {
    let status = (code != 0).then_some(HttpStatus { code });
    let headers = headers.iter().map(|(name, value)| header(name, value, None)).collect();
    let denied = DeniedHttpResponse { status, headers, body: body.into() };
    let http_response = Some(HttpResponse::DeniedResponse(denied));
    now(CheckResponse { status: status_of(7), http_response, ..CheckResponse::default() })
}

#[allow(deprecated, reason = "what most services send")]
fn header(name: &str, value: &str, append: Option<bool>) -> core::HeaderValueOption {
    let header = core::HeaderValue { key: name.into(), value: value.into(), ..core::HeaderValue::default() };
    core::HeaderValueOption {
        header: Some(header),
        append: append.map(|value| protobuf::BoolValue { value }),
        ..core::HeaderValueOption::default()
    }
}

pub(crate) fn filter(service: ExtAuthzService) -> ExtAuthz {
    ExtAuthz {
        service,
        failure_mode_allow: false,
        failure_mode_allow_header: false,
        status_on_error: 403,
        body: None,
        enabled: None,
        allowed_headers: None,
        disallowed_headers: Vec::new(),
        clear_route_cache: false,
        encode_raw_headers: false,
    }
}

fn grpc() -> ExtAuthz {
    filter(ExtAuthzService::Grpc {
        cluster: "authz".into(),
        authority: Some("authz.outside".into()),
        timeout: Duration::from_secs(2),
        initial_metadata: vec![HeaderAdd {
            name: "x-tenant".into(),
            format: "%REQ(x-tenant)%".into(),
            action: AppendAction::OverwriteIfExistsOrAdd,
            keep_empty_value: false,
        }],
    })
}

pub(crate) fn with_filter(filter: ExtAuthz) -> WaypointConfig {
    let chain = http_chain(vec![to("/", forward("app"))], vec![HttpFilterKind::ExtAuthz(Box::new(filter))]);
    config(ChainKind::Http(Box::new(chain)), vec![cluster("app", &[APP]), cluster("authz", &[AUTHZ])])
}

pub(crate) fn post(path: &str, body: &str) -> Request<Body> {
    Request::post(path).header("host", "reviews").body(full(body.to_owned())).unwrap()
}

/// The application echoes what it got.
pub(crate) fn echo(mesh: &Mesh) {
    mesh.handler(|endpoint, request| async move {
        let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        http::Response::new(full([endpoint.as_bytes(), b"|", &body].concat()))
    });
}

#[test]
fn the_service_is_told_everything_and_its_word_counts() {
    run(async || {
        let mesh = Mesh::new(&with_filter(grpc()));
        let asked = authorizer(&mesh, AUTHZ, |_| ok());
        let mut client = info();
        client.peer_principal = Some("spiffe://cluster.local/ns/shop/sa/frontend".into());
        client.local_principal = Some("spiffe://cluster.local/ns/shop/sa/waypoint".into());
        let request = with(with(get("/a/b?c=d"), "x-request-id", "id-1"), "x-two", "1");
        let answer = mesh.send_as(client, with(request, "x-two", "2")).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, APP));
        let asked = asked.lock().unwrap()[0].attributes.clone().unwrap();
        let (source, destination) = (asked.source.unwrap(), asked.destination.unwrap());
        assert_eq!(source.principal, "spiffe://cluster.local/ns/shop/sa/frontend");
        assert_eq!(destination.principal, "spiffe://cluster.local/ns/shop/sa/waypoint");
        for (peer, wanted) in [(source.address, ("10.8.0.10", 40000)), (destination.address, ("10.96.1.13", 80))] {
            let Some(core::address::Address::SocketAddress(socket)) = peer.unwrap().address else {
                panic!("no socket")
            };
            let port = core::socket_address::PortSpecifier::PortValue(wanted.1);
            assert_eq!((socket.address.as_str(), socket.port_specifier), (wanted.0, Some(port)));
        }
        let request = asked.request.unwrap();
        let since = request.time.unwrap().seconds;
        assert!(since > 1_700_000_000, "{since}");
        let http = request.http.unwrap();
        assert_eq!((http.method.as_str(), http.path.as_str(), http.host.as_str()), ("GET", "/a/b?c=d", "reviews"));
        assert_eq!((http.id.as_str(), http.scheme.as_str(), http.protocol.as_str()), ("id-1", "http", "HTTP/1.1"));
        assert_eq!(http.headers["x-two"], "1,2");
        assert_eq!((http.headers[":method"].as_str(), http.headers[":path"].as_str()), ("GET", "/a/b?c=d"));
        assert_eq!((http.headers[":authority"].as_str(), http.size), ("reviews", -1));
        let metrics = mesh.registry.encode();
        assert!(metrics.contains("envoy_cluster_ext_authz_ok_total{cluster_name=\"app\"} 1"), "{metrics}");
    });
}

#[test]
fn only_allowed_headers_are_sent_raw_when_asked() {
    run(async || {
        let mut filter = grpc();
        let prefix = xds_model::envoy::matcher::StringPattern::Prefix("x-".into());
        filter.allowed_headers = Some(vec![StringMatcher { pattern: prefix, ignore_case: true }]);
        filter.disallowed_headers = vec![StringMatcher::exact("x-secret")];
        filter.encode_raw_headers = true;
        let mesh = Mesh::new(&with_filter(filter));
        let asked = authorizer(&mesh, AUTHZ, |_| ok());
        mesh.send(with(with(with(get("/"), "x-a", "1"), "x-secret", "2"), "cookie", "3")).await;
        let http = asked.lock().unwrap()[0].attributes.clone().unwrap().request.unwrap().http.unwrap();
        assert!(http.headers.is_empty());
        let list = http.header_map.unwrap().headers;
        let names: Vec<_> = list.iter().map(|one| one.key.as_str()).collect();
        assert!(names.contains(&"x-a") && !names.contains(&"x-secret") && !names.contains(&"cookie"), "{names:?}");
        assert!(list.iter().any(|one| one.key == "x-a" && one.raw_value == b"1"));
    });
}

#[test]
fn an_allowing_answer_changes_request_and_response() {
    run(async || {
        let mesh = Mesh::new(&with_filter(grpc()));
        authorizer(&mesh, AUTHZ, |_| {
            let parameter = |key: &str, value: &str| core::QueryParameter { key: key.into(), value: value.into() };
            allowed(OkHttpResponse {
                headers: vec![
                    header("x-user", "jason", None),
                    header("x-groups", "b", Some(true)),
                    header("content-length", "7", None),
                    header("transfer-encoding", "chunked", None),
                ],
                headers_to_remove: vec!["authorization".into(), "host".into(), ":path".into()],
                response_headers_to_add: vec![
                    header("set-cookie", "a=1", None),
                    header("set-cookie", "b=2", None),
                    header("x-seen", "yes", None),
                ],
                query_parameters_to_set: vec![parameter("who", "a b")],
                query_parameters_to_remove: vec!["token".into()],
                ..OkHttpResponse::default()
            })
        });
        let request = with(with(get("/p?token=1&q=2&who=x"), "authorization", "Bearer x"), "x-user", "forged");
        let answer = mesh.send(with(request, "x-groups", "a")).await;
        assert_eq!(answer.status, 200);
        let cookies: Vec<_> = answer.headers.get_all("set-cookie").iter().collect();
        assert_eq!((cookies.len(), answer.header("x-seen")), (2, "yes"));
        let seen = mesh.seen().pop().unwrap();
        assert_eq!((seen.path.as_str(), seen.authority.as_str()), ("/p?q=2&who=a%20b", "reviews"));
        let users: Vec<_> = seen.headers.get_all("x-user").iter().collect();
        assert_eq!(users, ["jason"], "the client's own is gone");
        assert_eq!(seen.headers.get_all("x-groups").iter().count(), 2);
        assert!(!seen.headers.contains_key("authorization") && !seen.headers.contains_key("transfer-encoding"));
    });
}

#[test]
fn a_refusal_has_the_services_words() {
    run(async || {
        let mesh = Mesh::new(&with_filter(grpc()));
        authorizer(&mesh, AUTHZ, |request| {
            match request.attributes.as_ref().unwrap().request.as_ref().unwrap().http.as_ref().unwrap().path.as_str() {
                "/login" => denied(302, &[("location", "https://idp.example/"), ("set-cookie", "s=1")], ""),
                "/plain" => now(CheckResponse { status: status_of(16), ..CheckResponse::default() }),
                _ => denied(0, &[("x-why", "no")], "not you"),
            }
        });
        let answer = mesh.send(get("/")).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str(), answer.header("x-why")), (403, "not you", "no"));
        let event = mesh.event();
        assert_eq!(event.flags, ["UAEX"]);
        assert!(event.reasons.iter().any(|reason| reason.contains("denied by external authorization (authz")));
        let answer = mesh.send(get("/login")).await;
        assert_eq!((answer.status.as_u16(), answer.header("location")), (302, "https://idp.example/"));
        assert_eq!(mesh.send(get("/plain")).await.status, 403);
        let answer = mesh.send(with(get("/"), "content-type", "application/grpc")).await;
        assert_eq!((answer.status.as_u16(), answer.header("grpc-status")), (200, "7"));
        assert!(mesh.seen().is_empty(), "the application hears of none");
        let metrics = mesh.registry.encode();
        assert!(metrics.contains("envoy_cluster_ext_authz_denied_total{cluster_name=\"app\"} 4"), "{metrics}");
    });
}

#[test]
fn without_an_answer_nothing_passes() {
    run(async || {
        let mut filter = grpc();
        filter.status_on_error = 503;
        let mesh = Mesh::new(&with_filter(filter));
        let path = |request: &CheckRequest| {
            request.attributes.as_ref().unwrap().request.as_ref().unwrap().http.as_ref().unwrap().path.clone()
        };
        authorizer(&mesh, AUTHZ, move |request| match path(request).as_str() {
            "/slow" => (Duration::from_secs(60), ok().1),
            "/status" => (Duration::ZERO, Err(Status::new(Code::Unavailable, "gone"))),
            "/both" => {
                let both = HttpResponse::DeniedResponse(DeniedHttpResponse::default());
                now(CheckResponse { status: status_of(0), http_response: Some(both), ..CheckResponse::default() })
            }
            "/header" => allowed(OkHttpResponse { headers: vec![header("x\n", "1", None)], ..Default::default() }),
            "/error" => {
                let error = DeniedHttpResponse { status: Some(HttpStatus { code: 500 }), ..Default::default() };
                let error = Some(HttpResponse::ErrorResponse(error));
                now(CheckResponse { status: status_of(13), http_response: error, ..CheckResponse::default() })
            }
            _ => ok(),
        });
        let start = tokio::time::Instant::now();
        for (path, status, reason) in [
            ("/slow", 503, "no answer within 2s"),
            ("/status", 503, "gRPC status 14 gone"),
            ("/both", 503, "says OK, and what to refuse with"),
            ("/header", 503, "can't be sent"),
            ("/error", 500, "could not decide"),
        ] {
            let answer = mesh.send(get(path)).await;
            let event = mesh.event();
            assert_eq!((answer.status.as_u16(), event.flags.join(",").as_str()), (status, "UAEX"), "{path}");
            assert!(event.reasons.iter().any(|text| text.contains(reason)), "{path}: {:?}", event.reasons);
        }
        assert_eq!(start.elapsed().as_secs(), 2);
        assert!(mesh.seen().is_empty());
        // The next one is none the worse for it.
        assert_eq!(mesh.send(get("/")).await.status, 200);
    });
}

#[test]
fn a_service_that_is_not_there_or_not_grpc_refuses_or_not_as_configured() {
    run(async || {
        for (allow, status) in [(false, 403), (true, 200)] {
            let filter = ExtAuthz { failure_mode_allow: allow, failure_mode_allow_header: true, ..grpc() };
            let mesh = Mesh::new(&with_filter(filter.clone()));
            mesh.upstreams.down.borrow_mut().push(AUTHZ.into());
            assert_eq!(mesh.send(get("/")).await.status, status);
            let metrics = mesh.registry.encode();
            let count = format!("ext_authz_failure_mode_allowed_total{{cluster_name=\"app\"}} {}", u8::from(allow));
            assert_eq!(metrics.contains(&count), allow, "{metrics}");
            if allow {
                assert_eq!(mesh.seen()[0].headers["x-envoy-auth-failure-mode-allowed"], "true");
            }
            // An ordinary HTTP server in its place.
            let mesh = Mesh::new(&with_filter(filter.clone()));
            assert_eq!(mesh.send(get("/")).await.status, status);
            // A cluster that is not known, and one without endpoints.
            let mut unknown = with_filter(filter.clone());
            unknown.clusters.remove("authz");
            assert_eq!(Mesh::new(&unknown).send(get("/")).await.status, status);
            unknown.clusters.insert("authz".into(), cluster("authz", &[]));
            assert_eq!(Mesh::new(&unknown).send(get("/")).await.status, status);
        }
    });
}

#[test]
fn the_body_is_seen_and_sent_on_whole() {
    run(async || {
        let seen = async |allow_partial: bool, pack_as_bytes: bool, body: &str| {
            let mut filter = grpc();
            filter.body = Some(ExtAuthzBody { max_request_bytes: 8, allow_partial, pack_as_bytes });
            let mesh = Mesh::new(&with_filter(filter));
            echo(&mesh);
            let asked = authorizer(&mesh, AUTHZ, |_| ok());
            let answer = mesh.send(post("/", body)).await;
            let http = asked.lock().unwrap().pop().map(|one| one.attributes.unwrap().request.unwrap().http.unwrap());
            (answer.status.as_u16(), answer.body, http)
        };
        let (status, body, http) = seen(false, false, "12345678").await;
        let http = http.unwrap();
        assert_eq!(
            (status, body.as_str(), http.body.as_str(), http.size),
            (200, "10.0.0.1:80|12345678", "12345678", 8)
        );
        assert_eq!(http.headers["x-envoy-auth-partial-body"], "false");
        let (status, _, http) = seen(false, false, "123456789").await;
        assert_eq!((status, http), (413, None));
        let long = "x".repeat(100_000);
        let (status, body, http) = seen(true, true, &long).await;
        let http = http.unwrap();
        assert_eq!((status, body.len(), http.raw_body.as_slice()), (200, 12 + 100_000, b"xxxxxxxx".as_slice()));
        assert_eq!((http.headers["x-envoy-auth-partial-body"].as_str(), http.body.as_str()), ("true", ""));
        let (status, _, http) = seen(true, false, "").await;
        let http = http.unwrap();
        assert_eq!((status, http.headers.contains_key("x-envoy-auth-partial-body")), (200, false));
    });
}

#[test]
fn routes_tell_the_service_more_or_leave_it_out() {
    run(async || {
        let mut open = to("/open", forward("app"));
        open.filters.ext_authz = Some(ExtAuthzPerRoute::Disabled);
        let mut told = to("/told", forward("app"));
        let extensions = [("tier".to_owned(), "gold".to_owned())].into();
        told.filters.ext_authz = Some(ExtAuthzPerRoute::Check { context_extensions: extensions, no_body: true });
        let filter = HttpFilterKind::ExtAuthz(Box::new(ExtAuthz {
            body: Some(ExtAuthzBody { max_request_bytes: 8, allow_partial: true, pack_as_bytes: false }),
            ..grpc()
        }));
        let chain = http_chain(vec![open, told, to("/", forward("app"))], vec![filter]);
        let clusters = vec![cluster("app", &[APP]), cluster("authz", &[AUTHZ])];
        let mesh = Mesh::new(&config(ChainKind::Http(Box::new(chain)), clusters));
        let asked = authorizer(&mesh, AUTHZ, |_| denied(401, &[], ""));
        assert_eq!(mesh.send(get("/open/x")).await.status, 200);
        assert_eq!(mesh.send(post("/told", "body")).await.status, 401);
        assert_eq!(mesh.send(get("/")).await.status, 401);
        let asked = asked.lock().unwrap();
        let attributes: Vec<_> = asked.iter().map(|one| one.attributes.as_ref().unwrap()).collect();
        assert_eq!(attributes.len(), 2);
        assert_eq!(attributes[0].context_extensions["tier"], "gold");
        assert_eq!(attributes[0].request.as_ref().unwrap().http.as_ref().unwrap().body, "");
    });
}

#[test]
fn the_route_is_chosen_before_unless_configured_otherwise() {
    run(async || {
        for (clear, wanted) in [(false, "10.0.0.1:80"), (true, "10.0.0.2:80")] {
            let mut admin = to("/", forward("admin"));
            admin.matcher.path = PathMatcher::Prefix("/".into());
            admin.matcher.headers = vec![xds_model::envoy::matcher::HeaderMatcher {
                name: "x-role".into(),
                test: xds_model::envoy::matcher::HeaderTest::Value(StringMatcher::exact("admin")),
                invert: false,
                missing_as_empty: false,
            }];
            let filter = HttpFilterKind::ExtAuthz(Box::new(ExtAuthz { clear_route_cache: clear, ..grpc() }));
            let chain = http_chain(vec![admin, to("/", forward("app"))], vec![filter]);
            let clusters = vec![cluster("app", &[APP]), cluster("admin", &["10.0.0.2:80"]), cluster("authz", &[AUTHZ])];
            let mesh = Mesh::new(&config(ChainKind::Http(Box::new(chain)), clusters));
            authorizer(&mesh, AUTHZ, |_| {
                allowed(OkHttpResponse { headers: vec![header("x-role", "admin", None)], ..Default::default() })
            });
            assert_eq!(mesh.send(get("/")).await.body, wanted);
        }
    });
}
