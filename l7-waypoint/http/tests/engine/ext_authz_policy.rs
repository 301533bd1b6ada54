//! CUSTOM policies as a real istiod sends them, and their place among the other actions.

use std::sync::Arc;

use http::Response;
use l7_http::ConnInfo;
use xds_model::envoy::chain::ChainKind;
use xds_model::envoy::ext_authz::ExtAuthz;
use xds_model::envoy::filter::HttpFilterKind;
use xds_model::envoy::matcher::{MetadataMatcher, StringMatcher, StringPattern, ValueMatcher};
use xds_model::envoy::rbac::{Permission, Principal, Rbac, RbacAction, RbacPolicy, RbacRules};

use crate::config::*;
use crate::ext_authz::{APP, AUTHZ, authorizer, denied, filter, ok, post};
use crate::recorded::{SHOP, mesh_of, reviews, to};
use crate::support::*;

const CASE: &str = "10-external-authorization";
const BANK: &str = "waypoint-bank-payments-waypoint";

#[test]
fn case_10_an_http_provider_is_asked_for_the_policys_paths() {
    run(async || {
        let mesh = mesh_of(CASE, SHOP);
        mesh.handler(|endpoint, request| async move {
            let cookie = request.headers().get("cookie").is_some_and(|cookie| cookie == "good");
            match (endpoint.ends_with(":8000"), cookie) {
                (false, _) => Response::new(full(endpoint)),
                (true, true) => {
                    Response::builder().header("x-user", "jason").header("x-ok", "1").body(full("")).unwrap()
                }
                (true, false) => Response::builder().status(401).header("x-why", "1").body(full("no")).unwrap(),
            }
        });
        let asked = || mesh.seen().into_iter().filter(|seen| seen.endpoint.ends_with(":8000")).count();
        // Not the policy's paths.
        for path in ["/", "/private/open"] {
            assert_eq!(mesh.send_as(reviews(), to("reviews", path)).await.status, 200, "{path}");
            mesh.event();
        }
        assert_eq!(asked(), 0);
        let answer = mesh.send_as(reviews(), to("reviews", "/private/x")).await;
        // Only the listed headers come back.
        assert_eq!((answer.status.as_u16(), answer.body.as_str(), answer.header("x-why")), (401, "no", ""));
        let event = mesh.event();
        assert_eq!(event.flags, ["UAEX"]);
        assert!(event.reasons.iter().any(|reason| reason.contains("shop/ext-http rule 0")), "{:?}", event.reasons);
        let answer = mesh.send_as(reviews(), with(to("reviews", "/private/x"), "cookie", "good")).await;
        assert_eq!((answer.status.as_u16(), answer.header("x-ok")), (200, "1"));
        assert_eq!(mesh.seen().pop().unwrap().headers["x-user"], "jason");
        let check = mesh.seen().into_iter().find(|seen| seen.endpoint.ends_with(":8000")).unwrap();
        assert_eq!((check.path.as_str(), check.headers["x-add"].to_str().unwrap()), ("/check/private/x", "v"));
        // The service fails: the provider says 503.
        mesh.upstreams.down.borrow_mut().extend(["10.8.2.41:8000".to_owned(), "[fd00:8:2::29]:8000".to_owned()]);
        mesh.handler(|_, _| async { status(500) });
        assert_eq!(mesh.send_as(reviews(), to("reviews", "/private/x")).await.status, 503);
        // A provider that the mesh does not know denies everything.
        let checkout = ConnInfo::plain("10.8.0.10:40000".parse().unwrap(), "10.96.1.11:80".parse().unwrap());
        assert_eq!(mesh.send_as(checkout, to("checkout", "/")).await.status, 403);
    });
}

#[test]
fn case_10_a_grpc_provider_is_asked_for_the_policys_callers() {
    run(async || {
        let mesh = mesh_of(CASE, BANK);
        let asked = authorizer(&mesh, ":9000", |_| denied(401, &[("x-why", "no")], "go away"));
        assert_eq!(mesh.send_as(payments(&mesh, "admin"), to("payments", "/")).await.status, 200);
        assert!(asked.lock().unwrap().is_empty());
        let answer = mesh.send_as(payments(&mesh, "teller"), to("payments", "/")).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str(), answer.header("x-why")), (401, "go away", "no"));
        let principal = asked.lock().unwrap()[0].attributes.clone().unwrap().source.unwrap().principal;
        assert_eq!(principal, "spiffe://cluster.local/ns/bank/sa/teller");
        // This provider may fail open.
        let mesh = mesh_of(CASE, BANK);
        mesh.upstreams.down.borrow_mut().extend(["10.8.2.41:9000".to_owned(), "[fd00:8:2::29]:9000".to_owned()]);
        assert_eq!(mesh.send_as(payments(&mesh, "teller"), to("payments", "/")).await.status, 200);
        assert!(mesh.event().reasons.iter().any(|reason| reason.contains("external authorization failed")));
    });
}

