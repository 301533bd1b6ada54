//! Routes: virtual hosts, matches, actions. Order is kept; the first matching route wins.
use std::time::Duration;

use serde::Serialize;

use super::ext_authz::ExtAuthzPerRoute;
use super::filter::{CorsPolicy, Fault};
use super::matcher::{Fraction, HeaderMatcher, MetadataMatcher, PathMatcher, QueryMatcher};

/// One inline route configuration.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct RouteConfig {
    pub name: String,
    pub virtual_hosts: Vec<VirtualHost>,
    /// Header changes for every route; applied after the route's and the virtual host's own.
    pub request_headers: HeaderMutations,
    pub response_headers: HeaderMutations,
    /// Ignore the port in `:authority` when a virtual host is looked for.
    pub ignore_port_in_host: bool,
    /// Header changes of the widest scope are applied last instead of first.
    pub most_specific_header_mutations_wins: bool,
}

/// Routes of a set of host names.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct VirtualHost {
    pub name: String,
    /// Exact names, `*.suffix`, `prefix.*` or `*`, lower case.
    pub domains: Vec<String>,
    pub routes: Vec<Route>,
    pub request_headers: HeaderMutations,
    pub response_headers: HeaderMutations,
    pub filters: RouteFilters,
    /// Retry policy of routes that have none of their own.
    pub retry: Option<RetryPolicy>,
    /// Send `x-envoy-attempt-count` upstream.
    pub include_attempt_count: bool,
}

/// One route.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Route {
    /// The name the user gave, or empty.
    pub name: String,
    /// Path of the Istio object it came from (`istio` metadata, `config`), if any.
    pub config: Option<String>,
    pub matcher: RouteMatch,
    pub action: RouteAction,
    pub request_headers: HeaderMutations,
    pub response_headers: HeaderMutations,
    pub filters: RouteFilters,
    /// Span name (`decorator.operation`).
    pub operation: Option<String>,
    pub stat_prefix: Option<String>,
}

/// All parts must match.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RouteMatch {
    pub path: PathMatcher,
    pub case_sensitive: bool,
    pub headers: Vec<HeaderMatcher>,
    pub query: Vec<QueryMatcher>,
    pub metadata: Vec<MetadataMatcher>,
    /// Only this share of otherwise matching requests.
    pub fraction: Option<Fraction>,
    /// Only requests whose content type is gRPC.
    pub grpc: bool,
}

/// What a route does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum RouteAction {
    Forward(Box<Forward>),
    Redirect(Redirect),
    Respond(DirectResponse),
    /// The route could not be honoured: it answers `status` and says why. Its match is the part of the
    /// configured match that was understood, so that no request slips past it to a laxer route.
    Invalid {
        status: u16,
        reason: String,
    },
}

/// Proxy the request to a cluster.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forward {
    pub target: Target,
    /// Status when the chosen cluster is not known (503; 500 for Gateway API routes).
    pub cluster_not_found_status: u16,
    pub path_rewrite: Option<PathRewrite>,
    pub host_rewrite: Option<HostRewrite>,
    /// Whole request incl. retries, from the end of the downstream request to the end of the upstream
    /// response. `None`: no limit.
    pub timeout: Option<Duration>,
    /// No activity on the stream. `None`: the chain's `stream_idle_timeout`; `Some(0)`: no limit.
    pub idle_timeout: Option<Duration>,
    /// Cap on the timeout a gRPC client asks for by `grpc-timeout`. `None`: the header is not looked at;
    /// `Some(0)`: the header counts uncapped.
    pub grpc_timeout_max: Option<Duration>,
    /// Cap on the life of the stream. `None`: no cap.
    pub max_stream_duration: Option<Duration>,
    pub retry: Option<RetryPolicy>,
    pub hash: Vec<HashPolicy>,
    pub mirrors: Vec<Mirror>,
    pub high_priority: bool,
    /// Upgrades allowed or forbidden by this route, over what the chain says.
    pub upgrades: Vec<(String, bool)>,
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Target {
    Cluster(String),
    /// Weights sum to more than 0; a weight of 0 gets nothing.
    Weighted(Vec<WeightedCluster>),
}

/// One share of a [`Target::Weighted`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WeightedCluster {
    pub name: String,
    pub weight: u32,
    pub request_headers: HeaderMutations,
    pub response_headers: HeaderMutations,
    pub host_rewrite: Option<String>,
    pub filters: RouteFilters,
}

/// Rewrites of the path; the query is kept as it is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum PathRewrite {
    /// Replaces the matched prefix (or whole exact path).
    Prefix(String),
    /// RE2 pattern, all matches replaced; `\1`..`\9` refer to groups.
    Regex { pattern: String, substitution: String },
    /// Replaces the whole path.
    Full(String),
    /// `envoy.path.rewrite.uri_template`.
    UriTemplate(String),
}

