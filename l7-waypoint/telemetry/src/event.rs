//! Request events: what `strata observe` shows and `strata diagnose` reads. Built only when somebody follows, or as a
//! bounded sample for the recent ones.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::format::timestamp;
use crate::peer::Peer;
use crate::record::Record;

/// One request (or TCP connection) as it ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestEvent {
    /// `request`, or `connection` for TCP.
    pub kind: String,
    /// Always `request`: the layer that reports.
    pub layer: String,
    /// RFC 3339 with milliseconds: when it began.
    pub time: String,
    pub source: EventPeer,
    pub destination: EventPeer,
    /// Fully qualified host of the service asked for.
    pub service: String,
    pub route: String,
    pub cluster: Option<String>,
    pub endpoint: Option<String>,
    pub method: Option<String>,
    pub authority: String,
    pub path: String,
    pub protocol: Option<String>,
    pub status: u16,
    pub grpc_status: Option<u32>,
    /// Envoy's flags, such as `UH`.
    pub flags: Vec<String>,
    pub details: String,
    pub latency_ms: f64,
    pub attempts: u32,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    /// Why it went where it went, in order.
    pub reasons: Vec<String>,
    pub request_id: Option<String>,
    pub trace_id: Option<String>,
    pub cookie: Option<u64>,
    pub security: String,
}

/// One end of an event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventPeer {
    pub address: Option<String>,
    pub workload: String,
    pub namespace: String,
    pub identity: Option<String>,
}

impl EventPeer {
    fn new(peer: &Peer, address: Option<String>, identity: Option<&str>) -> Self {
        let known = Some(peer.principal.to_string()).filter(|principal| principal != "unknown");
        Self {
            address,
            workload: peer.workload.to_string(),
            namespace: peer.namespace.to_string(),
            identity: identity.map(str::to_owned).or(known),
        }
    }
}

pub(crate) fn render(record: &Record<'_>) -> Arc<str> {
    let upstream = record.upstream.as_ref();
    let endpoint = upstream.and_then(|upstream| upstream.host).map(str::to_owned);
    let event = RequestEvent {
        kind: if record.method.is_some() { "request" } else { "connection" }.to_owned(),
        layer: "request".to_owned(),
        time: timestamp(record.start),
        source: EventPeer::new(record.source, Some(record.downstream_remote.to_string()), record.peer_principal),
        destination: EventPeer::new(
            record.destination,
            endpoint.clone().or_else(|| address(record.downstream_local)),
            None,
        ),
        service: record.service.host.to_string(),
        route: record.route_name.to_owned(),
        cluster: upstream.map(|upstream| upstream.cluster.to_owned()),
        endpoint,
        method: record.method.map(|method| method.to_string()),
        authority: record.authority.to_owned(),
        path: record.path.to_owned(),
        protocol: record.version.map(|version| format!("{version:?}")),
        status: record.status,
        grpc_status: record.grpc_status.filter(|_| record.grpc),
        flags: record.flags.texts().map(str::to_owned).collect(),
        details: record.details.to_owned(),
        latency_ms: (record.duration.as_micros() as f64) / 1000.0,
        attempts: upstream.map_or(0, |upstream| upstream.attempts),
        bytes_received: record.bytes_received,
        bytes_sent: record.bytes_sent,
        reasons: record.reasons.to_vec(),
        request_id: record.request_id.map(str::to_owned),
        trace_id: record.trace_id.map(str::to_owned),
        cookie: record.cookie,
        security: record.security.label().to_owned(),
    };
    // Strings and numbers only: serialising can't fail.
    serde_json::to_string(&event).unwrap_or_default().into()
}

fn address(address: SocketAddr) -> Option<String> {
    (!address.ip().is_unspecified()).then(|| address.to_string())
}

/// Events a second a worker publishes when nobody follows (the admin server keeps the recent ones).
const IDLE_RATE: u32 = 50;
/// Events a second a worker publishes at most.
const FOLLOWED_RATE: u32 = 5000;

/// A bucket refilled once a second.
#[derive(Debug)]
pub(crate) struct Budget {
    window: Instant,
    used: u32,
}

impl Default for Budget {
    fn default() -> Self {
        Self { window: Instant::now(), used: 0 }
    }
}

impl Budget {
    /// `receivers`: one is the admin server's ring. Failures may use a budget of their own beyond the idle one.
    pub(crate) fn wants(&mut self, receivers: usize, failed: bool) -> bool {
        let limit = match (receivers, failed) {
            (0, _) => return false,
            (1, false) => IDLE_RATE,
            (1, true) => IDLE_RATE * 4,
            _ => FOLLOWED_RATE,
        };
        if self.used >= IDLE_RATE && self.window.elapsed() >= Duration::from_secs(1) {
            (self.window, self.used) = (Instant::now(), 0);
        }
        if self.used >= limit {
            return false;
        }
        self.used += 1;
        true
    }
}
