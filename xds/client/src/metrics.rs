//! ztunnel's metric names for the xDS client (xds-contract 7.1).
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use strata_runtime::metrics::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Url {
    url: String,
}

/// Counters of one client.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    terminations: Family<Reason, Counter>,
    messages: Family<Url, Counter>,
    bytes: Family<Url, Counter>,
    rejected: Family<Url, Counter>,
}

impl Metrics {
    /// Registers the counters; clients of one process share one set.
    pub fn register(registry: &Registry) -> Self {
        let metrics = Self::default();
        registry.with(|registry| {
            let sub = registry.sub_registry_with_prefix("istio");
            sub.register("xds_connection_terminations", "Ended xDS streams by reason", metrics.terminations.clone());
            sub.register("xds_message", "xDS responses received", metrics.messages.clone());
            sub.register("xds_message_bytes", "Bytes of xDS resources received", metrics.bytes.clone());
            sub.register("xds_rejected_resources", "Resources refused by name (NACK)", metrics.rejected.clone());
        });
        metrics
    }

    pub(crate) fn terminated(&self, reason: &'static str) {
        self.terminations.get_or_create(&Reason { reason }).inc();
    }

    pub(crate) fn received(&self, url: &str, bytes: usize, rejected: usize) {
        let label = Url { url: url.to_owned() };
        self.messages.get_or_create(&label).inc();
        self.bytes.get_or_create(&label).inc_by(bytes as u64);
        self.rejected.get_or_create(&label).inc_by(rejected as u64);
    }
}
