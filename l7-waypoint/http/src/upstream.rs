//! Clusters made ready: the shared part (balancer tables, outlier state, breakers) compiled once for all workers, and
//! each worker's part (rotation, connections).

mod compile;
mod dns;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use l7_resilience::{self as resilience, Pick, Rng};
use l7_telemetry::ServiceInfo;
use tokio::time::Instant;
use xds_model::envoy::cluster::{Assignment, Cluster, Endpoint};

use crate::connector::Connector;
use crate::pool::{Freed, HostPool};
pub(crate) use compile::{compile, encap};
pub(crate) use dns::{Resolved, Resolver};

/// A cluster as all workers see it.
pub(crate) struct CompiledCluster {
    pub(crate) config: Arc<Cluster>,
    /// Its endpoints are in the order of the balancer's hosts.
    pub(crate) assignment: Assignment,
    pub(crate) keys: Vec<Arc<str>>,
    pub(crate) balancer: resilience::Cluster,
    pub(crate) service: Arc<ServiceInfo>,
    pub(crate) name: Arc<str>,
    pub(crate) freed: Freed,
    pub(crate) mode: Mode,
}

/// How a host is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// By the balancer.
    Balanced,
    /// The address the client asked for, with another port perhaps.
    OriginalDestination { port: Option<u16>, hbone: bool },
    /// The host the request names.
    ByAuthority,
}

/// A cluster as one worker sees it.
pub(crate) struct Upstream {
    pub(crate) shared: Arc<CompiledCluster>,
    cursor: Cell<u64>,
    pools: RefCell<HashMap<Arc<str>, Rc<HostPool>>>,
    connector: Rc<dyn Connector>,
}

/// What picking a host depends on, besides the cluster.
pub(crate) struct Choice<'a> {
    pub(crate) hash: Option<u64>,
    pub(crate) rng: &'a mut Rng,
    pub(crate) tried: &'a [usize],
    pub(crate) attempts: u32,
    pub(crate) skip_priorities: u64,
    pub(crate) now: u64,
    pub(crate) original: SocketAddr,
}

impl<'a> Choice<'a> {
    /// The first and only try, wherever the balancer likes: for what is asked beside the request itself.
    pub(crate) fn once(rng: &'a mut Rng, now: u64, original: SocketAddr) -> Choice<'a> {
        Choice { hash: None, rng, tried: &[], attempts: 1, skip_priorities: 0, now, original }
    }
}

/// A host picked: its place in the balancer, if it has one, and its connections.
pub(crate) struct Picked {
    pub(crate) index: Option<usize>,
    pub(crate) pool: Rc<HostPool>,
}

/// Hosts of [`Mode::OriginalDestination`] and [`Mode::ByAuthority`], and hosts of requests, a worker keeps connections for.
const AD_HOC_HOSTS: usize = 1024;

impl Upstream {
    pub(crate) fn new(shared: Arc<CompiledCluster>, connector: Rc<dyn Connector>) -> Rc<Self> {
        Rc::new(Self { shared, cursor: Cell::new(0), pools: RefCell::default(), connector })
    }

    /// This worker's view of a newer version of the cluster: connections to endpoints that stay, and are reached the
    /// same way, stay; the others are closed as they become idle.
    pub(crate) fn renew(&self, shared: Arc<CompiledCluster>) -> Rc<Self> {
        let same_way = self.shared.config.tls == shared.config.tls
            && self.shared.config.http == shared.config.http
            && self.shared.config.limits == shared.config.limits
            && self.shared.config.connect_timeout == shared.config.connect_timeout
            && self.shared.config.proxy_protocol == shared.config.proxy_protocol;
        let mut kept = HashMap::new();
        for (key, pool) in self.pools.borrow_mut().drain() {
            let index = shared.keys.iter().position(|other| *other == pool.key);
            let stays = same_way
                && index.is_some_and(|index| shared.assignment.endpoints[index].target == pool.endpoint.target);
            if stays {
                kept.insert(key, pool);
            } else {
                pool.retire();
            }
        }
        let (cursor, connector) = (Cell::new(self.cursor.get()), self.connector.clone());
        Rc::new(Self { shared, cursor, pools: RefCell::new(kept), connector })
    }

