//! Compiled chains.
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use l7_authz::l7::{Rbac, RequestView};
use xds_model::envoy::chain as config;
use xds_model::envoy::cluster::{Cluster, ENCAP};
use xds_model::envoy::filter::{HttpFilterKind, Router};
use xds_model::envoy::jwt::JwtAuthn;
use xds_model::envoy::telemetry::{AccessLog, StatsFilter, Tracing};

use crate::CompileError;
use crate::decision::{Decision, Global};
use crate::ext_authz::ExtAuthz;
use crate::filter::Fault;
use crate::headers::HeaderOps;
use crate::redirect::split_port;
use crate::route::{Route, VirtualHost};

/// A cluster by name, looked up when the snapshot was made.
#[derive(Debug, Clone)]
pub struct ClusterRef {
    pub name: Arc<str>,
    pub target: ClusterTarget,
}

/// What a [`ClusterRef`] stands for.
#[derive(Debug, Clone)]
pub enum ClusterTarget {
    Cluster(Arc<Cluster>),
    /// HBONE to the address the client asked for.
    Encap,
    /// Not there (yet).
    Unknown,
}

/// All clusters of a snapshot.
#[derive(Debug, Clone, Default)]
pub struct Clusters(pub(crate) HashMap<Arc<str>, Arc<Cluster>>);

impl Clusters {
    /// A reference, whether the cluster is there or not.
    pub fn reference(&self, name: &str) -> ClusterRef {
        match self.0.get_key_value(name) {
            Some((name, cluster)) => ClusterRef { name: name.clone(), target: ClusterTarget::Cluster(cluster.clone()) },
            None if name == ENCAP => ClusterRef { name: ENCAP.into(), target: ClusterTarget::Encap },
            None => ClusterRef { name: name.into(), target: ClusterTarget::Unknown },
        }
    }

    /// A cluster by name.
    pub fn get(&self, name: &str) -> Option<&Arc<Cluster>> {
        self.0.get(name)
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Cluster>> {
        self.0.values()
    }
}

/// One chain.
#[derive(Debug)]
pub struct Chain {
    pub name: Arc<str>,
    pub kind: ChainKind,
}

/// What a chain does.
#[derive(Debug)]
pub enum ChainKind {
    Http(Box<HttpChain>),
    Tcp(Box<TcpChain>),
    /// Close the connection; the configuration could not be honoured.
    Closed {
        reason: Arc<str>,
    },
}

impl Chain {
    /// Compiles; what does not compile fails closed and is named in `errors`.
    pub(crate) fn compile(config: &config::Chain, clusters: &Clusters, errors: &mut Vec<String>) -> Self {
        let name: Arc<str> = config.name.as_str().into();
        let closed = |reason: &str| ChainKind::Closed { reason: reason.into() };
        let kind = match &config.kind {
            config::ChainKind::Closed { reason } => closed(reason),
            config::ChainKind::Tcp(chain) => ChainKind::Tcp(Box::new(TcpChain::compile(chain, clusters, errors))),
            config::ChainKind::Http(chain) => match HttpChain::compile(chain, clusters, errors) {
                Ok(chain) => ChainKind::Http(Box::new(chain)),
                Err(error) => {
                    errors.push(error.to_string());
                    closed(&error.to_string())
                }
            },
        };
        Self { name, kind }
    }
}

/// A filter of an HTTP chain.
#[derive(Debug)]
pub struct HttpFilter {
    pub name: Arc<str>,
    pub kind: FilterKind,
}

/// What a filter is.
#[derive(Debug)]
pub enum FilterKind {
    Rbac(Box<Rbac>),
    /// `l7-authn` compiles it.
    JwtAuthn(Arc<JwtAuthn>),
    ExtAuthz(Box<ExtAuthz>),
    /// Policy: [`Decision::cors`].
    Cors,
    /// [`Decision::fault`] comes before this one.
    Fault(Option<Box<Fault>>),
    HeaderMutation {
        request: HeaderOps,
        response: HeaderOps,
    },
    GrpcStats,
    GrpcWeb,
    Stats(Box<StatsFilter>),
    PeerMetadata,
    /// Always the last one.
    Router(Router),
}

/// An HTTP chain.
#[derive(Debug)]
pub struct HttpChain {
    pub options: config::HttpOptions,
    /// In the order they run; the last one is the router.
    pub filters: Box<[HttpFilter]>,
    pub access_logs: Box<[AccessLog]>,
    pub tracing: Option<Tracing>,
    hosts: VirtualHosts,
    global: Global,
}

impl HttpChain {
    fn compile(
        config: &config::HttpChain,
        clusters: &Clusters,
        errors: &mut Vec<String>,
    ) -> Result<Self, CompileError> {
        let filters = config
            .filters
            .iter()
            .filter_map(|filter| {
                let kind = compile_filter(&filter.kind, errors).transpose()?;
                Some(kind.map(|kind| HttpFilter { name: filter.name.as_str().into(), kind }))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            options: config.options.clone(),
            filters,
            access_logs: config.access_logs.clone().into(),
            tracing: config.tracing.clone(),
            hosts: VirtualHosts::compile(&config.routes, clusters, errors)?,
            global: Global {
                request_headers: HeaderOps::compile(&config.routes.request_headers)?,
                response_headers: HeaderOps::compile(&config.routes.response_headers)?,
                most_specific_wins: config.routes.most_specific_header_mutations_wins,
            },
        })
    }

