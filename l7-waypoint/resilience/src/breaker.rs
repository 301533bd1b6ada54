//! Circuit breakers: ceilings on what one cluster may have under way at a time (Envoy `circuit_breakers`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Ceilings of one cluster. `u32::MAX` means none, which is what Istio sends by default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Upstream connections, idle ones included.
    pub connections: u32,
    /// Requests waiting for a connection.
    pub pending: u32,
    /// Requests under way.
    pub requests: u32,
    /// Retries under way; not used when a budget is set.
    pub retries: u32,
    /// Retries as a share of requests.
    pub budget: Option<RetryBudget>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: u32::MAX, pending: u32::MAX, requests: u32::MAX, retries: u32::MAX, budget: None }
    }
}

/// Envoy `RetryBudget`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryBudget {
    /// Share of the requests under way that may be retries, 0 to 100.
    pub percent: f64,
    /// Retries always allowed at a time, however few requests there are.
    pub min_concurrency: u32,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// See [`Limits::connections`].
    Connection,
    /// See [`Limits::pending`].
    Pending,
    /// See [`Limits::requests`].
    Request,
    /// See [`Limits::retries`].
    Retry,
}

/// Counters of one cluster, shared by all workers and kept over configuration changes.
#[derive(Debug, Default)]
pub struct Breakers {
    counts: [AtomicU32; 4],
}

impl Breakers {
    /// How many of `kind` are under way.
    pub fn current(&self, kind: Kind) -> u32 {
        self.counts[kind as usize].load(Relaxed)
    }

    /// Takes one of `kind` unless that would exceed the limit. The count is exact over workers.
    pub fn acquire(self: &Arc<Self>, kind: Kind, limits: &Limits) -> Option<Guard> {
        let limit = match kind {
            Kind::Connection => limits.connections,
            Kind::Pending => limits.pending,
            Kind::Request => limits.requests,
            Kind::Retry => self.retry_limit(limits),
        };
        let count = &self.counts[kind as usize];
        if limit == u32::MAX {
            count.fetch_add(1, Relaxed);
        } else {
            count.fetch_update(Relaxed, Relaxed, |current| (current < limit).then_some(current + 1)).ok()?;
        }
        Some(Guard { breakers: self.clone(), kind })
    }

    fn retry_limit(&self, limits: &Limits) -> u32 {
        let Some(budget) = limits.budget else { return limits.retries };
        let under_way = self.current(Kind::Request).saturating_add(self.current(Kind::Pending));
        let share = (f64::from(under_way) * budget.percent / 100.0) as u32;
        share.max(budget.min_concurrency)
    }
}

/// One counted thing; the count goes down when this is dropped.
#[derive(Debug)]
pub struct Guard {
    breakers: Arc<Breakers>,
    kind: Kind,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.breakers.counts[self.kind as usize].fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_and_guards_give_back() {
        let breakers = Arc::new(Breakers::default());
        let limits = Limits { requests: 2, ..Limits::default() };
        let first = breakers.acquire(Kind::Request, &limits).unwrap();
        let _second = breakers.acquire(Kind::Request, &limits).unwrap();
        assert!(breakers.acquire(Kind::Request, &limits).is_none());
        assert!(breakers.acquire(Kind::Pending, &limits).is_some(), "other kinds are counted apart");
        drop(first);
        assert!(breakers.acquire(Kind::Request, &limits).is_some());
    }

    #[test]
    fn a_budget_grows_with_the_requests_under_way() {
        let breakers = Arc::new(Breakers::default());
        let budget = RetryBudget { percent: 20.0, min_concurrency: 3 };
        let limits = Limits { budget: Some(budget), retries: 0, ..Limits::default() };
        let few: Vec<_> = (0..4).map_while(|_| breakers.acquire(Kind::Retry, &limits)).collect();
        assert_eq!(few.len(), 3, "the minimum");
        drop(few);
        let _requests: Vec<_> = (0..50).map(|_| breakers.acquire(Kind::Request, &limits)).collect();
        let many: Vec<_> = (0..50).map_while(|_| breakers.acquire(Kind::Retry, &limits)).collect();
        assert_eq!(many.len(), 10, "20 % of 50");
    }
}
