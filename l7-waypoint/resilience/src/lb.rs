//! Load balancers, one file per algorithm. Each works on one *level*: the hosts of one priority (and, where
//! localities are weighted, one locality). None of them looks at health itself: the caller passes a predicate.

mod least_request;
mod maglev;
mod random;
mod ring_hash;
mod round_robin;

use std::sync::Arc;
use std::time::Duration;

use crate::cluster::HostSpec;
use crate::host::HostState;
use crate::random::Rng;

/// Which algorithm and its settings (Envoy `lb_policy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LbPolicy {
    /// Power of two choices on requests in flight; Istio's default.
    #[default]
    LeastRequest,
    /// Weighted round robin, one rotation per worker.
    RoundRobin,
    /// Weighted random.
    Random,
    /// Ketama-like ring with at least so many points.
    RingHash {
        /// Fewest points on the ring (Istio `minimumRingSize`, 1024 by default).
        minimum: u32,
        /// Most points on the ring.
        maximum: u32,
    },
    /// Maglev table of this (prime) size; Envoy's default is 65537.
    Maglev {
        /// Number of slots.
        table_size: u32,
    },
}

/// New hosts get a growing share of requests (Istio `warmup`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowStart {
    /// Length of the ramp.
    pub window: Duration,
    /// Share at its start, 0 to 100.
    pub min_percent: f64,
    /// 1 is linear; larger ramps faster at first.
    pub aggression: f64,
}

impl SlowStart {
    /// Share of its weight a host of this age has, in `(0, 1]`.
    pub fn factor(&self, age: Duration) -> f64 {
        if age >= self.window || self.window.is_zero() {
            return 1.0;
        }
        let time = age.as_secs_f64().max(0.001) / self.window.as_secs_f64();
        time.powf(1.0 / self.aggression.max(0.01)).max(self.min_percent / 100.0).clamp(0.001, 1.0)
    }
}

/// What an algorithm needs to know of one host.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    /// Index in the cluster's host list.
    pub(crate) index: usize,
    pub(crate) weight: u32,
    pub(crate) state: Arc<HostState>,
}

/// The per-request part.
pub(crate) struct Choice<'a> {
    pub(crate) hash: Option<u64>,
    pub(crate) rng: &'a mut Rng,
    pub(crate) cursor: &'a std::cell::Cell<u64>,
    pub(crate) now: u64,
    pub(crate) slow_start: Option<SlowStart>,
}

/// A compiled balancer over one level.
#[derive(Debug)]
pub(crate) struct Level {
    hosts: Vec<Candidate>,
    /// Running sums of weights; empty when all weights are equal.
    sums: Vec<u64>,
    table: Table,
}

#[derive(Debug)]
enum Table {
    None(LbPolicy),
    RoundRobin(round_robin::Schedule),
    Ring(ring_hash::Ring),
    Maglev(maglev::Maglev),
}

/// Random picks before falling back to a scan: with half the hosts out, 16 misses in a row are 1 in 65536.
const RANDOM_TRIES: usize = 16;

impl Level {
    pub(crate) fn build(policy: LbPolicy, specs: &[HostSpec], hosts: Vec<Candidate>) -> Self {
        let uniform = hosts.windows(2).all(|pair| pair[0].weight == pair[1].weight);
        let sums = if uniform { Vec::new() } else { running_sums(&hosts) };
        let keyed = || hosts.iter().map(|host| (specs[host.index].hash_key(), host.weight)).collect::<Vec<_>>();
        let table = match policy {
            LbPolicy::RoundRobin => Table::RoundRobin(round_robin::Schedule::new(hosts.iter().map(|host| host.weight))),
            LbPolicy::RingHash { minimum, maximum } => Table::Ring(ring_hash::Ring::new(&keyed(), minimum, maximum)),
            LbPolicy::Maglev { table_size } => Table::Maglev(maglev::Maglev::new(&keyed(), table_size)),
            other => Table::None(other),
        };
        Self { hosts, sums, table }
    }

    /// Position-independent pick: index of the host in the cluster, or `None` when no host passes `usable`.
    pub(crate) fn pick(&self, choice: &mut Choice<'_>, usable: &dyn Fn(usize) -> bool) -> Option<usize> {
        let usable = |position: usize| usable(self.hosts[position].index);
        let position = match &self.table {
            _ if self.hosts.is_empty() => None,
            Table::Ring(ring) => ring.pick(self.key(choice), &usable),
            Table::Maglev(table) => table.pick(self.key(choice), &usable),
            Table::RoundRobin(schedule) => schedule.pick(choice, self, &usable),
            Table::None(LbPolicy::Random) => random::pick(self, choice, &usable),
            Table::None(_) => least_request::pick(self, choice, &usable),
        };
        position.map(|position| self.hosts[position].index)
    }

    /// Without a hash policy (or with one that found nothing in the request) Envoy hashes a random number.
    fn key(&self, choice: &mut Choice<'_>) -> u64 {
        choice.hash.unwrap_or_else(|| choice.rng.next_u64())
    }

    /// A position drawn by weight.
    fn draw(&self, rng: &mut Rng) -> usize {
        match self.sums.last() {
            None => rng.below(self.hosts.len() as u64) as usize,
            Some(total) => {
                let point = rng.below(*total);
                self.sums.partition_point(|sum| *sum <= point)
            }
        }
    }

    /// The first usable position at or after a random one.
    fn scan(&self, rng: &mut Rng, usable: &dyn Fn(usize) -> bool) -> Option<usize> {
        let start = rng.below(self.hosts.len() as u64) as usize;
        (start..self.hosts.len()).chain(0..start).find(|position| usable(*position))
    }

    /// A usable position drawn by weight; the scan makes sure that one is found where there is one.
    fn draw_usable(&self, rng: &mut Rng, usable: &dyn Fn(usize) -> bool) -> Option<usize> {
        for _ in 0..RANDOM_TRIES {
            let position = self.draw(rng);
            if usable(position) {
                return Some(position);
            }
        }
        self.scan(rng, usable)
    }

    /// Slow-start share of the host at `position`.
    fn warmth(&self, position: usize, choice: &Choice<'_>) -> f64 {
        choice.slow_start.map_or(1.0, |slow_start| {
            let age = choice.now.saturating_sub(self.hosts[position].state.since());
            slow_start.factor(Duration::from_millis(age))
        })
    }
}

fn running_sums(hosts: &[Candidate]) -> Vec<u64> {
    let mut sum = 0;
    let add = |host: &Candidate| {
        sum += u64::from(host.weight.max(1));
        sum
    };
    hosts.iter().map(add).collect()
}

#[cfg(test)]
pub(crate) mod tests;
