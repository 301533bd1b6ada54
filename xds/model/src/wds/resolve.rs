//! Where an outbound connection goes (xds-contract 2.1, 4.4). Pure: view, source, address and seed in.
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::mesh::{Endpoint, Mesh};
use super::types::*;
use crate::spiffe::SpiffeId;

/// HBONE's port (Istio).
const HBONE_PORT: u16 = 15008;

/// The other end of a connection as the mesh knows it.
#[derive(Debug, Clone)]
pub struct Peer {
    pub workload: Arc<Workload>,
    /// The service the client asked for, if it did.
    pub service: Option<Arc<Service>>,
}

/// What a tunnel's far end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// The destination's own node proxy.
    Endpoint,
    /// A waypoint.
    Waypoint,
}

/// The way of one outbound connection.
#[derive(Debug, Clone)]
pub enum Upstream {
    /// Unknown to the mesh, or a service that leaves the choice to the client: as it is, in plaintext.
    Passthrough { addr: SocketAddr, service: Option<Arc<Service>> },
    /// A known workload that takes no tunnel.
    Plain { addr: SocketAddr, peer: Peer },
    /// A workload known by name only: resolve, then connect in plaintext.
    PlainHost { hostname: Arc<str>, port: u16, peer: Peer },
    /// A tunnel to `addr`, CONNECT `authority`.
    Hbone {
        /// Where to dial.
        addr: SocketAddr,
        /// Where the bytes shall go: pod and target port, or the service's address behind a waypoint.
        authority: SocketAddr,
        /// Identities the far end may present.
        identities: Vec<SpiffeId>,
        peer: Peer,
        via: Via,
    },
}

/// Why a connection to something the mesh knows goes nowhere. Never a reason to pass it through.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    #[error("service {service} has no port {port}")]
    UndefinedPort { service: ServiceKey, port: u16 },
    #[error("service {service} has no healthy endpoint for port {port}")]
    NoHealthyEndpoint { service: ServiceKey, port: u16 },
    #[error("waypoint {waypoint} of {of} is unknown or has no healthy endpoint")]
    NoWaypoint { waypoint: String, of: Arc<str> },
    #[error("workload {workload} is in network {network}: tunnels through network gateways are not supported yet")]
    RemoteNetwork { workload: Arc<str>, network: Arc<str> },
    #[error("workload {workload} has no address of the wanted family")]
    NoAddress { workload: Arc<str> },
}

/// How a service is addressed: by its user, or as somebody's waypoint.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Standard,
    Waypoint,
}

impl Mesh {
    /// Resolves an outbound connection of `source` to `dst`. `seed` decides random choices.
    ///
    /// # Errors
    /// If the destination is known but cannot be reached now.
    pub fn resolve_outbound(&self, source: &Workload, dst: SocketAddr, seed: u64) -> Result<Upstream, ResolveError> {
        let dst = unmapped(dst);
        if let Some(service) = self.service_by_address(&source.network, dst.ip(), &source.namespace) {
            return self.resolve_service(source, service, dst, seed);
        }
        let Some(workload) = self.workload_by_address(&source.network, dst.ip()) else {
            return Ok(Upstream::Passthrough { addr: dst, service: None });
        };
        if let Some(waypoint) = &workload.waypoint
            && !self.is_waypoint_itself(waypoint, source)
        {
            return self.through_waypoint(source, waypoint, &workload.uid, None, dst, seed);
        }
        let peer = Peer { workload: workload.clone(), service: None };
        Ok(to_workload(dst, dst.port(), peer))
    }

    /// The key of the waypoint's service that a connection of `source` to `dst` goes through with this seed, whether
    /// or not the waypoint has endpoints.
    pub fn waypoint_towards(&self, source: &Workload, dst: SocketAddr, seed: u64) -> Option<&str> {
        let ip = unmapped(dst).ip();
        let waypoint = match self.service_by_address(&source.network, ip, &source.namespace) {
            Some(service) => pick_waypoint(service, seed)?,
            None => self.workload_by_address(&source.network, ip)?.waypoint.as_ref()?,
        };
        if self.is_waypoint_itself(waypoint, source) {
            return None;
        }
        match &waypoint.destination {
            GatewayDestination::Service(key) => Some(key),
            GatewayDestination::Address { network, ip } => {
                self.service_by_address(network, *ip, &source.namespace).map(|service| &*service.key)
            }
        }
    }

