//! Everything a waypoint decides by, immutable.
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use l7_authz::l7::Rbac;
use l7_authz::l7::matcher::StringMatch;
use xds_model::envoy::chain::{ByProtocol, Terminate as TerminateConfig};
use xds_model::envoy::cluster::{Assignment, Cluster, Discovery, Originate as OriginateConfig};
use xds_model::envoy::matcher::StringMatcher;
use xds_model::envoy::telemetry::AccessLog;
use xds_model::envoy::{Rejection, WaypointConfig};
use xds_proto::type_url::{CLUSTER, LISTENER};

use crate::chain::{Chain, Clusters};

/// What the client speaks, from its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sniffed {
    Http10,
    Http11,
    /// HTTP/2 with prior knowledge.
    H2c,
    /// Anything else, or nothing in time.
    Other,
}

/// A compiled configuration.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// `None`: accept nothing.
    pub terminate: Option<Terminate>,
    pub originate: Option<Originate>,
    pub clusters: Clusters,
    pub no_chain_logs: Box<[AccessLog]>,
    chains: HashMap<Arc<str>, Arc<Chain>>,
    endpoints: HashMap<Box<str>, Arc<Assignment>>,
    /// Single addresses.
    hosts: HashMap<IpAddr, Ports>,
    /// Longest first.
    networks: Vec<(IpNet, Ports)>,
    authorities: HashMap<Box<str>, Dispatch>,
}

/// The HBONE listener.
#[derive(Debug)]
pub struct Terminate {
    pub config: TerminateConfig,
    /// On the CONNECT request.
    pub rbac: Box<[Rbac]>,
    peers: Peers,
}

/// HBONE connections to endpoints.
#[derive(Debug)]
pub struct Originate {
    pub config: OriginateConfig,
    peers: Peers,
}

/// URI SANs of acceptable peers.
#[derive(Debug, Default)]
struct Peers(Box<[StringMatch]>);

impl Peers {
    fn compile(config: &[StringMatcher]) -> Result<Self, String> {
        StringMatch::compile_all(config).map(Self).map_err(|error| format!("match_typed_subject_alt_names: {error}"))
    }

    fn accepts(&self, uri: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|test| test.matches(uri.as_bytes()))
    }
}

impl Terminate {
    /// Whether a client with this SPIFFE URI may connect.
    pub fn accepts(&self, uri: &str) -> bool {
        self.config.closed.is_none() && self.peers.accepts(uri)
    }
}

impl Originate {
    /// Whether a server with this SPIFFE URI may be talked to.
    pub fn accepts(&self, uri: &str) -> bool {
        self.peers.accepts(uri)
    }
}

/// Chains by protocol, for one destination.
#[derive(Debug, Clone, Default)]
pub struct Dispatch {
    http10: Option<Arc<Chain>>,
    http11: Option<Arc<Chain>>,
    h2c: Option<Arc<Chain>>,
    other: Option<Arc<Chain>>,
    sniff: bool,
}

impl Dispatch {
    /// Whether the first bytes must be looked at to choose.
    pub fn needs_sniffing(&self) -> bool {
        self.sniff
    }

