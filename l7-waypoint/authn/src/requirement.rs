//! The whole filter compiled: rules, requirements, providers; and one request put to it.

use std::collections::HashMap;
use std::sync::Arc;

use http::Method;
use http::header::{HeaderMap, HeaderName};
use serde_json::Value;
use smallvec::SmallVec;
use xds_model::envoy::jwt::{JwtAuthn, JwtRequirement};

use crate::cache::TokenCache;
use crate::edits::Edits;
use crate::extract::{self, Place};
use crate::rule::RuleMatch;
use crate::status::Status;
use crate::store::JwksStore;
use crate::token::Token;
use crate::verify::Provider;

/// A configuration that can't be compiled: object, field, value and reason.
#[derive(Debug, thiserror::Error)]
#[error("jwt provider {provider}: {field} {value:?}: {reason}")]
pub struct CompileError {
    provider: String,
    field: &'static str,
    value: String,
    reason: String,
}

impl CompileError {
    pub(crate) fn new(provider: &str, field: &'static str, value: &str, reason: impl ToString) -> Self {
        Self { provider: provider.to_owned(), field, value: value.to_owned(), reason: reason.to_string() }
    }
}

/// What of a request is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Method.
    pub method: &'a Method,
    /// Path with query, normalised.
    pub path_and_query: &'a str,
    /// Headers.
    pub headers: &'a HeaderMap,
}

/// A request that may go on.
#[derive(Debug, Default)]
pub struct Authenticated {
    /// Metadata of `envoy.filters.http.jwt_authn`: key and claims (or JOSE header), for RBAC and routing.
    pub metadata: SmallVec<[(Arc<str>, Arc<Value>); 1]>,
    /// To apply to the request before it goes on.
    pub edits: Edits,
    /// Whether the route should be looked up again with the claims at hand.
    pub clear_route_cache: bool,
}

/// A request that may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denied {
    /// Why; its text is the body of the answer.
    pub status: Status,
    /// Leave the reason out of the body.
    pub silent: bool,
}

/// See the module head.
#[derive(Debug)]
pub struct Authenticator {
    providers: Vec<Provider>,
    rules: Vec<(Option<RuleMatch>, Option<Requirement>)>,
    sanitised: Vec<HeaderName>,
    bypass_cors_preflight: bool,
    strip_failure_response: bool,
}

#[derive(Debug)]
enum Requirement {
    Provider {
        index: usize,
        audiences: Vec<String>,
    },
    Any(Vec<Requirement>),
    All(Vec<Requirement>),
    /// Tokens of these providers may be missing but not be bad.
    AllowMissing(Vec<usize>),
    AllowMissingOrFailed(Vec<usize>),
}

impl Authenticator {
    /// Compiles the filter; remote key sets are registered with `store`.
    pub fn compile(config: &JwtAuthn, store: &JwksStore) -> Result<Self, CompileError> {
        // An error says that a provider is installed already, which is as good.
        let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
        let mut providers = Vec::with_capacity(config.providers.len());
        let mut names = HashMap::new();
        for (name, provider) in &config.providers {
            names.insert(name.as_str(), providers.len());
            providers.push(Provider::compile(name, provider, store)?);
        }
        let mut rules = Vec::with_capacity(config.rules.len());
        for rule in &config.rules {
            let matcher = rule.matcher.as_ref().map(RuleMatch::compile).transpose()?;
            let all: Vec<usize> = (0..providers.len()).collect();
            let requires =
                rule.requires.as_ref().map(|requires| Requirement::compile(requires, &names, &all)).transpose()?;
            rules.push((matcher, requires));
        }
        let sanitised = providers.iter().flat_map(Provider::owned_headers).cloned().collect();
        let (bypass_cors_preflight, strip_failure_response) =
            (config.bypass_cors_preflight, config.strip_failure_response);
        Ok(Self { providers, rules, sanitised, bypass_cors_preflight, strip_failure_response })
    }

    /// Whether the request may go on, and what it carries then. `now` is in seconds since the epoch.
    pub fn authenticate(
        &self,
        request: Request<'_>,
        cache: &mut TokenCache,
        now: u64,
    ) -> Result<Authenticated, Denied> {
        let mut outcome = Authenticated::default();
        outcome.edits.remove.extend(self.sanitised.iter().filter(|name| request.headers.contains_key(*name)).cloned());
        if self.bypass_cors_preflight && is_preflight(&request) {
            return Ok(outcome);
        }
        let rule =
            self.rules.iter().find(|(matcher, _)| matcher.as_ref().is_none_or(|matcher| matcher.matches(&request)));
        let Some((_, Some(requirement))) = rule else { return Ok(outcome) };
        let mut check = Check { providers: &self.providers, request, cache, now, outcome: &mut outcome };
        match check.evaluate(requirement) {
            Ok(()) => Ok(outcome),
            Err(status) => Err(Denied { status, silent: self.strip_failure_response }),
        }
    }
}

/// Envoy's test: OPTIONS with an origin and a requested method.
fn is_preflight(request: &Request<'_>) -> bool {
    request.method == Method::OPTIONS
        && request.headers.get(http::header::ORIGIN).is_some_and(|origin| !origin.is_empty())
        && request.headers.get(http::header::ACCESS_CONTROL_REQUEST_METHOD).is_some_and(|method| !method.is_empty())
}

