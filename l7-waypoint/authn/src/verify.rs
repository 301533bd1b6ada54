//! One provider: its keys and what it asks of a token, in the order Envoy checks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use http::header::{HeaderName, HeaderValue};
use serde_json::Value;
use xds_model::envoy::jwt::{ClaimToHeader, Jwks, JwtProvider};

use crate::cache::{TokenCache, Verified};
use crate::edits::Edits;
use crate::extract::{self, Place};
use crate::keys::KeySet;
use crate::requirement::CompileError;
use crate::status::Status;
use crate::store::{JwksStore, RemoteSource, Slot};
use crate::token::Token;

/// A compiled provider.
#[derive(Debug)]
pub(crate) struct Provider {
    id: u64,
    pub(crate) config: JwtProvider,
    pub(crate) places: Vec<Place>,
    keys: Keys,
    payload_header: Option<HeaderName>,
    claim_headers: Vec<(HeaderName, Vec<String>)>,
    pub(crate) metadata_key: Option<Arc<str>>,
    pub(crate) header_metadata_key: Option<Arc<str>>,
}

#[derive(Debug)]
enum Keys {
    Inline(Arc<KeySet>),
    Remote(Arc<Slot>),
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Provider {
    pub(crate) fn compile(name: &str, config: &JwtProvider, store: &JwksStore) -> Result<Self, CompileError> {
        let keys = match &config.jwks {
            Jwks::Inline(text) => {
                let set = KeySet::parse(text.as_bytes());
                Keys::Inline(Arc::new(set.map_err(|error| CompileError::new(name, "local_jwks", "", error))?))
            }
            Jwks::Remote { uri, cluster, timeout, cache, .. } => {
                let source =
                    RemoteSource { uri: uri.clone(), cluster: cluster.clone(), timeout: *timeout, refresh: *cache };
                Keys::Remote(store.slot(source))
            }
        };
        let header = |field: &'static str, text: &str| {
            let parsed = HeaderName::from_bytes(text.to_ascii_lowercase().as_bytes());
            parsed.map_err(|_| CompileError::new(name, field, text, "is no header name"))
        };
        let claim = |entry: &ClaimToHeader| {
            let path = entry.claim.split('.').map(str::to_owned).collect();
            Ok((header("claim_to_headers", &entry.header)?, path))
        };
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Relaxed),
            places: extract::places(name, config)?,
            keys,
            payload_header: config
                .forward_payload_header
                .as_deref()
                .map(|text| header("forward_payload_header", text))
                .transpose()?,
            claim_headers: config.claim_to_headers.iter().map(claim).collect::<Result<_, _>>()?,
            metadata_key: config.payload_in_metadata.as_deref().map(Arc::from),
            header_metadata_key: config.header_in_metadata.as_deref().map(Arc::from),
            config: config.clone(),
        })
    }

    /// Headers only this provider may set; a client's own are taken out of every request.
    pub(crate) fn owned_headers(&self) -> impl Iterator<Item = &HeaderName> {
        self.payload_header.iter().chain(self.claim_headers.iter().map(|(name, _)| name))
    }

    pub(crate) fn is_issuer(&self, issuer: &str) -> bool {
        self.config.issuer.as_deref().is_none_or(|ours| ours == issuer)
    }

    fn key_set(&self) -> Option<Arc<KeySet>> {
        match &self.keys {
            Keys::Inline(set) => Some(set.clone()),
            Keys::Remote(slot) => slot.current(),
        }
    }

    /// Verifies `text`. `audiences` replaces the provider's own unless empty; `now` is in seconds since the epoch.
    pub(crate) fn verify(
        &self,
        text: &str,
        audiences: &[String],
        cache: &mut TokenCache,
        now: u64,
    ) -> Result<Arc<Verified>, Status> {
        let keys = self.key_set();
        // A requirement's own audiences are not part of the cache's key, so such tokens take the long way.
        let cached =
            keys.as_ref().filter(|_| audiences.is_empty()).and_then(|keys| cache.get(self.id, keys.generation, text));
        if let Some(verified) = cached {
            return self.check_time(verified.expires, verified.not_before, now).map(|()| verified);
        }
        let token = Token::parse(text)?;
        if !self.is_issuer(&token.issuer) {
            return Err(Status::UnknownIssuer);
        }
        self.check_time(token.expires, token.not_before, now)?;
        self.check_lifetime(&token)?;
        let wanted = if audiences.is_empty() { &self.config.audiences } else { audiences };
        if !wanted.is_empty()
            && !wanted.iter().any(|wanted| token.audiences.iter().any(|have| same_audience(wanted, have)))
        {
            return Err(Status::AudienceNotAllowed);
        }
        let Some(keys) = keys else { return Err(Status::JwksFetchFails) };
        let outcome = keys.verify(&token);
        if let (Err(Status::KidAlgMismatch), Keys::Remote(slot)) = (&outcome, &self.keys) {
            slot.ask_refresh();
        }
        outcome?;
        let claims = normalise(token.claims, &self.config.space_delimited_claims);
        let verified = Arc::new(Verified {
            claims: Arc::new(claims),
            header: Arc::new(token.header),
            payload: token.payload.into(),
            expires: token.expires,
            not_before: token.not_before,
        });
        if audiences.is_empty() {
            cache.put(self.id, keys.generation, text, verified.clone());
        }
        Ok(verified)
    }

    fn check_time(&self, expires: Option<u64>, not_before: Option<u64>, now: u64) -> Result<(), Status> {
        let skew = self.config.clock_skew.as_secs();
        if not_before.is_some_and(|not_before| not_before > now + skew) {
            return Err(Status::NotYetValid);
        }
        if expires.is_some_and(|expires| expires.saturating_add(skew) < now) {
            return Err(Status::Expired);
        }
        Ok(())
    }

    fn check_lifetime(&self, token: &Token<'_>) -> Result<(), Status> {
        if self.config.require_expiration && token.expires.is_none() {
            return Err(Status::ExpiryRequired);
        }
        let Some(max) = self.config.max_lifetime else { return Ok(()) };
        match (token.expires, token.issued_at.or(token.not_before)) {
            (Some(expires), Some(start)) if expires.saturating_sub(start) <= max.as_secs() => Ok(()),
            (None, _) => Err(Status::ExpiryRequired),
            _ => Err(Status::LifetimeTooLong),
        }
    }

    /// What a good token changes in the request.
    pub(crate) fn edit(&self, verified: &Verified, place: &Place, edits: &mut Edits) {
        for (name, path) in &self.claim_headers {
            if let Some(value) = claim(&verified.claims, path).and_then(header_text) {
                edits.set.push((name.clone(), value));
            }
        }
        if let Some(name) = &self.payload_header {
            let text = if self.config.pad_forward_payload_header {
                pad(&verified.payload)
            } else {
                verified.payload.to_string()
            };
            if let Ok(value) = HeaderValue::from_str(&text) {
                edits.set.push((name.clone(), value));
            }
        }
        if self.config.forward {
            return;
        }
        match place {
            Place::Header { name, .. } => edits.remove.push(name.clone()),
            Place::Param(name) => edits.params.push(name.clone()),
            // Cookies stay, as in Envoy.
            Place::Cookie(_) => {}
        }
    }
}

