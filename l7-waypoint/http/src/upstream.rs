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

impl CompiledCluster {
    /// Whether TLS is made with the request's host (no SNI configured): then requests to one host do not travel on
    /// connections made for another.
    fn per_host(&self) -> bool {
        let tls = self.config.tls.as_ref();
        tls.is_some_and(|tls| tls.sni.is_none() && (tls.auto_sni || tls.auto_san))
    }
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
    /// The host of the request; `None`: it is for no host.
    pub(crate) host: Option<&'a str>,
}

impl<'a> Choice<'a> {
    /// The first and only try, wherever the balancer likes: for what is asked beside the request itself.
    pub(crate) fn once(rng: &'a mut Rng, now: u64, original: SocketAddr, host: &'a str) -> Choice<'a> {
        Choice { hash: None, rng, tried: &[], attempts: 1, skip_priorities: 0, now, original, host: Some(host) }
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
        let Choice { hash, rng, tried, attempts, skip_priorities, now, original, host } = choice;
        let host = host.filter(|_| self.shared.per_host());
        match self.shared.mode {
            Mode::Balanced => {
                let pick = Pick { hash, rng, cursor: &self.cursor, tried, attempts, skip_priorities, now };
                let index = self.shared.balancer.pick(pick)?;
                let endpoint = || self.shared.assignment.endpoints[index].clone();
                Some(Picked { index: Some(index), pool: self.pool(&self.shared.keys[index], host, endpoint) })
            }
            Mode::OriginalDestination { port, hbone } => {
                let mut address = original;
                address.set_port(port.unwrap_or(address.port()));
                let endpoint = compile::endpoint_at(address, hbone);
                let key = compile::endpoint_key(&endpoint).into();
                Some(Picked { index: None, pool: self.pool(&key, host, || endpoint) })
            }
            Mode::ByAuthority => None,
        }
    }

    /// The host at an address that is none of the balancer's.
    pub(crate) fn at(&self, address: SocketAddr) -> Picked {
        let endpoint = compile::endpoint_at(address, false);
        let key = compile::endpoint_key(&endpoint).into();
        Picked { index: None, pool: self.pool(&key, None, || endpoint) }
    }

    /// The connections to an endpoint. With a host, those for requests to it: there are only so many of them, as of
    /// endpoints that are none of the balancer's, since callers choose both.
    fn pool(&self, key: &Arc<str>, host: Option<&str>, endpoint: impl FnOnce() -> Endpoint) -> Rc<HostPool> {
        let host = host.map(|host| host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase());
        let of_host: Arc<str>;
        let place = match &host {
            // No host holds a blank.
            Some(host) => {
                of_host = format!("{key} {host}").into();
                &of_host
            }
            None => key,
        };
        if let Some(pool) = self.pools.borrow().get(place) {
            return pool.clone();
        }
        let mut pools = self.pools.borrow_mut();
        if pools.len() >= AD_HOC_HOSTS.max(4 * self.shared.keys.len()) {
            pools.drain().for_each(|(_, pool)| pool.retire());
        }
        let host = host.map(Arc::from);
        let pool = HostPool::new(endpoint(), key.clone(), host, &self.shared, self.connector.clone());
        pools.insert(place.clone(), pool.clone());
        pool
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
