//! Graceful end: one trigger, many watchers; the drain is over when the last watcher is dropped.
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// Starts the drain.
#[derive(Debug)]
pub struct Trigger {
    /// The deadline, once the drain has started.
    signal: watch::Sender<Option<Instant>>,
    // Closed when every `Watch` is gone; nothing is ever sent.
    alive: mpsc::Receiver<()>,
}

/// Held by whatever must finish before the process may end.
#[derive(Debug, Clone)]
pub struct Watch {
    signal: watch::Receiver<Option<Instant>>,
    _alive: mpsc::Sender<()>,
}

/// A connected pair.
pub fn channel() -> (Trigger, Watch) {
    let (signal_tx, signal_rx) = watch::channel(None);
    let (alive_tx, alive_rx) = mpsc::channel(1);
    (Trigger { signal: signal_tx, alive: alive_rx }, Watch { signal: signal_rx, _alive: alive_tx })
}

impl Trigger {
    /// Signals all watchers and waits until they are gone or the deadline has passed. True: all finished.
    pub async fn drain(mut self, deadline: Duration) -> bool {
        // No receiver left means nothing to wait for; `alive` says so right after.
        let _unwatched = self.signal.send(Some(Instant::now() + deadline));
        tokio::time::timeout(deadline, self.alive.recv()).await.is_ok()
    }
}

impl Watch {
    /// Resolves when the drain starts, at once if it already has; says when it is to be over.
    pub async fn signaled(&mut self) -> Instant {
        // An error means that the trigger was dropped without draining: the process is going away as well.
        let deadline = self.signal.wait_for(Option::is_some).await.ok().and_then(|deadline| *deadline);
        deadline.unwrap_or_else(Instant::now)
    }

    /// Resolves when a drain has used up four fifths of its time: what is still open should end at its next pause, before
    /// it is cut.
    pub async fn last_call(&mut self) {
        let deadline = self.signaled().await;
        let left = deadline.saturating_duration_since(Instant::now());
        tokio::time::sleep(left * 4 / 5).await;
    }

    /// Whether the drain has started.
    pub fn is_draining(&self) -> bool {
        self.signal.borrow().is_some()
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
    async fn the_last_call_comes_before_the_deadline() {
        let (trigger, mut watch) = channel();
        let start = Instant::now();
        let task = tokio::spawn(async move {
            watch.last_call().await;
            start.elapsed()
        });
        assert!(trigger.drain(Duration::from_secs(10)).await);
        let called = task.await.unwrap_or_default();
        assert!(called >= Duration::from_secs(8) && called < Duration::from_secs(9), "{called:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn drain_gives_up_at_the_deadline() {
        let (trigger, watch) = channel();
        assert!(!trigger.drain(Duration::from_secs(1)).await);
        assert!(watch.is_draining());
    }
}
