//! The agent's own metrics; flows have theirs in `l4-flow`.
use std::time::Duration;

use strata_runtime::metrics::Registry;
use strata_runtime::prometheus_client::metrics::counter::Counter;
use strata_runtime::prometheus_client::metrics::gauge::Gauge;
use strata_runtime::prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use crate::agent::Pod;

/// Pods and reconciliations.
#[derive(Debug, Clone)]
pub(crate) struct AgentMetrics {
    pods: Gauge,
    enrolled: Gauge,
    duration: Histogram,
    failures: Counter,
}

impl AgentMetrics {
    pub(crate) fn register(registry: &Registry) -> AgentMetrics {
        let metrics = AgentMetrics {
            pods: Gauge::default(),
            enrolled: Gauge::default(),
            // 0.5 ms to about 2 s.
            duration: Histogram::new(exponential_buckets(0.0005, 2.0, 13)),
            failures: Counter::default(),
        };
        registry.with(|r| {
            r.register("strata_agent_pods", "Pods wired on this node", metrics.pods.clone());
            r.register("strata_agent_enrolled_pods", "Pods whose traffic is captured", metrics.enrolled.clone());
            let help = "Time from objects to maps";
            r.register("strata_agent_reconcile_duration_seconds", help, metrics.duration.clone());
            let help = "Times the objects could not be put in force";
            r.register("strata_agent_reconcile_failures", help, metrics.failures.clone());
        });
        metrics
    }

    pub(crate) fn set_pods<'a>(&self, pods: impl Iterator<Item = &'a Pod>) {
        let (mut all, mut enrolled) = (0, 0);
        for pod in pods {
            all += 1;
            enrolled += i64::from(pod.phase.is_enrolled());
        }
        self.pods.set(all);
        self.enrolled.set(enrolled);
    }

    pub(crate) fn reconciled(&self, took: Duration, ok: bool) {
        self.duration.observe(took.as_secs_f64());
        if !ok {
            self.failures.inc();
        }
    }
}
