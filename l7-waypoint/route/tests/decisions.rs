//! What the recorded configurations decide, case by case.
mod support;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use http::HeaderMap;
use l7_route::chain::ClusterTarget;
use l7_route::filter::Injected;
use l7_route::route::{Action, Forward};
use l7_route::{ChainKind, Decision, FormatContext, HttpChain, Snapshot, Sniffed, Verdict, Why};
use serde_json::json;
use support::{BANK, Request, get, http, load, snapshot};
use xds_model::envoy::cluster::{EndpointTarget, LbPolicy, LocalityMode, UpstreamVersion};
use xds_model::envoy::filter::AbortWith;

const REVIEWS: &str = "10.96.1.13:80";

fn chain<'a>(snapshot: &'a Snapshot, destination: &str) -> &'a HttpChain {
    let destination: SocketAddr = destination.parse().expect("an address");
    http(snapshot.chain(destination, Sniffed::Http11).expect("a chain"))
}

fn route_name(decision: &Decision<'_>) -> String {
    decision.route.map_or_else(|| "none".to_owned(), |route| route.name.to_string())
}

fn cluster(decision: &Decision<'_>) -> String {
    match decision.verdict {
        Verdict::Forward { cluster, .. } => cluster.name.to_string(),
        other => panic!("{other:?}"),
    }
}

/// The forwarding of the first route with a name, reachable or not (case 05's `/retry` is hidden by `/re`).
fn forward_named<'a>(chain: &'a HttpChain, name: &str) -> &'a Forward {
    let (_, route) = chain.routes().find(|(_, route)| &*route.name == name).expect("a route");
    match &route.action {
        Action::Forward(forward) => forward,
        other => panic!("{other:?}"),
    }
}

/// How often each cluster is chosen over 10 000 seeds.
fn shares(chain: &HttpChain, request: &Request) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for seed in 0..10_000 {
        *counts.entry(cluster(&chain.decide(&request.view(), seed))).or_insert(0) += 1;
    }
    counts
}

fn subset(name: &str) -> String {
    format!("inbound-vip|80|http/{name}|reviews.shop.svc.cluster.local")
}

#[test]
fn dispatch_finds_services_and_workloads() {
    let snapshot = snapshot("00-base");
    let chain = |destination: &str, sniffed| {
        snapshot.chain(destination.parse().expect("address"), sniffed).map(|chain| chain.name.to_string())
    };
    let reviews = Some("inbound-vip|80|http|reviews.shop.svc.cluster.local".to_owned());
    assert_eq!(chain(REVIEWS, Sniffed::Http11), reviews);
    assert_eq!(chain("[::ffff:10.96.1.13]:80", Sniffed::H2c), reviews);
    assert_eq!(chain("10.96.1.13:81", Sniffed::Http11), None);
    assert_eq!(chain("10.96.9.9:80", Sniffed::Http11), None);
    assert_eq!(chain("10.8.0.13:8080", Sniffed::Http11).as_deref(), Some("direct-http"));
    assert_eq!(chain("[fd00:8::d]:1", Sniffed::H2c).as_deref(), Some("direct-http"));
    assert_eq!(chain("10.8.0.13:8080", Sniffed::Other).as_deref(), Some("direct-tcp"));
    assert!(!snapshot.dispatch(REVIEWS.parse().expect("address")).expect("known").needs_sniffing());
    assert!(snapshot.dispatch("10.8.0.13:9".parse().expect("address")).expect("known").needs_sniffing());
    let direct = http(snapshot.chain("10.8.0.13:9".parse().expect("address"), Sniffed::Http11).expect("a chain"))
        .decide(&get("/").view(), 0);
    assert!(
        matches!(direct.verdict, Verdict::Forward { cluster, .. } if matches!(cluster.target, ClusterTarget::Encap))
    );
    let terminate = snapshot.terminate.as_ref().expect("there");
    assert!(terminate.accepts("spiffe://cluster.local/ns/shop/sa/frontend"));
    assert!(!terminate.accepts("spiffe://evil.local/ns/shop/sa/frontend"));
}

