//! Reads the kernel's events and publishes them with names.
use std::sync::Arc;
use std::time::{Duration, Instant};

use l4_flow::{BootClock, Metrics, Publisher, Refusal};
use l4_loader::{Events, Maps};
use strata_abi::{FlowEvent, stat};
use strata_runtime::task;

use crate::names::SharedNames;

/// Most records taken in one go.
const BATCH: usize = 256;
/// How old the reading of the wall clock may become.
const CLOCK_AGE: Duration = Duration::from_secs(10);

/// Turns decisions into counters and lines.
#[derive(Debug, Clone)]
pub(crate) struct Reporter {
    pub(crate) node: Arc<str>,
    pub(crate) names: SharedNames,
    pub(crate) metrics: Metrics,
    pub(crate) publisher: Publisher,
}

impl Reporter {
    /// Reads events for ever, on a task of its own.
    pub(crate) fn follow(&self, mut events: Events) {
        let reporter = self.clone();
        task::spawn("flow-events", async move {
            let mut batch: Vec<FlowEvent> = Vec::with_capacity(BATCH);
            let mut clock = (BootClock::now(), Instant::now());
            loop {
                batch.clear();
                if let Err(error) = events.read(&mut batch, BATCH).await {
                    tracing::error!(%error, "flow events");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    continue;
                }
                if clock.1.elapsed() > CLOCK_AGE {
                    clock = (BootClock::now(), Instant::now());
                }
                reporter.report(&batch, &clock.0);
            }
        });
    }

    fn report(&self, batch: &[FlowEvent], clock: &BootClock) {
        let names = self.names.load();
        for event in batch {
            self.metrics.count(event);
            let flow = l4_flow::resolve(event, &self.node, clock, &**names);
            if flow.verdict == "dropped" {
                tracing::info!(src = %flow.src.ip, dst = %flow.dst.ip, port = flow.dst.port, reason = %flow.drop_reason,
                    policy = flow.policy.as_ref().map_or("", |policy| &policy.text), "denied");
            }
            self.publisher.publish(&flow);
        }
    }

    /// A connection the proxy refused.
    pub(crate) fn refused(&self, refusal: &Refusal<'_>) {
        let flow = l4_flow::resolve_refusal(refusal, &self.node, &**self.names.load());
        self.metrics.count_refusal(&flow);
        self.publisher.publish(&flow);
    }

    /// Takes over the kernel's count of events it could not hand over.
    pub(crate) fn set_lost(&self, maps: &Maps) {
        match maps.stats.get(stat::EVENTS_LOST) {
            Ok(lost) => self.metrics.set_lost(lost),
            Err(error) => tracing::warn!(%error, "statistics"),
        }
    }
}
