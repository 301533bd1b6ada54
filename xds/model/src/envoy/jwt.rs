//! JWT authentication as configured.
use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::matcher::{HeaderMatcher, PathMatcher, QueryMatcher};

/// The `jwt_authn` filter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JwtAuthn {
    pub providers: BTreeMap<String, JwtProvider>,
    /// The first rule whose match fits decides.
    pub rules: Vec<JwtRule>,
    /// CORS preflights pass unverified.
    pub bypass_cors_preflight: bool,
    /// Do not put the reason of a failure into the response body.
    pub strip_failure_response: bool,
}

/// One issuer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JwtProvider {
    /// `None`: any issuer.
    pub issuer: Option<String>,
    /// Empty: any audience.
    pub audiences: Vec<String>,
    pub jwks: Jwks,
    /// Leave the token in the request.
    pub forward: bool,
    pub from_headers: Vec<JwtHeader>,
    pub from_params: Vec<String>,
    pub from_cookies: Vec<String>,
    /// Header to carry the payload upstream, base64url.
    pub forward_payload_header: Option<String>,
    pub pad_forward_payload_header: bool,
    /// Key of the payload in metadata; Istio's is `payload`.
    pub payload_in_metadata: Option<String>,
    /// Claims whose space-delimited text becomes a list in metadata.
    pub space_delimited_claims: Vec<String>,
    /// Dynamic metadata key for the JOSE header.
    pub header_in_metadata: Option<String>,
    pub claim_to_headers: Vec<ClaimToHeader>,
    /// Tolerance for `exp` and `nbf`; Envoy's default is 60 s.
    pub clock_skew: Duration,
    /// Verified tokens make the route be looked up again.
    pub clear_route_cache: bool,
    /// `exp` must be there.
    pub require_expiration: bool,
    /// Longest `exp - iat` accepted.
    pub max_lifetime: Option<Duration>,
}

/// Where the keys come from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Jwks {
    /// JWKS JSON text.
    Inline(String),
    Remote {
        uri: String,
        cluster: String,
        timeout: Duration,
        /// How long fetched keys are good.
        cache: Duration,
        /// Fetch before the first request rather than with it.
        async_fetch: bool,
    },
}

/// Header to take a token from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JwtHeader {
    /// Lower case.
    pub name: String,
    /// Text before the token, e.g. `Bearer `.
    pub value_prefix: String,
}

/// Copies a claim into a request header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClaimToHeader {
    pub header: String,
    /// Dotted path into the claims.
    pub claim: String,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JwtRule {
    /// `None`: every request.
    pub matcher: Option<JwtRuleMatch>,
    /// `None`: nothing is required.
    pub requires: Option<JwtRequirement>,
}

/// Requests a [`JwtRule`] is for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JwtRuleMatch {
    pub path: PathMatcher,
    pub case_sensitive: bool,
    pub headers: Vec<HeaderMatcher>,
    pub query: Vec<QueryMatcher>,
}

/// What must verify.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum JwtRequirement {
    Provider {
        name: String,
        /// Over the provider's own.
        audiences: Vec<String>,
    },
    Any(Vec<JwtRequirement>),
    All(Vec<JwtRequirement>),
    /// No token is fine; a bad one is not.
    AllowMissing,
    /// Anything is fine.
    AllowMissingOrFailed,
}
