//! What a node proxy tells of connections: Istio's TCP metrics, ztunnel's access log, events for `strata observe`.
mod labels;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::info::Info;
use serde_json::json;
use strata_runtime::metrics::Registry;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::broadcast;
use xds_model::spiffe::SpiffeId;
use xds_model::wds::{Service, Workload};

use crate::copy::Carried;
use labels::TcpLabels;

/// Events a slow reader may lag behind before it misses some.
const EVENT_BACKLOG: usize = 4096;

/// Which end of the connection reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Reporter {
    Source,
    Destination,
}

/// What protects and proves the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Security {
    MutualTls,
    /// Both ends are on this node and the kernel vouches for them; no TLS.
    KernelAttested,
    Unknown,
}

impl Security {
    fn as_str(self) -> &'static str {
        match self {
            Security::MutualTls => "mutual_tls",
            Security::KernelAttested => "kernel_attested",
            Security::Unknown => "unknown",
        }
    }
}

/// All that is known of one connection when it is opened or refused.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub reporter: Reporter,
    pub source: Option<Arc<Workload>>,
    pub source_identity: Option<SpiffeId>,
    pub destination: Option<Arc<Workload>>,
    pub destination_identity: Option<SpiffeId>,
    pub service: Option<Arc<Service>>,
    pub security: Security,
    pub src: SocketAddr,
    /// What the client asked for (outbound), or the application's address (inbound).
    pub dst: SocketAddr,
    /// The other end of the tunnel.
    pub hbone: Option<SocketAddr>,
}

/// Why a connection did not come about or did not end well.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// ztunnel's `response_flags` value.
    pub flag: &'static str,
    pub error: String,
    /// The policy that decided, if one did.
    pub policy: Option<Arc<str>>,
}

impl Failure {
    pub(crate) fn new(flag: &'static str, error: impl std::fmt::Display) -> Failure {
        Failure { flag, error: error.to_string(), policy: None }
    }

    pub(crate) fn connect(error: impl std::fmt::Display) -> Failure {
        Failure::new("CONNECT", error)
    }

    pub(crate) fn denied(policy: Option<Arc<str>>, reason: &str) -> Failure {
        Failure { flag: "DENY", error: reason.to_owned(), policy }
    }
}

/// The node proxy's metrics and event stream.
#[derive(Clone)]
pub(crate) struct Telemetry {
    opened: Family<TcpLabels, Counter>,
    closed: Family<TcpLabels, Counter>,
    failed: Family<TcpLabels, Counter>,
    received: Family<TcpLabels, Counter>,
    sent: Family<TcpLabels, Counter>,
    events: broadcast::Sender<Arc<str>>,
}

impl Telemetry {
    pub(crate) fn new(registry: &Registry) -> Telemetry {
        let telemetry = Telemetry {
            opened: Family::default(),
            closed: Family::default(),
            failed: Family::default(),
            received: Family::default(),
            sent: Family::default(),
            events: broadcast::channel(EVENT_BACKLOG).0,
        };
        registry.with(|registry| {
            let mut add = |name: &str, help: &str, family: &Family<TcpLabels, Counter>| {
                registry.register(name, help, family.clone());
            };
            add("istio_tcp_connections_opened", "Connections opened", &telemetry.opened);
            add("istio_tcp_connections_closed", "Connections closed", &telemetry.closed);
            add("istio_tcp_connections_failed", "Connections that could not be opened", &telemetry.failed);
            add("istio_tcp_received_bytes", "Bytes from client to server", &telemetry.received);
            add("istio_tcp_sent_bytes", "Bytes from server to client", &telemetry.sent);
            let build = Info::new(vec![("component", "ztunnel"), ("tag", env!("CARGO_PKG_VERSION"))]);
            registry.register("istio_build", "Version of this proxy", build);
        });
        telemetry
    }

    /// Where events are sent: JSON objects, one a line.
    pub(crate) fn events(&self) -> broadcast::Sender<Arc<str>> {
        self.events.clone()
    }

    /// A connection has been opened: count it, and count on it.
    pub(crate) fn opened(&self, report: Report, started: Instant) -> Open {
        let labels = TcpLabels::new(&report, "-");
        self.opened.get_or_create(&labels).inc();
        let carried = Carried::new(self.received.get_or_create_owned(&labels), self.sent.get_or_create_owned(&labels));
        tracing::debug!(target: "access", reporter = ?report.reporter, "src.addr" = %report.src, "dst.addr" = %report.dst, "connection opened");
        Open { telemetry: self.clone(), report, labels, carried, started, done: false }
    }

