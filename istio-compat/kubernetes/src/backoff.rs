//! Pauses between attempts.
use std::time::Duration;

use rand::Rng as _;
use tokio::time::Instant;

/// Doubles from the first pause to the longest; each pause is spread over half its length, so that a thousand nodes do
/// not come back at once. It never gives up.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, longest: Duration) -> Backoff {
        Backoff { first, longest, next: first }
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }

    /// The next pause: between half and the whole of the step.
    pub(crate) fn pause(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(self.longest);
        step.mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

/// Resolves at `time`; without one never.
pub(crate) async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// What the API server said, or what kept it from saying anything.
pub(crate) fn told(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.replace('\n', " "),
        error => chain(error),
    }
}

/// An error with everything below it, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(below) = source {
        let more = below.to_string();
        // Many errors repeat what they hold.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = below.source();
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_longest_and_start_over() {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(4));
        let pauses: Vec<Duration> = (0..20).map(|_| backoff.pause()).collect();
        assert!(pauses[0] >= Duration::from_millis(250) && pauses[0] <= Duration::from_millis(500));
        assert!(pauses[4..].iter().all(|p| *p >= Duration::from_secs(2) && *p <= Duration::from_secs(4)), "{pauses:?}");
        assert!(pauses[4..].windows(2).any(|two| two[0] != two[1]), "no jitter: {pauses:?}");
        backoff.reset();
        assert!(backoff.pause() <= Duration::from_millis(500));
    }
}
