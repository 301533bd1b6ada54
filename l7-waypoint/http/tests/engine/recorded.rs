//! What a real istiod sent, served: requests go where the objects say.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::Request;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use l7_http::ConnInfo;
use l7_route::Snapshot;
use prost::Message;
use serde_json::{Value, json};
use xds_model::envoy::{Resources, translate};
use xds_proto::envoy::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use xds_proto::type_url::{CLUSTER, ENDPOINT, LISTENER};

use crate::support::*;

pub(crate) const SHOP: &str = "waypoint-shop-waypoint";

fn recorded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/testdata/istiod/recorded")
}

fn mesh(case: &str) -> Mesh {
    mesh_of(case, SHOP)
}

pub(crate) fn mesh_of(case: &str, waypoint: &str) -> Mesh {
    let mut resources = Resources::default();
    for (file, type_url) in [("clusters", CLUSTER), ("endpoints", ENDPOINT), ("listeners", LISTENER)] {
        let path = |case: &str| recorded().join(case).join(waypoint).join(format!("{file}.binpb"));
        let bytes = std::fs::read(path(case)).or_else(|_| std::fs::read(path("00-base"))).expect(file);
        for resource in DeltaDiscoveryResponse::decode(bytes.as_slice()).unwrap().resources {
            resources.insert(type_url, &resource.name, &resource.resource.unwrap().value).unwrap();
        }
    }
    Mesh::of(Snapshot::compile(&translate(&resources).config).0)
}

/// From the frontend to the reviews service.
pub(crate) fn reviews() -> ConnInfo {
    let mut info = ConnInfo::plain("10.8.0.10:40000".parse().unwrap(), "10.96.1.13:80".parse().unwrap());
    info.peer_principal = Some(Arc::from("spiffe://cluster.local/ns/shop/sa/frontend"));
    info
}

pub(crate) fn to(authority: &str, path: &str) -> Request<Body> {
    Request::get(path).header("host", authority).body(full("")).unwrap()
}

/// Endpoints of a subset's cluster.
fn endpoints(mesh: &Mesh, cluster: &str) -> Vec<String> {
    let snapshot = mesh.snapshot.load();
    let found = snapshot.clusters.iter().find(|known| known.name == cluster);
    let found = found
        .unwrap_or_else(|| panic!("{cluster} in {:?}", snapshot.clusters.iter().map(|c| &c.name).collect::<Vec<_>>()));
    let assignment = snapshot.endpoints(found).unwrap();
    let target = |endpoint: &xds_model::envoy::cluster::Endpoint| match &endpoint.target {
        xds_model::envoy::cluster::EndpointTarget::Hbone { authority, .. } => authority.to_string(),
        other => panic!("{other:?}"),
    };
    assignment.endpoints.iter().map(target).collect()
}

fn subset(mesh: &Mesh, subset: &str) -> Vec<String> {
    endpoints(mesh, &format!("inbound-vip|80|http/{subset}|reviews.shop.svc.cluster.local"))
}

#[test]
fn case_03_jason_sees_v2_and_others_mostly_v1() {
    run(async || {
        let mesh = mesh("03-header-canary");
        let (v1, v2, v3) = (subset(&mesh, "v1"), subset(&mesh, "v2"), subset(&mesh, "v3"));
        for _ in 0..20 {
            let answer = mesh.send_as(reviews(), with(to("reviews", "/"), "x-user", "jason")).await;
            assert!(v2.contains(&answer.body), "{} not in {v2:?}", answer.body);
        }
        let mut sender = mesh.http1(reviews()).await;
        let mut canary = 0;
        for _ in 0..500 {
            let answer = Answer::read(sender.send_request(to("reviews", "/")).await.unwrap()).await;
            assert!(!v3.contains(&answer.body), "weight 0");
            assert!(v1.contains(&answer.body) || v2.contains(&answer.body));
            canary += usize::from(v2.contains(&answer.body));
        }
        assert!((25..80).contains(&canary), "{canary} of 500 at 10 %");
    });
}

