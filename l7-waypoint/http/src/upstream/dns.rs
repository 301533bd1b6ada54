//! Endpoints of clusters that are found by name: resolved in the background, the last good answer stays when a name
//! server does not answer.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use xds_model::envoy::cluster::{Assignment, Discovery, DnsFamily, DnsHost, Endpoint, EndpointTarget, Health};

/// Resolves the names of all DNS clusters of a process.
pub(crate) struct Resolver {
    runtime: Option<Handle>,
    watched: Mutex<HashMap<String, Weak<Resolved>>>,
    /// Called after an answer changed.
    changed: Arc<dyn Fn() + Send + Sync>,
}

/// One cluster's current answer; its task ends when this is dropped.
pub(crate) struct Resolved {
    wanted: Discovery,
    answer: ArcSwap<Assignment>,
}

impl Resolved {
    pub(crate) fn current(&self) -> Arc<Assignment> {
        self.answer.load_full()
    }
}

impl Resolver {
    pub(crate) fn new(runtime: Option<Handle>, changed: Arc<dyn Fn() + Send + Sync>) -> Self {
        Self { runtime, watched: Mutex::default(), changed }
    }

    /// The answer for the cluster called `name`, resolved anew when its names changed.
    pub(crate) fn watch(&self, name: &str, discovery: &Discovery) -> Arc<Resolved> {
        let mut watched = self.watched.lock();
        watched.retain(|_, resolved| resolved.strong_count() > 0);
        if let Some(known) = watched.get(name).and_then(Weak::upgrade)
            && known.wanted == *discovery
        {
            return known;
        }
        let previous = watched.get(name).and_then(Weak::upgrade).map(|known| known.current()).unwrap_or_default();
        let resolved = Arc::new(Resolved { wanted: discovery.clone(), answer: ArcSwap::new(previous) });
        watched.insert(name.to_owned(), Arc::downgrade(&resolved));
        match &self.runtime {
            Some(runtime) => drop(runtime.spawn(keep_resolved(Arc::downgrade(&resolved), self.changed.clone()))),
            None => tracing::error!(cluster = name, "no runtime to resolve names on: the cluster has no endpoints"),
        }
        resolved
    }
}

/// Bounds of how often a name is asked for.
const FASTEST: Duration = Duration::from_secs(1);

async fn keep_resolved(resolved: Weak<Resolved>, changed: Arc<dyn Fn() + Send + Sync>) {
    loop {
        let Some(discovery) = resolved.upgrade().map(|resolved| resolved.wanted.clone()) else { return };
        let Discovery::Dns { hosts, logical, refresh, family, .. } = discovery else { return };
        let mut endpoints = Vec::new();
        let mut failed = false;
        for host in &hosts {
            match lookup(host, family).await {
                Ok(addresses) => endpoints.extend(endpoints_of(host, &addresses, logical)),
                Err(error) => {
                    failed = true;
                    tracing::warn!(host = host.host, %error, "name not resolved");
                }
            }
        }
        let Some(alive) = resolved.upgrade() else { return };
        let assignment = Assignment { endpoints, ..Assignment::default() };
        // Stale endpoints are better than none.
        if !(failed && assignment.endpoints.len() < alive.current().endpoints.len())
            && **alive.answer.load() != assignment
        {
            alive.answer.store(Arc::new(assignment));
            changed();
        }
        drop(alive);
        tokio::time::sleep(if failed { FASTEST } else { refresh.max(FASTEST) }).await;
    }
}

async fn lookup(host: &DnsHost, family: DnsFamily) -> std::io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, host.port)]);
    }
    let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host((host.host.as_str(), host.port)).await?.collect();
    addresses.sort_unstable();
    addresses.dedup();
    let has_v4 = addresses.iter().any(SocketAddr::is_ipv4);
    let has_v6 = addresses.iter().any(SocketAddr::is_ipv6);
    addresses.retain(|address| match family {
        DnsFamily::All => true,
        DnsFamily::V4Only => address.is_ipv4(),
        DnsFamily::V6Only => address.is_ipv6(),
        DnsFamily::V4Preferred => address.is_ipv4() || !has_v4,
        // Envoy's `AUTO`: IPv6 if there is any.
        DnsFamily::Auto => address.is_ipv6() || !has_v6,
    });
    Ok(addresses)
}

fn endpoints_of(host: &DnsHost, addresses: &[SocketAddr], logical: bool) -> Vec<Endpoint> {
    let endpoint = |address: &SocketAddr, additional: &[SocketAddr]| Endpoint {
        target: EndpointTarget::Plain { address: *address, additional: additional.to_vec() },
        weight: host.weight.max(1),
        priority: host.priority,
        locality: host.locality.clone(),
        health: Health::Healthy,
        hostname: Some(host.host.clone()),
        workload: None,
    };
    match addresses {
        [] => Vec::new(),
        [first, rest @ ..] if logical => vec![endpoint(first, rest)],
        all => all.iter().map(|address| endpoint(address, &[])).collect(),
    }
}
