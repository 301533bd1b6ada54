//! One cluster ready to pick from: its hosts by priority and locality, its balancer tables, and the state that
//! outlives configuration changes.

mod state;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::breaker::{Breakers, Limits};
use crate::host::{Health, HostState};
use crate::lb::{Candidate, Choice, LbPolicy, Level, SlowStart};
use crate::outlier::{self, Outcome, OutlierConfig};
use crate::random::Rng;
pub use state::{ClusterState, States};

/// A priority with fewer than 1/1.4 of its hosts healthy hands part of its load to the next (Envoy's default).
const OVERPROVISIONING_PERCENT: u64 = 140;

/// One endpoint as configured.
#[derive(Debug, Clone, PartialEq)]
pub struct HostSpec {
    /// What identifies the endpoint over configuration changes, such as `10.0.0.1:8080`.
    pub key: Arc<str>,
    /// Load-balancing weight; 0 counts as 1.
    pub weight: u32,
    /// 0 is the most wanted.
    pub priority: u32,
    /// Any number that is the same for hosts of one locality.
    pub locality: u32,
    /// Weight of the locality; only with [`ClusterSpec::locality_weighted`].
    pub locality_weight: u32,
    /// Health as configured.
    pub health: Health,
}

impl HostSpec {
    /// A healthy host of priority 0.
    pub fn new(key: impl Into<Arc<str>>, weight: u32) -> Self {
        let key = key.into();
        Self { key, weight, priority: 0, locality: 0, locality_weight: 1, health: Health::Healthy }
    }

    pub(crate) fn hash_key(&self) -> &str {
        &self.key
    }
}

/// One cluster as configured.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    /// Name; state is kept by it.
    pub name: Arc<str>,
    /// Endpoints; [`Cluster::pick`] answers an index into this list.
    pub hosts: Vec<HostSpec>,
    /// Algorithm.
    pub policy: LbPolicy,
    /// Below this share of healthy hosts (0 to 100) all hosts of a priority are used; 0 switches that off, as Istio does.
    pub panic_threshold: u32,
    /// Choose a locality by weight first.
    pub locality_weighted: bool,
    /// Ramp for new hosts.
    pub slow_start: Option<SlowStart>,
    /// Passive health checking.
    pub outlier: Option<OutlierConfig>,
    /// Circuit breakers.
    pub limits: Limits,
}

/// What one pick depends on.
pub struct Pick<'a> {
    /// Hash of the request by the route's hash policy.
    pub hash: Option<u64>,
    /// Generator seeded by the request.
    pub rng: &'a mut Rng,
    /// The worker's rotation for this cluster.
    pub cursor: &'a Cell<u64>,
    /// Hosts tried before that should not be picked again.
    pub tried: &'a [usize],
    /// How many picks to make in search of an untried host.
    pub attempts: u32,
    /// Priorities to leave out, as bits; ignored when it leaves none.
    pub skip_priorities: u64,
    /// Monotonic milliseconds.
    pub now: u64,
}

#[derive(Debug)]
struct Priority {
    number: u32,
    /// Indices of all hosts.
    hosts: Vec<usize>,
    /// One level for all hosts, or one per locality with its weight.
    levels: Vec<(u32, Vec<usize>, Level)>,
}

/// See the module head. Immutable but for the shared state; used by all workers.
#[derive(Debug)]
pub struct Cluster {
    spec: ClusterSpec,
    states: Vec<Arc<HostState>>,
    state: Arc<ClusterState>,
    priorities: Vec<Priority>,
    /// Load of each priority in percent, as of `loads_version`, until `loads_until`.
    loads: Vec<AtomicU32>,
    loads_version: AtomicU64,
    loads_until: AtomicU64,
}

impl Cluster {
    /// Compiles `spec`, taking over what `states` knows of the cluster and its hosts. `now` dates new hosts.
    pub fn build(spec: ClusterSpec, states: &States, now: u64) -> Self {
        let state = states.cluster(&spec.name);
        let hosts = state.hosts(&spec.hosts, now);
        let mut numbers: Vec<u32> = spec.hosts.iter().map(|host| host.priority).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let priorities: Vec<Priority> = numbers.iter().map(|number| Priority::build(&spec, &hosts, *number)).collect();
        let loads = priorities.iter().map(|_| AtomicU32::new(0)).collect();
        let (loads_version, loads_until) = (AtomicU64::new(u64::MAX), AtomicU64::new(0));
        Self { spec, states: hosts, state, priorities, loads, loads_version, loads_until }
    }

