//! Listeners as one waypoint sees them: what it terminates, how a connection finds its chain, the chains.
use std::collections::BTreeMap;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

use super::cluster::{Assignment, Cluster, Originate};
use super::filter::HttpFilter;
use super::matcher::StringMatcher;
use super::rbac::Rbac;
use super::route::RouteConfig;
use super::telemetry::{AccessLog, StatsFilter, Tracing};

/// Everything a waypoint serves: immutable, replaced whole.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct WaypointConfig {
    /// `None` until `connect_terminate` came: nothing may be accepted then.
    pub terminate: Option<Terminate>,
    /// In no particular order; the longest network wins.
    pub dispatch: Vec<DispatchRule>,
    /// Chains by CONNECT authority (`hostname:port`), asked before `dispatch`; only in multi-network meshes.
    pub authorities: BTreeMap<String, ByProtocol>,
    /// By chain name.
    pub chains: BTreeMap<String, Chain>,
    /// By cluster name. Internal hops (`main_internal`, `encap`, `connect_originate`) are not in here,
    /// except that `encap` is a known target: see [`super::cluster::ENCAP`].
    pub clusters: BTreeMap<String, Cluster>,
    /// By EDS name.
    pub endpoints: BTreeMap<String, Assignment>,
    /// TLS and HTTP/2 settings of the HBONE connections the waypoint opens. `None`: none may be opened.
    pub originate: Option<Originate>,
    /// Connections that found no chain are logged by these.
    pub no_chain_logs: Vec<AccessLog>,
}

/// `connect_terminate`: the HBONE listener.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Terminate {
    pub port: u16,
    /// The peer's URI SAN must match one; empty: any certificate of the trusted roots.
    pub peer_sans: Vec<StringMatcher>,
    /// Evaluated on the CONNECT request (`ENABLE_LAYERED_WAYPOINT_AUTHORIZATION_POLICIES`).
    pub rbac: Vec<Rbac>,
    pub max_concurrent_streams: Option<u32>,
    pub keepalive: Option<Keepalive>,
    pub access_logs: Vec<AccessLog>,
    /// Why nothing may pass, if something touching security was not understood.
    pub closed: Option<String>,
}

/// HTTP/2 pings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Keepalive {
    pub interval: Duration,
    pub timeout: Duration,
}

/// Which chains serve destinations within some networks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DispatchRule {
    pub networks: Vec<IpNet>,
    pub ports: BTreeMap<u16, ByProtocol>,
    /// Ports not in `ports`.
    pub any_port: Option<ByProtocol>,
}

/// Chain names by the protocol the client was found to speak; `None`: the connection is closed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ByProtocol {
    pub http10: Option<String>,
    pub http11: Option<String>,
    /// HTTP/2 with prior knowledge.
    pub h2c: Option<String>,
    /// Anything else, and clients that say nothing in time.
    pub other: Option<String>,
}

impl ByProtocol {
    /// The same chain whatever the protocol is.
    pub fn always(chain: &str) -> Self {
        let chain = Some(chain.to_owned());
        Self { http10: chain.clone(), http11: chain.clone(), h2c: chain.clone(), other: chain }
    }

    /// Whether the first bytes must be looked at to choose.
    pub fn needs_sniffing(&self) -> bool {
        self.http11 != self.other || self.h2c != self.other || self.http10 != self.other
    }
}

/// One chain.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Chain {
    pub name: String,
    pub kind: ChainKind,
}

/// What a chain does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum ChainKind {
    Http(Box<HttpChain>),
    Tcp(Box<TcpChain>),
    /// Something touching security was not understood: every connection is closed.
    Closed {
        reason: String,
    },
}

/// Requests.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HttpChain {
    pub options: HttpOptions,
    pub filters: Vec<HttpFilter>,
    pub routes: RouteConfig,
    pub access_logs: Vec<AccessLog>,
    pub tracing: Option<Tracing>,
}

/// Options of the connection manager.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HttpOptions {
    pub server_name: String,
    pub server_header: ServerHeader,
    pub path: PathOptions,
    /// Upgrades offered to clients, lower case (`websocket`, `connect`).
    pub upgrades: Vec<String>,
    /// Idle time of a stream. `None`: no limit.
    pub stream_idle_timeout: Option<Duration>,
    /// Idle time of a connection. `None`: no limit.
    pub idle_timeout: Option<Duration>,
    /// `None`: no limit.
    pub request_timeout: Option<Duration>,
    pub request_headers_timeout: Option<Duration>,
    pub max_connection_duration: Option<Duration>,
    pub max_stream_duration: Option<Duration>,
    pub max_requests_per_connection: Option<u32>,
    /// Kibibytes; Envoy's default is 60.
    pub max_request_headers_kb: u32,
    /// Number of headers; Envoy's default is 100.
    pub max_headers_count: u32,
    /// Answer 400 to (or drop) headers whose name has an underscore.
    pub underscores: UnderscoreAction,
    pub drain_timeout: Duration,
    pub accept_http10: bool,
    pub default_host_http10: Option<String>,
    /// Keep the case of HTTP/1 header names.
    pub preserve_header_case: bool,
    pub max_concurrent_streams: Option<u32>,
    pub forward_100_continue: bool,
    pub use_remote_address: bool,
    pub xff_trusted_hops: u32,
    pub client_cert: ForwardClientCert,
    pub generate_request_id: bool,
    pub preserve_external_request_id: bool,
    pub always_set_request_id_in_response: bool,
    /// `x-envoy-*`, `via`: appended if set.
    pub via: Option<String>,
    pub strip_port_from_host: bool,
}

/// How the `server` response header is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ServerHeader {
    Overwrite,
    AppendIfAbsent,
    PassThrough,
}

/// `headers_with_underscores_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum UnderscoreAction {
    Allow,
    Reject,
    Drop,
}

/// `x-forwarded-client-cert`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ForwardClientCert {
    /// Remove it from requests.
    Sanitize,
    ForwardOnly,
    AppendForward,
    SanitizeSet,
    AlwaysForwardOnly,
}

/// Normalisation of the path before filters and routes see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct PathOptions {
    /// RFC 3986 normalisation, `\` becomes `/`.
    pub normalize: bool,
    pub merge_slashes: bool,
    pub escaped_slashes: EscapedSlashes,
}

/// `path_with_escaped_slashes_action`: what `%2F` and `%5C` (any case) mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum EscapedSlashes {
    #[default]
    Keep,
    /// Answer 400.
    Reject,
    /// Answer 307 with the unescaped path.
    UnescapeAndRedirect,
    UnescapeAndForward,
}

/// Bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TcpChain {
    pub rbac: Vec<Rbac>,
    pub target: TcpTarget,
    /// `None`: no limit. Envoy's default is one hour.
    pub idle_timeout: Option<Duration>,
    pub max_connection_duration: Option<Duration>,
    pub hash_source_ip: bool,
    pub max_connect_attempts: u32,
    pub access_logs: Vec<AccessLog>,
    /// What is changed of the metrics.
    pub stats: Option<StatsFilter>,
}

/// Where a TCP connection goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum TcpTarget {
    Cluster(String),
    /// (cluster, weight); weight 0 gets nothing.
    Weighted(Vec<(String, u32)>),
}
