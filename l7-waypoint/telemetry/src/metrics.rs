//! Istio's standard metrics as a waypoint reports them, labels in Istio's order.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::registry::Registry;

use crate::Telemetry;
use crate::event::{self, Budget};
use crate::flags::Flags;
use crate::histogram::AtomicHistogram;
use crate::peer::{Peer, ServiceInfo};
use crate::record::Record;

/// How the connection from the client was secured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Security {
    /// Both ends proved who they are.
    MutualTls,
    /// The kernel vouched for both ends on one node; never shown as mutual TLS.
    KernelAttested,
    #[default]
    None,
}

impl Security {
    /// Value of the label `connection_security_policy`.
    pub fn label(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::KernelAttested => "kernel_attested",
            Self::None => "none",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    reporter: &'static str,
    source_workload: Arc<str>,
    source_canonical_service: Arc<str>,
    source_canonical_revision: Arc<str>,
    source_workload_namespace: Arc<str>,
    source_principal: Arc<str>,
    source_app: Arc<str>,
    source_version: Arc<str>,
    source_cluster: Arc<str>,
    destination_workload: Arc<str>,
    destination_workload_namespace: Arc<str>,
    destination_principal: Arc<str>,
    destination_app: Arc<str>,
    destination_version: Arc<str>,
    destination_service: Arc<str>,
    destination_canonical_service: Arc<str>,
    destination_canonical_revision: Arc<str>,
    destination_service_name: Arc<str>,
    destination_service_namespace: Arc<str>,
    destination_cluster: Arc<str>,
    request_protocol: &'static str,
    #[prometheus(flatten)]
    http: HttpLabels,
    response_flags: String,
    connection_security_policy: &'static str,
}

/// Labels TCP metrics do not have.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct HttpLabels(Option<(u16, Option<u32>)>);

impl EncodeLabelSet for HttpLabels {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some((status, grpc)) = self.0 else { return Ok(()) };
        ("response_code", status.to_string()).encode(encoder.encode_label())?;
        ("grpc_response_status", grpc.map_or(String::new(), |code| code.to_string())).encode(encoder.encode_label())
    }
}

#[derive(Debug, Clone)]
struct NewHistogram;

impl MetricConstructor<Shared> for NewHistogram {
    fn new_metric(&self) -> Shared {
        Shared::default()
    }
}

/// A family owns its metrics; workers hold the same histogram.
#[derive(Debug, Clone, Default)]
struct Shared(Arc<AtomicHistogram>);

impl prometheus_client::metrics::TypedMetric for Shared {
    const TYPE: prometheus_client::metrics::MetricType = prometheus_client::metrics::MetricType::Histogram;
}

impl prometheus_client::encoding::EncodeMetric for Shared {
    fn encode(&self, encoder: prometheus_client::encoding::MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.0.encode(encoder)
    }

    fn metric_type(&self) -> prometheus_client::metrics::MetricType {
        <Self as prometheus_client::metrics::TypedMetric>::TYPE
    }
}

type Histograms = Family<Labels, Shared, NewHistogram>;

