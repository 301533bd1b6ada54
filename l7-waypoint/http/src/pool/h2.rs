//! HTTP/2 upstream: many requests on few connections.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::h1::Unsent;
use super::{ConnectError, HostPool, Slot};
use crate::body::RequestBody;
use crate::exec::LocalExec;

/// Streams on one connection before another is opened, unless the configuration says fewer.
const STREAMS: u32 = 1024;
/// Flow-control windows: what an endpoint within the cluster can keep filled without one stream starving others.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;

#[derive(Default)]
pub(super) struct Connections {
    open: RefCell<Vec<Rc<Connection>>>,
    /// Set while a connection is being made; later requests wait for it rather than open their own.
    connecting: RefCell<Option<Rc<Notify>>>,
}

struct Connection {
    sender: SendRequest<RequestBody>,
    active: Cell<u32>,
    requests: Cell<u32>,
    last_used: Cell<Instant>,
    born: Instant,
    extended_connect: Rc<Cell<bool>>,
    local: Option<std::net::SocketAddr>,
}

/// One stream's hold on a connection.
pub(crate) struct H2Lease {
    connection: Rc<Connection>,
    pool: Rc<HostPool>,
    fresh: bool,
}

impl Connections {
    pub(super) fn sweep(&self, limit: Option<Duration>, now: Instant, retired: bool) {
        self.open.borrow_mut().retain(|connection| {
            let idle =
                connection.active.get() == 0 && (retired || super::expired(connection.last_used.get(), limit, now));
            !idle && !connection.sender.is_closed()
        });
    }
}

impl HostPool {
    /// A stream on an open connection, or on a new one.
    pub(crate) async fn h2(self: &Rc<Self>, fresh: bool) -> Result<H2Lease, ConnectError> {
        loop {
            if !fresh && let Some(connection) = self.usable_h2() {
                return Ok(H2Lease::new(connection, self, false));
            }
            let Some(underway) = self.h2.connecting.borrow().clone() else { break };
            underway.notified().await;
        }
        let done = Connecting::begin(self);
        let slot = match self.slot_or(async || if fresh { None } else { self.usable_h2() }).await? {
            Ok(connection) => return Ok(H2Lease::new(connection, self, false)),
            Err(slot) => slot,
        };
        let connection = self.open_h2(slot).await?;
        drop(done);
        Ok(H2Lease::new(connection, self, true))
    }

    async fn open_h2(&self, slot: Slot) -> Result<Rc<Connection>, ConnectError> {
        let io = self.connect().await?;
        let local = io.local_addr();
        let mut builder = http2::Builder::new(LocalExec);
        builder.initial_stream_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW);
        builder.max_header_list_size(128 * 1024);
        let handshake = builder.handshake(TokioIo::new(io)).await;
        let (sender, mut connection) = handshake.map_err(|error| ConnectError::Failed(error.to_string()))?;
        let extended_connect = Rc::new(Cell::new(false));
        let seen = extended_connect.clone();
        tokio::task::spawn_local(async move {
            let _slot = slot;
            let ended = std::future::poll_fn(|cx| {
                let ended = Pin::new(&mut connection).poll(cx);
                seen.set(connection.is_extended_connect_protocol_enabled());
                ended
            });
            if let Err(error) = ended.await {
                tracing::debug!(%error, "upstream HTTP/2 connection ended");
            }
        });
        let now = Instant::now();
        let (active, requests, last_used) = (Cell::new(0), Cell::new(0), Cell::new(now));
        let connection =
            Rc::new(Connection { sender, active, requests, last_used, born: now, extended_connect, local });
        self.h2.open.borrow_mut().push(connection.clone());
        Ok(connection)
    }

    fn usable_h2(&self) -> Option<Rc<Connection>> {
        let settings = &self.cluster.http;
        let streams = settings.max_concurrent_streams.unwrap_or(STREAMS).clamp(1, STREAMS);
        let now = Instant::now();
        let mut open = self.h2.open.borrow_mut();
        open.retain(|connection| {
            let worn_out = settings.max_requests_per_connection.is_some_and(|most| connection.requests.get() >= most)
                || super::expired(connection.born, settings.max_connection_duration, now);
            !connection.sender.is_closed() && !worn_out
        });
        open.iter().find(|connection| connection.active.get() < streams).cloned()
    }
}

/// Wakes those who wait for the connection, also when it could not be made.
struct Connecting<'a>(&'a Rc<HostPool>);

impl<'a> Connecting<'a> {
    fn begin(pool: &'a Rc<HostPool>) -> Self {
        *pool.h2.connecting.borrow_mut() = Some(Rc::new(Notify::new()));
        Self(pool)
    }
}

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = self.0.h2.connecting.borrow_mut().take() {
            waiting.notify_waiters();
        }
    }
}

impl H2Lease {
    fn new(connection: Rc<Connection>, pool: &Rc<HostPool>, fresh: bool) -> Self {
        connection.active.set(connection.active.get() + 1);
        connection.requests.set(connection.requests.get() + 1);
        Self { connection, pool: pool.clone(), fresh }
    }

    /// Whether the connection had served requests before.
    pub(crate) fn reused(&self) -> bool {
        !self.fresh
    }

    pub(crate) fn local_addr(&self) -> Option<std::net::SocketAddr> {
        self.connection.local
    }

    /// Whether the upstream takes `CONNECT` with a protocol (RFC 8441). Known once its settings have come.
    pub(crate) fn extended_connect(&self) -> bool {
        self.connection.extended_connect.get()
    }

    pub(crate) async fn send(&mut self, request: Request<RequestBody>) -> Result<Response<Incoming>, Unsent> {
        let mut sender = self.connection.sender.clone();
        let answer = sender.try_send_request(request).await;
        answer.map_err(|mut error| Unsent { request: error.take_message(), error: error.into_error() })
    }
}

impl Drop for H2Lease {
    fn drop(&mut self) {
        self.connection.active.set(self.connection.active.get() - 1);
        self.connection.last_used.set(Instant::now());
        if self.pool.retired.get() {
            self.pool.h2.sweep(None, Instant::now(), true);
        }
        self.pool.notify_freed();
    }
}