#[test]
fn case_03_header_canary_and_split() {
    let snapshot = snapshot("03-header-canary");
    let chain = chain(&snapshot, REVIEWS);
    let jason = get("/reviews/1").header("x-user", "jason");
    assert_eq!(shares(chain, &jason), BTreeMap::from([(subset("v2"), 10_000)]));
    let other = get("/reviews/1").header("x-user", "jasonx");
    // v3 has a weight of 0 and gets exactly nothing.
    assert_eq!(shares(chain, &other), BTreeMap::from([(subset("v1"), 9_000), (subset("v2"), 1_000)]));
    let why: Vec<_> = chain.explain(&other.view(), 0).into_iter().map(|route| (route.name, route.why)).collect();
    assert_eq!(why.len(), 2);
    assert!(matches!(&why[0], (name, Why::Mismatch(reason)) if name == "jason" && reason.contains("x-user")));
    assert_eq!(why[1], ("split".to_owned(), Why::Matched));
    let config = chain.explain(&other.view(), 0)[1].config.clone();
    assert!(config.is_some_and(|path| path.ends_with("shop/virtual-service/reviews")));
}

#[test]
fn case_03_weighted_clusters_change_headers() {
    let (_, snapshot, _) = load("03-header-canary", BANK);
    let chain =
        http(snapshot.chain_named("inbound-vip|80|http|payments.bank.svc.cluster.local").expect("payments is there"));
    let request = get("/");
    for (seed, canary, served_by) in [(0, "no", None), (95, "yes", Some("v2"))] {
        let decision = chain.decide(&request.view(), seed);
        let (mut upstream, mut downstream) = (HeaderMap::new(), HeaderMap::new());
        decision.apply_request_headers(&mut upstream, &FormatContext::default());
        decision.apply_response_headers(&mut downstream, &FormatContext::default());
        assert_eq!(upstream.get("x-canary").and_then(|value| value.to_str().ok()), Some(canary));
        assert_eq!(downstream.get("x-served-by").and_then(|value| value.to_str().ok()), served_by);
    }
}

#[test]
fn case_04_every_kind_of_match() {
    let snapshot = snapshot("04-match-everything");
    let chain = chain(&snapshot, REVIEWS);
    let headers =
        || get("/h").header("x-exact", "a").header("x-prefix", "bcd").header("x-regex", "ccc").header("x-present", "");
    let other = |request: Request| request.authority("other");
    let table = [
        (get("/exact"), "uri-exact"),
        (other(get("/exact/")), "none"),
        (get("/PREFIX/x"), "uri-prefix"),
        (other(get("/prefix")), "none"),
        (get("/items/42/x"), "uri-regex"),
        (other(get("/items/4x")), "none"),
        (other(get("/x/items/4")), "none"),
        (other(get("/m").method("POST")), "method"),
        (other(get("/m").method("PATCH")), "method"),
        (other(get("/m").method("XPUT")), "none"),
        (get("/a"), "authority"),
        (other(headers()), "headers"),
        (other(headers().header("x-not", "e")), "headers"),
        (other(headers().header("x-not", "d")), "none"),
        (other(headers().header("x-absent", "")), "none"),
        // Two values of one header are one value, joined.
        (other(headers().header("x-exact", "a")), "none"),
        (other(get("/q?r=abc&q=1&s=face")), "query"),
        (other(get("/q?r=abc&q=2&q=1&s=face")), "none"),
        (other(get("/q?r=%61bc&q=1&s=face")), "query"),
        (other(get("/q?r=abc&q=1")), "none"),
        (other(get("/port/1")), "port"),
        (other(get("/statistics")), "stat"),
        (other(get("/cx").header("x", "1")), "combined"),
        (other(get("/d?x=1")), "combined"),
        (other(get("/cx").header("x", "1").method("HEAD")), "none"),
    ];
    for (request, wanted) in table {
        let decision = chain.decide(&request.view(), 7);
        assert_eq!(route_name(&decision), wanted, "{} {} {:?}", request.method, request.target, request.headers);
    }
}

