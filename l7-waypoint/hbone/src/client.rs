//! One client connection: dial, handshake, driver.
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Method, Request, StatusCode};
use l7_identity::{IdentityManager, peer_identity};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use xds_model::spiffe::SpiffeId;

use crate::error::ConnectError;
use crate::keepalive::unresponsive;
use crate::pool::{PoolConfig, PoolKey, StreamGuard};
use crate::tunnel::Tunnel;
use crate::{CONNECTION_WINDOW, MAX_FRAME, STREAM_WINDOW};

/// Largest header list taken from a server, bytes (ztunnel).
const MAX_HEADER_LIST: u32 = 16 << 10;

/// A pooled connection.
pub(crate) struct Connection {
    addr: SocketAddr,
    peer: SpiffeId,
    sender: Mutex<Option<SendRequest<Bytes>>>,
    streams: Arc<AtomicUsize>,
    closed: Arc<AtomicBool>,
    started: Instant,
    /// Milliseconds after `started` when the last stream was opened.
    last_used: AtomicU64,
}

impl Connection {
    /// Takes one stream's place, if there is one.
    pub(crate) fn reserve(&self, limit: usize) -> Option<StreamGuard> {
        if self.is_closed() {
            return None;
        }
        let limit = match &*self.sender.lock() {
            Some(sender) => limit.min(sender.current_max_send_streams()),
            None => return None,
        };
        self.streams.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| (now < limit).then_some(now + 1)).ok()?;
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_used.store(now, Ordering::Relaxed);
        Some(StreamGuard::new(self.streams.clone()))
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Takes no further stream; ends when the open ones have ended.
    pub(crate) fn retire(&self) {
        self.closed.store(true, Ordering::Release);
        self.sender.lock().take();
    }

    fn is_idle(&self, limit: Duration) -> bool {
        let last = Duration::from_millis(self.last_used.load(Ordering::Relaxed));
        self.streams.load(Ordering::Acquire) == 0 && self.started.elapsed().saturating_sub(last) >= limit
    }

    /// Opens one tunnel.
    ///
    /// # Errors
    /// If the connection is gone, or the server answers with anything but 200.
    pub(crate) async fn open(
        &self,
        guard: StreamGuard,
        authority: &Arc<str>,
        headers: HeaderMap,
    ) -> Result<Tunnel, ConnectError> {
        let http2 = |source| ConnectError::Http2 { addr: self.addr, source: Arc::new(source) };
        let sender = self.sender.lock().clone().ok_or(ConnectError::Draining)?;
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(&**authority)
            .body(())
            .map_err(|error| ConnectError::Request(Arc::new(error)))?;
        *request.headers_mut() = headers;
        let mut sender = sender.ready().await.map_err(http2)?;
        let (response, send) = sender.send_request(request, false).map_err(http2)?;
        let response = response.await.map_err(http2)?;
        if response.status() != StatusCode::OK {
            return Err(ConnectError::Refused { addr: self.addr, status: response.status() });
        }
        let recv = response.into_body();
        Ok(Tunnel::new(send, recv, authority.clone(), self.peer.clone(), self.addr, Some(guard)))
    }
}

/// Makes a connection for `key` on the TCP stream `dial` gives.
pub(crate) async fn connect(
    identities: &IdentityManager,
    config: &PoolConfig,
    key: &PoolKey,
    dial: impl Future<Output = io::Result<TcpStream>>,
) -> Result<Arc<Connection>, ConnectError> {
    let addr = key.addr;
    let certificate = identities.certificate(&key.source).await?;
    let tls = certificate.client_config(&key.destinations).map_err(|error| ConnectError::Config(Arc::new(error)))?;
    let handshake = async {
        let tcp = dial.await.map_err(|source| ConnectError::Connect { addr, source: Arc::new(source) })?;
        // Tunnelled bytes are latency-sensitive; failing to say so only makes them slower.
        let _ = tcp.set_nodelay(true);
        let stream = TlsConnector::from(tls)
            .connect(addr.ip().into(), tcp)
            .await
            .map_err(|source| ConnectError::Tls { addr, source: Arc::new(source) })?;
        let session = stream.get_ref().1;
        if session.alpn_protocol() != Some(b"h2") {
            return Err(ConnectError::Protocol { addr });
        }
        let peer = peer_identity(session.peer_certificates()).map_err(|source| ConnectError::Peer { addr, source })?;
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_header_list_size(MAX_HEADER_LIST)
            .enable_push(false)
            .handshake::<_, Bytes>(stream)
            .await
            .map_err(|source| ConnectError::Http2 { addr, source: Arc::new(source) })?;
        Ok((peer, sender, connection))
    };
    let (peer, sender, connection) = tokio::time::timeout(config.connect_timeout, handshake)
        .await
        .map_err(|_| ConnectError::Timeout { addr, seconds: config.connect_timeout.as_secs() })??;
    let pooled = Arc::new(Connection {
        addr,
        peer,
        sender: Mutex::new(Some(sender)),
        streams: Arc::new(AtomicUsize::new(0)),
        closed: Arc::new(AtomicBool::new(false)),
        started: Instant::now(),
        last_used: AtomicU64::new(0),
    });
    tokio::spawn(drive(connection, Arc::downgrade(&pooled), pooled.closed.clone(), config.idle_timeout, addr));
    Ok(pooled)
}

async fn drive<T>(
    mut connection: h2::client::Connection<T, Bytes>,
    pooled: std::sync::Weak<Connection>,
    closed: Arc<AtomicBool>,
    idle_timeout: Duration,
    addr: SocketAddr,
) where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let ping_pong = connection.ping_pong();
    let silent = unresponsive(ping_pong);
    let idle = async {
        loop {
            tokio::time::sleep((idle_timeout / 4).max(Duration::from_millis(10))).await;
            match pooled.upgrade() {
                Some(pooled) if pooled.is_idle(idle_timeout) => pooled.retire(),
                Some(_) => {}
                None => return std::future::pending::<()>().await,
            }
        }
    };
    tokio::select! {
        outcome = &mut connection => match outcome {
            Ok(()) => tracing::debug!(%addr, "HBONE connection ended"),
            Err(error) => tracing::debug!(%addr, %error, "HBONE connection broke"),
        },
        () = silent => tracing::info!(%addr, "HBONE peer stopped answering pings"),
        () = idle => {}
    }
    closed.store(true, Ordering::Release);
    if let Some(pooled) = pooled.upgrade() {
        pooled.retire();
    }
}
