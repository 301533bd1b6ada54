//! Connections shared by the tunnels of one worker.
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use http::HeaderMap;
use l7_identity::IdentityManager;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use xds_model::spiffe::SpiffeId;

use crate::client::{self, Connection};
use crate::error::ConnectError;
use crate::tunnel::Tunnel;

/// Bounds of the pool (defaults are ztunnel's).
#[derive(Debug, Clone)]
pub struct PoolConfig {
    pub streams_per_connection: usize,
    pub idle_timeout: Duration,
    /// TCP, TLS and HTTP/2 together.
    pub connect_timeout: Duration,
}

impl Default for PoolConfig {
    fn default() -> PoolConfig {
        PoolConfig {
            streams_per_connection: 100,
            idle_timeout: Duration::from_secs(300),
            connect_timeout: Duration::from_secs(10),
        }
    }
}

/// Connections found dead before one of them is the error.
const MAX_DEAD: usize = 2;
/// Turns of looking for room before giving up: each turn that finds none makes a connection.
const MAX_ROUNDS: usize = 8;

/// What tunnels must have in common to share a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Whose certificate is presented.
    pub source: SpiffeId,
    /// Who may answer, sorted.
    pub destinations: Arc<[SpiffeId]>,
    pub addr: SocketAddr,
    /// Address the connection comes from, where it is chosen (a pod's).
    pub source_ip: Option<IpAddr>,
}

impl PoolKey {
    pub fn new(
        source: SpiffeId,
        mut destinations: Vec<SpiffeId>,
        addr: SocketAddr,
        source_ip: Option<IpAddr>,
    ) -> PoolKey {
        destinations.sort_unstable();
        destinations.dedup();
        PoolKey { source, destinations: destinations.into(), addr, source_ip }
    }
}

/// One tunnel to open.
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    pub key: PoolKey,
    /// `ip:port` of the target, or of the service behind a waypoint.
    pub authority: Arc<str>,
    /// `baggage`, `forwarded`, `traceparent`.
    pub headers: HeaderMap,
}

type Dialing = Shared<BoxFuture<'static, Result<Arc<Connection>, ConnectError>>>;

#[derive(Default)]
struct Slot {
    connections: Vec<Arc<Connection>>,
    /// The connection being made; all who need one wait for it, and share its failure.
    dialing: Option<Dialing>,
}

struct Inner {
    identities: IdentityManager,
    config: PoolConfig,
    slots: Mutex<HashMap<PoolKey, Slot>>,
}

/// The pool; clones share it. Use one per worker thread.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

/// Holds a stream's place on its connection.
pub(crate) struct StreamGuard {
    streams: Arc<AtomicUsize>,
}

impl StreamGuard {
    pub(crate) fn new(streams: Arc<AtomicUsize>) -> StreamGuard {
        StreamGuard { streams }
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

enum Found {
    Stream(Arc<Connection>, StreamGuard),
    Wait(Dialing),
}

impl Pool {
    pub fn new(identities: IdentityManager, config: PoolConfig) -> Pool {
        Pool { inner: Arc::new(Inner { identities, config, slots: Mutex::new(HashMap::new()) }) }
    }

    /// Opens a tunnel on a shared connection. If there is none with room, `dial` makes its TCP connection
    /// (so that the caller decides from which network namespace and address).
    ///
    /// # Errors
    /// If no connection can be made or the server refuses the tunnel. A pooled connection that turns out to be
    /// dead is replaced; nothing of the tunnel's bytes was sent by then.
    pub async fn connect<D, F>(&self, request: ConnectRequest, dial: D) -> Result<Tunnel, ConnectError>
    where
        D: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = io::Result<TcpStream>> + Send + 'static,
    {
        let dial = Arc::new(dial);
        let mut reused = 0;
        for _ in 0..MAX_ROUNDS {
            match self.find(&request.key, &dial) {
                Found::Stream(connection, guard) => {
                    let outcome = connection.open(guard, &request.authority, request.headers.clone()).await;
                    match outcome {
                        Err(ConnectError::Http2 { .. } | ConnectError::Draining) if reused < MAX_DEAD => {
                            connection.retire();
                            reused += 1;
                        }
                        outcome => return outcome,
                    }
                }
                Found::Wait(dialing) => {
                    dialing.await?;
                }
            }
        }
        Err(ConnectError::Crowded { addr: request.key.addr })
    }

    /// Number of connections that take further tunnels.
    pub fn connections(&self) -> usize {
        let slots = self.inner.slots.lock();
        slots.values().flat_map(|slot| &slot.connections).filter(|connection| !connection.is_closed()).count()
    }

    /// Retires every connection: open tunnels go on, later ones get a fresh connection.
    pub fn drain(&self) {
        for (_, slot) in self.inner.slots.lock().drain() {
            slot.connections.iter().for_each(|connection| connection.retire());
        }
    }

    fn find<D, F>(&self, key: &PoolKey, dial: &Arc<D>) -> Found
    where
        D: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = io::Result<TcpStream>> + Send + 'static,
    {
        let mut slots = self.inner.slots.lock();
        let slot = match slots.get_mut(key) {
            Some(slot) => slot,
            None => slots.entry(key.clone()).or_default(),
        };
        slot.connections.retain(|connection| !connection.is_closed());
        let limit = self.inner.config.streams_per_connection;
        for connection in &slot.connections {
            if let Some(guard) = connection.reserve(limit) {
                return Found::Stream(connection.clone(), guard);
            }
        }
        if let Some(dialing) = &slot.dialing {
            return Found::Wait(dialing.clone());
        }
        let dialing = self.dial(key.clone(), dial.clone());
        slot.dialing = Some(dialing.clone());
        Found::Wait(dialing)
    }

    fn dial<D, F>(&self, key: PoolKey, dial: Arc<D>) -> Dialing
    where
        D: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = io::Result<TcpStream>> + Send + 'static,
    {
        let inner = self.inner.clone();
        async move {
            let done = Done { inner: inner.clone(), key: key.clone() };
            let connection = client::connect(&inner.identities, &inner.config, &key, dial()).await;
            if let Ok(connection) = &connection
                && let Some(slot) = inner.slots.lock().get_mut(&key)
            {
                slot.connections.push(connection.clone());
            }
            drop(done);
            connection
        }
        .boxed()
        .shared()
    }
}

/// Lets others dial again, however the dialing ended (also if all who waited went away).
struct Done {
    inner: Arc<Inner>,
    key: PoolKey,
}

impl Drop for Done {
    fn drop(&mut self) {
        let mut slots = self.inner.slots.lock();
        if let Some(slot) = slots.get_mut(&self.key) {
            slot.dialing = None;
            if slot.connections.is_empty() {
                slots.remove(&self.key);
            }
        }
    }
}
