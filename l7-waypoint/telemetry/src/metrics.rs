//! Istio's standard metrics as a waypoint reports them.

mod labels;
mod rules;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::registry::Registry;

use crate::Telemetry;
use crate::event::{self, Budget};
use crate::flags::Flags;
use crate::histogram::AtomicHistogram;
use crate::peer::{Peer, ServiceInfo};
use crate::record::Record;
use labels::Labels;
pub use rules::MetricRules;
use rules::Values;

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

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Metric {
    Requests,
    Durations,
    RequestBytes,
    ResponseBytes,
    RequestMessages,
    ResponseMessages,
    Opened,
    Closed,
    Sent,
    Received,
}

impl Metric {
    const ALL: [Self; 10] = [
        Self::Requests,
        Self::Durations,
        Self::RequestBytes,
        Self::ResponseBytes,
        Self::RequestMessages,
        Self::ResponseMessages,
        Self::Opened,
        Self::Closed,
        Self::Sent,
        Self::Received,
    ];

    /// Istio's name in its configuration: that of the metric without `istio_`.
    fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests_total",
            Self::Durations => "request_duration_milliseconds",
            Self::RequestBytes => "request_bytes",
            Self::ResponseBytes => "response_bytes",
            Self::RequestMessages => "request_messages_total",
            Self::ResponseMessages => "response_messages_total",
            Self::Opened => "tcp_connections_opened_total",
            Self::Closed => "tcp_connections_closed_total",
            Self::Sent => "tcp_sent_bytes_total",
            Self::Received => "tcp_received_bytes_total",
        }
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
    request_messages: Family<Labels, Counter>,
    response_messages: Family<Labels, Counter>,
    opened: Family<Labels, Counter>,
    closed: Family<Labels, Counter>,
    sent: Family<Labels, Counter>,
    received: Family<Labels, Counter>,
    values: Values,
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
            request_messages: Family::default(),
            response_messages: Family::default(),
            opened: Family::default(),
            closed: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            values: Values::default(),
            log_lines_dropped: Counter::default(),
            events_sampled_out: Counter::default(),
        };
        registry.register("istio_requests", "Requests", metrics.requests.clone());
        registry.register("istio_request_duration_milliseconds", "Duration of requests", metrics.durations.clone());
        registry.register("istio_request_bytes", "Sizes of request bodies", metrics.request_bytes.clone());
        registry.register("istio_response_bytes", "Sizes of response bodies", metrics.response_bytes.clone());
        for (name, help, family) in [
            ("istio_request_messages", "gRPC messages from clients", &metrics.request_messages),
            ("istio_response_messages", "gRPC messages to clients", &metrics.response_messages),
        ] {
            registry.register(name, help, family.clone());
        }
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
    rules: usize,
    /// Of labels that the rules add.
    values: u64,
}

/// Where one request or connection is counted; what is turned off is `None`.
enum Counters {
    Http {
        count: Option<Counter>,
        duration: Option<Arc<AtomicHistogram>>,
        request_bytes: Option<Arc<AtomicHistogram>>,
        response_bytes: Option<Arc<AtomicHistogram>>,
        /// Of gRPC alone.
        request_messages: Option<Counter>,
        response_messages: Option<Counter>,
    },
    Tcp {
        opened: Option<Counter>,
        closed: Option<Counter>,
        sent: Option<Counter>,
        received: Option<Counter>,
    },
}

struct Handles {
    counters: Counters,
    _alive: (Arc<Peer>, Arc<Peer>, Arc<ServiceInfo>, Arc<MetricRules>),
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