    /// The configuration this was compiled from.
    pub fn spec(&self) -> &ClusterSpec {
        &self.spec
    }

    /// Shared counters of the host at `index`.
    pub fn host(&self, index: usize) -> &Arc<HostState> {
        &self.states[index]
    }

    /// Circuit breakers of the cluster.
    pub fn breakers(&self) -> &Arc<Breakers> {
        &self.state.breakers
    }

    /// Index of the host to use, or `None`: no healthy upstream.
    pub fn pick(&self, mut pick: Pick<'_>) -> Option<usize> {
        let mut chosen = self.pick_once(&mut pick)?;
        for _ in 1..pick.attempts.max(1) {
            if !pick.tried.contains(&chosen) {
                break;
            }
            // Consistent hashing would answer the same host for ever.
            pick.hash = None;
            chosen = self.pick_once(&mut pick)?;
        }
        Some(chosen)
    }

    fn pick_once(&self, pick: &mut Pick<'_>) -> Option<usize> {
        let (priority, panic) = self.choose_priority(pick)?;
        let now = pick.now;
        let usable = |index: usize| {
            if panic { self.spec.hosts[index].health != Health::Draining } else { self.healthy(index, now) }
        };
        let level = self.choose_level(priority, pick, &usable)?;
        let slow_start = self.spec.slow_start;
        let mut choice = Choice { hash: pick.hash, rng: pick.rng, cursor: pick.cursor, now, slow_start };
        level.pick(&mut choice, &usable)
    }

    fn healthy(&self, index: usize, now: u64) -> bool {
        self.spec.hosts[index].health == Health::Healthy && !self.states[index].ejected(now)
    }

