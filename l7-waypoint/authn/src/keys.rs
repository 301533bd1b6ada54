//! A JSON Web Key Set (RFC 7517) made ready to verify with.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde_json::Value;

use crate::status::Status;
use crate::token::Token;

/// Verification keys of one issuer.
pub struct KeySet {
    /// Differs for every set compiled: cached verdicts of an older set don't count.
    pub(crate) generation: u64,
    keys: Vec<Key>,
    /// What could not be used, and why.
    skipped: Vec<String>,
}

struct Key {
    kid: Option<String>,
    alg: Option<String>,
    kind: Kind,
    key: DecodingKey,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rsa,
    P256,
    P384,
    Ed25519,
}

/// Why a JWKS could not be used at all.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("JWKS is no JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("JWKS has no `keys` list")]
    NoList,
    #[error("JWKS has no usable key: {0}")]
    NoKeys(String),
}

static GENERATION: AtomicU64 = AtomicU64::new(1);

impl KeySet {
    /// Reads the JSON text; keys of kinds not served are left out, a set without any usable key is an error.
    pub fn parse(text: &[u8]) -> Result<Self, KeyError> {
        let document: Value = serde_json::from_slice(text)?;
        let list = document.get("keys").and_then(Value::as_array).ok_or(KeyError::NoList)?;
        let (mut keys, mut skipped) = (Vec::new(), Vec::new());
        for (position, entry) in list.iter().enumerate() {
            match Key::read(entry) {
                Ok(key) => keys.push(key),
                Err(reason) => skipped.push(format!("keys[{position}]: {reason}")),
            }
        }
        if keys.is_empty() {
            return Err(KeyError::NoKeys(skipped.join("; ")));
        }
        Ok(Self { generation: GENERATION.fetch_add(1, Relaxed), keys, skipped })
    }

    /// Keys left out, each with its reason.
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    /// Whether one of the keys made the token's signature.
    pub(crate) fn verify(&self, token: &Token<'_>) -> Result<(), Status> {
        let name = format!("{:?}", token.algorithm);
        let kind = kind_of(token.algorithm);
        let mut verdict = Err(Status::KidAlgMismatch);
        for key in &self.keys {
            let other_kid = matches!((&key.kid, &token.kid), (Some(ours), Some(theirs)) if ours != theirs);
            let other_alg = key.alg.as_ref().is_some_and(|alg| *alg != name);
            if other_kid || other_alg || Some(key.kind) != kind {
                continue;
            }
            let valid =
                jsonwebtoken::crypto::verify(token.signature, token.signed.as_bytes(), &key.key, token.algorithm);
            if matches!(valid, Ok(true)) {
                return Ok(());
            }
            verdict = Err(Status::VerificationFails);
        }
        verdict
    }
}

impl std::fmt::Debug for KeySet {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kids: Vec<_> = self.keys.iter().map(|key| key.kid.as_deref().unwrap_or("-")).collect();
        out.debug_struct("KeySet").field("kids", &kids).finish()
    }
}

fn kind_of(algorithm: Algorithm) -> Option<Kind> {
    use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
    match algorithm {
        RS256 | RS384 | RS512 | PS256 | PS384 | PS512 => Some(Kind::Rsa),
        ES256 => Some(Kind::P256),
        ES384 => Some(Kind::P384),
        EdDSA => Some(Kind::Ed25519),
        _ => None,
    }
}

impl Key {
    fn read(entry: &Value) -> Result<Self, String> {
        let text = |name: &str| entry.get(name).and_then(Value::as_str).map(str::to_owned);
        if text("use").is_some_and(|usage| usage != "sig") {
            return Err("`use` is not `sig`".into());
        }
        let jwk: Jwk = serde_json::from_value(entry.clone()).map_err(|error| error.to_string())?;
        let kind = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => Kind::Rsa,
            AlgorithmParameters::EllipticCurve(curve) => match curve.curve {
                EllipticCurve::P256 => Kind::P256,
                EllipticCurve::P384 => Kind::P384,
                _ => return Err("curve is not served (P-256 and P-384 are)".into()),
            },
            AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => Kind::Ed25519,
            _ => return Err("key type is not served (RSA, EC and Ed25519 are)".into()),
        };
        let key = DecodingKey::from_jwk(&jwk).map_err(|error| error.to_string())?;
        Ok(Self {
            kid: text("kid").filter(|kid| !kid.is_empty()),
            alg: text("alg").filter(|alg| !alg.is_empty()),
            kind,
            key,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusable_keys_are_named_and_an_empty_set_is_refused() {
        let recorded = include_bytes!("../../../integration/testdata/istiod/keys/jwks.json");
        let set = KeySet::parse(recorded).unwrap();
        assert_eq!(format!("{set:?}"), r#"KeySet { kids: ["r1", "e1"] }"#);
        assert!(set.skipped().is_empty());
        let error = KeySet::parse(br#"{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}"#).unwrap_err().to_string();
        assert!(error.contains("keys[0]: key type is not served"), "{error}");
        assert!(matches!(KeySet::parse(b"{}"), Err(KeyError::NoList)));
        assert!(matches!(KeySet::parse(b"x"), Err(KeyError::Json(_))));
    }
}
