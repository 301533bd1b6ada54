//! Prometheus metrics, with Hubble's names and labels where Hubble has the metric.

use strata_abi::FlowEvent;
use strata_runtime::metrics::Registry;
use strata_runtime::prometheus_client::encoding::EncodeLabelSet;
use strata_runtime::prometheus_client::metrics::counter::Counter;
use strata_runtime::prometheus_client::metrics::family::Family;

use crate::{Flow, names};

/// Labels of `hubble_flows_processed_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlowLabels {
    protocol: String,
    r#type: String,
    subtype: String,
    verdict: String,
}

/// Labels of `hubble_drop_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DropLabels {
    reason: String,
    protocol: String,
}

/// Counts flows. Label values come from fixed word lists, never from addresses or names: the number of series is
/// bounded.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    flows: Family<FlowLabels, Counter>,
    drops: Family<DropLabels, Counter>,
    lost: Counter,
}

impl Metrics {
    /// Counters that are served with `registry`.
    pub fn register(registry: &Registry) -> Metrics {
        let metrics = Metrics::default();
        registry.with(|r| {
            // The client appends `_total`.
            r.register(
                "hubble_flows_processed",
                "Decisions about connections and first packets",
                metrics.flows.clone(),
            );
            r.register("hubble_drop", "Connections and packets dropped", metrics.drops.clone());
            r.register("strata_events_lost", "Flow events the kernel could not hand over", metrics.lost.clone());
        });
        metrics
    }

    /// Counts a kernel record.
    pub fn count(&self, event: &FlowEvent) {
        let protocol = names::protocol(event.proto);
        self.add(
            &protocol,
            "L3_L4",
            names::hook(event.hook),
            names::verdict(event.verdict),
            names::drop_reason(event.reason),
        );
    }

    /// Counts a flow of the mesh.
    pub fn count_refusal(&self, flow: &Flow) {
        self.add(&flow.proto, "L7", &flow.hook, &flow.verdict, &flow.drop_reason);
    }

    fn add(&self, protocol: &str, kind: &str, subtype: &str, verdict: &str, reason: &str) {
        let labels = FlowLabels {
            protocol: protocol.to_owned(),
            r#type: kind.to_owned(),
            subtype: subtype.to_owned(),
            verdict: verdict.to_owned(),
        };
        self.flows.get_or_create(&labels).inc();
        if !reason.is_empty() {
            let labels = DropLabels { reason: reason.to_owned(), protocol: protocol.to_owned() };
            self.drops.get_or_create(&labels).inc();
        }
    }

    /// Sets the number of events lost so far (monotonic, from the kernel's own counter).
    pub fn set_lost(&self, total: u64) {
        let known = self.lost.get();
        self.lost.inc_by(total.saturating_sub(known));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_hubbles() {
        let registry = Registry::new();
        let metrics = Metrics::register(&registry);
        metrics.add("TCP", "L3_L4", "connect", "dropped", "policy_denied");
        metrics.add("TCP", "L3_L4", "connect", "forwarded", "");
        metrics.set_lost(3);
        metrics.set_lost(5);
        let text = registry.encode();
        for line in [
            r#"hubble_flows_processed_total{protocol="TCP",type="L3_L4",subtype="connect",verdict="dropped"} 1"#,
            r#"hubble_drop_total{reason="policy_denied",protocol="TCP"} 1"#,
            "strata_events_lost_total 5",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
