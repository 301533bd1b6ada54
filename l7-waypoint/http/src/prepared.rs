//! A snapshot made ready for all workers: clusters with their balancers, JWT verifiers, access logs. Compiled once per
//! snapshot; what did not change is taken over.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use l7_authn::{Authenticator, JwksStore};
use l7_resilience::{Backoff, RetryOn, RetryPolicy, States};
use l7_route::route::Action;
use l7_route::{Chain, ChainKind, FilterKind, HttpChain, Snapshot};
use l7_telemetry::trace::Tracer;
use l7_telemetry::{AccessLogger, MetricRules, Telemetry};
use parking_lot::Mutex;
use tokio::time::Instant;
use xds_model::envoy::cluster::{Assignment, Cluster, Discovery, ENCAP};
use xds_model::envoy::route as config;
use xds_model::envoy::telemetry::{AccessLog, StatsFilter};

use crate::pool::Freed;
use crate::upstream::{self, CompiledCluster, Resolved, Resolver};

/// What all workers of a process share.
pub struct Shared {
    pub(crate) telemetry: Arc<Telemetry>,
    /// Istio's metrics as they are where nothing changes them: the same for all chains, as metrics are found by it.
    pub(crate) plain_metrics: Arc<MetricRules>,
    jwks: JwksStore,
    states: States,
    resolver: Resolver,
    freed: Mutex<HashMap<Arc<str>, Freed>>,
    prepared: Mutex<Option<Arc<Prepared>>>,
    /// Goes up when names resolve to other addresses.
    resolved: Arc<AtomicU64>,
    started: Instant,
}

/// See the module head.
pub(crate) struct Prepared {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) clusters: HashMap<Arc<str>, Arc<CompiledCluster>>,
    pub(crate) chains: HashMap<Arc<str>, Arc<PreparedChain>>,
    /// Of connections that no chain takes.
    pub(crate) no_chain: PreparedChain,
    pub(crate) resolved: u64,
    /// Keeps the resolving tasks of this snapshot's clusters alive.
    _names: Vec<Arc<Resolved>>,
}

/// What of a chain is compiled here.
#[derive(Default)]
pub(crate) struct PreparedChain {
    /// By position among the chain's filters; an error means that the filter lets nothing pass.
    pub(crate) authn: HashMap<usize, Result<Authenticator, String>>,
    pub(crate) logs: Vec<AccessLogger>,
    /// Where spans are sent.
    pub(crate) tracer: Option<Arc<Tracer>>,
    pub(crate) suppress_envoy_headers: bool,
    pub(crate) metrics: Arc<MetricRules>,
    /// By address of the route's own policy, which the snapshot keeps alive.
    retries: HashMap<usize, RetryPolicy>,
}

impl PreparedChain {
    pub(crate) fn retry(&self, retry: &Arc<l7_route::route::Retry>) -> Option<&RetryPolicy> {
        self.retries.get(&(Arc::as_ptr(retry) as usize))
    }
}

impl Shared {
    /// `runtime` is where names are resolved; it must outlive the workers. Without one, clusters found by name stay
    /// empty.
    pub fn new(telemetry: Arc<Telemetry>, jwks: JwksStore, runtime: Option<tokio::runtime::Handle>) -> Arc<Self> {
        let resolved = Arc::new(AtomicU64::new(0));
        let count = resolved.clone();
        let changed = Arc::new(move || {
            count.fetch_add(1, Relaxed);
        });
        Arc::new(Self {
            telemetry,
            plain_metrics: Arc::default(),
            jwks,
            states: States::default(),
            resolver: Resolver::new(runtime, changed),
            freed: Mutex::default(),
            prepared: Mutex::default(),
            resolved,
            started: Instant::now(),
        })
    }