    /// Counts one finished request, as the chain's rules say, and emits its event if somebody wants it.
    pub fn request(&mut self, record: &Record<'_>, rules: &Arc<MetricRules>) {
        if let Counters::Http { count, duration, request_bytes, response_bytes, request_messages, response_messages } =
            self.counters(record, rules)
        {
            let messages = [(request_messages, record.messages_received), (response_messages, record.messages_sent)];
            for (counter, by) in [(count, 1)].into_iter().chain(messages) {
                if let Some(counter) = counter {
                    counter.inc_by(by);
                }
            }
            let micros = u64::try_from(record.duration.as_micros()).unwrap_or(u64::MAX);
            duration.iter().for_each(|duration| duration.observe_thousandths(micros));
            request_bytes.iter().for_each(|bytes| bytes.observe(record.bytes_received));
            response_bytes.iter().for_each(|bytes| bytes.observe(record.bytes_sent));
        }
        self.emit(record);
    }

    /// Counts a TCP connection that was opened; give the guard back through [`Recorder::connection_closed`].
    pub fn connection_opened(&mut self, record: &Record<'_>, rules: &Arc<MetricRules>) -> ConnectionGuard {
        if let Counters::Tcp { opened: Some(opened), .. } = self.counters(record, rules) {
            opened.inc();
        }
        ConnectionGuard(())
    }

    /// Counts a TCP connection that ended, with its bytes.
    pub fn connection_closed(&mut self, _opened: ConnectionGuard, record: &Record<'_>, rules: &Arc<MetricRules>) {
        if let Counters::Tcp { closed, sent, received, .. } = self.counters(record, rules) {
            for (counter, by) in [(closed, 1), (sent, record.bytes_sent), (received, record.bytes_received)] {
                if let Some(counter) = counter {
                    counter.inc_by(by);
                }
            }
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

    fn counters(&mut self, record: &Record<'_>, rules: &Arc<MetricRules>) -> &Counters {
        let values = rules.values(record);
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
            rules: Arc::as_ptr(rules) as usize,
            values: if values.is_empty() { 0 } else { self.hasher.hash_one(&values) },
        };
        if self.cache.len() >= CACHE_LIMIT && !self.cache.contains_key(&key) {
            self.cache.clear();
        }
        let metrics = &self.telemetry.metrics;
        let handles = self.cache.entry(key).or_insert_with(|| Handles::new(metrics, record, rules, &values));
        &handles.counters
    }
}

/// A TCP connection counted as open.
#[must_use]
pub struct ConnectionGuard(());

impl Handles {
    fn new(metrics: &Metrics, record: &Record<'_>, rules: &Arc<MetricRules>, values: &[Arc<str>]) -> Self {
        let standard = Labels::standard(record);
        let values = metrics.values.bounded(values);
        let labels = |metric| rules.labels(metric, &standard, &values);
        let counter = |metric, family: &Family<Labels, Counter>| {
            labels(metric).map(|labels| family.get_or_create(&labels).clone())
        };
        let of_grpc = |metric, family| record.grpc.then(|| counter(metric, family)).flatten();
        let histogram =
            |metric, family: &Histograms| labels(metric).map(|labels| family.get_or_create(&labels).0.clone());
        let counters = match record.method {
            Some(_) => Counters::Http {
                count: counter(Metric::Requests, &metrics.requests),
                duration: histogram(Metric::Durations, &metrics.durations),
                request_bytes: histogram(Metric::RequestBytes, &metrics.request_bytes),
                response_bytes: histogram(Metric::ResponseBytes, &metrics.response_bytes),
                request_messages: of_grpc(Metric::RequestMessages, &metrics.request_messages),
                response_messages: of_grpc(Metric::ResponseMessages, &metrics.response_messages),
            },
            None => Counters::Tcp {
                opened: counter(Metric::Opened, &metrics.opened),
                closed: counter(Metric::Closed, &metrics.closed),
                sent: counter(Metric::Sent, &metrics.sent),
                received: counter(Metric::Received, &metrics.received),
            },
        };
        let _alive = (record.source.clone(), record.destination.clone(), record.service.clone(), rules.clone());
        Self { counters, _alive }
    }
}

#[cfg(test)]
mod tests;