/// All families.
pub(crate) struct Metrics {
    requests: Family<Labels, Counter>,
    durations: Histograms,
    request_bytes: Histograms,
    response_bytes: Histograms,
    opened: Family<Labels, Counter>,
    closed: Family<Labels, Counter>,
    sent: Family<Labels, Counter>,
    received: Family<Labels, Counter>,
    pub(crate) log_lines_dropped: Counter,
    events_sampled_out: Counter,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let histogram = || Histograms::new_with_constructor(NewHistogram);
        let metrics = Self {
            requests: Family::default(),
            durations: histogram(),
            request_bytes: histogram(),
            response_bytes: histogram(),
            opened: Family::default(),
            closed: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            log_lines_dropped: Counter::default(),
            events_sampled_out: Counter::default(),
        };
        registry.register("istio_requests", "Requests", metrics.requests.clone());
        registry.register("istio_request_duration_milliseconds", "Duration of requests", metrics.durations.clone());
        registry.register("istio_request_bytes", "Sizes of request bodies", metrics.request_bytes.clone());
        registry.register("istio_response_bytes", "Sizes of response bodies", metrics.response_bytes.clone());
        registry.register("istio_tcp_connections_opened", "TCP connections opened", metrics.opened.clone());
        registry.register("istio_tcp_connections_closed", "TCP connections closed", metrics.closed.clone());
        registry.register("istio_tcp_sent_bytes", "Bytes sent in responses over TCP", metrics.sent.clone());
        registry.register("istio_tcp_received_bytes", "Bytes received in requests over TCP", metrics.received.clone());
        registry.register(
            "strata_access_log_lines_dropped",
            "Access log lines lost because the writer was behind",
            metrics.log_lines_dropped.clone(),
        );
        registry.register(
            "strata_request_events_sampled_out",
            "Request events not built because nobody followed and the budget was used up",
            metrics.events_sampled_out.clone(),
        );
        metrics
    }
}

/// What the labels of one request follow from. The `Arc`s' addresses stand for their contents: the cache's entry
/// holds them, so no address is used twice while the entry lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    source: usize,
    destination: usize,
    service: usize,
    peer_principal: Option<u64>,
    status: u16,
    grpc: bool,
    grpc_status: Option<u32>,
    flags: Flags,
    security: Security,
    tcp: bool,
}

/// Count, duration, request bytes, response bytes.
type HttpHandles = (Counter, Arc<AtomicHistogram>, Arc<AtomicHistogram>, Arc<AtomicHistogram>);
/// Opened, closed, sent, received.
type TcpHandles = (Counter, Counter, Counter, Counter);

struct Handles {
    _alive: (Arc<Peer>, Arc<Peer>, Arc<ServiceInfo>),
    http: Option<HttpHandles>,
    tcp: Option<TcpHandles>,
}

/// Entries a worker keeps before it starts afresh.
const CACHE_LIMIT: usize = 8192;

/// One worker's way to the metrics, logs and events.
pub struct Recorder {
    telemetry: Arc<Telemetry>,
    cache: HashMap<Key, Handles>,
    hasher: RandomState,
    budget: Budget,
}

impl Recorder {
    /// A recorder for one worker.
    pub fn new(telemetry: Arc<Telemetry>) -> Self {
        Self { telemetry, cache: HashMap::new(), hasher: RandomState::new(), budget: Budget::default() }
    }

    /// Counts one finished request and emits its event if somebody wants it.
    pub fn request(&mut self, record: &Record<'_>) {
        if let Some((count, duration, request_bytes, response_bytes)) = &self.handles(record).http {
            count.inc();
            duration.observe_thousandths(u64::try_from(record.duration.as_micros()).unwrap_or(u64::MAX));
            request_bytes.observe(record.bytes_received);
            response_bytes.observe(record.bytes_sent);
        }
        self.emit(record);
    }

    /// Counts a TCP connection that was opened; give the guard back through [`Recorder::connection_closed`].
    pub fn connection_opened(&mut self, record: &Record<'_>) -> ConnectionGuard {
        if let Some((opened, ..)) = &self.handles(record).tcp {
            opened.inc();
        }
        ConnectionGuard(())
    }

    /// Counts a TCP connection that ended, with its bytes.
    pub fn connection_closed(&mut self, _opened: ConnectionGuard, record: &Record<'_>) {
        if let Some((_, closed, sent, received)) = &self.handles(record).tcp {
            closed.inc();
            sent.inc_by(record.bytes_sent);
            received.inc_by(record.bytes_received);
        }
        self.emit(record);
    }

    /// Whether an event of this request would be published; ask before building its reasons.
    pub fn wants_event(&mut self, failed: bool) -> bool {
        let wanted = self.budget.wants(self.telemetry.events.receiver_count(), failed);
        if !wanted {
            self.telemetry.metrics.events_sampled_out.inc();
        }
        wanted
    }