    fn resolve_service(
        &self,
        source: &Workload,
        service: &Arc<Service>,
        dst: SocketAddr,
        seed: u64,
    ) -> Result<Upstream, ResolveError> {
        if let Some(waypoint) = pick_waypoint(service, seed)
            && !self.is_waypoint_itself(waypoint, source)
        {
            return self.through_waypoint(source, waypoint, &service.key, Some(service), dst, seed);
        }
        if service.load_balancing.mode == LoadBalancingMode::Passthrough {
            return Ok(Upstream::Passthrough { addr: dst, service: Some(service.clone()) });
        }
        let (endpoint, target_port) = self.pick_endpoint(source, service, dst.port(), Purpose::Standard, seed)?;
        let workload = &endpoint.workload;
        if workload.network != source.network {
            let (workload, network) = (workload.uid.clone(), workload.network.clone());
            return Err(ResolveError::RemoteNetwork { workload, network });
        }
        let peer = Peer { workload: workload.clone(), service: Some(service.clone()) };
        if workload.addresses.is_empty()
            && let Some(hostname) = &workload.hostname
        {
            return Ok(Upstream::PlainHost { hostname: hostname.clone(), port: target_port, peer });
        }
        let ip = pick_address(workload, service.ip_families, dst.ip())
            .ok_or_else(|| ResolveError::NoAddress { workload: workload.uid.clone() })?;
        Ok(to_workload(SocketAddr::new(ip, target_port), target_port, peer))
    }

    fn through_waypoint(
        &self,
        source: &Workload,
        waypoint: &GatewayAddress,
        of: &Arc<str>,
        service: Option<&Arc<Service>>,
        dst: SocketAddr,
        seed: u64,
    ) -> Result<Upstream, ResolveError> {
        let missing = || ResolveError::NoWaypoint { waypoint: describe(waypoint), of: of.clone() };
        let (workload, own_service, addr) =
            self.waypoint_endpoint(source, waypoint, dst.ip(), seed).ok_or_else(missing)?;
        let mut identities = vec![workload.identity.clone()];
        if let Some(own_service) = own_service {
            identities.extend(own_service.subject_alt_names.iter().cloned());
        }
        let peer = Peer { workload, service: service.cloned() };
        Ok(Upstream::Hbone { addr, authority: dst, identities, peer, via: Via::Waypoint })
    }

    fn waypoint_endpoint(
        &self,
        source: &Workload,
        waypoint: &GatewayAddress,
        family: IpAddr,
        seed: u64,
    ) -> Option<(Arc<Workload>, Option<Arc<Service>>, SocketAddr)> {
        let service = match &waypoint.destination {
            GatewayDestination::Service(key) => Some(self.service(key)?),
            GatewayDestination::Address { network, ip } => self.service_by_address(network, *ip, &source.namespace),
        };
        match (service, &waypoint.destination) {
            (Some(service), _) => {
                let (endpoint, port) =
                    self.pick_endpoint(source, service, waypoint.hbone_mtls_port, Purpose::Waypoint, seed).ok()?;
                let ip = pick_address(&endpoint.workload, service.ip_families, family)?;
                Some((endpoint.workload.clone(), Some(service.clone()), SocketAddr::new(ip, port)))
            }
            (None, GatewayDestination::Address { network, ip }) => {
                let workload = self.workload_by_address(network, *ip)?;
                Some((workload.clone(), None, SocketAddr::new(*ip, waypoint.hbone_mtls_port)))
            }
            (None, GatewayDestination::Service(_)) => None,
        }
    }

    /// Whether `source` is an endpoint of the waypoint: its own traffic does not go through it again.
    fn is_waypoint_itself(&self, waypoint: &GatewayAddress, source: &Workload) -> bool {
        self.waypoint_workloads(waypoint).any(|workload| workload.uid == source.uid)
    }

