//! HTTP filters in the order they run, and their configuration.
use std::time::Duration;

use serde::Serialize;

use super::ext_authz::ExtAuthz;
use super::jwt::JwtAuthn;
use super::matcher::{Fraction, HeaderMatcher, StringMatcher};
use super::rbac::Rbac;
use super::route::HeaderMutations;

/// One HTTP filter of a chain.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HttpFilter {
    /// The name it has in the chain (per-route configuration refers to it).
    pub name: String,
    pub kind: HttpFilterKind,
}

/// What an HTTP filter is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum HttpFilterKind {
    Rbac(Box<Rbac>),
    JwtAuthn(Box<JwtAuthn>),
    ExtAuthz(Box<ExtAuthz>),
    /// Configuration is per route ([`super::route::RouteFilters`]).
    Cors,
    /// Configuration of the chain; a route's own replaces it.
    Fault(Option<Box<Fault>>),
    /// `header_mutation` v3.
    HeaderMutation {
        request: HeaderMutations,
        response: HeaderMutations,
    },
    /// gRPC status and message counts are wanted in telemetry.
    GrpcStats {
        emit_filter_state: bool,
    },
    /// Routes to clusters of [`super::cluster::Discovery::DynamicForward`] resolve the request's own host.
    DynamicForwardProxy,
    /// gRPC-Web to gRPC translation.
    GrpcWeb,
    /// `istio.stats`.
    Stats(Box<super::telemetry::StatsFilter>),
    /// Source or destination workload lookup (`io.istio.http.peer_metadata`); always done by Strata.
    PeerMetadata,
    /// `set_filter_state` whose keys are all of those Strata fills itself.
    FilterState(Vec<FilterStateSet>),
    Router(Router),
}

/// One `set_filter_state` entry that was recognised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FilterStateSet {
    pub key: String,
    pub format: String,
}

/// The terminal filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Router {
    /// Do not add `x-envoy-*` headers.
    pub suppress_envoy_headers: bool,
}

/// Cross-origin policy of a route.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CorsPolicy {
    pub allow_origins: Vec<StringMatcher>,
    /// As sent in `access-control-allow-methods`; empty: not sent.
    pub allow_methods: String,
    pub allow_headers: String,
    pub expose_headers: String,
    /// Seconds, as sent.
    pub max_age: String,
    pub allow_credentials: bool,
    pub enabled: Fraction,
    /// Evaluated for statistics only.
    pub shadow_enabled: Fraction,
    pub allow_private_network_access: bool,
    /// A preflight whose origin does not match goes upstream (else it is answered without CORS headers).
    pub forward_not_matching_preflights: bool,
}

/// Faults to inject.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fault {
    pub delay: Option<Delay>,
    pub abort: Option<Abort>,
    /// Only requests that match all of these.
    pub headers: Vec<HeaderMatcher>,
    /// Faults active at one time at most.
    pub max_active: Option<u32>,
}

/// Wait before the request goes on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Delay {
    pub duration: Duration,
    pub fraction: Fraction,
}

/// Answer instead of the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Abort {
    pub with: AbortWith,
    pub fraction: Fraction,
}

/// What an [`Abort`] answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum AbortWith {
    HttpStatus(u16),
    GrpcStatus(u32),
}
