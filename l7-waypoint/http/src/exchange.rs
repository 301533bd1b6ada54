//! One request from its first byte to its last: what is known of it so far, and what is left behind at its end.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use l7_resilience::Guard;
use l7_resilience::host::ActiveRequest;
use l7_telemetry::trace::callers_trace_id;
use l7_telemetry::{Flags, Peer, Record, ServiceInfo, Upstream};
use tokio::time::Instant;

use crate::body::{OnEnd, Passed, Stop, Upload};
use crate::engine::Engine;
use crate::head::Head;
use crate::pool::{H1Lease, H2Lease};
use crate::prepared::PreparedChain;
use crate::server::Client;
use crate::trace::Traced;

/// A connection to the upstream, as long as the response lasts.
pub(crate) enum Lease {
    H1(H1Lease),
    H2(H2Lease),
}

/// What is held until the response has ended.
#[derive(Default)]
pub(crate) struct Held {
    pub(crate) lease: Option<Lease>,
    pub(crate) active: Option<ActiveRequest>,
    pub(crate) request: Option<Guard>,
    pub(crate) retry: Option<Guard>,
}

/// See the module head. Recorded when dropped, so that a request given up by its client is recorded as well.
pub(crate) struct Exchange {
    pub(crate) engine: Rc<Engine>,
    pub(crate) client: Rc<Client>,
    pub(crate) chain: Option<Arc<PreparedChain>>,
    pub(crate) started: Instant,
    pub(crate) head: Option<Head>,
    pub(crate) original_path: Option<String>,
    pub(crate) status: u16,
    pub(crate) grpc_status: Option<u32>,
    pub(crate) flags: Flags,
    pub(crate) details: std::borrow::Cow<'static, str>,
    pub(crate) route_name: Option<Arc<str>>,
    pub(crate) cluster: Option<Arc<str>>,
    pub(crate) host: Option<Arc<str>>,
    pub(crate) upstream_local: Option<std::net::SocketAddr>,
    pub(crate) service_time: Option<Duration>,
    pub(crate) failure: Option<String>,
    pub(crate) attempts: u32,
    pub(crate) service: Arc<ServiceInfo>,
    pub(crate) destination: Arc<Peer>,
    /// Kept only where an access log may want them.
    pub(crate) response_headers: Option<HeaderMap>,
    pub(crate) trailers: Option<HeaderMap>,
    pub(crate) upload: Option<Rc<Upload>>,
    pub(crate) bytes_received: u64,
    pub(crate) bytes_sent: u64,
    /// Of gRPC.
    pub(crate) messages_sent: u64,
    pub(crate) reasons: Vec<String>,
    pub(crate) trace: Option<Traced>,
    pub(crate) held: Held,
    pub(crate) mirrors: Vec<crate::mirror::Waiting>,
    finished: bool,
}

impl Exchange {
    pub(crate) fn new(engine: Rc<Engine>, client: Rc<Client>) -> Box<Self> {
        client.request_begins();
        Box::new(Self {
            chain: None,
            started: Instant::now(),
            head: None,
            original_path: None,
            status: 0,
            grpc_status: None,
            flags: Flags::default(),
            details: "".into(),
            route_name: None,
            cluster: None,
            host: None,
            upstream_local: None,
            service_time: None,
            failure: None,
            attempts: 0,
            service: engine.unknown_service.clone(),
            destination: engine.unknown_peer.clone(),
            response_headers: None,
            trailers: None,
            upload: None,
            bytes_received: 0,
            bytes_sent: 0,
            messages_sent: 0,
            reasons: Vec::new(),
            trace: None,
            held: Held::default(),
            mirrors: Vec::new(),
            finished: false,
            engine,
            client,
        })
    }

    /// Whether somebody may ask for the response's headers at the end.
    pub(crate) fn keeps_headers(&self) -> bool {
        self.chain.as_ref().is_some_and(|chain| !chain.logs.is_empty() || chain.metrics.looks_at_requests())
    }

    /// A protocol switch took the place of a body.
    pub(crate) fn switched(mut self: Box<Self>, received: u64, sent: u64) {
        (self.bytes_received, self.bytes_sent, self.finished) = (received, sent, true);
    }