    /// Monotonic milliseconds, the same for all workers. Starts high enough for "long ago" to be expressible.
    pub(crate) fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64 + 1
    }

    /// Compiles `snapshot` ahead of its use. Call it before storing the snapshot, so that no request waits for it.
    pub fn warm(&self, snapshot: &Arc<Snapshot>) {
        self.prepare(snapshot);
    }

    pub(crate) fn resolved(&self) -> u64 {
        self.resolved.load(Relaxed)
    }

    /// The prepared form of `snapshot`; the first worker to ask makes it.
    pub(crate) fn prepare(&self, snapshot: &Arc<Snapshot>) -> Arc<Prepared> {
        let mut current = self.prepared.lock();
        let resolved = self.resolved();
        if let Some(prepared) = &*current
            && Arc::ptr_eq(&prepared.snapshot, snapshot)
            && prepared.resolved == resolved
        {
            return prepared.clone();
        }
        let previous = current.as_deref();
        let same_snapshot = previous.filter(|previous| Arc::ptr_eq(&previous.snapshot, snapshot));
        let mut names = Vec::new();
        let clusters = self.clusters(snapshot, previous, &mut names);
        let chains = match same_snapshot {
            Some(previous) => previous.chains.clone(),
            None => snapshot.chains().map(|chain| (chain.name.clone(), Arc::new(self.chain(chain)))).collect(),
        };
        let no_chain = PreparedChain { logs: self.logs(&snapshot.no_chain_logs), ..PreparedChain::default() };
        let snapshot = snapshot.clone();
        let prepared = Arc::new(Prepared { snapshot, clusters, chains, no_chain, resolved, _names: names });
        self.states.retain(|name| prepared.clusters.contains_key(name));
        *current = Some(prepared.clone());
        prepared
    }

    fn clusters(
        &self,
        snapshot: &Snapshot,
        previous: Option<&Prepared>,
        names: &mut Vec<Arc<Resolved>>,
    ) -> HashMap<Arc<str>, Arc<CompiledCluster>> {
        let mut clusters = HashMap::new();
        for cluster in snapshot.clusters.iter() {
            let assignment = self.assignment(snapshot, cluster, names);
            let name: Arc<str> = cluster.name.as_str().into();
            let known = previous.and_then(|previous| previous.clusters.get(&name));
            let same = |known: &&Arc<CompiledCluster>| *known.config == **cluster && known.assignment == *assignment;
            let compiled = known.filter(same).cloned().unwrap_or_else(|| {
                Arc::new(upstream::compile(cluster, &assignment, &self.states, self.freed(&name), self.now()))
            });
            clusters.insert(name, compiled);
        }
        let encap: Arc<str> = ENCAP.into();
        let known = previous.and_then(|previous| previous.clusters.get(&encap)).cloned();
        let compiled = known.unwrap_or_else(|| Arc::new(upstream::encap(&self.states, self.freed(&encap))));
        clusters.insert(encap, compiled);
        clusters
    }

    fn assignment(&self, snapshot: &Snapshot, cluster: &Cluster, names: &mut Vec<Arc<Resolved>>) -> Arc<Assignment> {
        if let Discovery::Dns { .. } = cluster.discovery {
            let resolved = self.resolver.watch(&cluster.name, &cluster.discovery);
            let current = resolved.current();
            names.push(resolved);
            return current;
        }
        snapshot.endpoints(cluster).unwrap_or_default()
    }

    fn freed(&self, name: &Arc<str>) -> Freed {
        self.freed.lock().entry(name.clone()).or_default().clone()
    }

    fn chain(&self, chain: &Chain) -> PreparedChain {
        match &chain.kind {
            ChainKind::Http(http) => self.http_chain(&chain.name, http),
            ChainKind::Tcp(tcp) => PreparedChain {
                logs: self.logs(&tcp.access_logs),
                metrics: self.metrics(tcp.stats.as_ref()),
                ..PreparedChain::default()
            },
            ChainKind::Closed { .. } => PreparedChain::default(),
        }
    }

    fn http_chain(&self, name: &str, chain: &HttpChain) -> PreparedChain {
        let mut prepared = PreparedChain { logs: self.logs(&chain.access_logs), ..PreparedChain::default() };
        prepared.tracer = chain.tracing.as_ref().and_then(|config| {
            let tracer = Tracer::compile(config);
            tracer.inspect_err(|error| tracing::error!(chain = name, %error, "no spans are sent")).ok()?.map(Arc::new)
        });
        let stats = chain.filters.iter().find_map(|filter| match &filter.kind {
            FilterKind::Stats(config) => Some(&**config),
            _ => None,
        });
        prepared.metrics = self.metrics(stats);
        for (position, filter) in chain.filters.iter().enumerate() {
            match &filter.kind {
                FilterKind::JwtAuthn(config) => {
                    let compiled = Authenticator::compile(config, &self.jwks).map_err(|error| error.to_string());
                    if let Err(reason) = &compiled {
                        tracing::error!(chain = name, filter = %filter.name, reason, "JWT filter lets nothing pass");
                    }
                    prepared.authn.insert(position, compiled);
                }
                FilterKind::Router(router) => prepared.suppress_envoy_headers = router.suppress_envoy_headers,
                _ => {}
            }
        }
        for (_, route) in chain.routes() {
            if let Action::Forward(forward) = &route.action
                && let Some(retry) = &forward.retry
            {
                prepared.retries.insert(Arc::as_ptr(retry) as usize, retry_policy(&retry.policy));
            }
        }
        prepared
    }

    /// They are always there: istiod sends no filter in meshes that name no provider for them, and when a Telemetry turns all of
    /// them off.
    fn metrics(&self, config: Option<&StatsFilter>) -> Arc<MetricRules> {
        let changed = config.filter(|config| !config.metrics.is_empty());
        changed.map_or_else(|| self.plain_metrics.clone(), |config| Arc::new(MetricRules::compile(config)))
    }

    fn logs(&self, configs: &[AccessLog]) -> Vec<AccessLogger> {
        let compile = |config: &AccessLog| {
            let logger = self.telemetry.access_logger(config);
            logger.inspect_err(|error| tracing::error!(%error, "access log left out")).ok()
        };
        configs.iter().filter_map(compile).collect()
    }
}