    /// Picks a host; `None`: no healthy upstream.
    pub(crate) fn pick(&self, choice: Choice<'_>) -> Option<Picked> {
        match self.shared.mode {
            Mode::Balanced => {
                let Choice { hash, rng, tried, attempts, skip_priorities, now, original: _ } = choice;
                let pick = Pick { hash, rng, cursor: &self.cursor, tried, attempts, skip_priorities, now };
                let index = self.shared.balancer.pick(pick)?;
                Some(Picked { index: Some(index), pool: self.pool(index) })
            }
            Mode::OriginalDestination { port, hbone } => {
                let mut address = choice.original;
                address.set_port(port.unwrap_or(address.port()));
                Some(Picked { index: None, pool: self.ad_hoc(compile::endpoint_at(address, hbone)) })
            }
            Mode::ByAuthority => None,
        }
    }

    /// The host at an address that is none of the balancer's.
    pub(crate) fn at(&self, address: SocketAddr) -> Picked {
        Picked { index: None, pool: self.ad_hoc(compile::endpoint_at(address, false)) }
    }

    /// The same host for a request to `host`: where TLS is made with the request's host (no SNI configured), requests to
    /// one host do not travel on connections made for another.
    pub(crate) fn for_host(&self, picked: Picked, host: &str) -> Picked {
        let per_host = self.shared.config.tls.as_ref();
        if !per_host.is_some_and(|tls| tls.sni.is_none() && (tls.auto_sni || tls.auto_san)) {
            return picked;
        }
        let Picked { index, pool } = picked;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        // No host holds a blank.
        let key: Arc<str> = format!("{} {host}", pool.key).into();
        let make = |_| self.new_pool(pool.endpoint.clone(), pool.key.clone(), Some(host.into()));
        Picked { index, pool: self.bounded(key, make) }
    }

    fn pool(&self, index: usize) -> Rc<HostPool> {
        let key = &self.shared.keys[index];
        if let Some(pool) = self.pools.borrow().get(key) {
            return pool.clone();
        }
        let pool = self.new_pool(self.shared.assignment.endpoints[index].clone(), key.clone(), None);
        self.pools.borrow_mut().insert(key.clone(), pool.clone());
        pool
    }

    fn ad_hoc(&self, endpoint: Endpoint) -> Rc<HostPool> {
        let key: Arc<str> = compile::endpoint_key(&endpoint).into();
        self.bounded(key, |key| self.new_pool(endpoint, key, None))
    }

    /// The pool of a key that callers can choose freely: there are only so many.
    fn bounded(&self, key: Arc<str>, make: impl FnOnce(Arc<str>) -> Rc<HostPool>) -> Rc<HostPool> {
        if let Some(pool) = self.pools.borrow().get(&key) {
            return pool.clone();
        }
        let mut pools = self.pools.borrow_mut();
        if pools.len() >= AD_HOC_HOSTS.max(4 * self.shared.keys.len()) {
            pools.drain().for_each(|(_, pool)| pool.retire());
        }
        let pool = make(key.clone());
        pools.insert(key, pool.clone());
        pool
    }

    fn new_pool(&self, endpoint: Endpoint, key: Arc<str>, host: Option<Arc<str>>) -> Rc<HostPool> {
        HostPool::new(endpoint, key, host, &self.shared, self.connector.clone())
    }

    /// Closes connections idle for too long.
    pub(crate) fn sweep(&self, now: Instant) {
        self.pools.borrow().values().for_each(|pool| pool.sweep(now));
    }

    /// The cluster is gone.
    pub(crate) fn retire(&self) {
        self.pools.borrow().values().for_each(|pool| pool.retire());
    }
}
