//! Compiled matches of routes.
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use l7_authz::l7::RequestView;
use l7_authz::l7::matcher::{ClaimMatch, HeaderMatch, QueryMatch, full_regex, template_regex};
use regex::bytes::Regex;
use xds_model::envoy::matcher::{Fraction, PathMatcher};
use xds_model::envoy::route as config;

use crate::{CompileError, draw};

const SALT_FRACTION: u64 = 0xf0;

/// A compiled path matcher.
#[derive(Debug, Clone)]
pub struct PathMatch {
    kind: PathKind,
    case_sensitive: bool,
}

#[derive(Debug, Clone)]
enum PathKind {
    Prefix(Box<str>),
    Exact(Box<str>),
    Separated(Box<str>),
    Regex(Regex),
    Connect,
}

impl PathMatch {
    fn compile(path: &PathMatcher, case_sensitive: bool) -> Result<Self, CompileError> {
        let kind = match path {
            PathMatcher::Prefix(prefix) => PathKind::Prefix(prefix.as_str().into()),
            PathMatcher::Exact(path) => PathKind::Exact(path.as_str().into()),
            PathMatcher::SeparatedPrefix(prefix) => PathKind::Separated(prefix.as_str().into()),
            PathMatcher::Regex(text) => PathKind::Regex(full_regex(text)?),
            PathMatcher::UriTemplate(template) => PathKind::Regex(template_regex(template)?),
            PathMatcher::Connect => PathKind::Connect,
        };
        Ok(Self { kind, case_sensitive })
    }

    /// Matches anything; what a route whose path could not be compiled falls back to.
    fn everything() -> Self {
        Self { kind: PathKind::Prefix("".into()), case_sensitive: true }
    }

    fn matches(&self, request: &RequestView<'_>) -> bool {
        let path = request.path.as_bytes();
        let eq = |a: &[u8], b: &str| {
            if self.case_sensitive { a == b.as_bytes() } else { a.eq_ignore_ascii_case(b.as_bytes()) }
        };
        let head = |prefix: &str| path.get(..prefix.len()).is_some_and(|head| eq(head, prefix));
        match &self.kind {
            PathKind::Prefix(prefix) => head(prefix),
            PathKind::Exact(wanted) => eq(path, wanted),
            PathKind::Separated(prefix) => head(prefix) && path.get(prefix.len()).is_none_or(|next| *next == b'/'),
            PathKind::Regex(regex) => regex.is_match(path),
            PathKind::Connect => request.method == "CONNECT",
        }
    }

    /// How much of a path that matched a prefix rewrite replaces.
    pub(crate) fn matched_length(&self, path: &str) -> usize {
        match &self.kind {
            PathKind::Prefix(prefix) | PathKind::Separated(prefix) => prefix.len(),
            _ => path.len(),
        }
    }
}

/// A compiled match.
#[derive(Debug, Clone)]
pub(crate) struct RouteMatch {
    pub(crate) path: PathMatch,
    headers: Box<[HeaderMatch]>,
    query: Box<[QueryMatch]>,
    claims: Box<[ClaimMatch]>,
    fraction: Option<Fraction>,
    grpc: bool,
}

/// The first part of a match that does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mismatch {
    Path,
    /// Index into the configured list.
    Header(usize),
    Query(usize),
    Claim(usize),
    Grpc,
    Fraction,
}

impl RouteMatch {
    pub(crate) fn compile(config: &config::RouteMatch) -> Result<Self, CompileError> {
        Ok(Self {
            path: PathMatch::compile(&config.path, config.case_sensitive)?,
            headers: HeaderMatch::compile_all(&config.headers)?,
            query: config.query.iter().map(QueryMatch::compile).collect::<Result<_, _>>()?,
            claims: config.metadata.iter().map(ClaimMatch::compile).collect::<Result<_, _>>()?,
            fraction: config.fraction,
            grpc: config.grpc,
        })
    }

    /// Only what compiles: wider than what was meant, for routes that answer with an error.
    pub(crate) fn compile_widened(config: &config::RouteMatch) -> Self {
        Self {
            path: PathMatch::compile(&config.path, config.case_sensitive).unwrap_or_else(|_| PathMatch::everything()),
            headers: config.headers.iter().filter_map(|test| HeaderMatch::compile(test).ok()).collect(),
            query: config.query.iter().filter_map(|test| QueryMatch::compile(test).ok()).collect(),
            claims: config.metadata.iter().filter_map(|test| ClaimMatch::compile(test).ok()).collect(),
            fraction: config.fraction,
            grpc: config.grpc,
        }
    }

    pub(crate) fn mismatch(&self, request: &RequestView<'_>, seed: u64) -> Option<Mismatch> {
        if !self.path.matches(request) {
            return Some(Mismatch::Path);
        }
        if self.grpc && !is_grpc(request.headers) {
            return Some(Mismatch::Grpc);
        }
        if let Some(index) = self.headers.iter().position(|test| !test.matches(request)) {
            return Some(Mismatch::Header(index));
        }
        if let Some(index) = self.query.iter().position(|test| !test.matches(request)) {
            return Some(Mismatch::Query(index));
        }
        if let Some(index) = self.claims.iter().position(|test| !test.matches(request.claims)) {
            return Some(Mismatch::Claim(index));
        }
        match self.fraction {
            Some(fraction) if !fraction.hit(draw(seed, SALT_FRACTION)) => Some(Mismatch::Fraction),
            _ => None,
        }
    }
}

/// Whether the content type is gRPC's.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc")).is_some_and(
        // "application/grpc-web" is not gRPC.
        |rest| rest.is_empty() || rest[0] == b'+' || rest[0] == b';',
    )
}