fn retry_policy(config: &config::RetryPolicy) -> RetryPolicy {
    use config::RetryOn as On;
    let bit = |on: &On| match on {
        On::FiveXx => RetryOn::SERVER_ERROR,
        On::GatewayError => RetryOn::GATEWAY_ERROR,
        On::Reset => RetryOn::RESET,
        On::ResetBeforeRequest => RetryOn::RESET_BEFORE_REQUEST,
        On::ConnectFailure => RetryOn::CONNECT_FAILURE,
        On::EnvoyRateLimited => RetryOn::RATE_LIMITED,
        On::Retriable4xx => RetryOn::RETRIABLE_4XX,
        On::RefusedStream => RetryOn::REFUSED_STREAM,
        On::RetriableStatusCodes => RetryOn::STATUS_CODES,
        On::RetriableHeaders => RetryOn::HEADERS,
        On::Http3PostConnectFailure => 0,
        On::Cancelled => RetryOn::GRPC_CANCELLED,
        On::DeadlineExceeded => RetryOn::GRPC_DEADLINE_EXCEEDED,
        On::Internal => RetryOn::GRPC_INTERNAL,
        On::ResourceExhausted => RetryOn::GRPC_RESOURCE_EXHAUSTED,
        On::Unavailable => RetryOn::GRPC_UNAVAILABLE,
    };
    RetryPolicy {
        on: RetryOn::of(config.retry_on.iter().map(bit).fold(0, std::ops::BitOr::bitor)),
        retries: config.num_retries,
        codes: config.retriable_status_codes.clone(),
        backoff: Backoff { base: config.base_interval, max: config.max_interval },
        per_try: config.per_try_timeout.filter(|timeout| !timeout.is_zero()),
        other_hosts: config.avoid_previous_hosts,
        other_priorities: config.previous_priorities,
    }
}
