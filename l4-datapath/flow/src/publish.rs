//! The live stream.
use std::sync::Arc;

use tokio::sync::broadcast;

use crate::Flow;

/// Sends flows as JSON lines to whoever listens; a slow listener loses its oldest, nobody waits.
#[derive(Clone, Debug)]
pub struct Publisher {
    lines: broadcast::Sender<Arc<str>>,
}

impl Publisher {
    /// Keeps the last `capacity` lines for slow listeners.
    pub fn new(capacity: usize) -> Publisher {
        Publisher { lines: broadcast::channel(capacity).0 }
    }

    /// For `strata_runtime::admin::Admin::stream`.
    pub fn sender(&self) -> broadcast::Sender<Arc<str>> {
        self.lines.clone()
    }

    /// Publishes one flow.
    pub fn publish(&self, flow: &Flow) {
        // Serialising these types cannot fail: no maps with other keys than strings, no foreign serialisers.
        if let Ok(line) = serde_json::to_string(flow) {
            // No listener is no error.
            let _listeners = self.lines.send(line.into());
        }
    }
}
