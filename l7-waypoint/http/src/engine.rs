//! One worker's engine.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use l7_authn::TokenCache;
use l7_resilience::Rng;
use l7_route::{Chain, ChainKind, Dispatch, Snapshot, Sniffed};
use l7_telemetry::{Flags, Peer, Peers, Recorder, ServiceInfo};
use strata_runtime::drain::Watch;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use xds_model::envoy::cluster::{Endpoint, EndpointTarget};

use crate::conn::ConnInfo;
use crate::connector::Connector;
use crate::io::Rewind;
use crate::prepared::{Prepared, PreparedChain, Shared};
use crate::server::Client;
use crate::trace::Spans;
use crate::upstream::Upstream;
use crate::{server, sniff, tcp, trace};

/// What an engine is made of.
pub struct EngineConfig {
    /// Loaded once per request.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// The same for all workers.
    pub shared: Arc<Shared>,
    /// This worker's way to endpoints.
    pub connector: Rc<dyn Connector>,
    /// Finds workloads for telemetry.
    pub peers: Arc<dyn Peers>,
    /// How long a client may be silent before it is taken for one that waits for the server to speak, where the
    /// destination serves both HTTP and plain TCP.
    pub sniff_timeout: Duration,
    /// Bytes of a request body kept for retries.
    pub retry_buffer: usize,
    /// First seed; `None`: random. With a fixed one a single connection's requests are decided reproducibly.
    pub seed: Option<u64>,
}

impl EngineConfig {
    /// Defaults for all but what must be given.
    pub fn new(snapshot: Arc<ArcSwap<Snapshot>>, shared: Arc<Shared>, connector: Rc<dyn Connector>) -> Self {
        let sniff_timeout = Duration::from_secs(1);
        Self {
            snapshot,
            shared,
            connector,
            peers: Arc::new(NoPeers),
            sniff_timeout,
            retry_buffer: 64 * 1024,
            seed: None,
        }
    }
}

/// Knows no workloads.
#[derive(Debug, Clone, Copy)]
pub struct NoPeers;

impl Peers for NoPeers {
    fn by_address(&self, _: IpAddr) -> Option<Arc<Peer>> {
        None
    }
}

/// See the crate head. Lives on one thread, within a `LocalSet`.
pub struct Engine {
    pub(crate) config: EngineConfig,
    worker: RefCell<Rc<Worker>>,
    pub(crate) recorder: RefCell<Recorder>,
    pub(crate) tokens: RefCell<TokenCache>,
    pub(crate) spans: RefCell<Spans>,
    pub(crate) rng: RefCell<Rng>,
    pub(crate) unknown_peer: Arc<Peer>,
    pub(crate) unknown_service: Arc<ServiceInfo>,
    pub(crate) faults_active: Cell<u32>,
    this: Weak<Self>,
}

/// A snapshot as this worker uses it.
pub(crate) struct Worker {
    pub(crate) prepared: Arc<Prepared>,
    upstreams: RefCell<HashMap<Arc<str>, Rc<Upstream>>>,
}

/// How often idle connections are looked through.
const SWEEP: Duration = Duration::from_secs(15);

impl Engine {
    /// An engine for the worker this is called on.
    ///
    /// # Panics
    /// Outside a `LocalSet`.
    pub fn new(config: EngineConfig) -> Rc<Self> {
        let prepared = config.shared.prepare(&config.snapshot.load_full());
        let recorder = Recorder::new(config.shared.telemetry.clone());
        let seed = config.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
        let engine = Rc::new_cyclic(|this| Self {
            worker: RefCell::new(Rc::new(Worker { prepared, upstreams: RefCell::default() })),
            recorder: RefCell::new(recorder),
            tokens: RefCell::default(),
            spans: RefCell::default(),
            rng: RefCell::new(Rng::new(seed)),
            unknown_peer: Arc::default(),
            unknown_service: Arc::default(),
            faults_active: Cell::new(0),
            this: this.clone(),
            config,
        });
        tokio::task::spawn_local(sweep(Rc::downgrade(&engine)));
        tokio::task::spawn_local(trace::export(Rc::downgrade(&engine)));
        engine
    }