    fn emit(&mut self, record: &Record<'_>) {
        let failed = record.status >= 400 || !record.flags.is_empty();
        if self.wants_event(failed) {
            // An error means that nobody is there.
            let _ = self.telemetry.events.send(event::render(record));
        }
    }

    fn handles(&mut self, record: &Record<'_>) -> &Handles {
        let key = Key {
            source: Arc::as_ptr(record.source) as usize,
            destination: Arc::as_ptr(record.destination) as usize,
            service: Arc::as_ptr(record.service) as usize,
            // Many principals may share the unknown workload.
            peer_principal: record.peer_principal.map(|principal| self.hasher.hash_one(principal)),
            status: record.status,
            grpc: record.grpc,
            grpc_status: record.grpc_status,
            flags: record.flags,
            security: record.security,
            tcp: record.method.is_none(),
        };
        if self.cache.len() >= CACHE_LIMIT && !self.cache.contains_key(&key) {
            self.cache.clear();
        }
        let metrics = &self.telemetry.metrics;
        self.cache.entry(key).or_insert_with(|| Handles::new(metrics, record))
    }
}

/// A TCP connection counted as open.
#[must_use]
pub struct ConnectionGuard(());

impl Handles {
    fn new(metrics: &Metrics, record: &Record<'_>) -> Self {
        let labels = Labels::new(record);
        let _alive = (record.source.clone(), record.destination.clone(), record.service.clone());
        if record.method.is_none() {
            let counter = |family: &Family<Labels, Counter>| family.get_or_create(&labels).clone();
            let tcp = (
                counter(&metrics.opened),
                counter(&metrics.closed),
                counter(&metrics.sent),
                counter(&metrics.received),
            );
            return Self { _alive, http: None, tcp: Some(tcp) };
        }
        let histogram = |family: &Histograms| family.get_or_create(&labels).0.clone();
        let http = (
            metrics.requests.get_or_create(&labels).clone(),
            histogram(&metrics.durations),
            histogram(&metrics.request_bytes),
            histogram(&metrics.response_bytes),
        );
        Self { _alive, http: Some(http), tcp: None }
    }
}

impl Labels {
    fn new(record: &Record<'_>) -> Self {
        let (source, destination, service) = (record.source, record.destination, record.service);
        let tcp = record.method.is_none();
        let protocol = match (tcp, record.grpc) {
            (true, _) => "tcp",
            (false, true) => "grpc",
            (false, false) => "http",
        };
        let http = HttpLabels((!tcp).then_some((record.status, record.grpc_status.filter(|_| record.grpc))));
        Self {
            reporter: "waypoint",
            source_workload: source.workload.clone(),
            source_canonical_service: source.canonical_service.clone(),
            source_canonical_revision: source.canonical_revision.clone(),
            source_workload_namespace: source.namespace.clone(),
            source_principal: record.peer_principal.map_or_else(|| source.principal.clone(), Arc::from),
            source_app: source.app.clone(),
            source_version: source.version.clone(),
            source_cluster: source.cluster.clone(),
            destination_workload: destination.workload.clone(),
            destination_workload_namespace: destination.namespace.clone(),
            destination_principal: destination.principal.clone(),
            destination_app: destination.app.clone(),
            destination_version: destination.version.clone(),
            destination_service: service.host.clone(),
            destination_canonical_service: destination.canonical_service.clone(),
            destination_canonical_revision: destination.canonical_revision.clone(),
            destination_service_name: service.name.clone(),
            destination_service_namespace: service.namespace.clone(),
            destination_cluster: destination.cluster.clone(),
            request_protocol: protocol,
            http,
            response_flags: record.flags.to_string(),
            connection_security_policy: record.security.label(),
        }
    }
}

#[cfg(test)]
mod tests;
