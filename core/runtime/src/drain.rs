//! Graceful end: one trigger, many watchers; the drain is over when the last watcher is dropped.
use std::time::Duration;

use tokio::sync::{mpsc, watch};

/// Starts the drain.
#[derive(Debug)]
pub struct Trigger {
    signal: watch::Sender<bool>,
    // Closed when every `Watch` is gone; nothing is ever sent.
    alive: mpsc::Receiver<()>,
}

/// Held by whatever must finish before the process may end.
#[derive(Debug, Clone)]
pub struct Watch {
    signal: watch::Receiver<bool>,
    _alive: mpsc::Sender<()>,
}

/// A connected pair.
pub fn channel() -> (Trigger, Watch) {
    let (signal_tx, signal_rx) = watch::channel(false);
    let (alive_tx, alive_rx) = mpsc::channel(1);
    (Trigger { signal: signal_tx, alive: alive_rx }, Watch { signal: signal_rx, _alive: alive_tx })
}

impl Trigger {
    /// Signals all watchers and waits until they are gone or the deadline has passed. True: all finished.
    pub async fn drain(mut self, deadline: Duration) -> bool {
        // No receiver left means nothing to wait for; `alive` says so right after.
        let _unwatched = self.signal.send(true);
        tokio::time::timeout(deadline, self.alive.recv()).await.is_ok()
    }
}

impl Watch {
    /// Resolves when the drain starts, at once if it already has.
    pub async fn signaled(&mut self) {
        // An error means that the trigger was dropped without draining: the process is going away as well.
        let _gone = self.signal.wait_for(|draining| *draining).await;
    }

    /// Whether the drain has started.
    pub fn is_draining(&self) -> bool {
        *self.signal.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn drain_waits_for_the_last_watcher() {
        let (trigger, mut watch) = channel();
        let task = tokio::spawn(async move {
            watch.signaled().await;
            tokio::time::sleep(Duration::from_secs(3)).await;
        });
        assert!(trigger.drain(Duration::from_secs(10)).await);
        assert!(task.is_finished() || task.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn drain_gives_up_at_the_deadline() {
        let (trigger, watch) = channel();
        assert!(!trigger.drain(Duration::from_secs(1)).await);
        assert!(watch.is_draining());
    }
}
