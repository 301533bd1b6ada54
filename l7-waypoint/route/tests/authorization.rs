//! What the recorded authorization policies allow, decided by the filters of the chains in order.
mod support;

use std::net::SocketAddr;

use l7_route::{AuthzRequest, ChainKind, FilterKind, HttpChain, Snapshot, Sniffed};
use serde_json::json;
use support::{BANK, Request, get, http, load, snapshot};

const REVIEWS: &str = "10.96.1.13:80";
const FRONTEND: &str = "spiffe://cluster.local/ns/shop/sa/frontend";

fn chain<'a>(snapshot: &'a Snapshot, destination: &str) -> &'a HttpChain {
    let destination = destination.parse().expect("an address");
    http(snapshot.chain(destination, Sniffed::Http11).expect("a chain"))
}

/// Client, address, VIP.
#[derive(Clone, Copy)]
struct Who {
    peer: &'static str,
    ip: &'static str,
    destination: &'static str,
}

const DEFAULT: Who = Who { peer: FRONTEND, ip: "10.8.0.10", destination: REVIEWS };

fn authz<'a>(who: Who, http: Option<&'a l7_route::RequestView<'a>>) -> AuthzRequest<'a> {
    let ip = who.ip.parse().expect("an address");
    let destination: SocketAddr = who.destination.parse().expect("an address");
    let peer = Some(who.peer).filter(|peer| !peer.is_empty());
    AuthzRequest { http, peer, direct_remote_ip: ip, remote_ip: ip, destination, server_name: None }
}

/// `Ok`, or the policy that denied (empty: no policy allowed).
fn check(chain: &HttpChain, who: Who, request: &Request) -> Result<(), String> {
    let view = request.view();
    let request = authz(who, Some(&view));
    for filter in &chain.filters {
        if let FilterKind::Rbac(rbac) = &filter.kind {
            let outcome = rbac.evaluate(&request);
            if !outcome.allowed {
                return Err(outcome.policy.map(ToString::to_string).unwrap_or_default());
            }
        }
    }
    Ok(())
}

#[test]
fn case_09_allow_and_deny() {
    let snapshot = snapshot("09-l7-authorization");
    let reviews = chain(&snapshot, REVIEWS);
    let ok = |target: &str| get(target).header("x-tenant", "a");
    let denied = |policy: &str| Err(policy.to_owned());
    let bank = Who { peer: "spiffe://cluster.local/ns/bank/sa/payments", ..DEFAULT };
    let table = [
        (DEFAULT, ok("/reviews/1"), Ok(())),
        (DEFAULT, ok("/"), Ok(())),
        (DEFAULT, ok("/x/style.css?y"), Ok(())),
        (DEFAULT, ok("/reviews/1").method("HEAD"), Ok(())),
        // The second operation only asks for host and port.
        (DEFAULT, ok("/anything").method("POST"), Ok(())),
        (DEFAULT, ok("/anything").authority("other"), denied("")),
        (DEFAULT, ok("/reviews/admin").authority("other"), denied("")),
        (DEFAULT, ok("/reviews/1").method("POST").authority("other"), denied("")),
        (DEFAULT, ok("/anything").authority("x.example"), Ok(())),
        (DEFAULT, ok("/anything").authority("bad.example"), denied("")),
        (bank, ok("/reviews/1"), Ok(())),
        (Who { peer: "spiffe://cluster.local/ns/bank/sa/ledger", ..DEFAULT }, ok("/reviews/1"), denied("")),
        (Who { peer: "spiffe://cluster.local/ns/shop/sa/other", ..DEFAULT }, ok("/reviews/1"), denied("")),
        (Who { peer: "", ..DEFAULT }, ok("/reviews/1"), denied("")),
        (DEFAULT, get("/reviews/1"), denied("")),
        (DEFAULT, get("/reviews/1").header("x-tenant", "bcd"), Ok(())),
        (DEFAULT, get("/reviews/1").header("x-tenant", "bb"), denied("")),
        (Who { ip: "10.9.0.1", ..DEFAULT }, ok("/reviews/1"), denied("")),
        (Who { destination: "10.96.1.14:80", ..DEFAULT }, ok("/reviews/1"), denied("")),
        (DEFAULT, ok("/reviews/1").method("DELETE"), denied("shop/reviews-deny rule 0")),
        (DEFAULT, ok("/a/1/b"), denied("shop/reviews-deny rule 1")),
        (DEFAULT, ok("/a/1/2/b"), Ok(())),
        (DEFAULT, ok("/c/1/2/b"), denied("shop/reviews-deny rule 1")),
        (DEFAULT, ok("/reviews/1").header("x-evil", "yes"), denied("shop/reviews-deny rule 2")),
        (DEFAULT, ok("/reviews/1").method("TRACE"), denied("istio-system/class-wide rule 0")),
    ];
    for (who, request, wanted) in table {
        let got = check(reviews, who, &request);
        assert_eq!(got, wanted, "{} {} {} {:?}", who.peer, request.method, request.target, request.headers);
    }
    let legacy = Who { peer: "spiffe://cluster.local/ns/legacy/sa/default", ..DEFAULT };
    let frontend = chain(&snapshot, "10.96.1.10:80");
    assert_eq!(check(frontend, legacy, &get("/internal")), denied("shop/gateway-wide rule 0"));
    assert_eq!(check(frontend, legacy, &get("/internal/x")), Ok(()));
    assert_eq!(check(frontend, DEFAULT, &get("/internal")), Ok(()));
    let catalog = chain(&snapshot, "10.96.1.12:9000");
    assert_eq!(check(catalog, DEFAULT, &get("/")), denied(""));
}