/// Rewrites of `:authority`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum HostRewrite {
    Literal(String),
    /// The upstream endpoint's host name.
    Auto,
    /// The value of this header.
    Header(String),
    /// RE2 pattern on the path.
    PathRegex {
        pattern: String,
        substitution: String,
    },
}

/// Conditions under which a request is sent again (`retry_on`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RetryOn {
    FiveXx,
    GatewayError,
    Reset,
    ResetBeforeRequest,
    ConnectFailure,
    EnvoyRateLimited,
    Retriable4xx,
    RefusedStream,
    RetriableStatusCodes,
    RetriableHeaders,
    Http3PostConnectFailure,
    /// gRPC status 1.
    Cancelled,
    /// gRPC status 4.
    DeadlineExceeded,
    /// gRPC status 13.
    Internal,
    /// gRPC status 8.
    ResourceExhausted,
    /// gRPC status 14.
    Unavailable,
}

/// When and how often to try again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RetryPolicy {
    pub retry_on: Vec<RetryOn>,
    /// Retries after the first attempt.
    pub num_retries: u32,
    pub per_try_timeout: Option<Duration>,
    pub per_try_idle_timeout: Option<Duration>,
    /// Avoid hosts tried before, choosing again at most this often. `None`: any host.
    pub avoid_previous_hosts: Option<u32>,
    /// After this many attempts, avoid priorities tried before.
    pub previous_priorities: Option<u32>,
    pub retriable_status_codes: Vec<u16>,
    /// Response headers that make a response retriable.
    pub retriable_headers: Vec<HeaderMatcher>,
    /// Requests must match one of these to be retried at all, if there are any.
    pub retriable_request_headers: Vec<HeaderMatcher>,
    /// Exponential back-off with full jitter; Envoy's defaults are 25 ms and ten times the base.
    pub base_interval: Duration,
    pub max_interval: Duration,
}

/// One contribution to the hash of consistent load balancing.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HashPolicy {
    pub key: HashKey,
    /// If this one gives a hash the later ones are skipped.
    pub terminal: bool,
}

/// What is hashed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum HashKey {
    Header(String),
    Cookie {
        name: String,
        /// Make the cookie when it is missing, living this long (0: a session cookie). `None`: never make it.
        ttl: Option<Duration>,
        path: String,
        /// Further attributes (`SameSite`, ...), written as given.
        attributes: Vec<(String, String)>,
    },
    SourceIp,
    Query(String),
}

/// A copy of the request, fire and forget.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mirror {
    pub cluster: String,
    pub fraction: Fraction,
    /// Append `-shadow` to the host of the copy.
    pub shadow_suffix: bool,
    /// Host of the copy, if it is to be another one.
    pub host_rewrite: Option<String>,
}

/// Answer with a redirect.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Redirect {
    pub status: u16,
    pub scheme: Option<String>,
    /// `https` whatever the scheme was.
    pub https: bool,
    pub host: Option<String>,
    pub port: Option<u16>,
    pub path: Option<RedirectPath>,
    pub strip_query: bool,
}

/// The path of a [`Redirect`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum RedirectPath {
    /// Whole path; may hold its own query.
    Full(String),
    Prefix(String),
    Regex {
        pattern: String,
        substitution: String,
    },
}

/// Answer without an upstream.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DirectResponse {
    pub status: u16,
    pub body: Vec<u8>,
}

/// Changes to headers: removals first, then additions, as Envoy does for one scope.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct HeaderMutations {
    pub add: Vec<HeaderAdd>,
    /// Lower case.
    pub remove: Vec<String>,
}

impl HeaderMutations {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }
}

/// One header to add or set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeaderAdd {
    /// Lower case; `:authority` and `:path` are possible.
    pub name: String,
    /// Text with Envoy's command operators (`%DOWNSTREAM_REMOTE_ADDRESS%`).
    pub format: String,
    pub action: AppendAction,
    pub keep_empty_value: bool,
}

/// What [`HeaderAdd`] does when the header is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum AppendAction {
    AppendIfExistsOrAdd,
    AddIfAbsent,
    OverwriteIfExistsOrAdd,
    OverwriteIfExists,
}

/// `typed_per_filter_config` of a route, virtual host or weighted cluster.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct RouteFilters {
    pub cors: Option<CorsPolicy>,
    pub fault: Option<Fault>,
    pub ext_authz: Option<ExtAuthzPerRoute>,
}

impl RouteFilters {
    /// Whether no filter is configured here.
    pub fn is_empty(&self) -> bool {
        self.cors.is_none() && self.fault.is_none() && self.ext_authz.is_none()
    }
}
