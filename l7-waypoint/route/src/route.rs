//! Compiled routes and the decision for one request.
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::HeaderName;
use l7_authz::l7::matcher::HeaderMatch;
use xds_model::envoy::matcher::Fraction;
use xds_model::envoy::route as config;

use crate::chain::{ClusterRef, Clusters};
pub use crate::decision::{Decision, Rewritten, Verdict};
use crate::filter::RouteFilters;
use crate::hash::HashPolicies;
use crate::headers::HeaderOps;
use crate::matching::RouteMatch;
pub use crate::matching::{PathMatch, is_grpc};
use crate::redirect::Redirect;
use crate::rewrite::{PathRewrite, Substitution};
use crate::{CompileError, draw};

const SALT_MIRROR: u64 = 0x31;
const STATUS_INVALID: u16 = 500;

/// One route.
#[derive(Debug, Clone)]
pub struct Route {
    pub name: Arc<str>,
    /// Place in its virtual host.
    pub index: usize,
    /// Path of the Istio object it came from.
    pub config: Option<Arc<str>>,
    /// Span name.
    pub operation: Option<Arc<str>>,
    pub stat_prefix: Option<Arc<str>>,
    pub(crate) matcher: RouteMatch,
    /// What was configured, for explanations.
    pub(crate) source: Arc<config::RouteMatch>,
    pub action: Action,
    pub(crate) request_headers: HeaderOps,
    pub(crate) response_headers: HeaderOps,
    pub(crate) filters: RouteFilters,
}

/// What a route does.
#[derive(Debug, Clone)]
pub enum Action {
    Forward(Box<Forward>),
    Redirect(Redirect),
    Respond { status: u16, body: Bytes },
    Invalid { status: u16, reason: Arc<str> },
}

/// Proxying.
#[derive(Debug, Clone)]
pub struct Forward {
    target: Target,
    pub cluster_not_found_status: u16,
    pub(crate) path_rewrite: Option<PathRewrite>,
    pub(crate) host_rewrite: Option<HostRewrite>,
    /// See [`config::Forward`] for these.
    pub timeout: Option<Duration>,
    pub idle_timeout: Option<Duration>,
    pub grpc_timeout_max: Option<Duration>,
    pub max_stream_duration: Option<Duration>,
    pub retry: Option<Arc<Retry>>,
    pub hash: HashPolicies,
    pub mirrors: Box<[Mirror]>,
    pub high_priority: bool,
    pub upgrades: Box<[(String, bool)]>,
}

#[derive(Debug, Clone)]
enum Target {
    One(ClusterRef),
    Weighted { shares: Box<[Share]>, total: u64 },
}

/// One weighted cluster.
#[derive(Debug, Clone)]
pub struct Share {
    pub cluster: ClusterRef,
    pub weight: u32,
    pub(crate) request_headers: HeaderOps,
    pub(crate) response_headers: HeaderOps,
    pub(crate) host_rewrite: Option<Box<str>>,
    pub(crate) filters: RouteFilters,
}

#[derive(Debug, Clone)]
pub(crate) enum HostRewrite {
    Literal(Box<str>),
    Auto,
    Header(HeaderName),
    PathRegex(Substitution),
}

/// A retry policy with compiled header tests.
#[derive(Debug, Clone)]
pub struct Retry {
    pub policy: config::RetryPolicy,
    /// Any of these makes a response retriable (under `retriable-headers`).
    pub retriable_headers: Box<[HeaderMatch]>,
    /// If not empty, a request must match one to be retried.
    pub retriable_request_headers: Box<[HeaderMatch]>,
}

/// A mirror.
#[derive(Debug, Clone)]
pub struct Mirror {
    pub cluster: ClusterRef,
    fraction: Fraction,
    /// Append `-shadow` to the host.
    pub shadow_suffix: bool,
    pub host_rewrite: Option<Box<str>>,
    salt: u64,
}

impl Mirror {
    /// Whether this request is copied; mirrors draw independently of each other.
    pub fn hit(&self, seed: u64) -> bool {
        self.fraction.hit(draw(seed, self.salt))
    }
}

