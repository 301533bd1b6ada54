//! Connections to one endpoint, as one worker holds them.

mod h1;
mod h2;

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use l7_resilience::{Breakers, Guard, Kind, Limits};
use l7_telemetry::Peer;
use tokio::sync::Notify;
use tokio::time::Instant;
use xds_model::envoy::cluster::{Cluster, Endpoint};

use crate::connector::Connector;
use crate::io::Io;
use crate::upstream::CompiledCluster;
pub(crate) use h1::H1Lease;
pub(crate) use h2::H2Lease;

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum ConnectError {
    /// A circuit breaker of ours.
    Overflow,
    /// The endpoint, in the words of whoever tried.
    Failed(String),
    TimedOut,
}

/// What waits for a connection of the cluster to be given up; shared by workers.
pub(crate) type Freed = Arc<Notify>;

/// See the module head.
pub(crate) struct HostPool {
    pub(crate) endpoint: Endpoint,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) key: Arc<str>,
    /// The host of the requests its connections are for, where TLS depends on it.
    host: Option<Arc<str>>,
    connector: Rc<dyn Connector>,
    breakers: Arc<Breakers>,
    limits: Limits,
    freed: Freed,
    idle: RefCell<Vec<h1::Idle>>,
    h2: h2::Connections,
    /// The endpoint is gone: connections are closed as they become idle.
    retired: Cell<bool>,
    /// The workload behind the endpoint, and when it was looked up.
    peer: RefCell<Option<(Arc<Peer>, Instant)>>,
    /// Connections there are, idle ones included.
    open: Rc<Cell<u32>>,
}

/// How long a workload looked up is good for telemetry.
const PEER_AGE: Duration = Duration::from_secs(5);

/// A request's place in the queue for a connection, and the connection's own place in the cluster's count.
pub(crate) struct Slot {
    connection: Option<Guard>,
    freed: Freed,
    open: Rc<Cell<u32>>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The count goes down before anybody is woken: who wakes on another thread must find the place free.
        self.connection = None;
        self.open.set(self.open.get() - 1);
        self.freed.notify_one();
    }
}

impl HostPool {
    pub(crate) fn new(
        endpoint: Endpoint,
        key: Arc<str>,
        host: Option<Arc<str>>,
        shared: &CompiledCluster,
        connector: Rc<dyn Connector>,
    ) -> Rc<Self> {
        Rc::new(Self {
            endpoint,
            cluster: shared.config.clone(),
            key,
            host,
            connector,
            breakers: shared.balancer.breakers().clone(),
            limits: shared.balancer.spec().limits,
            freed: shared.freed.clone(),
            idle: RefCell::default(),
            h2: h2::Connections::default(),
            retired: Cell::new(false),
            peer: RefCell::default(),
            open: Rc::default(),
        })
    }

    /// The workload behind the endpoint as telemetry names it.
    pub(crate) fn peer(&self, find: impl FnOnce(&Endpoint) -> Arc<Peer>) -> Arc<Peer> {
        let now = Instant::now();
        match &mut *self.peer.borrow_mut() {
            Some((peer, at)) if now.saturating_duration_since(*at) < PEER_AGE => peer.clone(),
            slot => slot.insert((find(&self.endpoint), now)).0.clone(),
        }
    }

    /// Drops connections that have been idle for too long, and all idle ones when the endpoint is gone.
    pub(crate) fn sweep(&self, now: Instant) {
        let retired = self.retired.get();
        let limit = self.cluster.http.idle_timeout;
        self.idle.borrow_mut().retain(|idle| !retired && !idle.is_closed() && !expired(idle.since, limit, now));
        self.h2.sweep(limit, now, retired);
    }

    /// Takes the endpoint out of use: requests under way go on.
    pub(crate) fn retire(&self) {
        self.retired.set(true);
        self.sweep(Instant::now());
    }

    /// Takes a place among the cluster's connections, waiting in the bounded queue when all are taken. `reuse` is asked
    /// first and again each time a connection is given up.
    async fn slot_or<T>(&self, mut reuse: impl AsyncFnMut() -> Option<T>) -> Result<Result<T, Slot>, ConnectError> {
        if let Some(found) = reuse().await {
            return Ok(Ok(found));
        }
        let _pending = self.breakers.acquire(Kind::Pending, &self.limits).ok_or(ConnectError::Overflow)?;
        loop {
            let freed = self.freed.notified();
            if let Some(found) = reuse().await {
                return Ok(Ok(found));
            }
            if let Some(slot) = self.slot() {
                return Ok(Err(slot));
            }
            freed.await;
        }
    }

    /// A place among the cluster's connections. The first one to a host is always allowed: otherwise idle connections to
    /// other hosts could keep this one from ever being reached.
    fn slot(&self) -> Option<Slot> {
        let unlimited = Limits::default();
        let limits = if self.open.get() == 0 { &unlimited } else { &self.limits };
        let connection = Some(self.breakers.acquire(Kind::Connection, limits)?);
        self.open.set(self.open.get() + 1);
        Some(Slot { connection, freed: self.freed.clone(), open: self.open.clone() })
    }

    async fn connect(&self) -> Result<Box<dyn Io>, ConnectError> {
        let connecting = self.connector.connect(&self.endpoint, &self.cluster, self.host.as_ref());
        let outcome = match self.cluster.connect_timeout {
            Duration::ZERO => connecting.await,
            timeout => tokio::time::timeout(timeout, connecting).await.map_err(|_| ConnectError::TimedOut)?,
        };
        outcome.map_err(|error| ConnectError::Failed(describe(&error)))
    }

    /// A raw stream, outside the pool, for TCP chains.
    pub(crate) async fn raw(&self) -> Result<(Box<dyn Io>, Slot), ConnectError> {
        let slot = self.slot().ok_or(ConnectError::Overflow)?;
        Ok((self.connect().await?, slot))
    }

    fn notify_freed(&self) {
        if self.limits.connections != u32::MAX {
            self.freed.notify_one();
        }
    }
}

fn expired(since: Instant, limit: Option<Duration>, now: Instant) -> bool {
    limit.is_some_and(|limit| now.saturating_duration_since(since) >= limit)
}

/// The system's words for an error, without the number.
fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    text.find(" (os error").map_or(text.clone(), |at| text[..at].to_owned())
}
