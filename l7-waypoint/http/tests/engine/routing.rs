use std::time::Duration;

use http::Request;
use tokio::time::Instant;
use xds_model::envoy::filter::*;
use xds_model::envoy::matcher::*;
use xds_model::envoy::route::*;

use crate::config::*;
use crate::support::*;

const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";

fn two() -> Vec<xds_model::envoy::cluster::Cluster> {
    vec![cluster("a", &[A]), cluster("b", &[B])]
}

#[test]
fn a_header_chooses_the_cluster_and_headers_are_as_envoys() {
    run(async || {
        let mut by_header = to("/", forward("b"));
        let test = HeaderTest::Value(StringMatcher::exact("jason"));
        by_header.matcher.headers.push(HeaderMatcher {
            name: "x-user".into(),
            test,
            invert: false,
            missing_as_empty: false,
        });
        by_header.operation = Some("reviews:80/*".into());
        let mesh = Mesh::new(&http(vec![by_header, to("/", forward("a"))], two()));
        let answer = mesh.send(get("/x?y=1")).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, A));
        assert_eq!(answer.header("server"), "istio-envoy");
        assert!(answer.headers.contains_key("x-envoy-upstream-service-time"));
        let answer = mesh.send(with(with(get("/x"), "x-user", "jason"), "x-forwarded-client-cert", "forged")).await;
        assert_eq!(answer.body, B);
        assert_eq!(answer.header("x-envoy-decorator-operation"), "reviews:80/*");
        let seen = &mesh.seen()[1];
        assert_eq!((seen.authority.as_str(), seen.path.as_str()), ("reviews", "/x"));
        assert_eq!(seen.headers["x-forwarded-proto"], "http");
        assert_eq!(seen.headers["x-request-id"].len(), 36);
        assert!(!seen.headers.contains_key("x-forwarded-client-cert"));
        let event = mesh.event();
        assert_eq!(
            (event.status, event.endpoint.as_deref(), event.service.as_str()),
            (200, Some(A), "a.shop.svc.cluster.local")
        );
        let metrics = mesh.registry.encode();
        assert!(metrics.contains(r#"destination_service="b.shop.svc.cluster.local""#), "{metrics}");
    });
}

#[test]
fn weights_are_kept_and_zero_is_zero() {
    run(async || {
        let share = |name: &str, weight| WeightedCluster {
            name: name.into(),
            weight,
            request_headers: HeaderMutations::default(),
            response_headers: HeaderMutations::default(),
            host_rewrite: None,
            filters: RouteFilters::default(),
        };
        let mut split = forward("a");
        split.target = Target::Weighted(vec![share("a", 90), share("b", 10), share("c", 0)]);
        let mut clusters = two();
        clusters.push(cluster("c", &["10.0.0.3:80"]));
        let mesh = Mesh::new(&http(vec![to("/", split)], clusters));
        let mut sender = mesh.http1(info()).await;
        for _ in 0..1000 {
            let response = sender.send_request(get("/")).await.unwrap();
            Answer::read(response).await;
        }
        let count = |endpoint: &str| mesh.seen().iter().filter(|seen| seen.endpoint == endpoint).count();
        assert!((70..130).contains(&count(B)), "{}", count(B));
        assert_eq!(count("10.0.0.3:80"), 0);
        assert_eq!(mesh.upstreams.connections.get(), 2, "connections are kept");
    });
}

#[test]
fn answers_without_an_upstream() {
    run(async || {
        let teapot = RouteAction::Respond(DirectResponse { status: 418, body: b"short".to_vec() });
        let redirect = RouteAction::Redirect(Redirect {
            status: 308,
            scheme: None,
            https: true,
            host: None,
            port: None,
            path: Some(RedirectPath::Full("/there".into())),
            strip_query: false,
        });
        let routes = vec![
            route("/teapot", teapot),
            route("/go", redirect),
            to("/lost", forward("none")),
            to("/empty", forward("e")),
        ];
        let mesh = Mesh::new(&http(routes, vec![cluster("e", &[])]));
        let answer = mesh.send(get("/teapot")).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (418, "short"));
        let answer = mesh.send(get("/go?q=1")).await;
        assert_eq!((answer.status.as_u16(), answer.header("location")), (308, "https://reviews/there?q=1"));
        let answer = mesh.send(get("/nowhere")).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (404, ""));
        assert_eq!(mesh.send(get("/lost")).await.status, 503);
        let answer = mesh.send(get("/empty")).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (503, "no healthy upstream"));
        let flags: Vec<_> = (0..5).map(|_| mesh.event().flags.join(",")).collect();
        assert_eq!(flags, ["", "", "NR", "NC", "UH"]);
        let grpc = mesh.send(with(get("/nowhere"), "content-type", "application/grpc")).await;
        assert_eq!((grpc.status.as_u16(), grpc.header("grpc-status")), (200, "12"));
    });
}