/// Envoy compares audiences without scheme-insensitive tricks but for a trailing slash and `http(s)://` in front.
fn same_audience(wanted: &str, have: &str) -> bool {
    fn bare(text: &str) -> &str {
        let text = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
        text.strip_suffix('/').unwrap_or(text)
    }
    bare(wanted) == bare(have)
}

fn pad(payload: &str) -> String {
    // Verified payloads decode; if one didn't, the unpadded text is the honest answer.
    URL_SAFE_NO_PAD.decode(payload).map_or_else(|_| payload.to_owned(), |bytes| URL_SAFE.encode(bytes))
}

fn normalise(mut claims: Value, space_delimited: &[String]) -> Value {
    for name in space_delimited {
        if let Some(slot) = claims.get_mut(name)
            && let Some(text) = slot.as_str()
        {
            *slot = text.split(' ').filter(|word| !word.is_empty()).map(Value::from).collect();
        }
    }
    claims
}

fn claim<'a>(claims: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(claims, |value, part| value.get(part))
}

/// Text and numbers as they are, lists and objects as base64 JSON, as Envoy.
fn header_text(value: &Value) -> Option<HeaderValue> {
    let text = match value {
        Value::Null => return None,
        Value::String(text) => text.clone(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::Array(_) | Value::Object(_) => base64::engine::general_purpose::STANDARD.encode(value.to_string()),
    };
    HeaderValue::from_str(&text).ok()
}
