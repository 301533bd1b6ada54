//! Readiness: a process is ready when every task it named at start has dropped its guard.
use std::collections::BTreeSet;

use tokio::sync::watch;

/// The set of tasks a process still waits for.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    pending: watch::Sender<BTreeSet<String>>,
}

/// Blocks readiness until dropped.
#[derive(Debug)]
pub struct ReadyGuard {
    name: String,
    pending: watch::Sender<BTreeSet<String>>,
}

impl Readiness {
    /// Nothing to wait for yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names something that must happen before the process is ready.
    pub fn task(&self, name: impl Into<String>) -> ReadyGuard {
        let name = name.into();
        self.pending.send_modify(|pending| {
            pending.insert(name.clone());
        });
        ReadyGuard { name, pending: self.pending.clone() }
    }

    /// What is still missing, in alphabetical order; empty when ready.
    pub fn pending(&self) -> Vec<String> {
        self.pending.borrow().iter().cloned().collect()
    }

    /// Waits until the task `name` is done; at once if there is none of that name.
    pub async fn done(&self, name: &str) {
        let mut pending = self.pending.subscribe();
        // It cannot fail: `self` holds a sender.
        let _ = pending.wait_for(|pending| !pending.contains(name)).await;
    }
}

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        let mut left = 0;
        self.pending.send_modify(|pending| {
            pending.remove(&self.name);
            left = pending.len();
        });
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

    #[tokio::test]
    async fn one_task_can_be_waited_for() {
        let readiness = Readiness::new();
        let (xds, _certificates) = (readiness.task("xds"), readiness.task("certificates"));
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.done("xds").await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(xds);
        waiting.await.unwrap();
        assert_eq!(readiness.pending(), ["certificates"]);
    }
}
