//! HTTP/1.1 upstream: one request at a time on a connection, idle connections kept, the last used first.

use std::rc::Rc;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{ConnectError, HostPool};
use crate::body::RequestBody;
use crate::io::Io;

/// What is left of a connection after the upstream switched protocols.
pub(crate) struct UpgradedParts {
    pub(crate) io: Box<dyn Io>,
    pub(crate) read: Bytes,
}

struct Connection {
    sender: SendRequest<RequestBody>,
    /// Comes when the connection task ends with the stream still usable.
    upgraded: oneshot::Receiver<UpgradedParts>,
    requests: u32,
    born: Instant,
    local: Option<std::net::SocketAddr>,
}

/// A connection nobody uses.
pub(super) struct Idle {
    connection: Connection,
    pub(super) since: Instant,
}

impl Idle {
    pub(super) fn is_closed(&self) -> bool {
        self.connection.sender.is_closed()
    }
}

/// A connection for one request. Goes back to the pool through [`H1Lease::give_back`], else it is closed.
pub(crate) struct H1Lease {
    connection: Connection,
    pool: Rc<HostPool>,
    reused: bool,
}

/// A request that was not answered.
pub(crate) struct Unsent {
    pub(crate) error: hyper::Error,
    /// There when nothing of it was written.
    pub(crate) request: Option<Request<RequestBody>>,
}

impl HostPool {
    /// An idle connection or a new one. `fresh` forbids reuse.
    pub(crate) async fn h1(self: &Rc<Self>, fresh: bool) -> Result<H1Lease, ConnectError> {
        let slot = match self.slot_or(async || if fresh { None } else { self.idle_h1().await }).await? {
            Ok(connection) => return Ok(H1Lease { connection, pool: self.clone(), reused: true }),
            Err(slot) => slot,
        };
        let io = self.connect().await?;
        let local = io.local_addr();
        let mut builder = http1::Builder::new();
        builder.preserve_header_case(self.cluster.http.preserve_header_case);
        let handshake = builder.handshake(TokioIo::new(io)).await;
        let (sender, mut connection) = handshake.map_err(|error| ConnectError::Failed(error.to_string()))?;
        let (parts, upgraded) = oneshot::channel();
        tokio::task::spawn_local(async move {
            let _slot = slot;
            let ended = std::future::poll_fn(|cx| connection.poll_without_shutdown(cx)).await;
            if ended.is_ok() {
                let http1::Parts { io, read_buf, .. } = connection.into_parts();
                // Nobody takes them unless it was an upgrade.
                if let Err(mut left) = parts.send(UpgradedParts { io: io.into_inner(), read: read_buf }) {
                    // The other end may be gone already.
                    let _ = left.io.shutdown().await;
                }
            }
        });
        let connection = Connection { sender, upgraded, requests: 0, born: Instant::now(), local };
        Ok(H1Lease { connection, pool: self.clone(), reused: false })
    }

    /// The connection used last that still works.
    async fn idle_h1(&self) -> Option<Connection> {
        loop {
            let mut connection = self.idle.borrow_mut().pop()?.connection;
            // Right after a response the connection's task may not have run yet; then this waits for it.
            if connection.sender.is_ready() || connection.sender.ready().await.is_ok() {
                return Some(connection);
            }
        }
    }
}

impl H1Lease {
    /// Whether the connection had served requests before.
    pub(crate) fn reused(&self) -> bool {
        self.reused
    }

    pub(crate) fn local_addr(&self) -> Option<std::net::SocketAddr> {
        self.connection.local
    }

    pub(crate) async fn send(&mut self, request: Request<RequestBody>) -> Result<Response<Incoming>, Unsent> {
        self.connection.requests += 1;
        let answer = self.connection.sender.try_send_request(request).await;
        answer.map_err(|mut error| Unsent { request: error.take_message(), error: error.into_error() })
    }

    /// Keeps the connection for the next request; the response must have been read to its end and the request sent.
    pub(crate) fn give_back(self) {
        let limits = &self.pool.cluster.http;
        let worn_out = limits.max_requests_per_connection.is_some_and(|most| self.connection.requests >= most)
            || super::expired(self.connection.born, limits.max_connection_duration, Instant::now());
        if worn_out || self.pool.retired.get() || self.connection.sender.is_closed() {
            return;
        }
        self.pool.idle.borrow_mut().push(Idle { connection: self.connection, since: Instant::now() });
        self.pool.notify_freed();
    }

    /// The stream after `101 Switching Protocols`.
    pub(crate) async fn into_upgraded(self) -> Option<UpgradedParts> {
        self.connection.upgraded.await.ok()
    }
}