    fn release(&mut self, stop: Stop) {
        let sent_all = self.upload.as_ref().is_none_or(|upload| upload.finished());
        if let Some(Lease::H1(lease)) = self.held.lease.take()
            && stop == Stop::Complete
            && sent_all
        {
            lease.give_back();
        }
    }

    fn record(&mut self) {
        if let Some(upload) = &self.upload {
            self.bytes_received = upload.received();
        }
        let duration = self.started.elapsed();
        let nothing = HeaderMap::new();
        let head = self.head.as_ref();
        let unknown = http::Method::GET;
        let info = &self.client.info;
        let header = |name: &str| head.and_then(|head| head.headers.get(name)).and_then(|value| value.to_str().ok());
        let trace_id = head.and_then(|head| match &self.trace {
            Some(traced) => traced.trace_id(&head.headers),
            None => callers_trace_id(&head.headers),
        });
        let record = Record {
            start: SystemTime::now() - duration,
            duration,
            method: Some(head.map_or(&unknown, |head| &head.method)),
            path: head.map_or("", |head| head.path.as_str()),
            original_path: self.original_path.as_deref(),
            authority: head.map_or("", |head| head.authority.as_str()),
            scheme: head.map_or("http", |head| head.scheme),
            version: head.map(|head| head.version),
            request_headers: head.map_or(&nothing, |head| &head.headers),
            response_headers: self.response_headers.as_ref(),
            trailers: self.trailers.as_ref(),
            status: self.status,
            grpc: head.is_some_and(|head| head.grpc),
            grpc_status: self.grpc_status,
            flags: self.flags,
            details: &self.details,
            bytes_received: self.bytes_received,
            bytes_sent: self.bytes_sent,
            messages_received: self.upload.as_ref().map_or(0, |upload| upload.messages()),
            messages_sent: self.messages_sent,
            downstream_remote: info.peer,
            downstream_local: info.destination,
            peer_principal: info.peer_principal.as_deref(),
            local_principal: info.local_principal.as_deref(),
            route_name: self.route_name.as_deref().unwrap_or_default(),
            upstream: self.cluster.as_deref().map(|cluster| Upstream {
                cluster,
                host: self.host.as_deref(),
                local: self.upstream_local,
                service_time: self.service_time,
                transport_failure: self.failure.as_deref(),
                attempts: self.attempts,
            }),
            request_id: header("x-request-id"),
            trace_id,
            security: info.security,
            source: &self.client.source,
            destination: &self.destination,
            service: &self.service,
            reasons: &self.reasons,
            cookie: info.cookie,
        };
        for log in self.chain.iter().flat_map(|chain| &chain.logs) {
            log.log(&record);
        }
        if let Some(traced) = &self.trace {
            traced.report(&record, &self.engine);
        }
        let rules = self.chain.as_ref().map_or(&self.engine.config.shared.plain_metrics, |chain| &chain.metrics);
        self.engine.recorder.borrow_mut().request(&record, rules);
    }
}

impl OnEnd for Exchange {
    fn ended(mut self: Box<Self>, stop: Stop, passed: Passed, trailers: Option<&HeaderMap>) {
        (self.bytes_sent, self.messages_sent) = (passed.bytes, passed.messages);
        self.finished = true;
        if let Some(trailers) = trailers {
            self.grpc_status = grpc_status(trailers).or(self.grpc_status);
            if self.keeps_headers() {
                self.trailers = Some(trailers.clone());
            }
        }
        match stop {
            Stop::Complete => {}
            Stop::UpstreamFailed => {
                self.flags.set(Flags::UPSTREAM_TERMINATION);
                self.details = "upstream_reset_after_response_started{connection_termination}".into();
            }
            Stop::TimedOut => {
                self.flags.set(Flags::UPSTREAM_TIMEOUT);
                self.details = "response_timeout".into();
            }
            Stop::ClientGone => {
                self.flags.set(Flags::DOWNSTREAM_TERMINATION);
                self.details = "downstream_remote_disconnect".into();
            }
        }
        self.release(stop);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.finished {
            self.flags.set(Flags::DOWNSTREAM_TERMINATION);
            self.details = "downstream_remote_disconnect".into();
        }
        for mirror in std::mem::take(&mut self.mirrors) {
            mirror.send(&self.engine, self.upload.as_deref());
        }
        self.client.request_ends();
        self.record();
    }
}

/// `grpc-status` of headers or trailers.
pub(crate) fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}