#[test]
fn rewrites_and_header_changes() {
    run(async || {
        let mut rewritten = forward("a");
        rewritten.path_rewrite = Some(PathRewrite::Prefix("/new".into()));
        rewritten.host_rewrite = Some(HostRewrite::Literal("new.example".into()));
        let mut rewritten = to("/old", rewritten);
        let add = |name: &str, format: &str| HeaderAdd {
            name: name.into(),
            format: format.into(),
            action: AppendAction::OverwriteIfExistsOrAdd,
            keep_empty_value: false,
        };
        rewritten.request_headers.add.push(add("x-from", "%DOWNSTREAM_REMOTE_ADDRESS%"));
        rewritten.request_headers.remove.push("x-drop".into());
        rewritten.response_headers.add.push(add("x-out", "1"));
        let mesh = Mesh::new(&http(vec![rewritten], two()));
        let answer = mesh.send(with(get("/old/x?q=1"), "x-drop", "1")).await;
        assert_eq!(answer.header("x-out"), "1");
        let seen = &mesh.seen()[0];
        assert_eq!((seen.authority.as_str(), seen.path.as_str()), ("new.example", "/new/x?q=1"));
        assert_eq!(seen.headers["x-from"], "10.8.0.10:40000");
        assert_eq!(seen.headers["x-envoy-original-path"], "/old/x?q=1");
        assert!(!seen.headers.contains_key("x-drop"));
        assert_eq!(mesh.send(get("/a/../old/x")).await.status, 200, "normalised before it is matched");
    });
}

#[test]
fn faults_are_injected() {
    run(async || {
        let mut slow = to("/slow", forward("a"));
        let always = Fraction::ALWAYS;
        let delay = Some(Delay { duration: Duration::from_secs(2), fraction: always });
        slow.filters.fault = Some(Fault { delay, abort: None, headers: Vec::new(), max_active: None });
        let mut broken = to("/broken", forward("a"));
        let abort = Some(Abort { with: AbortWith::HttpStatus(555), fraction: always });
        broken.filters.fault = Some(Fault { delay: None, abort, headers: Vec::new(), max_active: None });
        let mut grpc = to("/grpc", forward("a"));
        let abort = Some(Abort { with: AbortWith::GrpcStatus(14), fraction: always });
        grpc.filters.fault = Some(Fault { delay: None, abort, headers: Vec::new(), max_active: None });
        let chain = http_chain(vec![slow, broken, grpc], vec![HttpFilterKind::Fault(None), HttpFilterKind::Cors]);
        let mesh = Mesh::new(&config(xds_model::envoy::chain::ChainKind::Http(Box::new(chain)), two()));
        let start = Instant::now();
        assert_eq!(mesh.send(get("/slow")).await.status, 200);
        assert!(start.elapsed() >= Duration::from_secs(2));
        let answer = mesh.send(get("/broken")).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (555, "fault filter abort"));
        let answer = mesh.send(with(get("/grpc"), "content-type", "application/grpc+proto")).await;
        assert_eq!((answer.header("grpc-status"), answer.header("grpc-message")), ("14", "fault filter abort"));
        assert_eq!((mesh.event().flags.join(","), mesh.event().flags.join(",")), ("DI".into(), "FI".into()));
    });
}

