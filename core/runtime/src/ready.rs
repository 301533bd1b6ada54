//! Readiness: a process is ready when every task it named at start has dropped its guard.
use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;

/// The set of tasks a process still waits for.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    pending: Arc<Mutex<BTreeSet<String>>>,
}

/// Blocks readiness until dropped.
#[derive(Debug)]
pub struct ReadyGuard {
    name: String,
    pending: Arc<Mutex<BTreeSet<String>>>,
}

impl Readiness {
    /// Nothing to wait for yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names something that must happen before the process is ready.
    pub fn task(&self, name: impl Into<String>) -> ReadyGuard {
        let name = name.into();
        self.pending.lock().insert(name.clone());
        ReadyGuard { name, pending: self.pending.clone() }
    }

    /// What is still missing, in alphabetical order; empty when ready.
    pub fn pending(&self) -> Vec<String> {
        self.pending.lock().iter().cloned().collect()
    }
}

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        let mut pending = self.pending.lock();
        pending.remove(&self.name);
        let left = pending.len();
        drop(pending);
        tracing::info!(task = %self.name, left, "ready");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_the_last_guard_drops() {
        let readiness = Readiness::new();
        let (xds, certificates) = (readiness.task("xds"), readiness.task("certificates"));
        assert_eq!(readiness.pending(), ["certificates", "xds"]);
        drop(xds);
        drop(certificates);
        assert!(readiness.pending().is_empty());
    }
}
