//! Why a token is not accepted, in the words Envoy answers clients with (they are what people search for).

/// Outcome of verifying one token, or of looking for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Status {
    #[error("Jwt is missing")]
    Missing,
    #[error("Jwt not yet valid")]
    NotYetValid,
    #[error("Jwt is expired")]
    Expired,
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    BadFormat,
    #[error("Jwt header is an invalid Base64url encoded")]
    HeaderBadBase64,
    #[error("Jwt header is an invalid JSON")]
    HeaderBadJson,
    #[error("Jwt header [alg] field is required and must be a string")]
    HeaderBadAlg,
    #[error("Jwt header [alg] is not supported")]
    HeaderUnsupportedAlg,
    #[error("Jwt header [kid] field is not a string")]
    HeaderBadKid,
    /// Not one of Envoy's: it lets unknown critical extensions pass (RFC 7515, 4.1.11 says they must not).
    #[error("Jwt header [crit] is not supported")]
    HeaderCritical,
    #[error("Jwt payload is an invalid Base64url encoded")]
    PayloadBadBase64,
    #[error("Jwt payload is an invalid JSON")]
    PayloadBadJson,
    #[error("Jwt payload [iss] field is not a string")]
    BadIssuer,
    #[error("Jwt payload [sub] field is not a string")]
    BadSubject,
    #[error("Jwt payload [iat] field is not an integer or exceeds max")]
    BadIssuedAt,
    #[error("Jwt payload [nbf] field is not an integer or exceeds max")]
    BadNotBefore,
    #[error("Jwt payload [exp] field is not an integer or exceeds max")]
    BadExpiry,
    #[error("Jwt payload [aud] field is not a string or string list")]
    BadAudience,
    #[error("Jwt signature is an invalid Base64url encoded")]
    SignatureBadBase64,
    #[error("Jwt issuer is not configured")]
    UnknownIssuer,
    #[error("Audiences in Jwt are not allowed")]
    AudienceNotAllowed,
    #[error("Jwt verification fails")]
    VerificationFails,
    #[error("Jwks remote fetch is failed")]
    JwksFetchFails,
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    KidAlgMismatch,
    /// Not one of Envoy's, whose only bound is that of all headers.
    #[error("Jwt is too large")]
    TooLarge,
    /// The provider demands `exp`.
    #[error("Jwt payload [exp] is required")]
    ExpiryRequired,
    /// The provider bounds `exp - iat`.
    #[error("Jwt lifetime exceeds the maximum")]
    LifetimeTooLong,
    /// A requirement names what could not be compiled.
    #[error("Jwt requirement is not configured")]
    NotConfigured,
}

impl Status {
    /// Status code of the answer.
    pub fn http_status(self) -> u16 {
        if self == Self::AudienceNotAllowed { 403 } else { 401 }
    }

    /// Envoy prefers any other failure over "no token" and "not my issuer" when several requirements fail.
    pub(crate) fn says_little(self) -> bool {
        matches!(self, Self::Missing | Self::UnknownIssuer)
    }
}