#[test]
fn case_05_rewrites_redirects_and_answers() {
    let snapshot = snapshot("05-actions");
    let chain = chain(&snapshot, REVIEWS);
    let rewritten = |target: &str| {
        let request = get(target);
        let rewritten = chain.decide(&request.view(), 0).rewrite(&request.view());
        (rewritten.path_and_query, rewritten.authority.map(|host| host.into_owned()))
    };
    assert_eq!(rewritten("/old/x?y=1"), (Some("/new/x?y=1".into()), Some("new.example".into())));
    assert_eq!(rewritten("/re/a/b/x?y"), (Some("/y/a/b?y".into()), None));
    assert_eq!(rewritten("/headers"), (None, Some("h.example".into())));
    let redirect = |request: Request| {
        let decision = chain.decide(&request.view(), 0);
        let status = match decision.verdict {
            Verdict::Redirect(redirect) => redirect.status(),
            other => panic!("{other:?}"),
        };
        (status, decision.location(&request.view()).expect("a location"))
    };
    assert_eq!(redirect(get("/go/x?y")), (308, "https://other.example/there?y".into()));
    assert_eq!(redirect(get("/port/1").authority("r:81")), (302, "http://r:81/port/1".into()));
    let answer = |target: &str| match chain.decide(&get(target).view(), 0).verdict {
        Verdict::Respond { status, body } => (status, String::from_utf8(body.to_vec()).expect("text")),
        other => panic!("{other:?}"),
    };
    assert_eq!(answer("/teapot"), (418, "short and stout".into()));
    assert_eq!(answer("/bytes"), (200, "hello".into()));
}

#[test]
fn case_05_headers() {
    let snapshot = snapshot("05-actions");
    let chain = chain(&snapshot, REVIEWS);
    let request = get("/headers/1").header("x-a", "0").header("x-b", "0").header("x-c", "0");
    let decision = chain.decide(&request.view(), 0);
    let context = FormatContext { downstream_remote: "10.8.0.10:9".parse().ok(), ..FormatContext::default() };
    let mut headers = request.headers.clone();
    decision.apply_request_headers(&mut headers, &context);
    let list = |headers: &HeaderMap| {
        let mut list: Vec<_> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().expect("text"))).collect();
        list.sort();
        list
    };
    assert_eq!(list(&headers), ["x-a: 1", "x-b: 0", "x-b: 2", "x-f: 6"]);
    let mut headers = HeaderMap::new();
    headers.insert("server", http::HeaderValue::from_static("echo"));
    decision.apply_response_headers(&mut headers, &context);
    assert_eq!(list(&headers), ["x-d: 10.8.0.10:9", "x-e: 5"]);
}

#[test]
fn case_05_mirrors() {
    let snapshot = snapshot("05-actions");
    let chain = chain(&snapshot, REVIEWS);
    let share = |route: &str, index: usize| {
        let forward = forward_named(chain, route);
        (0..100_000).filter(|seed| forward.mirrors[index].hit(*seed)).count()
    };
    assert!((25_000..26_000).contains(&share("mirror", 0)), "25.5 %");
    assert!((9_500..10_500).contains(&share("mirrors", 0)), "10 %");
    assert_eq!(share("mirrors", 1), 100_000);
    assert!(!forward_named(chain, "mirror").mirrors[0].shadow_suffix);
    assert!(forward_named(chain, "mirror").mirrors[0].cluster.name.contains("catalog"));
}

#[test]
fn case_05_faults() {
    let snapshot = snapshot("05-actions");
    let chain = chain(&snapshot, REVIEWS);
    let request = get("/fault");
    let decision = chain.decide(&request.view(), 0);
    let fault = decision.fault().expect("a fault");
    let injected: Vec<_> = (0..100_000).map(|seed| fault.inject(&request.view(), seed)).collect();
    let delays = injected.iter().filter(|one| one.delay == Some(Duration::from_secs(2))).count();
    let aborts = injected.iter().filter(|one| one.abort == Some(AbortWith::HttpStatus(503))).count();
    let both = injected.iter().filter(|one| one.delay.is_some() && one.abort.is_some()).count();
    assert!((49_000..51_000).contains(&delays), "{delays}");
    assert!((12_000..13_000).contains(&aborts), "{aborts}");
    assert!((5_800..6_700).contains(&both), "independent of each other: {both}");
    let request = get("/fgrpc");
    let decision = chain.decide(&request.view(), 0);
    let wanted = Injected { delay: None, abort: Some(AbortWith::GrpcStatus(14)) };
    assert_eq!(decision.fault().expect("a fault").inject(&request.view(), 1), wanted);
    assert!(chain.decide(&get("/x").view(), 0).fault().is_none());
}