    fn waypoint_workloads<'a>(&'a self, waypoint: &'a GatewayAddress) -> impl Iterator<Item = &'a Arc<Workload>> {
        let (service, address) = match &waypoint.destination {
            GatewayDestination::Service(key) => (self.service(key), None),
            GatewayDestination::Address { network, ip } => {
                (self.service_by_address(network, *ip, ""), self.workload_by_address(network, *ip))
            }
        };
        let endpoints = service.map(|service| self.endpoints(&service.key)).unwrap_or_default();
        endpoints.iter().map(|endpoint| &endpoint.workload).chain(address)
    }

    /// Whether `peer` is the identity of a waypoint in front of `workload` (its own or one of its services'):
    /// only such a peer may say for whom it speaks.
    pub fn is_own_waypoint(&self, workload: &Workload, peer: &SpiffeId) -> bool {
        let services = workload.services.keys().filter_map(|key| self.service(key));
        let waypoints = services
            .flat_map(|service| service.waypoint.iter().chain(service.weighted_waypoints.iter().map(|(w, _)| w)))
            .chain(&workload.waypoint);
        waypoints.into_iter().any(|waypoint| self.waypoint_workloads(waypoint).any(|w| w.identity == *peer))
    }

    /// Whether any service that can lead to `target_port` of `workload` has a waypoint, or the workload itself:
    /// such a port must not be reached past it.
    pub fn is_behind_waypoint(&self, workload: &Workload, target_port: u16) -> bool {
        workload.waypoint.is_some()
            || workload.services.iter().any(|(key, overrides)| {
                self.service(key).is_some_and(|service| {
                    service.has_waypoint()
                        && (overrides.iter().any(|port| port.target_port == target_port)
                            || service.ports.iter().any(|port| port.target_port == target_port))
                })
            })
    }

    fn pick_endpoint(
        &self,
        source: &Workload,
        service: &Service,
        service_port: u16,
        purpose: Purpose,
        seed: u64,
    ) -> Result<(&Endpoint, u16), ResolveError> {
        let port = service.port(service_port);
        if port.is_none() && purpose == Purpose::Standard {
            return Err(ResolveError::UndefinedPort { service: service.key.clone(), port: service_port });
        }
        let lb = &service.load_balancing;
        let candidates = self.endpoints(&service.key).iter().filter_map(|endpoint| {
            let workload = &endpoint.workload;
            let healthy = workload.status == Health::Healthy || lb.allow_unhealthy;
            let reachable = !workload.addresses.is_empty() || workload.hostname.is_some();
            if !healthy || !reachable {
                return None;
            }
            let target = target_port(endpoint, port, service_port, purpose)?;
            Some((locality_rank(lb, source, workload)?, endpoint, target))
        });
        choose(candidates, seed)
            .ok_or_else(|| ResolveError::NoHealthyEndpoint { service: service.key.clone(), port: service_port })
    }
}

/// Endpoint's own list, then the service's, then (application tunnel, or a waypoint) the port itself.
fn target_port(endpoint: &Endpoint, port: Option<&Port>, service_port: u16, purpose: Purpose) -> Option<u16> {
    if let Some(own) = endpoint.ports.iter().find(|own| own.service_port == service_port && own.target_port > 0) {
        return Some(own.target_port);
    }
    match port {
        Some(port) if port.target_port > 0 => Some(port.target_port),
        _ if endpoint.workload.application_tunnel.is_some_and(|tunnel| tunnel.port > 0) => Some(service_port),
        _ if purpose == Purpose::Waypoint => Some(service_port),
        _ => None,
    }
}

