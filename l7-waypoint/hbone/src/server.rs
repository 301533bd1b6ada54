//! The accepting side.
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{Connection, SendResponse};
use http::{HeaderMap, Method, Response, StatusCode};
use l7_identity::{WorkloadCertificate, peer_identity};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use xds_model::spiffe::SpiffeId;

use crate::error::ServerError;
use crate::keepalive::unresponsive;
use crate::tunnel::Tunnel;
use crate::{CONNECTION_WINDOW, MAX_FRAME, STREAM_WINDOW};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Tunnels a client may have open on one connection (ztunnel).
const MAX_STREAMS: u32 = 200;
/// Largest header list taken, bytes (ztunnel).
const MAX_HEADER_LIST: u32 = 64 << 10;

/// TLS handshake as the server; the client must present a certificate of the mesh.
///
/// # Errors
/// If the handshake fails or takes too long.
pub async fn accept_tls<IO>(io: IO, certificate: &WorkloadCertificate) -> Result<(TlsStream<IO>, SpiffeId), ServerError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let accept = TlsAcceptor::from(certificate.server_config()).accept(io);
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, accept)
        .await
        .map_err(|_| ServerError::HandshakeTimeout { seconds: HANDSHAKE_TIMEOUT.as_secs() })?
        .map_err(ServerError::Tls)?;
    let peer = peer_identity(stream.get_ref().1.peer_certificates())?;
    Ok((stream, peer))
}

/// One accepted connection. [`Server::accept`] also drives its open tunnels: call it until it returns `None`.
pub struct Server<IO: AsyncRead + AsyncWrite + Unpin> {
    connection: Connection<IO, Bytes>,
    silent: Pin<Box<dyn Future<Output = ()> + Send>>,
    peer: SpiffeId,
    peer_addr: SocketAddr,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Server<IO> {
    /// HTTP/2 handshake on an authenticated stream.
    ///
    /// # Errors
    /// If the client does not speak HTTP/2 or takes too long.
    pub async fn handshake(io: IO, peer: SpiffeId, peer_addr: SocketAddr) -> Result<Server<IO>, ServerError> {
        let handshake = h2::server::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADER_LIST)
            .handshake::<_, Bytes>(io);
        let mut connection = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
            .await
            .map_err(|_| ServerError::HandshakeTimeout { seconds: HANDSHAKE_TIMEOUT.as_secs() })??;
        let silent = Box::pin(unresponsive(connection.ping_pong()));
        Ok(Server { connection, silent, peer, peer_addr })
    }

    /// The client's verified identity.
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// The client's TCP address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer_addr
    }

    /// The next request for a tunnel; `None` when the connection has ended.
    ///
    /// # Errors
    /// If the connection breaks.
    pub async fn accept(&mut self) -> Result<Option<Inbound>, ServerError> {
        tokio::select! {
            next = self.connection.accept() => match next {
                Some(Ok((request, respond))) => {
                    let (head, recv) = request.into_parts();
                    let peer = self.peer.clone();
                    Ok(Some(Inbound { head, recv, respond, peer, peer_addr: self.peer_addr }))
                }
                Some(Err(error)) => Err(error.into()),
                None => Ok(None),
            },
            () = &mut self.silent => Err(ServerError::Unresponsive),
        }
    }

    /// Announces that no further tunnel is taken (GOAWAY); open ones go on as long as `accept` is called.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }
}

/// A request for a tunnel, not answered yet. Dropping it resets the stream.
pub struct Inbound {
    head: http::request::Parts,
    recv: RecvStream,
    respond: SendResponse<Bytes>,
    peer: SpiffeId,
    peer_addr: SocketAddr,
}

impl Inbound {
    /// What the client asks for; `None` if the request is no plain CONNECT (answer 400).
    pub fn authority(&self) -> Option<&str> {
        let extended = self.head.extensions.get::<h2::ext::Protocol>().is_some();
        if self.head.method != Method::CONNECT || extended {
            return None;
        }
        self.head.uri.authority().map(http::uri::Authority::as_str)
    }

    pub fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }

    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    pub fn peer_addr(&self) -> SocketAddr {
        self.peer_addr
    }

    /// Refuses with a status: 400 for an authority that makes no sense, 401 for policy, 503 for the rest (ztunnel).
    pub fn refuse(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        // Fails only if the stream is gone, and then nobody waits for the answer.
        let _ = self.respond.send_response(response, true);
    }

    /// Opens the tunnel (200), with headers for the client.
    ///
    /// # Errors
    /// If the client went away meanwhile.
    pub fn accept(mut self, headers: HeaderMap) -> Result<Tunnel, ServerError> {
        let authority: Arc<str> = self.authority().unwrap_or_default().into();
        let mut response = Response::new(());
        *response.headers_mut() = headers;
        let send = self.respond.send_response(response, false)?;
        Ok(Tunnel::new(send, self.recv, authority, self.peer, self.peer_addr, None))
    }
}