    /// Decides: the first route of the virtual host that matches. `seed` is any uniformly distributed number, the
    /// same for one request each time it is decided.
    pub fn decide(&self, request: &RequestView<'_>, seed: u64) -> Decision<'_> {
        let Some(host) = self.hosts.find(request.authority) else {
            return Decision::not_found(&self.global, None);
        };
        match host.routes.iter().find(|route| route.matcher.mismatch(request, seed).is_none()) {
            Some(route) => Decision::of(&self.global, host, route, seed),
            None => Decision::not_found(&self.global, Some(host)),
        }
    }

    /// The virtual host for an authority.
    pub fn host(&self, authority: &str) -> Option<&VirtualHost> {
        self.hosts.find(authority)
    }

    /// All routes, with their virtual hosts.
    pub fn routes(&self) -> impl Iterator<Item = (&VirtualHost, &Route)> {
        self.hosts.hosts.iter().flat_map(|host| host.routes.iter().map(move |route| (host, route)))
    }
}

fn compile_filter(kind: &HttpFilterKind, errors: &mut Vec<String>) -> Result<Option<FilterKind>, CompileError> {
    Ok(Some(match kind {
        HttpFilterKind::Rbac(config) => {
            let (rbac, reasons) = Rbac::compile(config);
            errors.extend(reasons);
            FilterKind::Rbac(Box::new(rbac))
        }
        HttpFilterKind::JwtAuthn(config) => FilterKind::JwtAuthn(Arc::new((**config).clone())),
        HttpFilterKind::ExtAuthz(config) => FilterKind::ExtAuthz(Box::new(ExtAuthz::compile(config)?)),
        HttpFilterKind::Cors => FilterKind::Cors,
        HttpFilterKind::Fault(config) => {
            FilterKind::Fault(config.as_deref().map(Fault::compile).transpose()?.map(Box::new))
        }
        HttpFilterKind::HeaderMutation { request, response } => FilterKind::HeaderMutation {
            request: HeaderOps::compile(request)?,
            response: HeaderOps::compile(response)?,
        },
        HttpFilterKind::GrpcStats { emit_filter_state: _ } => FilterKind::GrpcStats,
        HttpFilterKind::GrpcWeb => FilterKind::GrpcWeb,
        HttpFilterKind::Stats(config) => FilterKind::Stats(config.clone()),
        HttpFilterKind::PeerMetadata => FilterKind::PeerMetadata,
        // Its values are carried by the connection.
        HttpFilterKind::FilterState(_) => return Ok(None),
        // The cluster says the same.
        HttpFilterKind::DynamicForwardProxy => return Ok(None),
        HttpFilterKind::Router(router) => FilterKind::Router(*router),
    }))
}

/// Virtual hosts by name.
#[derive(Debug, Default)]
struct VirtualHosts {
    hosts: Box<[VirtualHost]>,
    exact: HashMap<Box<str>, usize>,
    /// Longest first: (`.example.com`, host).
    suffixes: Vec<(Box<str>, usize)>,
    /// Longest first: (`example.`, host).
    prefixes: Vec<(Box<str>, usize)>,
    any: Option<usize>,
    ignore_port: bool,
}

impl VirtualHosts {
    fn compile(
        config: &xds_model::envoy::route::RouteConfig,
        clusters: &Clusters,
        errors: &mut Vec<String>,
    ) -> Result<Self, CompileError> {
        let mut out = Self { ignore_port: config.ignore_port_in_host, ..Self::default() };
        let mut hosts = Vec::with_capacity(config.virtual_hosts.len());
        for (index, host) in config.virtual_hosts.iter().enumerate() {
            for domain in &host.domains {
                if domain == "*" {
                    out.any.get_or_insert(index);
                } else if let Some(suffix) = domain.strip_prefix('*') {
                    out.suffixes.push((suffix.into(), index));
                } else if let Some(prefix) = domain.strip_suffix('*') {
                    out.prefixes.push((prefix.into(), index));
                } else {
                    out.exact.entry(domain.as_str().into()).or_insert(index);
                }
            }
            hosts.push(VirtualHost::compile(host, clusters, errors)?);
        }
        out.suffixes.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        out.prefixes.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        out.hosts = hosts.into();
        Ok(out)
    }