    /// The chain for a protocol; `None`: close the connection.
    pub fn chain(&self, sniffed: Sniffed) -> Option<&Arc<Chain>> {
        match sniffed {
            Sniffed::Http10 => self.http10.as_ref(),
            Sniffed::Http11 => self.http11.as_ref(),
            Sniffed::H2c => self.h2c.as_ref(),
            Sniffed::Other => self.other.as_ref(),
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Ports {
    ports: HashMap<u16, Dispatch>,
    any: Option<Dispatch>,
}

impl Ports {
    fn get(&self, port: u16) -> Option<&Dispatch> {
        self.ports.get(&port).or(self.any.as_ref())
    }

    /// What is there already wins.
    fn merge(&mut self, other: &Self) {
        for (port, dispatch) in &other.ports {
            self.ports.entry(*port).or_insert_with(|| dispatch.clone());
        }
        if self.any.is_none() {
            self.any.clone_from(&other.any);
        }
    }
}

impl Snapshot {
    /// Compiles a configuration. What does not compile fails closed and is returned as partial rejections.
    pub fn compile(config: &WaypointConfig) -> (Self, Vec<Rejection>) {
        let mut rejections = Vec::new();
        let mut out = Self { no_chain_logs: config.no_chain_logs.clone().into(), ..Self::default() };
        let clusters = config.clusters.iter();
        out.clusters =
            Clusters(clusters.map(|(name, cluster)| (name.as_str().into(), Arc::new(cluster.clone()))).collect());
        let endpoints = config.endpoints.iter();
        out.endpoints =
            endpoints.map(|(name, assignment)| (name.as_str().into(), Arc::new(assignment.clone()))).collect();
        for (name, chain) in &config.chains {
            let mut errors = Vec::new();
            let chain = Arc::new(Chain::compile(chain, &out.clusters, &mut errors));
            out.chains.insert(chain.name.clone(), chain);
            let named = errors.into_iter().map(|error| format!("chain {name}: {error}"));
            rejections.extend(named.map(|reason| rejection(LISTENER, "main_internal", reason)));
        }
        out.index(config, &mut rejections);
        out.terminate = config.terminate.as_ref().map(|config| terminate(config, &mut rejections));
        out.originate = config.originate.as_ref().and_then(|config| match Peers::compile(&config.peer_sans) {
            Ok(peers) => Some(Originate { config: config.clone(), peers }),
            Err(reason) => {
                rejections.push(rejection(CLUSTER, "connect_originate", reason));
                None
            }
        });
        (out, rejections)
    }

    fn index(&mut self, config: &WaypointConfig, rejections: &mut Vec<Rejection>) {
        let mut missing = std::collections::BTreeSet::new();
        let mut resolve = |by: &ByProtocol| {
            let mut get = |name: &Option<String>| {
                let name = name.as_ref()?;
                let chain = self.chains.get(name.as_str()).cloned();
                if chain.is_none() {
                    missing.insert(name.clone());
                }
                chain
            };
            Dispatch {
                http10: get(&by.http10),
                http11: get(&by.http11),
                h2c: get(&by.h2c),
                other: get(&by.other),
                sniff: by.needs_sniffing(),
            }
        };
        let mut networks: HashMap<IpNet, Ports> = HashMap::new();
        for rule in &config.dispatch {
            let ports = Ports {
                ports: rule.ports.iter().map(|(port, by)| (*port, resolve(by))).collect(),
                any: rule.any_port.as_ref().map(&mut resolve),
            };
            for network in &rule.networks {
                networks.entry(*network).or_default().merge(&ports);
            }
        }
        let authorities = config.authorities.iter();
        let authorities = authorities.map(|(name, by)| (name.as_str().into(), resolve(by))).collect();
        self.authorities = authorities;
        let (hosts, mut networks): (Vec<_>, Vec<_>) =
            networks.into_iter().partition(|(network, _)| network.prefix_len() == network.max_prefix_len());
        self.hosts = hosts.into_iter().map(|(network, ports)| (network.addr(), ports)).collect();
        networks.sort_by_key(|(network, _)| (std::cmp::Reverse(network.prefix_len()), *network));
        self.networks = networks;
        for name in missing {
            rejections.push(rejection(LISTENER, "main_internal", format!("chain {name} is not there")));
        }
    }

    /// How connections to `destination` find their chain; `None`: close. The longest network that knows the port
    /// wins.
    pub fn dispatch(&self, destination: SocketAddr) -> Option<&Dispatch> {
        let ip = destination.ip().to_canonical();
        let port = destination.port();
        self.hosts.get(&ip).and_then(|ports| ports.get(port)).or_else(|| {
            self.networks.iter().filter(|(network, _)| network.contains(&ip)).find_map(|(_, ports)| ports.get(port))
        })
    }

    /// The same by CONNECT authority (`hostname:port`), in multi-network meshes.
    pub fn dispatch_authority(&self, authority: &str) -> Option<&Dispatch> {
        self.authorities.get(authority)
    }

    /// The chain for a destination and protocol; `None`: close.
    pub fn chain(&self, destination: SocketAddr, sniffed: Sniffed) -> Option<&Arc<Chain>> {
        self.dispatch(destination)?.chain(sniffed)
    }

    /// A chain by name.
    pub fn chain_named(&self, name: &str) -> Option<&Arc<Chain>> {
        self.chains.get(name)
    }

    /// All chains, in no order.
    pub fn chains(&self) -> impl Iterator<Item = &Arc<Chain>> {
        self.chains.values()
    }

    /// Endpoints known for a cluster that has them by discovery or in itself.
    pub fn endpoints(&self, cluster: &Cluster) -> Option<Arc<Assignment>> {
        match &cluster.discovery {
            Discovery::Eds(name) => self.endpoints.get(name.as_str()).cloned(),
            Discovery::Static(assignment) => Some(Arc::new(assignment.clone())),
            _ => None,
        }
    }
}

fn terminate(config: &TerminateConfig, rejections: &mut Vec<Rejection>) -> Terminate {
    let mut config = config.clone();
    let rbac = config.rbac.iter().map(|config| {
        let (rbac, errors) = Rbac::compile(config);
        rejections.extend(errors.into_iter().map(|reason| rejection(LISTENER, "connect_terminate", reason)));
        rbac
    });
    let rbac = rbac.collect();
    let peers = Peers::compile(&config.peer_sans).unwrap_or_else(|reason| {
        rejections.push(rejection(LISTENER, "connect_terminate", reason.clone()));
        config.closed = Some(reason);
        Peers::default()
    });
    Terminate { config, rbac, peers }
}

fn rejection(type_url: &str, name: &str, reason: String) -> Rejection {
    Rejection { type_url: type_url.to_owned(), name: name.to_owned(), reason, partial: true }
}
