//! External authorization as configured.
use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::matcher::{MetadataMatcher, StringMatcher};
use super::route::HeaderAdd;

/// The `ext_authz` filter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExtAuthz {
    pub service: ExtAuthzService,
    /// Let requests pass when the service cannot be asked.
    pub failure_mode_allow: bool,
    /// Add `x-envoy-auth-failure-mode-allowed: true` then.
    pub failure_mode_allow_header: bool,
    /// Status when the service cannot be asked.
    pub status_on_error: u16,
    pub body: Option<ExtAuthzBody>,
    /// Only when the shadow outcome of an RBAC filter before says so.
    pub enabled: Option<MetadataMatcher>,
    /// Request headers sent to the service; `None`: all (gRPC) or the built-in set (HTTP).
    pub allowed_headers: Option<Vec<StringMatcher>>,
    pub disallowed_headers: Vec<StringMatcher>,
    /// The service's changes decide about the route as well.
    pub clear_route_cache: bool,
    /// Headers go as a list of byte values rather than a map of texts (gRPC).
    pub encode_raw_headers: bool,
}

/// What a route, virtual host or weighted cluster says about the `ext_authz` filter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum ExtAuthzPerRoute {
    /// The service is not asked.
    Disabled,
    Check {
        /// Told to a gRPC service with every request.
        context_extensions: BTreeMap<String, String>,
        /// The body is not sent even where the filter says so.
        no_body: bool,
    },
}

/// Who is asked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum ExtAuthzService {
    Grpc {
        cluster: String,
        authority: Option<String>,
        timeout: Duration,
        initial_metadata: Vec<HeaderAdd>,
    },
    Http {
        uri: String,
        cluster: String,
        timeout: Duration,
        path_prefix: String,
        headers_to_add: Vec<HeaderAdd>,
        /// Of an allowing response, put into the upstream request (replacing).
        allowed_upstream_headers: Vec<StringMatcher>,
        /// Likewise, appending.
        allowed_upstream_headers_to_append: Vec<StringMatcher>,
        /// Of a denying response, sent to the client; empty: all.
        allowed_client_headers: Vec<StringMatcher>,
        /// Of an allowing response, sent to the client.
        allowed_client_headers_on_success: Vec<StringMatcher>,
    },
}

/// How much of the body the service sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ExtAuthzBody {
    /// Bytes.
    pub max_request_bytes: u32,
    /// Send what fits instead of answering 413.
    pub allow_partial: bool,
    /// As bytes rather than text.
    pub pack_as_bytes: bool,
}
