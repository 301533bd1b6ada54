//! Everything known about one finished request or connection, borrowed from the engine.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, Method, Version};

use crate::flags::Flags;
use crate::metrics::Security;
use crate::peer::{Peer, ServiceInfo};

/// See the module head.
#[derive(Debug, Clone)]
pub struct Record<'a> {
    pub start: SystemTime,
    pub duration: Duration,
    /// `None` for a TCP connection.
    pub method: Option<&'a Method>,
    /// Path with query as sent upstream.
    pub path: &'a str,
    /// Path with query as the client sent it, when a rewrite changed it.
    pub original_path: Option<&'a str>,
    pub authority: &'a str,
    pub scheme: &'a str,
    pub version: Option<Version>,
    pub request_headers: &'a HeaderMap,
    pub response_headers: Option<&'a HeaderMap>,
    pub trailers: Option<&'a HeaderMap>,
    /// 0 when the client never got an answer.
    pub status: u16,
    pub grpc: bool,
    pub grpc_status: Option<u32>,
    pub flags: Flags,
    /// Envoy's response code details, such as `via_upstream`.
    pub details: &'a str,
    /// Body bytes from the client.
    pub bytes_received: u64,
    /// Body bytes to the client.
    pub bytes_sent: u64,
    /// Messages of gRPC from the client, and to it.
    pub messages_received: u64,
    pub messages_sent: u64,
    pub downstream_remote: SocketAddr,
    /// The address the client asked for.
    pub downstream_local: SocketAddr,
    pub peer_principal: Option<&'a str>,
    pub local_principal: Option<&'a str>,
    pub route_name: &'a str,
    pub upstream: Option<Upstream<'a>>,
    pub request_id: Option<&'a str>,
    pub trace_id: Option<&'a str>,
    pub security: Security,
    /// Workload at `downstream_remote`.
    pub source: &'a Arc<Peer>,
    /// Workload of the chosen endpoint.
    pub destination: &'a Arc<Peer>,
    pub service: &'a Arc<ServiceInfo>,
    /// Why the request went where it went; for events only.
    pub reasons: &'a [String],
    /// Socket cookie, where there is one.
    pub cookie: Option<u64>,
}

/// The last attempt's upstream.
#[derive(Debug, Clone, Copy)]
pub struct Upstream<'a> {
    pub cluster: &'a str,
    /// Endpoint as `IP:port`, if one was chosen.
    pub host: Option<&'a str>,
    pub local: Option<SocketAddr>,
    /// Time from the end of the request to the first byte of the response.
    pub service_time: Option<Duration>,
    pub transport_failure: Option<&'a str>,
    pub attempts: u32,
}
