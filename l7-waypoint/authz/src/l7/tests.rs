use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use http::HeaderMap;
use serde_json::json;
use xds_model::envoy::matcher::{
    HeaderMatcher, HeaderTest, MetadataMatcher, StringMatcher, StringPattern, ValueMatcher,
};
use xds_model::envoy::rbac::{Permission as P, Principal as S, Rbac as Config, RbacPolicy, RbacRules};

use super::matcher::full_regex;
use super::*;

const IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 8, 0, 10));

fn rules(action: RbacAction, permissions: Vec<P>, principals: Vec<S>) -> Config {
    let name = "ns[shop]-policy[reviews]-rule[2]".to_owned();
    let policies = vec![RbacPolicy { name, permissions, principals }];
    Config { rules: Some(RbacRules { action, policies }), shadow_rules: None, shadow_prefix: String::new() }
}

fn allowed(config: &Config, view: &RequestView<'_>) -> bool {
    let (rbac, errors) = Rbac::compile(config);
    assert_eq!(errors, Vec::<String>::new());
    rbac.evaluate(&authz(Some(view))).allowed
}

fn authz<'a>(http: Option<&'a RequestView<'a>>) -> AuthzRequest<'a> {
    AuthzRequest {
        http,
        peer: Some("spiffe://cluster.local/ns/shop/sa/frontend"),
        direct_remote_ip: IP,
        remote_ip: IP,
        destination: SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 1, 13)), 80),
        server_name: None,
    }
}

fn view<'a>(path: &'a str, headers: &'a HeaderMap) -> RequestView<'a> {
    let authority = "reviews.shop";
    RequestView { method: "GET", path, query: None, authority, scheme: "http", headers, source_ip: IP, claims: None }
}

fn text(pattern: StringPattern) -> StringMatcher {
    StringMatcher { pattern, ignore_case: false }
}

#[test]
fn allow_lets_only_the_matching_through_and_names_the_rule() {
    let headers = HeaderMap::new();
    let principal = S::Peer(Some(text(StringPattern::Regex("spiffe://.+/ns/shop/(.+/|)sa/frontend(/.+)?".into()))));
    let path = P::UrlPath(text(StringPattern::Prefix("/api/".into())));
    let (rbac, _) = Rbac::compile(&rules(RbacAction::Allow, vec![path], vec![principal]));
    let request = view("/api/x", &headers);
    let outcome = rbac.evaluate(&authz(Some(&request)));
    assert!(outcome.allowed);
    assert_eq!(outcome.policy.map(ToString::to_string).as_deref(), Some("shop/reviews rule 2"));
    let request = view("/apix", &headers);
    let outcome = rbac.evaluate(&authz(Some(&request)));
    assert!(!outcome.allowed);
    assert_eq!(outcome.policy, None);
    let stranger = AuthzRequest { peer: Some("spiffe://cluster.local/ns/legacy/sa/frontend"), ..authz(Some(&request)) };
    assert!(!rbac.evaluate(&stranger).allowed);
    assert!(!rbac.evaluate(&AuthzRequest { peer: None, ..stranger }).allowed);
}

#[test]
fn allow_without_policies_denies_and_no_rules_allow() {
    let headers = HeaderMap::new();
    let request = view("/", &headers);
    let mut config = rules(RbacAction::Allow, vec![P::Any], vec![S::Any]);
    assert!(allowed(&config, &request));
    if let Some(rules) = config.rules.as_mut() {
        rules.policies.clear();
    }
    assert!(!allowed(&config, &request));
    config.rules = None;
    assert!(allowed(&config, &request));
}

#[test]
fn unknown_parts_fail_closed_even_when_negated() {
    let headers = HeaderMap::new();
    let request = view("/", &headers);
    let unknown = || P::Unsupported("x".into());
    for permission in [unknown(), P::Not(Box::new(unknown())), P::And(vec![P::Any, unknown()])] {
        assert!(allowed(&rules(RbacAction::Log, vec![permission.clone()], vec![S::Any]), &request));
        assert!(!allowed(&rules(RbacAction::Deny, vec![permission.clone()], vec![S::Any]), &request));
        assert!(!allowed(&rules(RbacAction::Allow, vec![permission], vec![S::Any]), &request));
    }
    // A part that is known to be false settles the matter.
    let settled = P::And(vec![unknown(), P::DestinationPort(81)]);
    assert!(allowed(&rules(RbacAction::Deny, vec![settled], vec![S::Any]), &request));
    let (rbac, errors) =
        Rbac::compile(&rules(RbacAction::Deny, vec![P::UrlPath(text(StringPattern::Regex("(".into())))], vec![S::Any]));
    assert_eq!(errors.len(), 1);
    assert!(!rbac.evaluate(&authz(Some(&request))).allowed);
}