#[test]
fn case_05_actions() {
    run(async || {
        let mesh = mesh("05-actions");
        let ask = async |path: &str| mesh.send_as(reviews(), to("reviews", path)).await;
        assert_eq!(ask("/old/x").await.status, 200);
        let seen = mesh.seen().pop().unwrap();
        assert_eq!((seen.authority.as_str(), seen.path.as_str()), ("new.example", "/new/x"));
        ask("/re/middle/x").await;
        assert_eq!(mesh.seen().pop().unwrap().path, "/y/middle");
        let answer = ask("/go/anywhere").await;
        assert_eq!((answer.status.as_u16(), answer.header("location")), (308, "https://other.example/there"));
        let answer = ask("/teapot").await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (418, "short and stout"));
        assert_eq!(ask("/bytes").await.body, "hello");
        let answer = ask("/headers").await;
        assert_eq!((answer.header("x-d"), answer.header("x-e")), ("10.8.0.10:40000", "5"));
        let seen = mesh.seen().pop().unwrap();
        assert_eq!(
            (&seen.headers["x-a"], &seen.headers["x-b"], &seen.headers["x-f"]),
            (&"1".parse().unwrap(), &"2".parse().unwrap(), &"6".parse().unwrap())
        );
        let grpc = with(to("reviews", "/fgrpc"), "content-type", "application/grpc");
        assert_eq!(mesh.send_as(reviews(), grpc).await.header("grpc-status"), "14");
        mesh.handler(|_, _| async { status(503) });
        let before = mesh.seen().len();
        assert_eq!(ask("/noretry").await.status, 503);
        assert_eq!(ask("/").await.status, 503);
        assert_eq!(mesh.seen().len() - before, 2, "none, and Istio's default, which leaves a 503 alone");
        let faults = futures::future::join_all((0..100).map(|_| ask("/fault"))).await;
        assert!(faults.iter().any(|answer| answer.body == "fault filter abort"));
    });
}

#[test]
fn case_07_keys_stick() {
    run(async || {
        let mesh = mesh("07-destination-rule-traffic");
        let mut by_subset = std::collections::HashMap::new();
        for _ in 0..60 {
            let answer =
                mesh.send_as(reviews(), with(with(to("reviews", "/?u=1"), "x-user", "ann"), "cookie", "sid=7")).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            let name = ["v1", "v3"].into_iter().find(|name| subset(&mesh, name).contains(&answer.body));
            if let Some(name) = name {
                let first = by_subset.entry(name).or_insert_with(|| answer.body.clone());
                assert_eq!(*first, answer.body, "{name} moved");
            }
        }
    });
}

#[test]
fn case_09_authorization() {
    run(async || {
        let mesh = mesh("09-l7-authorization");
        let ask = async |info: ConnInfo, request: Request<Body>| {
            let answer = mesh.send_as(info, request).await;
            (answer.status.as_u16(), answer.body)
        };
        let good = || with(to("reviews.shop.svc.cluster.local", "/reviews/1"), "x-tenant", "a");
        assert_eq!(ask(reviews(), good()).await.0, 200);
        let denied = (403, "RBAC: access denied".to_owned());
        assert_eq!(ask(reviews(), with(good(), "x-evil", "1")).await, denied);
        let mut delete = good();
        *delete.method_mut() = http::Method::DELETE;
        assert_eq!(ask(reviews(), delete).await, denied);
        let mut stranger = reviews();
        stranger.peer_principal = Some(Arc::from("spiffe://cluster.local/ns/other/sa/x"));
        assert_eq!(ask(stranger, good()).await, denied);
        let mut nobody = reviews();
        nobody.peer_principal = None;
        assert_eq!(ask(nobody, good()).await, denied);
        let mut outside = reviews();
        outside.peer = "172.16.0.1:1".parse().unwrap();
        assert_eq!(ask(outside, good()).await, denied);
        assert_eq!(
            ask(reviews(), with(to("reviews", "/a/b/../admin/b"), "x-tenant", "a")).await,
            denied,
            "/a/admin/b after normalisation"
        );
        let reasons: Vec<_> = (0..7).flat_map(|_| mesh.event().reasons).collect();
        assert!(reasons.iter().any(|reason| reason.contains("shop/reviews-deny rule")), "{reasons:?}");
        let mut catalog = reviews();
        catalog.destination = "10.96.1.12:9000".parse().unwrap();
        let grpc = with(to("catalog:9000", "/pkg.Svc/M"), "content-type", "application/grpc");
        assert_eq!(mesh.send_as(catalog, grpc).await.header("grpc-status"), "7", "nothing is allowed there");
    });
}

fn token(claims: &Value) -> String {
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    let key = include_bytes!("../../../../integration/testdata/istiod/keys/r1.pem");
    let header = Header { kid: Some("r1".into()), ..Header::new(Algorithm::RS256) };
    encode(&header, claims, &EncodingKey::from_rsa_pem(key).unwrap()).unwrap()
}

