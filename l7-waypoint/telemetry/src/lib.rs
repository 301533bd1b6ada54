//! What one request or connection leaves behind: Istio's metrics, access log lines, and request events for
//! `strata observe`. One [`Telemetry`] a process; every data-plane worker has a [`Recorder`] of its own, which finds
//! the metric handles of a (source, destination, outcome) without building label sets again.
//! It decides nothing and must never slow a request down: full queues drop and count.

mod access_log;
mod event;
mod expression;
mod ext_authz;
mod flags;
mod format;
mod histogram;
mod metrics;
mod peer;
mod record;
mod spans;
pub mod trace;

use std::sync::Arc;

use strata_runtime::metrics::Registry;
use tokio::sync::broadcast;

pub use access_log::AccessLogger;
pub use event::{EventPeer, RequestEvent};
pub use ext_authz::ExtAuthzOutcome;
pub use flags::Flags;
pub use format::{Format, FormatError};
pub use histogram::AtomicHistogram;
pub use metrics::{ConnectionGuard, MetricRules, Recorder, Security};
pub use peer::{Peer, Peers, ServiceInfo};
pub use record::{Record, Upstream};
pub use spans::SpanOutcome;

/// Events a slow reader may be behind before it loses some.
const EVENT_QUEUE: usize = 4096;

/// The process's metrics, access log writers and event stream.
pub struct Telemetry {
    pub(crate) metrics: metrics::Metrics,
    pub(crate) events: broadcast::Sender<Arc<str>>,
    pub(crate) writers: access_log::Writers,
    ext_authz: ext_authz::ExtAuthz,
    spans: spans::Spans,
}

impl Telemetry {
    /// Registers all metrics.
    pub fn new(registry: &Registry) -> Arc<Self> {
        let metrics = registry.with(metrics::Metrics::register);
        let (events, _) = broadcast::channel(EVENT_QUEUE);
        let writers = access_log::Writers::new(metrics.log_lines_dropped.clone());
        let ext_authz = registry.with(ext_authz::ExtAuthz::register);
        let spans = registry.with(spans::Spans::register);
        Arc::new(Self { metrics, events, writers, ext_authz, spans })
    }

    /// Where request events appear, one JSON object each; for the admin server's `/requests`.
    pub fn events(&self) -> broadcast::Sender<Arc<str>> {
        self.events.clone()
    }

    /// Counts what external authorization said of a request to `cluster`.
    pub fn ext_authz(&self, cluster: &Arc<str>, outcome: ExtAuthzOutcome) {
        self.ext_authz.count(cluster, outcome);
    }

    /// Counts spans on their way to a collector.
    pub fn spans(&self, outcome: SpanOutcome, count: u64) {
        self.spans.count(outcome, count);
    }

    /// Compiles a configured access log.
    pub fn access_logger(
        self: &Arc<Self>,
        config: &xds_model::envoy::telemetry::AccessLog,
    ) -> Result<AccessLogger, FormatError> {
        AccessLogger::compile(config, &self.writers)
    }
}
