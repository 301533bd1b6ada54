//! RequestAuthentications -> one JWT filter. A request without a token passes; one with a bad token does not.
use compat_objects::istio::JwtRule;
use compat_objects::{HasMeta, Kind, ObjectKey};

use super::Builder;
use super::access::Target;
use crate::pb::{any, core, ext, http_filter, route};
use ext::filters::http::jwt_authn::v3 as jwt;
use ext::filters::network::http_connection_manager::v3 as hcm;
use jwt::jwt_requirement::RequiresType;

/// Claims that hold several values separated by blanks, besides those a rule names.
const SPACE_DELIMITED: [&str; 2] = ["permission", "scope"];

/// A key set no token is signed by: data planes refuse an empty one, which would leave the old rules in force.
///
/// The key is a point of P-256 whose x is the SHA-256 of `strata: nobody has the private key of this point` and one
/// zero byte, y the even root: chosen by a hash, so that its private key is known to nobody, us included.
const NO_KEYS: &str = r#"{"keys":[{"kty":"EC","crv":"P-256","alg":"ES256","kid":"nobody","x":"tbmfMa941R_zOohJKn3Rw8y4e8jjnZsMD7Ey0C-7AQs","y":"WNkfu0Dt4Jhhdf6Geh6V6gsHVXdeOacMmRqs7mhs4ZI"}]}"#;

impl Builder<'_, '_> {
    /// The filter of a target; none without rules for it.
    pub(crate) fn jwt(&self, target: &Target<'_>) -> Option<hcm::HttpFilter> {
        let mut rules: Vec<(ObjectKey, String, &JwtRule)> = Vec::new();
        for found in self.mesh.objects.request_authentications() {
            let spec = &found.spec;
            if !self.attached(found.namespace(), spec.target_ref.as_ref(), &spec.target_refs, target) {
                continue;
            }
            let key = ObjectKey::new(Kind::RequestAuthentication, found.namespace(), found.name());
            for (index, rule) in spec.jwt_rules.iter().enumerate() {
                rules.push((key.clone(), format!("spec.jwtRules[{index}]"), rule));
            }
        }
        if rules.is_empty() {
            return None;
        }
        rules.sort_by(|a, b| a.2.issuer.cmp(&b.2.issuer));
        let name = |index: usize| format!("origins-{index}");
        let providers =
            rules.iter().enumerate().map(|(index, (key, field, rule))| (name(index), self.provider(key, field, rule)));
        let everything = route::RouteMatch {
            path_specifier: Some(route::route_match::PathSpecifier::Prefix("/".into())),
            ..Default::default()
        };
        let config = jwt::JwtAuthentication {
            providers: providers.collect(),
            rules: vec![jwt::RequirementRule {
                r#match: Some(everything),
                requirement_type: Some(jwt::requirement_rule::RequirementType::Requires(requirement(
                    (0..rules.len()).map(name).collect(),
                ))),
            }],
            bypass_cors_preflight: true,
            ..Default::default()
        };
        Some(http_filter("envoy.filters.http.jwt_authn", any(&config)))
    }

    fn provider(&self, key: &ObjectKey, field: &str, rule: &JwtRule) -> jwt::JwtProvider {
        let mut space_delimited: Vec<String> = SPACE_DELIMITED.iter().map(|claim| (*claim).to_owned()).collect();
        space_delimited.extend(rule.space_delimited_claims.iter().cloned());
        space_delimited.sort();
        space_delimited.dedup();
        let inline = core::DataSource {
            specifier: Some(core::data_source::Specifier::InlineString(self.keys(key, field, rule))),
            ..Default::default()
        };
        let headers = rule
            .from_headers
            .iter()
            .map(|header| jwt::JwtHeader { name: header.name.clone(), value_prefix: header.prefix.clone() });
        let claims = rule.output_claim_to_headers.iter().map(|claim| jwt::JwtClaimToHeader {
            header_name: claim.header.clone(),
            claim_name: claim.claim.clone(),
            ..Default::default()
        });
        jwt::JwtProvider {
            issuer: rule.issuer.clone(),
            audiences: rule.audiences.clone(),
            forward: rule.forward_original_token,
            from_headers: headers.collect(),
            from_params: rule.from_params.clone(),
            from_cookies: rule.from_cookies.clone(),
            forward_payload_header: rule.output_payload_to_header.clone(),
            payload_in_metadata: "payload".into(),
            normalize_payload_in_metadata: Some(jwt::jwt_provider::NormalizePayload {
                space_delimited_claims: space_delimited,
            }),
            claim_to_headers: claims.collect(),
            clear_route_cache: true,
            jwks_source_specifier: Some(jwt::jwt_provider::JwksSourceSpecifier::LocalJwks(inline)),
            ..Default::default()
        }
    }

    /// The keys as text; without any, a set that fits no token.
    fn keys(&self, key: &ObjectKey, field: &str, rule: &JwtRule) -> String {
        if !rule.jwks.is_empty() {
            let keys = serde_json::from_str::<serde_json::Value>(&rule.jwks);
            if keys.is_ok_and(|keys| keys.get("keys").is_some_and(serde_json::Value::is_array)) {
                return rule.jwks.clone();
            }
            self.error(key, &format!("{field}.jwks"), "is no JSON Web Key Set; no token of this issuer is accepted");
            return NO_KEYS.to_owned();
        }
        if rule.jwks_uri.is_empty() {
            self.error(key, field, "needs jwks or jwksUri; no token of this issuer is accepted");
            return NO_KEYS.to_owned();
        }
        self.jwks_uris.borrow_mut().insert(rule.jwks_uri.clone());
        let fetched = self.mesh.options.jwks.get(&rule.jwks_uri).cloned().unwrap_or_default();
        let (uri, field) = (&rule.jwks_uri, format!("{field}.jwksUri"));
        match (fetched.keys, fetched.error) {
            (Some(keys), None) => keys,
            (Some(keys), Some(error)) => {
                self.warning(key, &field, format!("{uri}: {error}; the keys fetched before stay in force"));
                keys
            }
            (None, Some(error)) => {
                self.error(
                    key,
                    &field,
                    format!("{uri}: {error}; until it answers no token of this issuer is accepted"),
                );
                NO_KEYS.to_owned()
            }
            (None, None) => NO_KEYS.to_owned(),
        }
    }
}

/// Any provider's token; with several, also none at all, as long as no provider is shown a bad one.
fn requirement(names: Vec<String>) -> jwt::JwtRequirement {
    let of = |kind| jwt::JwtRequirement { requires_type: Some(kind) };
    let provider = |name: &String| of(RequiresType::ProviderName(name.clone()));
    let any_of = |requirements| of(RequiresType::RequiresAny(jwt::JwtRequirementOrList { requirements }));
    let missing = || of(RequiresType::AllowMissing(Default::default()));
    if let [only] = names.as_slice() {
        return any_of(vec![provider(only), missing()]);
    }
    let each = names.iter().map(|name| any_of(vec![provider(name), missing()])).collect();
    let all = of(RequiresType::RequiresAll(jwt::JwtRequirementAndList { requirements: each }));
    any_of(names.iter().map(provider).chain(std::iter::once(all)).collect())
}