/// How well an endpoint suits the source; `None` if it must not be chosen.
fn locality_rank(lb: &LoadBalancing, source: &Workload, workload: &Workload) -> Option<usize> {
    if !matches!(lb.mode, LoadBalancingMode::Strict | LoadBalancingMode::Failover) {
        return Some(0);
    }
    let matches = |scope: &LocalityScope| match scope {
        LocalityScope::Region => source.locality.region == workload.locality.region,
        LocalityScope::Zone => source.locality.zone == workload.locality.zone,
        LocalityScope::Subzone => source.locality.subzone == workload.locality.subzone,
        LocalityScope::Node => source.node == workload.node,
        LocalityScope::Cluster => source.cluster_id == workload.cluster_id,
        LocalityScope::Network => source.network == workload.network,
    };
    let scopes = lb.routing_preference.as_slice();
    // A network scope in front dominates: an endpoint of the own network beats all others, and among the
    // others the remaining scopes still count.
    let (scopes, bonus, network) = match scopes.split_first() {
        Some((LocalityScope::Network, rest)) if matches(&LocalityScope::Network) => (rest, scopes.len(), true),
        Some((LocalityScope::Network, rest)) => (rest, 0, false),
        _ => (scopes, 0, true),
    };
    let prefix = scopes.iter().take_while(|scope| matches(scope)).count();
    match lb.mode {
        LoadBalancingMode::Strict if !network || prefix < scopes.len() => None,
        _ => Some(prefix + bonus),
    }
}

/// Weighted random choice among the best-ranked candidates, without collecting them.
fn choose<'a>(
    candidates: impl Iterator<Item = (usize, &'a Endpoint, u16)> + Clone,
    seed: u64,
) -> Option<(&'a Endpoint, u16)> {
    let best = candidates.clone().map(|(rank, _, _)| rank).max()?;
    let best = candidates.filter(|(rank, _, _)| *rank == best);
    let total: u64 = best.clone().map(|(_, endpoint, _)| u64::from(endpoint.workload.capacity)).sum();
    if total == 0 {
        return None;
    }
    let mut left = spread(seed) % total;
    for (_, endpoint, port) in best {
        let weight = u64::from(endpoint.workload.capacity);
        if left < weight {
            return Some((endpoint, port));
        }
        left -= weight;
    }
    None
}

fn pick_waypoint(service: &Service, seed: u64) -> Option<&GatewayAddress> {
    let total: u64 = service.weighted_waypoints.iter().map(|(_, weight)| u64::from(*weight)).sum();
    if total > 0 {
        // Another stream of the seed than the endpoint's choice.
        let mut left = spread(seed.rotate_left(32)) % total;
        for (waypoint, weight) in &service.weighted_waypoints {
            if left < u64::from(*weight) {
                return Some(waypoint);
            }
            left -= u64::from(*weight);
        }
    }
    service.waypoint.as_ref()
}

/// Spreads low-entropy seeds over 64 bits (the finalizer of SplitMix64).
fn spread(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The client's own family if the endpoint has it and the service allows it, else whatever it has.
fn pick_address(workload: &Workload, families: IpFamilies, client: IpAddr) -> Option<IpAddr> {
    let mut allowed = workload.addresses.iter().copied().filter(|ip| families.allows(*ip));
    let first = allowed.next()?;
    if first.is_ipv4() == client.is_ipv4() {
        return Some(first);
    }
    Some(allowed.find(|ip| ip.is_ipv4() == client.is_ipv4()).unwrap_or(first))
}

fn to_workload(addr: SocketAddr, target_port: u16, peer: Peer) -> Upstream {
    if peer.workload.tunnel != Tunnel::Hbone {
        return Upstream::Plain { addr, peer };
    }
    let mut identities = vec![peer.workload.identity.clone()];
    if let Some(service) = &peer.service {
        identities.extend(service.subject_alt_names.iter().cloned());
    }
    Upstream::Hbone {
        addr: SocketAddr::new(addr.ip(), HBONE_PORT),
        authority: SocketAddr::new(addr.ip(), target_port),
        identities,
        peer,
        via: Via::Endpoint,
    }
}

fn describe(waypoint: &GatewayAddress) -> String {
    match &waypoint.destination {
        GatewayDestination::Service(key) => key.to_string(),
        GatewayDestination::Address { ip, .. } => ip.to_string(),
    }
}