    fn choose_level<'a>(
        &'a self,
        priority: &'a Priority,
        pick: &mut Pick<'_>,
        usable: &dyn Fn(usize) -> bool,
    ) -> Option<&'a Level> {
        if let [(_, _, level)] = priority.levels.as_slice() {
            return Some(level);
        }
        // Locality weight times its health (overprovisioned), as Envoy's effective locality weight.
        let weigh = |(weight, hosts, _): &(u32, Vec<usize>, Level)| {
            let healthy = hosts.iter().filter(|index| usable(**index)).count() as u64;
            u64::from(*weight) * (healthy * OVERPROVISIONING_PERCENT).min(hosts.len() as u64 * 100) * 1000
                / hosts.len() as u64
        };
        let weights: Vec<u64> = priority.levels.iter().map(weigh).collect();
        let total: u64 = weights.iter().sum();
        let mut point = pick.rng.below(total);
        for (weight, (_, _, level)) in weights.iter().zip(&priority.levels) {
            if point < *weight {
                return Some(level);
            }
            point -= weight;
        }
        None
    }

    /// The priority to use and whether it is in panic (health ignored).
    fn choose_priority(&self, pick: &mut Pick<'_>) -> Option<(&Priority, bool)> {
        if let ([only], 0) = (self.priorities.as_slice(), self.spec.panic_threshold) {
            return Some((only, false));
        }
        self.refresh_loads(pick.now);
        let skipped = |position: usize| pick.skip_priorities & (1 << position.min(63)) != 0;
        let load = |position: usize| u64::from(self.loads[position].load(Relaxed));
        let total: u64 = (0..self.priorities.len()).filter(|position| !skipped(*position)).map(load).sum();
        let ignore_skips = total == 0;
        let total = if ignore_skips { (0..self.priorities.len()).map(load).sum() } else { total };
        if total == 0 {
            // Nothing healthy anywhere: panic on the first priority, if panic is on at all.
            return self.priorities.first().filter(|_| self.spec.panic_threshold > 0).map(|first| (first, true));
        }
        let mut point = pick.rng.below(total);
        for (position, priority) in self.priorities.iter().enumerate() {
            if !ignore_skips && skipped(position) {
                continue;
            }
            if point < load(position) {
                return Some((priority, self.in_panic(priority, pick.now)));
            }
            point -= load(position);
        }
        None
    }

    fn in_panic(&self, priority: &Priority, now: u64) -> bool {
        let threshold = u64::from(self.spec.panic_threshold);
        threshold > 0 && self.count_healthy(priority, now) * 100 < threshold * priority.hosts.len() as u64
    }

    fn count_healthy(&self, priority: &Priority, now: u64) -> u64 {
        priority.hosts.iter().filter(|index| self.healthy(**index, now)).count() as u64
    }

    /// Recomputes the priorities' loads after an ejection or when a host returns. Two workers may do it at once; both
    /// write the same.
    fn refresh_loads(&self, now: u64) {
        let version = self.state.version.load(Relaxed);
        if self.loads_version.load(Relaxed) == version && now < self.loads_until.load(Relaxed) {
            return;
        }
        let health: Vec<u64> = self.priorities.iter().map(|priority| self.availability(priority, now)).collect();
        let total = health.iter().sum::<u64>().min(100);
        let mut left = 100u64;
        for (position, health) in health.iter().enumerate() {
            let load = (health * 100).checked_div(total).unwrap_or(0).min(left);
            left -= load;
            self.loads[position].store(load as u32, Relaxed);
        }
        let returns = |state: &Arc<HostState>| Some(state.ejected_until.load(Relaxed)).filter(|until| *until > now);
        let until = self.states.iter().filter_map(returns).min().unwrap_or(u64::MAX);
        self.loads_until.store(until, Relaxed);
        self.loads_version.store(version, Relaxed);
    }

    fn availability(&self, priority: &Priority, now: u64) -> u64 {
        (self.count_healthy(priority, now) * OVERPROVISIONING_PERCENT / priority.hosts.len() as u64).min(100)
    }

    /// Position of the host's priority among this cluster's priorities, for [`Pick::skip_priorities`].
    pub fn priority_bit(&self, index: usize) -> u64 {
        let number = self.spec.hosts[index].priority;
        self.priorities
            .iter()
            .position(|priority| priority.number == number)
            .map_or(0, |position| 1 << position.min(63))
    }

    /// Tells outlier detection how an attempt on the host ended; true when that ejected the host.
    pub fn report(&self, index: usize, outcome: Outcome, now: u64) -> bool {
        let Some(config) = &self.spec.outlier else { return false };
        let host = &self.states[index];
        if !outlier::record(config, host, outcome) || host.ejected(now) {
            return false;
        }
        let ejected = self.states.iter().filter(|state| state.ejected(now)).count() as u64;
        let within = (ejected + 1) * 100 <= u64::from(config.max_ejection_percent) * self.states.len() as u64;
        let first = config.always_eject_one && ejected == 0;
        if !within && !first {
            return false;
        }
        outlier::eject(config, host, now);
        self.state.version.fetch_add(1, Relaxed);
        true
    }
}

impl Priority {
    fn build(spec: &ClusterSpec, states: &[Arc<HostState>], number: u32) -> Self {
        let of_priority = |(index, host): (usize, &HostSpec)| (host.priority == number).then_some(index);
        let hosts: Vec<usize> = spec.hosts.iter().enumerate().filter_map(of_priority).collect();
        let level = |members: &[usize]| {
            let candidate = |index: &usize| Candidate {
                index: *index,
                weight: spec.hosts[*index].weight.max(1),
                state: states[*index].clone(),
            };
            Level::build(spec.policy, &spec.hosts, members.iter().map(candidate).collect())
        };
        if !spec.locality_weighted {
            let levels = vec![(1, hosts.clone(), level(&hosts))];
            return Self { number, hosts, levels };
        }
        let mut localities: Vec<u32> = hosts.iter().map(|index| spec.hosts[*index].locality).collect();
        localities.sort_unstable();
        localities.dedup();
        let by_locality = |locality: &u32| {
            let members: Vec<usize> =
                hosts.iter().copied().filter(|index| spec.hosts[*index].locality == *locality).collect();
            (spec.hosts[members[0]].locality_weight, members.clone(), level(&members))
        };
        let levels = localities.iter().map(by_locality).collect();
        Self { number, hosts, levels }
    }
}

#[cfg(test)]
mod tests;
