//! Metrics under the names istiod's dashboards use.
use std::time::Duration;

use strata_runtime::metrics::Registry;
use strata_runtime::prometheus_client::collector::Collector;
use strata_runtime::prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use strata_runtime::prometheus_client::metrics::counter::{ConstCounter, Counter};
use strata_runtime::prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use strata_runtime::prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use xds_server::Clients;

/// What the control plane counts itself.
#[derive(Clone)]
pub(crate) struct Metrics {
    translations: Counter,
    faults: Gauge,
    convergence: Histogram,
}

impl Metrics {
    /// Registers everything; the clients' numbers are read when asked for.
    pub(crate) fn new(registry: &Registry, clients: Vec<Clients>) -> Self {
        let metrics = Self {
            translations: Counter::default(),
            faults: Gauge::default(),
            convergence: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
        };
        registry.with(|r| {
            r.register("pilot_k8s_cfg_events", "changes of the objects translated", metrics.translations.clone());
            r.register(
                "strata_control_faults",
                "mistakes in the objects, as /status lists them",
                metrics.faults.clone(),
            );
            r.register(
                "pilot_proxy_convergence_time_seconds",
                "from the change of an object to the start of its push",
                metrics.convergence.clone(),
            );
            r.register_collector(Box::new(Streams(clients)));
        });
        metrics
    }

    pub(crate) fn translated(&self, took: Duration, faults: usize) {
        self.translations.inc();
        self.faults.set(i64::try_from(faults).unwrap_or(i64::MAX));
        self.convergence.observe(took.as_secs_f64());
    }
}

/// Numbers of the open streams.
#[derive(Debug)]
struct Streams(Vec<Clients>);

impl Collector for Streams {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let open: Vec<_> = self.0.iter().flat_map(Clients::snapshot).collect();
        let sum = |pick: fn(&xds_server::TypeStatus) -> u64| -> u64 {
            open.iter().flat_map(|client| client.types.values()).map(pick).sum()
        };
        let connected = ConstGauge::new(i64::try_from(open.len()).unwrap_or(i64::MAX));
        let kind = connected.metric_type();
        connected.encode(encoder.encode_descriptor("pilot_xds", "open xDS streams", None, kind)?)?;
        for (name, help, value) in [
            ("pilot_xds_pushes", "responses sent on the open streams", sum(|status| status.sent)),
            (
                "pilot_total_xds_rejects",
                "responses the clients of the open streams refused",
                sum(|status| status.nacked),
            ),
        ] {
            let counter = ConstCounter::new(value);
            let kind = counter.metric_type();
            counter.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        Ok(())
    }
}