/// From a bank account to the payments service.
fn payments(mesh: &Mesh, who: &str) -> ConnInfo {
    let mut info = ConnInfo::plain("10.8.0.10:40000".parse().unwrap(), "10.96.2.20:80".parse().unwrap());
    let snapshot = mesh.snapshot.load();
    let chain = snapshot.chain(info.destination, l7_route::Sniffed::Http11);
    assert!(chain.is_some_and(|chain| chain.name.contains("payments")), "{chain:?}");
    info.peer_principal = Some(Arc::from(format!("spiffe://cluster.local/ns/bank/sa/{who}")));
    info
}

fn rule(name: &str, prefix: &str) -> RbacPolicy {
    let pattern = StringPattern::Prefix(prefix.into());
    let path = Permission::UrlPath(StringMatcher { pattern, ignore_case: false });
    RbacPolicy { name: name.into(), permissions: vec![path], principals: vec![Principal::Any] }
}

fn rules(action: RbacAction, policies: Vec<RbacPolicy>) -> Option<RbacRules> {
    Some(RbacRules { action, policies })
}

#[test]
fn custom_comes_first_and_the_others_still_decide() {
    run(async || {
        let shadow = Rbac {
            rules: None,
            shadow_rules: rules(RbacAction::Deny, vec![rule("istio-ext-authz-p-ns[a]-policy[c]-rule[0]", "/c")]),
            shadow_prefix: "istio_ext_authz_".into(),
        };
        let enforced = |action, name: &str, prefix: &str| Rbac {
            rules: rules(action, vec![rule(name, prefix)]),
            shadow_rules: None,
            shadow_prefix: String::new(),
        };
        let asks = filter(xds_model::envoy::ext_authz::ExtAuthzService::Grpc {
            cluster: "authz".into(),
            authority: None,
            timeout: std::time::Duration::from_secs(1),
            initial_metadata: Vec::new(),
        });
        let enabled = MetadataMatcher {
            filter: "envoy.filters.http.rbac".into(),
            path: vec!["istio_ext_authz_shadow_effective_policy_id".into()],
            value: ValueMatcher::String(StringMatcher {
                pattern: StringPattern::Prefix("istio-ext-authz-p".into()),
                ignore_case: false,
            }),
            invert: false,
        };
        let filters = vec![
            HttpFilterKind::Rbac(Box::new(shadow)),
            HttpFilterKind::ExtAuthz(Box::new(ExtAuthz { enabled: Some(enabled), ..asks })),
            HttpFilterKind::Rbac(Box::new(enforced(RbacAction::Deny, "ns[a]-policy[d]-rule[0]", "/c/denied"))),
            HttpFilterKind::Rbac(Box::new(enforced(RbacAction::Allow, "ns[a]-policy[a]-rule[0]", "/c"))),
        ];
        let chain = http_chain(vec![crate::config::to("/", forward("app"))], filters);
        let clusters = vec![cluster("app", &[APP]), cluster("authz", &[AUTHZ])];
        let mesh = Mesh::new(&config(ChainKind::Http(Box::new(chain)), clusters));
        let asked = authorizer(&mesh, AUTHZ, |request| {
            let http = request.attributes.as_ref().unwrap().request.as_ref().unwrap().http.as_ref().unwrap();
            if http.path.ends_with("bad") { denied(401, &[], "") } else { ok() }
        });
        let ask = async |path: &str| {
            asked.lock().unwrap().clear();
            let status = mesh.send(post(path, "")).await.status.as_u16();
            let event = mesh.event();
            (status, asked.lock().unwrap().len(), event.flags.join(","))
        };
        assert_eq!(ask("/c/x").await, (200, 1, String::new()));
        assert_eq!(ask("/c/bad").await, (401, 1, "UAEX".into()), "refused by the service");
        assert_eq!(ask("/c/denied").await, (403, 1, String::new()), "the service's yes does not overrule DENY");
        assert_eq!(ask("/other").await, (403, 0, String::new()), "no ALLOW, and nobody was asked");
    });
}