#[test]
fn missing_headers_follow_envoy() {
    let present = "x-a: 1";
    let table = [
        // (test, invert, missing_as_empty, with header, without)
        (HeaderTest::Present(true), false, false, true, false),
        (HeaderTest::Present(true), true, false, false, true),
        (HeaderTest::Value(StringMatcher::exact("1")), false, false, true, false),
        (HeaderTest::Value(StringMatcher::exact("1")), true, false, false, false),
        (HeaderTest::Value(StringMatcher::exact("1")), true, true, false, true),
        (HeaderTest::Value(StringMatcher::exact("")), false, true, false, true),
        (HeaderTest::Range { start: 0, end: 2 }, false, false, true, false),
    ];
    for (test, invert, missing_as_empty, with, without) in table {
        let matcher = HeaderMatcher { name: "x-a".into(), test: test.clone(), invert, missing_as_empty };
        let compiled = HeaderMatch::compile(&matcher).expect("compiles");
        let mut headers = HeaderMap::new();
        assert_eq!(compiled.matches(&view("/", &headers)), without, "{test:?} without {present}");
        headers.insert("x-a", http::HeaderValue::from_static("1"));
        assert_eq!(compiled.matches(&view("/", &headers)), with, "{test:?} with {present}");
    }
}

#[test]
fn claims_are_searched_in_lists_and_nested_objects() {
    let claims = json!({"groups": ["a", "canary"], "org": {"tenant": "acme"}, "n": 3, "null": null});
    let any = |text: StringMatcher| {
        ValueMatcher::Or(vec![
            ValueMatcher::List(Box::new(ValueMatcher::String(text.clone()))),
            ValueMatcher::String(text),
        ])
    };
    let matcher = |path: &[&str], value, invert| {
        let path = std::iter::once("payload").chain(path.iter().copied()).map(str::to_owned).collect();
        let matcher = MetadataMatcher { filter: "envoy.filters.http.jwt_authn".into(), path, value, invert };
        ClaimMatch::compile(&matcher).expect("compiles")
    };
    let exact = StringMatcher::exact;
    assert!(matcher(&["groups"], any(exact("canary")), false).matches(Some(&claims)));
    assert!(!matcher(&["groups"], any(exact("b")), false).matches(Some(&claims)));
    assert!(matcher(&["org", "tenant"], any(text(StringPattern::Prefix("ac".into()))), false).matches(Some(&claims)));
    assert!(matcher(&["banned"], ValueMatcher::Present(true), true).matches(Some(&claims)));
    assert!(!matcher(&["null"], ValueMatcher::Present(true), true).matches(Some(&claims)));
    assert!(!matcher(&["groups"], any(exact("canary")), false).matches(None));
    let other = MetadataMatcher { filter: "other".into(), path: vec![], value: ValueMatcher::Null, invert: false };
    assert!(ClaimMatch::compile(&other).is_err());
}

#[test]
fn templates() {
    let matches = |template: &str, path: &str| template_regex(template).expect("compiles").is_match(path.as_bytes());
    assert!(matches("/a/*/b", "/a/x=1/b"));
    assert!(!matches("/a/*/b", "/a/b"));
    assert!(!matches("/a/*/b", "/a/x/y/b"));
    assert!(matches("/c/**", "/c/x/y"));
    assert!(matches("/c/**", "/c/"));
    assert!(!matches("/c/**", "/cc"));
    assert!(matches("/u/{id}/{rest=p/*}", "/u/7/p/8"));
    assert!(!matches("/u/{id}/{rest=p/*}", "/u/7/q/8"));
    assert!(matches("/a.b/{*}", "/a.b/x"));
    assert!(!matches("/a.b/{*}", "/axb/x"));
    assert!(template_regex("/a/{x").is_err());
    assert!(template_regex("a").is_err());
}

#[test]
fn regexes_match_the_whole_value_and_classes_are_ascii() {
    let regex = full_regex("a|b+").expect("compiles");
    assert!(regex.is_match(b"bb"));
    assert!(!regex.is_match(b"xbb"));
    assert!(!regex.is_match(b"ab"));
    assert!(!full_regex(r"\d").expect("compiles").is_match("٣".as_bytes()));
    assert!(full_regex("[äö]").expect("compiles").is_match("ä".as_bytes()));
    assert!(full_regex("a)|(?:b").is_err());
}
