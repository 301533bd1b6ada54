//! One metrics registry a process, in Prometheus' text format.
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::encoding::text;

/// Shared handle of the process's registry.
#[derive(Debug, Clone, Default)]
pub struct Registry(Arc<Mutex<prometheus_client::registry::Registry>>);

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers metrics; called at start, never on a hot path.
    pub fn with<R>(&self, register: impl FnOnce(&mut prometheus_client::registry::Registry) -> R) -> R {
        register(&mut self.0.lock())
    }

    /// The exposition served on `/metrics` (OpenMetrics text, which Prometheus reads).
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail; a collector of ours that does loses its own lines only.
        if let Err(error) = text::encode(&mut text, &self.0.lock()) {
            tracing::error!(%error, "metrics could not be encoded");
        }
        text
    }
}