impl Requirement {
    /// `scope`: the providers whose tokens an `allow_missing` beside them is about.
    fn compile(config: &JwtRequirement, names: &HashMap<&str, usize>, scope: &[usize]) -> Result<Self, CompileError> {
        let many = |list: &[JwtRequirement]| {
            let mut inner: Vec<usize> = Vec::new();
            for entry in list {
                collect(entry, names, &mut inner);
            }
            let scope = if inner.is_empty() { scope } else { &inner };
            list.iter().map(|entry| Self::compile(entry, names, scope)).collect::<Result<Vec<_>, _>>()
        };
        Ok(match config {
            JwtRequirement::Provider { name, audiences } => {
                let index = names.get(name.as_str()).copied();
                let index = index.ok_or_else(|| CompileError::new(name, "requires", name, "no such provider"))?;
                Self::Provider { index, audiences: audiences.clone() }
            }
            JwtRequirement::Any(list) => Self::Any(many(list)?),
            JwtRequirement::All(list) => Self::All(many(list)?),
            JwtRequirement::AllowMissing => Self::AllowMissing(scope.to_vec()),
            JwtRequirement::AllowMissingOrFailed => Self::AllowMissingOrFailed(scope.to_vec()),
        })
    }
}

fn collect(config: &JwtRequirement, names: &HashMap<&str, usize>, into: &mut Vec<usize>) {
    match config {
        JwtRequirement::Provider { name, .. } => into.extend(names.get(name.as_str())),
        JwtRequirement::Any(list) | JwtRequirement::All(list) => {
            list.iter().for_each(|entry| collect(entry, names, into))
        }
        JwtRequirement::AllowMissing | JwtRequirement::AllowMissingOrFailed => {}
    }
}

struct Check<'a, 'r> {
    providers: &'a [Provider],
    request: Request<'r>,
    cache: &'a mut TokenCache,
    now: u64,
    outcome: &'a mut Authenticated,
}

impl Check<'_, '_> {
    fn evaluate(&mut self, requirement: &Requirement) -> Result<(), Status> {
        match requirement {
            Requirement::Provider { index, audiences } => self.provider(*index, audiences),
            Requirement::All(list) => list.iter().try_for_each(|entry| self.evaluate(entry)),
            Requirement::Any(list) => {
                let mut worst = Status::Missing;
                for entry in list {
                    match self.evaluate(entry) {
                        Ok(()) => return Ok(()),
                        Err(status) if worst.says_little() => worst = status,
                        Err(_) => {}
                    }
                }
                Err(worst)
            }
            Requirement::AllowMissing(scope) => self.whatever_is_there(scope, false),
            Requirement::AllowMissingOrFailed(scope) => self.whatever_is_there(scope, true),
        }
    }

    /// A token of this provider is needed, and every token in its places must be good: otherwise a bad one could
    /// reach the upstream beside a good one.
    fn provider(&mut self, index: usize, audiences: &[String]) -> Result<(), Status> {
        let provider = &self.providers[index];
        let tokens = extract::tokens(&self.request, &provider.places);
        if tokens.is_empty() {
            return Err(Status::Missing);
        }
        let mut good = SmallVec::<[_; 2]>::new();
        for found in &tokens {
            good.push((provider.verify(&found.token, audiences, self.cache, self.now)?, found.place));
        }
        for (verified, place) in good {
            self.accept(provider, &verified, &provider.places[place]);
        }
        Ok(())
    }

    /// No token is fine; one that is there is verified by the provider its issuer names.
    fn whatever_is_there(&mut self, scope: &[usize], failures_too: bool) -> Result<(), Status> {
        let mut seen = SmallVec::<[(String, Place); 2]>::new();
        for index in scope {
            for found in extract::tokens(&self.request, &self.providers[*index].places) {
                let place = &self.providers[*index].places[found.place];
                if !seen.iter().any(|(token, at)| *token == found.token && at == place) {
                    seen.push((found.token.into_owned(), place.clone()));
                }
            }
        }
        for (token, place) in seen {
            match self.by_issuer(scope, &token, &place) {
                Err(status) if !failures_too => return Err(status),
                _ => {}
            }
        }
        Ok(())
    }

    fn by_issuer(&mut self, scope: &[usize], token: &str, place: &Place) -> Result<(), Status> {
        let issuer = Token::parse(token)?.issuer;
        let fits = |provider: &&Provider| provider.is_issuer(&issuer) && provider.places.contains(place);
        let provider = scope.iter().map(|index| &self.providers[*index]).find(fits).ok_or(Status::UnknownIssuer)?;
        let verified = provider.verify(token, &[], self.cache, self.now)?;
        self.accept(provider, &verified, place);
        Ok(())
    }

    fn accept(&mut self, provider: &Provider, verified: &crate::cache::Verified, place: &Place) {
        provider.edit(verified, place, &mut self.outcome.edits);
        if let Some(key) = &provider.metadata_key {
            self.outcome.metadata.push((key.clone(), verified.claims.clone()));
        }
        if let Some(key) = &provider.header_metadata_key {
            self.outcome.metadata.push((key.clone(), verified.header.clone()));
        }
        self.outcome.clear_route_cache |= provider.config.clear_route_cache;
    }
}

#[cfg(test)]
mod tests;