    /// Exact names, then the longest suffix, then the longest prefix, then `*`.
    fn find(&self, authority: &str) -> Option<&VirtualHost> {
        let named = !self.exact.is_empty() || !self.suffixes.is_empty() || !self.prefixes.is_empty();
        let index = if named { self.find_named(authority).or(self.any) } else { self.any };
        self.hosts.get(index?)
    }

    fn find_named(&self, authority: &str) -> Option<usize> {
        let host = if self.ignore_port { split_port(authority).0 } else { authority };
        let host = host.to_ascii_lowercase();
        if let Some(index) = self.exact.get(host.as_str()) {
            return Some(*index);
        }
        // A wildcard stands for at least one character.
        let suffix = self.suffixes.iter().find(|(text, _)| host.len() > text.len() && host.ends_with(&**text));
        let prefix = || self.prefixes.iter().find(|(text, _)| host.len() > text.len() && host.starts_with(&**text));
        suffix.or_else(prefix).map(|(_, index)| *index)
    }
}

/// A TCP chain.
#[derive(Debug)]
pub struct TcpChain {
    /// In the order they run.
    pub rbac: Box<[Rbac]>,
    clusters: Box<[(ClusterRef, u32)]>,
    total: u64,
    /// `None`: no limit.
    pub idle_timeout: Option<Duration>,
    pub max_connection_duration: Option<Duration>,
    pub hash_source_ip: bool,
    pub max_connect_attempts: u32,
    pub access_logs: Box<[AccessLog]>,
    /// What is changed of the metrics.
    pub stats: Option<StatsFilter>,
}

impl TcpChain {
    fn compile(config: &config::TcpChain, clusters: &Clusters, errors: &mut Vec<String>) -> Self {
        let rbac = config.rbac.iter().map(|config| {
            let (rbac, reasons) = Rbac::compile(config);
            errors.extend(reasons);
            rbac
        });
        let rbac = rbac.collect();
        let shares: Box<[_]> = match &config.target {
            config::TcpTarget::Cluster(name) => Box::new([(clusters.reference(name), 1)]),
            config::TcpTarget::Weighted(list) => {
                list.iter().map(|(name, weight)| (clusters.reference(name), *weight)).collect()
            }
        };
        Self {
            rbac,
            total: shares.iter().map(|(_, weight)| u64::from(*weight)).sum::<u64>().max(1),
            clusters: shares,
            idle_timeout: config.idle_timeout,
            max_connection_duration: config.max_connection_duration,
            hash_source_ip: config.hash_source_ip,
            max_connect_attempts: config.max_connect_attempts,
            access_logs: config.access_logs.clone().into(),
            stats: config.stats.clone(),
        }
    }

    /// The cluster for a seed; a weight of 0 gets exactly nothing.
    pub fn choose(&self, seed: u64) -> &ClusterRef {
        let mut point = seed % self.total;
        for (cluster, weight) in &self.clusters {
            if point < u64::from(*weight) {
                return cluster;
            }
            point -= u64::from(*weight);
        }
        // `point` is less than the sum of the weights; translation makes at least one entry.
        &self.clusters[self.clusters.len() - 1].0
    }
}