    /// Serves one client until its connection ends. `drain` ends it gracefully: `GOAWAY`, `Connection: close`.
    pub async fn serve<T>(&self, mut io: T, info: ConnInfo, mut drain: Watch)
    where
        T: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let Some(engine) = self.this.upgrade() else { return };
        let worker = engine.worker();
        let source = engine.source(&info);
        let Some(dispatch) = worker.prepared.snapshot.dispatch(info.destination) else {
            return engine.refuse(&worker, info, source, "no chain for the destination", Flags::NO_ROUTE);
        };
        let looked = tokio::select! {
            looked = engine.look(&mut io, dispatch) => looked,
            // A client that has sent nothing loses nothing.
            () = drain.last_call() => None,
        };
        let Some((sniffed, first)) = looked else { return };
        let Some(chain) = dispatch.chain(sniffed).cloned() else {
            return engine.refuse(&worker, info, source, "no chain for the protocol", Flags::NO_ROUTE);
        };
        let io = Rewind::new(first, io);
        match &chain.kind {
            ChainKind::Closed { reason } => {
                tracing::error!(chain = %chain.name, %reason, "connection closed: the configuration can't be honoured");
                engine.refuse(&worker, info, source, reason, Flags::DENIED);
            }
            ChainKind::Tcp(_) => tcp::serve(engine, worker, chain, io, info, source, drain).await,
            ChainKind::Http(http) => {
                let client = Client::new(info, source, sniffed == Sniffed::H2c);
                let options = http.options.clone();
                drop((worker, chain));
                match sniffed {
                    Sniffed::H2c => server::http2(engine, io, client, options, drain).await,
                    _ => server::http1(engine, io, client, options, drain).await,
                }
            }
        }
    }

    /// What the client speaks, with the bytes read to find out; `None`: it is gone.
    async fn look(&self, io: &mut (impl AsyncRead + Unpin), dispatch: &Dispatch) -> Option<(Sniffed, bytes::Bytes)> {
        let other = dispatch.chain(Sniffed::Other);
        let other_is_tcp = other.is_some_and(|chain| matches!(chain.kind, ChainKind::Tcp(_)));
        if !dispatch.needs_sniffing() && other.is_some_and(|chain| !matches!(chain.kind, ChainKind::Http(_))) {
            return Some((Sniffed::Other, bytes::Bytes::new()));
        }
        let patience = other_is_tcp.then_some(self.config.sniff_timeout);
        let (sniffed, first) = sniff::sniff(io, patience).await.ok()?;
        (!first.is_empty() || other_is_tcp).then_some((sniffed, first))
    }

    /// This worker's state under the current snapshot.
    pub(crate) fn worker(&self) -> Rc<Worker> {
        let current = self.worker.borrow().clone();
        let latest = self.config.snapshot.load();
        let up_to_date = Arc::ptr_eq(&current.prepared.snapshot, &latest)
            && current.prepared.resolved == self.config.shared.resolved();
        if up_to_date {
            return current;
        }
        let worker = Rc::new(current.renew(self.config.shared.prepare(&latest)));
        *self.worker.borrow_mut() = worker.clone();
        worker
    }

    pub(crate) fn seed(&self) -> u64 {
        self.rng.borrow_mut().next_u64()
    }

    pub(crate) fn source(&self, info: &ConnInfo) -> Arc<Peer> {
        self.config.peers.by_address(info.peer.ip().to_canonical()).unwrap_or_else(|| self.unknown_peer.clone())
    }

    /// The workload of an endpoint: by address, else by what the control plane says of the endpoint.
    pub(crate) fn destination(&self, endpoint: &Endpoint) -> Arc<Peer> {
        let address = match &endpoint.target {
            EndpointTarget::Hbone { authority, .. } => Some(authority.ip()),
            EndpointTarget::Plain { address, .. } => Some(address.ip()),
            EndpointTarget::Unreachable { .. } => None,
        };
        if let Some(peer) = address.and_then(|address| self.config.peers.by_address(address.to_canonical())) {
            return peer;
        }
        let Some(workload) = &endpoint.workload else { return self.unknown_peer.clone() };
        let text = |text: &str| if text.is_empty() { "unknown".into() } else { Arc::from(text) };
        Arc::new(Peer {
            workload: text(&workload.name),
            namespace: text(&workload.namespace),
            canonical_service: text(&workload.canonical_name),
            canonical_revision: text(&workload.canonical_revision),
            cluster: text(&workload.cluster),
            ..Peer::default()
        })
    }

    pub(crate) fn upstream(&self, worker: &Worker, name: &str) -> Option<Rc<Upstream>> {
        if let Some(upstream) = worker.upstreams.borrow().get(name) {
            return Some(upstream.clone());
        }
        let shared = worker.prepared.clusters.get(name)?.clone();
        let name = shared.name.clone();
        let upstream = Upstream::new(shared, self.config.connector.clone());
        worker.upstreams.borrow_mut().insert(name, upstream.clone());
        Some(upstream)
    }

    fn refuse(&self, worker: &Worker, info: ConnInfo, source: Arc<Peer>, reason: &str, flags: Flags) {
        tracing::debug!(peer = %info.peer, destination = %info.destination, reason, "connection closed");
        let outcome = tcp::Outcome { flags, details: reason, ..tcp::Outcome::default() };
        tcp::log(self, &worker.prepared.no_chain, &info, &source, &outcome, None);
    }
}

impl Worker {
    fn renew(&self, prepared: Arc<Prepared>) -> Self {
        let mut upstreams = HashMap::new();
        for (name, upstream) in self.upstreams.borrow_mut().drain() {
            match prepared.clusters.get(&name) {
                None => upstream.retire(),
                Some(shared) if Arc::ptr_eq(shared, &upstream.shared) => {
                    upstreams.insert(name, upstream);
                }
                Some(shared) => {
                    upstreams.insert(name, upstream.renew(shared.clone()));
                }
            }
        }
        Self { prepared, upstreams: RefCell::new(upstreams) }
    }

    pub(crate) fn chain(&self, chain: &Chain) -> Option<&Arc<PreparedChain>> {
        self.prepared.chains.get(&chain.name)
    }

    fn sweep(&self, now: Instant) {
        self.upstreams.borrow().values().for_each(|upstream| upstream.sweep(now));
    }
}

/// Ends with the engine.
async fn sweep(engine: Weak<Engine>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let Some(engine) = engine.upgrade() else { return };
        engine.worker().sweep(Instant::now());
    }
}