#[test]
fn case_05_cors_and_retries() {
    let snapshot = snapshot("05-actions");
    let chain = chain(&snapshot, REVIEWS);
    let cors = chain.decide(&get("/cors").view(), 0).cors().expect("a policy").clone();
    for (origin, allowed) in [
        ("https://a.example", true),
        ("https://b.anything", true),
        ("https://x.c.example", true),
        ("https://x.c.example.evil", false),
        ("http://a.example", false),
    ] {
        assert_eq!(cors.allows(origin.as_bytes()), allowed, "{origin}");
    }
    assert_eq!((cors.policy.max_age.as_str(), cors.policy.allow_credentials), ("86400", true));
    assert!(cors.enabled(3));
    let forward = forward_named(chain, "retries");
    let retry = forward.retry.as_ref().expect("retries").policy.clone();
    assert_eq!(forward.timeout, Some(Duration::from_secs(5)));
    assert_eq!((retry.num_retries, retry.per_try_timeout), (4, Some(Duration::from_millis(750))));
    assert_eq!((retry.base_interval, retry.retriable_status_codes), (Duration::from_millis(40), vec![503]));
    assert_eq!((retry.avoid_previous_hosts, retry.previous_priorities), (Some(5), Some(2)));
    assert!(forward_named(chain, "no-retries").retry.is_none());
    let default = forward_named(chain, "default");
    assert_eq!(default.timeout, None);
    assert_eq!(default.retry.as_ref().expect("the default").policy.num_retries, 2);
}

#[test]
fn case_07_hash_policies() {
    let snapshot = snapshot("07-destination-rule-traffic");
    let policies: Vec<_> = snapshot
        .chains()
        .filter_map(|chain| match &chain.kind {
            ChainKind::Http(chain) => Some(chain),
            _ => None,
        })
        .flat_map(|chain| chain.routes())
        .filter_map(|(_, route)| match &route.action {
            Action::Forward(forward) if !forward.hash.is_empty() => Some(forward.hash.clone()),
            _ => None,
        })
        .collect();
    assert!(!policies.is_empty());
    let mut distinct = 0;
    for policies in policies {
        let hash = |request: Request, seed| policies.hash(&request.view(), seed);
        let same = hash(get("/?u=1").header("x-user", "a").header("cookie", "sid=q"), 1);
        assert_eq!(same, hash(get("/?u=1").header("x-user", "a").header("cookie", "sid=q"), 2));
        distinct +=
            usize::from(same.hash != hash(get("/?u=2").header("x-user", "b").header("cookie", "sid=z"), 1).hash);
        for cookie in hash(get("/"), 1).set_cookies {
            assert!(cookie.starts_with("sid=\"") && cookie.contains("; Max-Age=600; Path=/"), "{cookie}");
            let value = cookie.split('"').nth(1).expect("a value").to_owned();
            let back = hash(get("/").header("cookie", &format!("a=b; sid={value}")), 9);
            assert_eq!((back.hash, back.set_cookies), (hash(get("/"), 1).hash, Vec::new()));
        }
    }
    assert!(distinct > 0);
}

#[test]
fn case_12_and_24_claims() {
    let with_claims = snapshot("12-jwt");
    let chain_12 = chain(&with_claims, REVIEWS);
    let table = [
        (None, "v1"),
        (Some(json!({"groups": ["x", "canary-testers"]})), "v2"),
        (Some(json!({"groups": "canary-testers"})), "v2"),
        (Some(json!({"org": {"tenant": "acme"}})), "v3"),
        (Some(json!({"org": {"tenant": "acme"}, "banned": "true"})), "v1"),
        (Some(json!({"org": {"tenant": "acme"}, "banned": "no"})), "v3"),
        (Some(json!({"org.tenant": "acme"})), "v1"),
    ];
    for (claims, wanted) in table {
        let request = Request { claims, ..get("/") };
        assert_eq!(cluster(&chain_12.decide(&request.view(), 0)), subset(wanted), "{:?}", request.claims);
    }
    let absent = snapshot("24-claim-presence");
    let chain_24 = chain(&absent, REVIEWS);
    let (checkout, reviews) = ("checkout.shop", "reviews.shop");
    for (claims, wanted) in [
        (None, reviews),
        (Some(json!({"sub": "me"})), checkout),
        (Some(json!({"sub": "me", "banned": "x"})), reviews),
        (Some(json!({"sub": "me", "banned": ["x"]})), reviews),
        (Some(json!({"sub": "me", "banned": true})), reviews),
        (Some(json!({"banned": "x"})), reviews),
    ] {
        let request = Request { claims, ..get("/") };
        let cluster = cluster(&chain_24.decide(&request.view(), 0));
        assert!(cluster.contains(wanted), "{:?} -> {cluster}", request.claims);
    }
}