#[test]
fn cors_preflights_and_requests() {
    run(async || {
        let mut route = to("/", forward("a"));
        route.filters.cors = Some(CorsPolicy {
            allow_origins: vec![StringMatcher::exact("https://a.example")],
            allow_methods: "GET,POST".into(),
            allow_headers: "x-a".into(),
            expose_headers: "x-b".into(),
            max_age: "60".into(),
            allow_credentials: true,
            enabled: Fraction::ALWAYS,
            shadow_enabled: Fraction::NEVER,
            allow_private_network_access: false,
            forward_not_matching_preflights: false,
        });
        let chain = http_chain(vec![route], vec![HttpFilterKind::Cors]);
        let mesh = Mesh::new(&config(xds_model::envoy::chain::ChainKind::Http(Box::new(chain)), two()));
        let preflight = |origin: &str| {
            let request = Request::options("/").header("host", "reviews").header("origin", origin);
            request.header("access-control-request-method", "GET").body(full("")).unwrap()
        };
        let answer = mesh.send(preflight("https://a.example")).await;
        assert_eq!(answer.header("access-control-allow-origin"), "https://a.example");
        assert_eq!(answer.header("access-control-allow-methods"), "GET,POST");
        let answer = mesh.send(preflight("https://evil")).await;
        assert_eq!((answer.status.as_u16(), answer.header("access-control-allow-origin")), (200, ""));
        assert!(mesh.seen().is_empty(), "preflights are answered here");
        let answer = mesh.send(with(get("/"), "origin", "https://a.example")).await;
        assert_eq!(answer.header("access-control-expose-headers"), "x-b");
        assert_eq!(answer.header("access-control-allow-credentials"), "true");
    });
}

#[test]
fn mirrors_get_a_copy_with_the_body() {
    run(async || {
        let mut mirrored = forward("a");
        let mirror = |cluster: &str, fraction| Mirror {
            cluster: cluster.into(),
            fraction,
            shadow_suffix: true,
            host_rewrite: None,
        };
        mirrored.mirrors = vec![mirror("b", Fraction::ALWAYS), mirror("a", Fraction::NEVER)];
        let mesh = Mesh::new(&http(vec![to("/", mirrored)], two()));
        let request =
            Request::post("/m").header("host", "reviews:80").header("x-collect", "1").body(full("payload")).unwrap();
        assert_eq!(mesh.send(request).await.status, 200);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut seen: Vec<_> =
            mesh.seen().iter().map(|seen| (seen.endpoint.clone(), seen.authority.clone(), seen.body.clone())).collect();
        seen.sort();
        let body = bytes::Bytes::from("payload");
        assert_eq!(seen, [(A.into(), "reviews:80".into(), body.clone()), (B.into(), "reviews-shadow:80".into(), body)]);
    });
}

#[test]
fn a_new_snapshot_is_used_on_open_connections() {
    run(async || {
        let mesh = Mesh::new(&http(vec![to("/", forward("a"))], two()));
        let mut sender = mesh.http1(info()).await;
        let answer = Answer::read(sender.send_request(get("/")).await.unwrap()).await;
        assert_eq!(answer.body, A);
        let (snapshot, _) = l7_route::Snapshot::compile(&http(vec![to("/", forward("b"))], two()));
        mesh.snapshot.store(std::sync::Arc::new(snapshot));
        let answer = Answer::read(sender.send_request(get("/")).await.unwrap()).await;
        assert_eq!(answer.body, B);
    });
}

#[test]
fn keys_stick_to_hosts_and_cookies_are_made() {
    run(async || {
        let mut sticky = forward("many");
        let key = HashKey::Cookie {
            name: "sid".into(),
            ttl: Some(Duration::from_secs(600)),
            path: "/".into(),
            attributes: Vec::new(),
        };
        sticky.hash = vec![HashPolicy { key, terminal: false }];
        let addresses: Vec<String> = (1..20).map(|n| format!("10.0.1.{n}:80")).collect();
        let mut many = cluster("many", &addresses.iter().map(String::as_str).collect::<Vec<_>>());
        many.lb = xds_model::envoy::cluster::LbPolicy::Maglev { table_size: 65537 };
        let mesh = Mesh::new(&http(vec![to("/", sticky)], vec![many]));
        let first = mesh.send(get("/")).await;
        let cookie = first.header("set-cookie").to_owned();
        assert!(cookie.starts_with("sid=") && cookie.contains("Max-Age=600"), "{cookie}");
        let cookie = cookie.split(';').next().unwrap();
        for _ in 0..20 {
            let again = mesh.send(with(get("/"), "cookie", cookie)).await;
            assert_eq!((again.body.as_str(), again.header("set-cookie")), (first.body.as_str(), ""));
        }
    });
}
