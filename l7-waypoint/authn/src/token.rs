//! The compact serialisation taken apart (RFC 7515, RFC 7519). Nothing here trusts what it reads.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::Algorithm;
use serde_json::{Map, Value};

use crate::status::Status;

/// Bytes; larger ones are refused before anything is decoded.
const MAX_LENGTH: usize = 32 * 1024;

/// A token that is well formed; its signature has not been looked at.
#[derive(Debug)]
pub(crate) struct Token<'a> {
    /// What the signature is over.
    pub(crate) signed: &'a str,
    pub(crate) payload: &'a str,
    pub(crate) signature: &'a str,
    pub(crate) algorithm: Algorithm,
    pub(crate) kid: Option<String>,
    pub(crate) header: Value,
    pub(crate) claims: Value,
    pub(crate) issuer: String,
    pub(crate) audiences: Vec<String>,
    pub(crate) expires: Option<u64>,
    pub(crate) not_before: Option<u64>,
    pub(crate) issued_at: Option<u64>,
}

impl<'a> Token<'a> {
    pub(crate) fn parse(text: &'a str) -> Result<Self, Status> {
        if text.len() > MAX_LENGTH {
            return Err(Status::TooLarge);
        }
        let mut parts = text.split('.');
        let (Some(header_text), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Status::BadFormat);
        };
        let signed = &text[..header_text.len() + 1 + payload.len()];
        let header = object(header_text, Status::HeaderBadBase64, Status::HeaderBadJson)?;
        let (algorithm, kid) = read_header(&header)?;
        let claims = object(payload, Status::PayloadBadBase64, Status::PayloadBadJson)?;
        let issuer = text_claim(&claims, "iss", Status::BadIssuer)?.unwrap_or_default();
        text_claim(&claims, "sub", Status::BadSubject)?;
        let issued_at = time_claim(&claims, "iat", Status::BadIssuedAt)?;
        let not_before = time_claim(&claims, "nbf", Status::BadNotBefore)?;
        let expires = time_claim(&claims, "exp", Status::BadExpiry)?;
        let audiences = audiences(&claims)?;
        if URL_SAFE_NO_PAD.decode(signature).is_err() {
            return Err(Status::SignatureBadBase64);
        }
        let (header, claims) = (Value::Object(header), Value::Object(claims));
        Ok(Self {
            signed,
            payload,
            signature,
            algorithm,
            kid,
            header,
            claims,
            issuer,
            audiences,
            expires,
            not_before,
            issued_at,
        })
    }
}

fn object(text: &str, bad_base64: Status, bad_json: Status) -> Result<Map<String, Value>, Status> {
    let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| bad_base64)?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        _ => Err(bad_json),
    }
}

fn read_header(header: &Map<String, Value>) -> Result<(Algorithm, Option<String>), Status> {
    if header.contains_key("crit") {
        return Err(Status::HeaderCritical);
    }
    let name = header.get("alg").and_then(Value::as_str).ok_or(Status::HeaderBadAlg)?;
    let algorithm = match name {
        "RS256" => Algorithm::RS256,
        "RS384" => Algorithm::RS384,
        "RS512" => Algorithm::RS512,
        "PS256" => Algorithm::PS256,
        "PS384" => Algorithm::PS384,
        "PS512" => Algorithm::PS512,
        "ES256" => Algorithm::ES256,
        "ES384" => Algorithm::ES384,
        "EdDSA" => Algorithm::EdDSA,
        // HMAC would let whoever may read a JWKS make tokens; `none` is no signature at all.
        _ => return Err(Status::HeaderUnsupportedAlg),
    };
    let kid = match header.get("kid") {
        None => None,
        Some(Value::String(kid)) => Some(kid.clone()),
        Some(_) => return Err(Status::HeaderBadKid),
    };
    Ok((algorithm, kid))
}

fn text_claim(claims: &Map<String, Value>, name: &str, bad: Status) -> Result<Option<String>, Status> {
    match claims.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(bad),
    }
}

/// Seconds since the epoch. Fractions are cut off, as RFC 7519 allows `NumericDate` to have them.
fn time_claim(claims: &Map<String, Value>, name: &str, bad: Status) -> Result<Option<u64>, Status> {
    match claims.get(name) {
        None => Ok(None),
        Some(Value::Number(number)) => {
            let fraction = || number.as_f64().filter(|value| (0.0..9e15).contains(value)).map(|value| value as u64);
            number.as_u64().filter(|value| *value < 9_000_000_000_000_000).or_else(fraction).map(Some).ok_or(bad)
        }
        Some(_) => Err(bad),
    }
}

fn audiences(claims: &Map<String, Value>) -> Result<Vec<String>, Status> {
    match claims.get("aud") {
        None => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![one.clone()]),
        Some(Value::Array(many)) => {
            let text = |value: &Value| value.as_str().map(str::to_owned).ok_or(Status::BadAudience);
            many.iter().map(text).collect()
        }
        Some(_) => Err(Status::BadAudience),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(header: &str, payload: &str) -> String {
        format!("{}.{}.c2ln", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload))
    }

    fn refused(header: &str, payload: &str) -> Status {
        Token::parse(&token(header, payload)).unwrap_err()
    }

    #[test]
    fn malformed_tokens_say_what_is_wrong() {
        let good = r#"{"alg":"RS256"}"#;
        for text in ["", "a.b", "a.b.c.d"] {
            assert_eq!(Token::parse(text).unwrap_err(), Status::BadFormat, "{text}");
        }
        assert_eq!(Token::parse("!.e30.c2ln").unwrap_err(), Status::HeaderBadBase64);
        assert_eq!(Token::parse(&"x".repeat(40_000)).unwrap_err(), Status::TooLarge);
        assert_eq!(refused("[]", "{}"), Status::HeaderBadJson);
        assert_eq!(refused("{}", "{}"), Status::HeaderBadAlg);
        assert_eq!(refused(r#"{"alg":"RS256","kid":7}"#, "{}"), Status::HeaderBadKid);
        assert_eq!(refused(r#"{"alg":"RS256","crit":["x"]}"#, "{}"), Status::HeaderCritical);
        for alg in ["none", "None", "HS256", "ES512", "RS1", ""] {
            assert_eq!(refused(&format!(r#"{{"alg":"{alg}"}}"#), "{}"), Status::HeaderUnsupportedAlg, "{alg}");
        }
        assert_eq!(refused(good, "x"), Status::PayloadBadJson);
        assert_eq!(refused(good, r#"{"iss":1}"#), Status::BadIssuer);
        assert_eq!(refused(good, r#"{"exp":"soon"}"#), Status::BadExpiry);
        assert_eq!(refused(good, r#"{"exp":-1}"#), Status::BadExpiry);
        assert_eq!(refused(good, r#"{"aud":[1]}"#), Status::BadAudience);
        assert_eq!(Token::parse("eyJhbGciOiJSUzI1NiJ9.e30.!").unwrap_err(), Status::SignatureBadBase64);
    }

    #[test]
    fn claims_are_read() {
        let text = token(r#"{"alg":"ES256","kid":"k"}"#, r#"{"iss":"i","aud":["a","b"],"exp":12.5,"nbf":3}"#);
        let parsed = Token::parse(&text).unwrap();
        assert_eq!((parsed.issuer.as_str(), parsed.expires, parsed.not_before), ("i", Some(12), Some(3)));
        assert_eq!(parsed.audiences, ["a", "b"]);
        assert_eq!((parsed.algorithm, parsed.kid.as_deref()), (Algorithm::ES256, Some("k")));
    }
}
