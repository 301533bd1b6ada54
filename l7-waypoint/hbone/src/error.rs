//! What can go wrong, in the order a connection is made.
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use http::StatusCode;
use l7_identity::{IdentityError, PeerError};

/// Why there is no tunnel. Cheap to clone: all who waited for one connection get the same.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("TLS configuration: {0}")]
    Config(Arc<rustls::Error>),
    #[error("connecting to {addr}: {source}")]
    Connect { addr: SocketAddr, source: Arc<io::Error> },
    #[error("TLS with {addr}: {source}")]
    Tls { addr: SocketAddr, source: Arc<io::Error> },
    #[error("the peer at {addr}: {source}")]
    Peer { addr: SocketAddr, source: PeerError },
    #[error("{addr} did not agree on HTTP/2")]
    Protocol { addr: SocketAddr },
    #[error("HTTP/2 with {addr}: {source}")]
    Http2 { addr: SocketAddr, source: Arc<h2::Error> },
    #[error("{addr} refused the tunnel: {status}")]
    Refused { addr: SocketAddr, status: StatusCode },
    #[error("no answer from {addr} within {seconds} s")]
    Timeout { addr: SocketAddr, seconds: u64 },
    #[error("authority or headers of the tunnel cannot be sent: {0}")]
    Request(Arc<http::Error>),
    #[error("connections to {addr} have no room for a further tunnel")]
    Crowded { addr: SocketAddr },
    #[error("the connection is draining")]
    Draining,
}

impl ConnectError {
    /// Nobody was reached at the address, or nobody who takes tunnels: another one may be tried.
    pub fn is_unreachable(&self) -> bool {
        matches!(
            self,
            ConnectError::Connect { .. }
                | ConnectError::Timeout { .. }
                | ConnectError::Http2 { .. }
                | ConnectError::Tls { .. }
                | ConnectError::Crowded { .. }
                | ConnectError::Draining
        )
    }

    /// ztunnel's `response_flags` value (xds-contract 7.1).
    pub fn response_flag(&self) -> &'static str {
        match self {
            ConnectError::Identity(_) => "IDENTITY_ERROR",
            ConnectError::Config(_) | ConnectError::Tls { .. } | ConnectError::Peer { .. } => "TLS_FAILURE",
            ConnectError::Protocol { .. } | ConnectError::Http2 { .. } => "H2_HANDSHAKE_FAILURE",
            ConnectError::Refused { status, .. } if *status == StatusCode::UNAUTHORIZED => "DENY",
            ConnectError::Refused { .. }
            | ConnectError::Connect { .. }
            | ConnectError::Timeout { .. }
            | ConnectError::Request(_)
            | ConnectError::Crowded { .. }
            | ConnectError::Draining => "CONNECT",
        }
    }
}

/// Why an incoming connection ended before or between tunnels.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("TLS: {0}")]
    Tls(#[source] io::Error),
    #[error("TLS handshake took longer than {seconds} s")]
    HandshakeTimeout { seconds: u64 },
    #[error("the peer: {0}")]
    Peer(#[from] PeerError),
    #[error("HTTP/2: {0}")]
    Http2(#[from] h2::Error),
    #[error("the peer stopped answering pings")]
    Unresponsive,
}
