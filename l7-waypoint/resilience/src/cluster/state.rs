//! State by cluster name and endpoint key, kept while configuration comes and goes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;

use crate::breaker::Breakers;
use crate::cluster::HostSpec;
use crate::host::HostState;

/// Of all clusters; one per process. Locked only when a cluster is compiled.
#[derive(Debug, Default)]
pub struct States {
    clusters: Mutex<HashMap<Arc<str>, Arc<ClusterState>>>,
}

/// Of one cluster.
#[derive(Debug, Default)]
pub struct ClusterState {
    pub(crate) breakers: Arc<Breakers>,
    /// Goes up when a host is ejected.
    pub(crate) version: AtomicU64,
    hosts: Mutex<HashMap<Arc<str>, Arc<HostState>>>,
}

impl States {
    /// The state of the cluster called `name`, made on first use.
    pub fn cluster(&self, name: &Arc<str>) -> Arc<ClusterState> {
        self.clusters.lock().entry(name.clone()).or_default().clone()
    }

    /// Forgets clusters that are no longer configured.
    pub fn retain(&self, wanted: impl Fn(&str) -> bool) {
        self.clusters.lock().retain(|name, _| wanted(name));
    }
}

impl ClusterState {
    /// States of `specs` in order; hosts that are gone are forgotten, new ones start at `now`.
    ///
    /// When a cluster is first seen its hosts are dated 0: slow start is for hosts that join, not for all at start.
    pub(crate) fn hosts(&self, specs: &[HostSpec], now: u64) -> Vec<Arc<HostState>> {
        let mut known = self.hosts.lock();
        let since = if known.is_empty() { 0 } else { now };
        let mut take = |spec: &HostSpec| {
            let state = known.get(&spec.key).cloned().unwrap_or_else(|| Arc::new(HostState::new(since)));
            (spec.key.clone(), state)
        };
        let current: Vec<(Arc<str>, Arc<HostState>)> = specs.iter().map(&mut take).collect();
        *known = current.iter().cloned().collect();
        current.into_iter().map(|(_, state)| state).collect()
    }
}