#[test]
fn case_14_gateway_api_routes() {
    let snapshot = snapshot("14-http-routes");
    let chain = chain(&snapshot, REVIEWS);
    let both = get("/r").header("x-user", "jason").header("x-re", "abc");
    assert!(cluster(&chain.decide(&both.view(), 0)).contains("checkout"));
    assert!(matches!(chain.decide(&get("/unknown").view(), 0).verdict, Verdict::NotFound));
    let split = shares(chain, &get("/split/x"));
    assert_eq!(split.values().copied().collect::<Vec<_>>(), [1_000, 9_000]);
    assert!(split.keys().all(|name| !name.contains("frontend")));
    let rewritten = |target: &str| {
        let request = get(target);
        chain.decide(&request.view(), 0).rewrite(&request.view()).path_and_query
    };
    assert_eq!(rewritten("/pre/x?y").as_deref(), Some("/post/x?y"));
    assert_eq!(rewritten("/pre").as_deref(), Some("/post"));
    assert_eq!(rewritten("/re/abc").as_deref(), Some("/full"));
    let request = get("/redirect/a");
    let location = chain.decide(&request.view(), 0).location(&request.view());
    assert_eq!(location.as_deref(), Some("https://r.example:8443/to/a"));
    // A backend that is not there: 500 by the Gateway API.
    for target in ["/nowhere", "/none"] {
        match chain.decide(&get(target).view(), 0).verdict {
            Verdict::Forward { forward, cluster } => {
                assert!(matches!(cluster.target, ClusterTarget::Unknown), "{target}");
                assert_eq!(forward.cluster_not_found_status, 500, "{target}");
            }
            Verdict::Respond { status, .. } => assert_eq!(status, 500, "{target}"),
            other => panic!("{target}: {other:?}"),
        }
    }
}

#[test]
fn case_06_tcp_weights() {
    let (_, snapshot, _) = load("06-tcp-tls-routes", BANK);
    let chains = snapshot.chains().filter_map(|chain| match &chain.kind {
        ChainKind::Tcp(tcp) => Some(tcp),
        _ => None,
    });
    let mut weighted = 0;
    for chain in chains {
        let mut counts = BTreeMap::new();
        for seed in 0..10_000 {
            *counts.entry(chain.choose(seed).name.to_string()).or_insert(0) += 1;
        }
        if counts.len() > 1 {
            weighted += 1;
            assert_eq!(counts.values().copied().sum::<u32>(), 10_000);
            assert!(counts.values().all(|count| count % 500 == 0), "{counts:?}");
        }
    }
    assert!(weighted > 0);
}

#[test]
fn clusters_keep_what_destination_rules_say() {
    let snapshot = snapshot("07-destination-rule-traffic");
    let cluster = snapshot.clusters.get(&subset("v1")).expect("v1");
    assert_eq!(cluster.lb, LbPolicy::RingHash { minimum: 1024, maximum: 8 * 1024 * 1024 });
    assert_eq!((cluster.limits.max_connections, cluster.limits.max_pending_requests), (100, 7));
    assert_eq!(cluster.connect_timeout, Duration::from_millis(30));
    let outlier = cluster.outlier.expect("outlier detection");
    assert_eq!((outlier.consecutive_5xx, outlier.consecutive_gateway_failure), (3, 2));
    assert_eq!((outlier.interval, outlier.max_ejection_percent), (Duration::from_secs(5), 60));
    assert_eq!(cluster.http.version, UpstreamVersion::Http2);
    assert_eq!(cluster.http.max_requests_per_connection, Some(9));
    assert_eq!(cluster.service.as_ref().map(|service| service.name.as_str()), Some("reviews"));
    let whole = snapshot.clusters.get("inbound-vip|80|http|reviews.shop.svc.cluster.local").expect("reviews");
    assert_eq!(whole.locality, LocalityMode::Weighted);
    let endpoints = snapshot.endpoints(whole).expect("endpoints");
    assert!(!endpoints.endpoints.is_empty());
    for endpoint in &endpoints.endpoints {
        let EndpointTarget::Hbone { authority, waypoint: None } = endpoint.target else {
            panic!("{:?}", endpoint.target);
        };
        assert_eq!(authority.port(), 8080);
        assert_eq!(endpoint.workload.as_ref().map(|workload| workload.namespace.as_str()), Some("shop"));
    }
}
