//! What became of spans.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// The end of a span's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanOutcome {
    Sent,
    /// The collector could not be reached, or refused it.
    Failed,
    /// Too many waited.
    Dropped,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    outcome: &'static str,
}

#[derive(Default)]
pub(crate) struct Spans(Family<Labels, Counter>);

impl Spans {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let spans = Self::default();
        registry.register("strata_spans", "Spans of sampled requests, by what became of them", spans.0.clone());
        spans
    }

    pub(crate) fn count(&self, outcome: SpanOutcome, count: u64) {
        let outcome = match outcome {
            SpanOutcome::Sent => "sent",
            SpanOutcome::Failed => "failed",
            SpanOutcome::Dropped => "dropped",
        };
        if count > 0 {
            self.0.get_or_create(&Labels { outcome }).inc_by(count);
        }
    }
}