impl Forward {
    fn compile(
        config: &config::Forward,
        retry: Option<&config::RetryPolicy>,
        clusters: &Clusters,
    ) -> Result<Self, CompileError> {
        let target = match &config.target {
            config::Target::Cluster(name) => Target::One(clusters.reference(name)),
            config::Target::Weighted(shares) => Target::Weighted {
                total: shares.iter().map(|share| u64::from(share.weight)).sum::<u64>().max(1),
                shares: shares.iter().map(|share| Share::compile(share, clusters)).collect::<Result<_, _>>()?,
            },
        };
        let header =
            |name: &str| HeaderName::from_bytes(name.as_bytes()).map_err(|_| CompileError::HeaderName(name.to_owned()));
        let host_rewrite = match &config.host_rewrite {
            None => None,
            Some(config::HostRewrite::Literal(host)) => Some(HostRewrite::Literal(host.as_str().into())),
            Some(config::HostRewrite::Auto) => Some(HostRewrite::Auto),
            Some(config::HostRewrite::Header(name)) => Some(HostRewrite::Header(header(name)?)),
            Some(config::HostRewrite::PathRegex { pattern, substitution }) => {
                Some(HostRewrite::PathRegex(Substitution::compile(pattern, substitution)?))
            }
        };
        let retry = config.retry.as_ref().or(retry).map(Retry::compile).transpose()?.map(Arc::new);
        let mirrors = config.mirrors.iter().enumerate().map(|(index, mirror)| Mirror {
            cluster: clusters.reference(&mirror.cluster),
            fraction: mirror.fraction,
            shadow_suffix: mirror.shadow_suffix,
            host_rewrite: mirror.host_rewrite.as_deref().map(Into::into),
            salt: SALT_MIRROR + index as u64,
        });
        Ok(Self {
            target,
            cluster_not_found_status: config.cluster_not_found_status,
            path_rewrite: config.path_rewrite.as_ref().map(PathRewrite::compile).transpose()?,
            host_rewrite,
            timeout: config.timeout,
            idle_timeout: config.idle_timeout,
            grpc_timeout_max: config.grpc_timeout_max,
            max_stream_duration: config.max_stream_duration,
            retry,
            hash: HashPolicies::compile(&config.hash)?,
            mirrors: mirrors.collect(),
            high_priority: config.high_priority,
            upgrades: config.upgrades.clone().into(),
        })
    }

    /// The cluster for a seed: uniform over the total weight, so that a weight of 0 gets exactly nothing.
    pub fn choose(&self, seed: u64) -> (&ClusterRef, Option<&Share>) {
        match &self.target {
            Target::One(cluster) => (cluster, None),
            Target::Weighted { shares, total } => {
                let mut point = seed % total;
                for share in shares {
                    let weight = u64::from(share.weight);
                    if point < weight {
                        return (&share.cluster, Some(share));
                    }
                    point -= weight;
                }
                // `point` is less than the sum of the weights, so one share was chosen; the last one stands in.
                let share = &shares[shares.len() - 1];
                (&share.cluster, Some(share))
            }
        }
    }

    /// All clusters this route may choose, mirrors not counted.
    pub fn clusters(&self) -> impl Iterator<Item = &ClusterRef> {
        let (one, many) = match &self.target {
            Target::One(cluster) => (Some(cluster), &[][..]),
            Target::Weighted { shares, .. } => (None, &**shares),
        };
        one.into_iter().chain(many.iter().map(|share| &share.cluster))
    }
}

impl Share {
    fn compile(config: &config::WeightedCluster, clusters: &Clusters) -> Result<Self, CompileError> {
        Ok(Self {
            cluster: clusters.reference(&config.name),
            weight: config.weight,
            request_headers: HeaderOps::compile(&config.request_headers)?,
            response_headers: HeaderOps::compile(&config.response_headers)?,
            host_rewrite: config.host_rewrite.as_deref().map(Into::into),
            filters: RouteFilters::compile(&config.filters)?,
        })
    }
}

