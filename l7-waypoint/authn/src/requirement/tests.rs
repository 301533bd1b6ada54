use std::collections::BTreeMap;
use std::time::Duration;

use http::header::{AUTHORIZATION, HeaderValue};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::json;
use xds_model::envoy::jwt::{ClaimToHeader, Jwks, JwtProvider, JwtRule};

use super::*;

const JWKS: &str = include_str!("../../../../integration/testdata/istiod/keys/jwks.json");
const RSA: &[u8] = include_bytes!("../../../../integration/testdata/istiod/keys/r1.pem");
const EC: &[u8] = include_bytes!("../../../../integration/testdata/istiod/keys/e1.pem");
const NOW: u64 = 1_800_000_000;

fn sign(algorithm: Algorithm, kid: &str, claims: &Value) -> String {
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    let key = match algorithm {
        Algorithm::ES256 => EncodingKey::from_ec_pem(EC).unwrap(),
        _ => EncodingKey::from_rsa_pem(RSA).unwrap(),
    };
    let header = Header { kid: Some(kid.into()), ..Header::new(algorithm) };
    encode(&header, claims, &key).unwrap()
}

fn provider(issuer: &str) -> JwtProvider {
    JwtProvider {
        issuer: Some(issuer.into()),
        audiences: Vec::new(),
        jwks: Jwks::Inline(JWKS.replace(r#""alg": "RS256", "#, "")),
        forward: false,
        from_headers: Vec::new(),
        from_params: Vec::new(),
        from_cookies: Vec::new(),
        forward_payload_header: None,
        pad_forward_payload_header: false,
        payload_in_metadata: Some("payload".into()),
        space_delimited_claims: vec!["scope".into()],
        header_in_metadata: None,
        claim_to_headers: Vec::new(),
        clock_skew: Duration::from_secs(60),
        clear_route_cache: true,
        require_expiration: false,
        max_lifetime: None,
    }
}

fn filter(providers: Vec<JwtProvider>, requires: JwtRequirement) -> Authenticator {
    let providers: BTreeMap<_, _> =
        providers.into_iter().enumerate().map(|(i, p)| (format!("origins-{i}"), p)).collect();
    let rules = vec![JwtRule { matcher: None, requires: Some(requires) }];
    let config = JwtAuthn { providers, rules, bypass_cors_preflight: true, strip_failure_response: false };
    Authenticator::compile(&config, &JwksStore::default()).unwrap()
}

/// What Istio writes for one RequestAuthentication.
fn istio(providers: Vec<JwtProvider>) -> Authenticator {
    let one = |index| JwtRequirement::Provider { name: format!("origins-{index}"), audiences: Vec::new() };
    let mut list: Vec<_> = (0..providers.len()).map(one).collect();
    list.push(JwtRequirement::AllowMissing);
    filter(providers, JwtRequirement::Any(list))
}

fn ask(filter: &Authenticator, token: Option<&str>, now: u64) -> Result<Authenticated, Status> {
    ask_cached(filter, token, now, &mut TokenCache::default())
}

fn ask_cached(
    filter: &Authenticator,
    token: Option<&str>,
    now: u64,
    cache: &mut TokenCache,
) -> Result<Authenticated, Status> {
    let mut headers = HeaderMap::new();
    if let Some(token) = token {
        headers.insert(AUTHORIZATION, HeaderValue::from_str(&format!("Bearer {token}")).unwrap());
    }
    let request = Request { method: &Method::GET, path_and_query: "/", headers: &headers };
    filter.authenticate(request, cache, now).map_err(|denied| denied.status)
}

#[test]
fn good_tokens_of_every_algorithm_pass_with_their_claims() {
    let filter = istio(vec![provider("https://a"), provider("https://b")]);
    use Algorithm::{ES256, PS256, PS384, PS512, RS256, RS384, RS512};
    for algorithm in [RS256, RS384, RS512, PS256, PS384, PS512, ES256] {
        let kid = if algorithm == ES256 { "e1" } else { "r1" };
        let token = sign(algorithm, kid, &json!({"iss": "https://b", "sub": "me", "scope": "read write", "exp": NOW}));
        let passed = ask(&filter, Some(&token), NOW).unwrap_or_else(|status| panic!("{algorithm:?}: {status}"));
        let (key, claims) = &passed.metadata[0];
        assert_eq!((&**key, &claims["scope"]), ("payload", &json!(["read", "write"])));
        assert!(passed.clear_route_cache);
        assert_eq!(passed.edits.remove, [AUTHORIZATION], "not forwarded");
    }
}

#[test]
fn missing_is_fine_and_bad_is_not() {
    let filter = istio(vec![provider("https://a")]);
    assert!(ask(&filter, None, NOW).unwrap().metadata.is_empty());
    let good = sign(Algorithm::RS256, "r1", &json!({"iss": "https://a", "exp": NOW}));
    let (body, signature) = good.rsplit_once('.').unwrap();
    let other_start = if signature.starts_with('A') { "B" } else { "A" };
    let forged = format!("{body}.{other_start}{}", &signature[1..]);
    let other = sign(Algorithm::RS256, "r1", &json!({"iss": "https://other"}));
    let early = sign(Algorithm::RS256, "r1", &json!({"iss": "https://a", "nbf": NOW + 61}));
    let unknown = sign(Algorithm::RS256, "r9", &json!({"iss": "https://a"}));
    let confused = sign(Algorithm::RS256, "e1", &json!({"iss": "https://a"}));
    for (token, status) in [
        ("rubbish", Status::BadFormat),
        (forged.as_str(), Status::VerificationFails),
        (other.as_str(), Status::UnknownIssuer),
        (early.as_str(), Status::NotYetValid),
        (unknown.as_str(), Status::KidAlgMismatch),
        (confused.as_str(), Status::KidAlgMismatch),
    ] {
        assert_eq!(ask(&filter, Some(token), NOW).unwrap_err(), status);
    }
    assert!(ask(&filter, Some(&good), NOW + 60).is_ok(), "60 s of skew");
    assert_eq!(ask(&filter, Some(&good), NOW + 61).unwrap_err(), Status::Expired);
}

#[test]
fn a_cached_token_still_expires() {
    let filter = istio(vec![provider("https://a")]);
    let token = sign(Algorithm::RS256, "r1", &json!({"iss": "https://a", "exp": NOW}));
    let mut cache = TokenCache::default();
    assert!(ask_cached(&filter, Some(&token), NOW, &mut cache).is_ok());
    assert!(ask_cached(&filter, Some(&token), NOW, &mut cache).is_ok());
    assert_eq!(ask_cached(&filter, Some(&token), NOW + 61, &mut cache).unwrap_err(), Status::Expired);
}

#[test]
fn audiences_are_forbidden_rather_than_unauthorized() {
    let filter = istio(vec![JwtProvider { audiences: vec!["shop".into()], ..provider("https://a") }]);
    let with = |aud: Value| sign(Algorithm::RS256, "r1", &json!({"iss": "https://a", "aud": aud}));
    assert!(ask(&filter, Some(&with(json!(["x", "https://shop/"]))), NOW).is_ok());
    let status = ask(&filter, Some(&with(json!("bank"))), NOW).unwrap_err();
    assert_eq!((status, status.http_status()), (Status::AudienceNotAllowed, 403));
    assert_eq!(Status::Expired.http_status(), 401);
}

#[test]
fn headers_carry_claims_and_can_not_be_forged() {
    let claim = ClaimToHeader { header: "x-tenant".into(), claim: "org.tenant".into() };
    let payload = Some("x-payload".to_owned());
    let filter = istio(vec![JwtProvider {
        claim_to_headers: vec![claim],
        forward_payload_header: payload,
        forward: true,
        ..provider("https://a")
    }]);
    let mut headers = HeaderMap::new();
    headers.insert("x-tenant", HeaderValue::from_static("forged"));
    let request = Request { method: &Method::GET, path_and_query: "/", headers: &headers };
    let passed = filter.authenticate(request, &mut TokenCache::default(), NOW).unwrap();
    passed.edits.apply(&mut headers);
    assert!(headers.is_empty(), "{headers:?}");
    let token = sign(Algorithm::RS256, "r1", &json!({"iss": "https://a", "org": {"tenant": "acme"}}));
    let edits = ask(&filter, Some(&token), NOW).unwrap().edits;
    edits.apply(&mut headers);
    assert_eq!(headers["x-tenant"], "acme");
    assert_eq!(headers["x-payload"], token.split('.').nth(1).unwrap());
    assert!(edits.remove.is_empty(), "forwarded");
}

#[test]
fn requirements_combine() {
    let named = |index: usize| JwtRequirement::Provider { name: format!("origins-{index}"), audiences: Vec::new() };
    let a = sign(Algorithm::RS256, "r1", &json!({"iss": "https://a"}));
    let two = || vec![provider("https://a"), provider("https://b")];
    let strict = filter(two(), named(1));
    assert_eq!(ask(&strict, None, NOW).unwrap_err(), Status::Missing);
    assert_eq!(ask(&strict, Some(&a), NOW).unwrap_err(), Status::UnknownIssuer);
    let all = filter(two(), JwtRequirement::All(vec![named(0), named(1)]));
    assert_eq!(ask(&all, Some(&a), NOW).unwrap_err(), Status::UnknownIssuer);
    let lax = filter(two(), JwtRequirement::AllowMissingOrFailed);
    assert!(ask(&lax, Some("rubbish"), NOW).unwrap().metadata.is_empty());
    assert_eq!(ask(&lax, Some(&a), NOW).unwrap().metadata.len(), 1);
    let config = JwtAuthn {
        providers: BTreeMap::new(),
        rules: vec![JwtRule { matcher: None, requires: Some(named(7)) }],
        bypass_cors_preflight: false,
        strip_failure_response: false,
    };
    let error = Authenticator::compile(&config, &JwksStore::default()).unwrap_err().to_string();
    assert!(error.contains("origins-7") && error.contains("no such provider"), "{error}");
}

#[test]
fn preflights_pass_and_remote_keys_missing_do_not() {
    let remote = Jwks::Remote {
        uri: "https://a/jwks".into(),
        cluster: "c".into(),
        timeout: Duration::from_secs(1),
        cache: Duration::from_secs(600),
        async_fetch: true,
    };
    let filter = filter(
        vec![JwtProvider { jwks: remote, ..provider("https://a") }],
        JwtRequirement::Provider { name: "origins-0".into(), audiences: Vec::new() },
    );
    let token = sign(Algorithm::RS256, "r1", &json!({"iss": "https://a"}));
    assert_eq!(ask(&filter, Some(&token), NOW).unwrap_err(), Status::JwksFetchFails);
    let mut headers = HeaderMap::new();
    headers.insert("origin", HeaderValue::from_static("https://x"));
    headers.insert("access-control-request-method", HeaderValue::from_static("GET"));
    let request = Request { method: &Method::OPTIONS, path_and_query: "/", headers: &headers };
    assert!(filter.authenticate(request, &mut TokenCache::default(), NOW).is_ok());
}
