//! What is known about a client's connection before its first byte is read.

use std::net::SocketAddr;
use std::sync::Arc;

use l7_telemetry::Security;

/// The trusted context of a connection: nothing in it comes from request headers.
#[derive(Debug, Clone)]
pub struct ConnInfo {
    /// The client, as HBONE's source or the accepted socket says.
    pub peer: SocketAddr,
    /// What the client asked for: the CONNECT authority or the original destination.
    pub destination: SocketAddr,
    /// SPIFFE URI of the verified client certificate.
    pub peer_principal: Option<Arc<str>>,
    /// SPIFFE URI the client verified.
    pub local_principal: Option<Arc<str>>,
    /// Whether the client itself speaks TLS to us (inside HBONE); says what `x-forwarded-proto` is.
    pub tls: bool,
    /// For telemetry.
    pub security: Security,
    /// Socket cookie, joins this connection with the flows of the lower layer.
    pub cookie: Option<u64>,
}

impl ConnInfo {
    /// A connection of which only the addresses are known.
    pub fn plain(peer: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            peer,
            destination,
            peer_principal: None,
            local_principal: None,
            tls: false,
            security: Security::None,
            cookie: None,
        }
    }
}