impl Retry {
    pub(crate) fn compile(policy: &config::RetryPolicy) -> Result<Self, CompileError> {
        Ok(Self {
            retriable_headers: HeaderMatch::compile_all(&policy.retriable_headers)?,
            retriable_request_headers: HeaderMatch::compile_all(&policy.retriable_request_headers)?,
            policy: policy.clone(),
        })
    }
}

impl Route {
    /// Compiles. A route that does not compile answers with an error; the reason is returned with it.
    pub(crate) fn compile(
        index: usize,
        config: &config::Route,
        host: &config::VirtualHost,
        clusters: &Clusters,
    ) -> (Self, Option<CompileError>) {
        match Self::try_compile(index, config, host, clusters) {
            Ok(route) => (route, None),
            Err(error) => {
                let action = Action::Invalid { status: STATUS_INVALID, reason: error.to_string().into() };
                let matcher = RouteMatch::compile_widened(&config.matcher);
                (Self::new(index, config, matcher, action), Some(error))
            }
        }
    }

    fn new(index: usize, config: &config::Route, matcher: RouteMatch, action: Action) -> Self {
        let text = |text: &Option<String>| text.as_deref().map(Into::into);
        Self {
            name: config.name.as_str().into(),
            index,
            config: text(&config.config),
            operation: text(&config.operation),
            stat_prefix: text(&config.stat_prefix),
            matcher,
            source: Arc::new(config.matcher.clone()),
            action,
            request_headers: HeaderOps::default(),
            response_headers: HeaderOps::default(),
            filters: RouteFilters::default(),
        }
    }

    fn try_compile(
        index: usize,
        config: &config::Route,
        host: &config::VirtualHost,
        clusters: &Clusters,
    ) -> Result<Self, CompileError> {
        let action = match &config.action {
            config::RouteAction::Forward(forward) => {
                Action::Forward(Box::new(Forward::compile(forward, host.retry.as_ref(), clusters)?))
            }
            config::RouteAction::Redirect(redirect) => Action::Redirect(Redirect::compile(redirect)?),
            config::RouteAction::Respond(response) => {
                Action::Respond { status: response.status, body: Bytes::from(response.body.clone()) }
            }
            config::RouteAction::Invalid { status, reason } => {
                Action::Invalid { status: *status, reason: reason.as_str().into() }
            }
        };
        let matcher = match action {
            Action::Invalid { .. } => RouteMatch::compile_widened(&config.matcher),
            _ => RouteMatch::compile(&config.matcher)?,
        };
        let mut route = Self::new(index, config, matcher, action);
        route.request_headers = HeaderOps::compile(&config.request_headers)?;
        route.response_headers = HeaderOps::compile(&config.response_headers)?;
        route.filters = RouteFilters::compile(&config.filters)?;
        Ok(route)
    }
}

/// A virtual host.
#[derive(Debug, Clone)]
pub struct VirtualHost {
    pub name: Arc<str>,
    pub routes: Box<[Route]>,
    pub include_attempt_count: bool,
    pub(crate) request_headers: HeaderOps,
    pub(crate) response_headers: HeaderOps,
    pub(crate) filters: RouteFilters,
}

impl VirtualHost {
    /// Compiles; routes that don't are named in `errors`.
    pub(crate) fn compile(
        config: &config::VirtualHost,
        clusters: &Clusters,
        errors: &mut Vec<String>,
    ) -> Result<Self, CompileError> {
        let routes = config.routes.iter().enumerate().map(|(index, route)| {
            let (route, error) = Route::compile(index, route, config, clusters);
            if let Some(error) = error {
                errors.push(format!("virtual host {}, route {index} ({}): {error}", config.name, route.name));
            }
            route
        });
        Ok(Self {
            name: config.name.as_str().into(),
            routes: routes.collect(),
            include_attempt_count: config.include_attempt_count,
            request_headers: HeaderOps::compile(&config.request_headers)?,
            response_headers: HeaderOps::compile(&config.response_headers)?,
            filters: RouteFilters::compile(&config.filters)?,
        })
    }
}