#[test]
fn case_09_tcp() {
    let (_, snapshot, _) = load("09-l7-authorization", BANK);
    let (chain, port) = snapshot
        .chains()
        .find_map(|chain| match &chain.kind {
            ChainKind::Tcp(tcp) if chain.name.contains("ledger") => Some((tcp, 3306)),
            _ => None,
        })
        .expect("ledger has a TCP chain");
    let [class_wide, ledger] = &*chain.rbac else { panic!("{:?}", chain.rbac) };
    // istiod drops the HTTP method of the class-wide DENY here, so that it denies every TCP connection.
    let outcome = class_wide.evaluate(&authz(DEFAULT, None));
    assert!(!outcome.allowed);
    assert_eq!(outcome.policy.map(ToString::to_string).as_deref(), Some("istio-system/class-wide rule 0"));
    let allowed = |peer, port| {
        let mut request = authz(Who { peer, ..DEFAULT }, None);
        request.destination.set_port(port);
        ledger.evaluate(&request).allowed
    };
    assert!(allowed("spiffe://cluster.local/ns/bank/sa/payments", port));
    assert!(!allowed("spiffe://cluster.local/ns/bank/sa/payments", 3307));
    assert!(!allowed(FRONTEND, port));
    assert!(!allowed("", port));
    assert!(chain.choose(0).name.contains("ledger"));
}

#[test]
fn case_10_the_service_is_asked_when_the_policy_says_so() {
    let snapshot = snapshot("10-external-authorization");
    let reviews = chain(&snapshot, REVIEWS);
    for (target, wanted) in [("/private/x", true), ("/private/open", false), ("/", false)] {
        let request = get(target);
        let view = request.view();
        let request = authz(DEFAULT, Some(&view));
        let mut shadows = Vec::new();
        let mut asked = None;
        for filter in &reviews.filters {
            match &filter.kind {
                FilterKind::Rbac(rbac) => shadows.extend(rbac.evaluate(&request).shadow),
                FilterKind::ExtAuthz(service) => {
                    assert!(!service.applies(&[]));
                    asked = Some(service.applies(&shadows));
                }
                _ => {}
            }
        }
        assert_eq!(asked, Some(wanted), "{target}");
    }
    // A provider that is not there denies.
    let checkout = chain(&snapshot, "10.96.1.11:80");
    assert_eq!(check(checkout, DEFAULT, &get("/")), Err("shop/missing-provider rule 0".to_owned()));
}

#[test]
fn case_12_claims_authorize() {
    let snapshot = snapshot("12-jwt");
    let reviews = chain(&snapshot, REVIEWS);
    let issuer = "https://keycloak.example/realms/shop";
    let good = json!({
        "iss": issuer, "sub": "jason", "groups": ["x", "canary-testers"], "org": {"tenant": "acme"},
        "aud": ["shop"], "azp": "web",
    });
    let with = |key: &str, value: serde_json::Value| {
        let mut claims = good.clone();
        claims[key] = value;
        get("/").claims(claims)
    };
    assert_eq!(check(reviews, DEFAULT, &get("/").claims(good.clone())), Ok(()));
    assert_eq!(check(reviews, DEFAULT, &with("groups", json!("admins"))), Ok(()));
    assert_eq!(check(reviews, DEFAULT, &get("/")), Err("shop/need-token rule 0".to_owned()));
    // No token, but the path is exempt from the DENY: no ALLOW matches.
    assert_eq!(check(reviews, DEFAULT, &get("/healthz")), Err(String::new()));
    for request in [
        with("groups", json!(["x"])),
        with("org", json!({"tenant": "other"})),
        with("aud", json!(["other"])),
        with("azp", json!("cli")),
        with("sub", json!("guest")),
        with("iss", json!("https://second.example")),
    ] {
        assert_eq!(check(reviews, DEFAULT, &request), Err(String::new()), "{:?}", request.claims);
    }
}
