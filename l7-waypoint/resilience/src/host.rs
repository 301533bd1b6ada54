//! What is known of one upstream host, shared by all workers and kept over configuration changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Health as the control plane states it (`LbEndpoint.health_status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Health {
    /// Takes requests. `UNKNOWN` counts as healthy, as in Envoy.
    #[default]
    Healthy,
    /// Takes requests only in panic mode.
    Unhealthy,
    /// Takes no new requests.
    Draining,
}

/// Counters of one host. All atomics are relaxed: each is read for a heuristic of its own, none guards other memory.
#[derive(Debug, Default)]
pub struct HostState {
    active: AtomicU32,
    pub(crate) consecutive_5xx: AtomicU32,
    pub(crate) consecutive_gateway: AtomicU32,
    pub(crate) consecutive_local: AtomicU32,
    pub(crate) ejected_until: AtomicU64,
    pub(crate) ejections: AtomicU32,
    pub(crate) returned_at: AtomicU64,
    since: u64,
}

impl HostState {
    /// A host first seen at `now` milliseconds.
    pub fn new(now: u64) -> Self {
        Self { since: now, ..Self::default() }
    }

    /// Requests in flight, over all workers.
    pub fn active(&self) -> u32 {
        self.active.load(Relaxed)
    }

    /// Milliseconds at which the host was first seen.
    pub fn since(&self) -> u64 {
        self.since
    }

    /// Whether outlier detection keeps the host out at `now`.
    pub fn ejected(&self, now: u64) -> bool {
        self.ejected_until.load(Relaxed) > now
    }

    /// Counts one request until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> ActiveRequest {
        self.active.fetch_add(1, Relaxed);
        ActiveRequest(self.clone())
    }
}

/// One request in flight on a host.
#[derive(Debug)]
pub struct ActiveRequest(Arc<HostState>);

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn active_follows_guards() {
        let host = Arc::new(HostState::new(5));
        let (first, second) = (host.begin(), host.begin());
        assert_eq!(host.active(), 2);
        drop(first);
        assert_eq!(host.active(), 1);
        drop(second);
        assert_eq!((host.active(), host.since()), (0, 5));
    }
}