    /// A connection was refused or could not be made.
    pub(crate) fn failed(&self, report: &Report, failure: &Failure, started: Instant) {
        self.failed.get_or_create(&TcpLabels::new(report, failure.flag)).inc();
        self.log(report, "connection failed", Some(failure), (0, 0), started);
    }

    fn log(&self, report: &Report, message: &str, failure: Option<&Failure>, bytes: (u64, u64), started: Instant) {
        let duration = started.elapsed();
        let (request, response) = bytes;
        let outbound = report.reporter == Reporter::Source;
        // As ztunnel: what the local workload sent and received.
        let (sent, received) = if outbound { (request, response) } else { (response, request) };
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    target: "access",
                    direction = if outbound { "outbound" } else { "inbound" },
                    "src.addr" = %report.src,
                    "src.workload" = report.source.as_ref().map(|w| &*w.name),
                    "src.namespace" = report.source.as_ref().map(|w| &*w.namespace),
                    "src.identity" = report.source_identity.as_ref().map(SpiffeId::as_str),
                    "dst.addr" = %report.dst,
                    "dst.hbone_addr" = report.hbone.map(tracing::field::display),
                    "dst.service" = report.service.as_ref().map(|s| &*s.hostname),
                    "dst.workload" = report.destination.as_ref().map(|w| &*w.name),
                    "dst.namespace" = report.destination.as_ref().map(|w| &*w.namespace),
                    "dst.identity" = report.destination_identity.as_ref().map(SpiffeId::as_str),
                    bytes_sent = sent,
                    bytes_recv = received,
                    duration = format_args!("{}ms", duration.as_millis()),
                    policy = failure.and_then(|f| f.policy.as_deref()),
                    error = failure.map(|f| f.error.as_str()),
                    "{message}"
                )
            };
        }
        match failure {
            Some(_) => line!(error),
            None => line!(info),
        }
        self.emit(report, failure, bytes, duration);
    }

    fn emit(&self, report: &Report, failure: Option<&Failure>, bytes: (u64, u64), duration: std::time::Duration) {
        if self.events.receiver_count() == 0 {
            return;
        }
        let end = |workload: &Option<Arc<Workload>>, identity: &Option<SpiffeId>, addr: SocketAddr| {
            json!({
                "address": addr.to_string(),
                "workload": workload.as_ref().map(|w| &*w.name),
                "namespace": workload.as_ref().map(|w| &*w.namespace),
                "identity": identity,
            })
        };
        let verdict = match failure {
            None => "forwarded",
            Some(failure) if failure.flag == "DENY" => "dropped",
            Some(_) => "error",
        };
        let event = json!({
            "time": OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default(),
            "layer": "mesh",
            "direction": if report.reporter == Reporter::Source { "outbound" } else { "inbound" },
            "verdict": verdict,
            "source": end(&report.source, &report.source_identity, report.src),
            "destination": end(&report.destination, &report.destination_identity, report.dst),
            "service": report.service.as_ref().map(|s| &*s.hostname),
            "hbone_address": report.hbone.map(|addr| addr.to_string()),
            "protocol": "tcp",
            "security": report.security.as_str(),
            "flag": failure.map(|f| f.flag),
            "policy": failure.and_then(|f| f.policy.as_deref()),
            "reason": failure.map(|f| &f.error),
            "bytes_received": bytes.0,
            "bytes_sent": bytes.1,
            "duration_ms": duration.as_millis() as u64,
        });
        // Fails only if the last reader has just gone.
        let _ = self.events.send(event.to_string().into());
    }
}

/// An open connection's account. Closing it writes the access log; dropping it counts as closed without error.
pub(crate) struct Open {
    telemetry: Telemetry,
    report: Report,
    labels: TcpLabels,
    carried: Carried,
    started: Instant,
    done: bool,
}

impl Open {
    pub(crate) fn carried(&self) -> &Carried {
        &self.carried
    }

    /// The connection has ended, well or with a failure.
    pub(crate) fn close(mut self, outcome: Result<(), Failure>) {
        self.finish(outcome.err());
    }

    fn finish(&mut self, failure: Option<Failure>) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        if let Some(failure) = &failure {
            self.labels.set_flag(failure.flag);
        }
        self.telemetry.closed.get_or_create(&self.labels).inc();
        let bytes = (self.carried.request.get(), self.carried.response.get());
        self.telemetry.log(&self.report, "connection complete", failure.as_ref(), bytes, self.started);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.finish(None);
    }
}