#[test]
fn case_12_tokens_authorize_and_route() {
    run(async || {
        let mesh = mesh("12-jwt");
        let claims = |groups: Value, tenant: &str| {
            json!({"iss": "https://keycloak.example/realms/shop", "sub": "ann", "aud": ["shop"], "azp": "web", "exp": 4_000_000_000u64,
                   "groups": groups, "org": {"tenant": tenant}})
        };
        let ask = async |token: Option<String>, path: &str| {
            let request = to("reviews", path);
            let request = match token {
                Some(token) => with(request, "authorization", &format!("Bearer {token}")),
                None => request,
            };
            mesh.send_as(reviews(), request).await
        };
        let answer = ask(None, "/").await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (403, "RBAC: access denied"), "a token is needed");
        let answer = ask(Some("rubbish".into()), "/").await;
        assert_eq!(answer.status, 401);
        assert!(answer.body.starts_with("Jwt is not in the form of"), "{}", answer.body);
        assert_eq!(answer.header("www-authenticate"), "Bearer realm=\"http://reviews/\", error=\"invalid_token\"");
        let answer = ask(Some(token(&json!({"iss": "https://other"}))), "/").await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (401, "Jwt issuer is not configured"));
        let mut expired = claims(json!(["canary-testers"]), "acme");
        expired["exp"] = json!(1_000_000);
        assert_eq!(ask(Some(token(&expired)), "/").await.body, "Jwt is expired");
        let mut elsewhere = claims(json!(["canary-testers"]), "acme");
        elsewhere["aud"] = json!("bank");
        let answer = ask(Some(token(&elsewhere)), "/").await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (403, "Audiences in Jwt are not allowed"));

        let canary = ask(Some(token(&claims(json!(["canary-testers"]), "acme"))), "/").await;
        assert_eq!(canary.status, 200, "{canary:?}");
        assert!(subset(&mesh, "v2").contains(&canary.body), "routed by a claim");
        let seen = mesh.seen().pop().unwrap();
        assert_eq!(
            (&seen.headers["x-sub"], &seen.headers["x-tenant"]),
            (&"ann".parse().unwrap(), &"acme".parse().unwrap())
        );
        assert!(seen.headers.contains_key("authorization"), "forwarded");
        let admin = ask(Some(token(&claims(json!(["admin-x"]), "acme"))), "/").await;
        assert!(subset(&mesh, "v3").contains(&admin.body), "{}", admin.body);
        assert_eq!(ask(Some(token(&claims(json!(["nobody"]), "acme"))), "/").await.status, 403);
        assert_eq!(ask(Some(token(&claims(json!(["canary-testers"]), "umbrella"))), "/").await.status, 403);
        let by_query = format!("/?token={}", token(&claims(json!(["canary-testers"]), "acme")));
        assert_eq!(ask(None, &by_query).await.status, 200);
    });
}

#[test]
fn case_14_gateway_api_routes() {
    run(async || {
        let mesh = mesh("14-http-routes");
        let ask = async |request: Request<Body>| mesh.send_as(reviews(), request).await;
        let checkout = endpoints(&mesh, "inbound-vip|80|http|checkout.shop.svc.cluster.local");
        let answer = ask(with(with(to("reviews", "/r"), "x-user", "jason"), "x-re", "abc")).await;
        assert!(checkout.contains(&answer.body), "{}", answer.body);
        let answer = ask(to("reviews", "/redirect/x")).await;
        assert_eq!((answer.status.as_u16(), answer.header("location")), (301, "https://r.example:8443/to/x"));
        ask(to("reviews", "/pre/x")).await;
        assert_eq!(mesh.seen().pop().unwrap().path, "/post/x");
        ask(to("reviews", "/re/abc")).await;
        let seen = mesh.seen().into_iter().rev().find(|seen| seen.path == "/full").unwrap();
        assert!(seen.authority.starts_with("new.example"), "{}", seen.authority);
        assert_eq!(ask(to("reviews", "/nowhere")).await.status, 500, "a backend that does not exist");
        assert_eq!(ask(to("reviews", "/none")).await.status, 500);
        mesh.handler(|_, _| async { status(500) });
        let before = mesh.seen().len();
        ask(to("reviews", "/split")).await;
        assert_eq!(mesh.seen().len() - before, 4, "three retries of the codes listed");
    });
}

#[test]
fn every_recorded_case_is_served_or_closed() {
    run(async || {
        let mut cases: Vec<_> = std::fs::read_dir(recorded())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        cases.retain(|name| name.starts_with(|c: char| c.is_ascii_digit()));
        assert!(cases.len() > 20);
        let mut outcomes = Vec::new();
        for case in cases {
            let mesh = mesh(&case);
            let outcome = mesh.http1(reviews()).await.send_request(to("reviews", "/")).await;
            let outcome =
                outcome.map_or_else(|error| error.to_string(), |response| response.status().as_u16().to_string());
            outcomes.push(format!("{case} {outcome}"));
        }
        outcomes.sort();
        outcomes.retain(|outcome| !outcome.ends_with(" 200"));
        let expected = [
            "04-match-everything 404",
            "09-l7-authorization 403",
            "12-jwt 403",
            "14-http-routes 404",
            // Wasm and Lua filters are not served: the chain is closed.
            "21-extension-filters operation was canceled",
        ];
        assert_eq!(outcomes, expected);
    });
}
