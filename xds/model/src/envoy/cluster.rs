//! Clusters and endpoints.
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;

use super::matcher::StringMatcher;

/// Name of the cluster that stands for "the address the client asked for" (workload-addressed traffic):
/// the target is HBONE to the CONNECT authority itself. It is never in [`super::WaypointConfig::clusters`].
pub const ENCAP: &str = "encap";

/// One upstream service (or subset of one).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cluster {
    pub name: String,
    /// `istio.services[0]` of its metadata.
    pub service: Option<ServiceName>,
    /// `istio.config`: the DestinationRule it was made under.
    pub config: Option<String>,
    pub subset: Option<String>,
    pub discovery: Discovery,
    pub lb: LbPolicy,
    pub locality: LocalityMode,
    /// Percent of healthy endpoints under which health is ignored; 0 turns panic off.
    pub panic_threshold: f64,
    pub connect_timeout: Duration,
    pub limits: CircuitBreakers,
    pub outlier: Option<OutlierDetection>,
    pub http: UpstreamHttp,
    /// User TLS, inside HBONE if the endpoint is behind HBONE.
    pub tls: Option<UpstreamTls>,
    /// PROXY protocol header version sent first.
    pub proxy_protocol: Option<u8>,
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Close connections to endpoints that are gone or turn unhealthy.
    pub close_on_health_failure: bool,
}

/// A service's name as telemetry shows it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ServiceName {
    pub host: String,
    pub name: String,
    pub namespace: String,
}

/// How endpoints are found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Discovery {
    /// By this name in [`super::WaypointConfig::endpoints`].
    Eds(String),
    Static(Assignment),
    /// Names to resolve. `logical`: one address at a time.
    Dns {
        hosts: Vec<DnsHost>,
        logical: bool,
        refresh: Duration,
        respect_ttl: bool,
        family: DnsFamily,
    },
    /// The address the client asked for.
    OriginalDestination {
        port_override: Option<u16>,
    },
    /// The host the request names (`DYNAMIC_DNS`).
    DynamicForward {
        family: DnsFamily,
    },
}

/// A name to resolve.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DnsHost {
    pub host: String,
    pub port: u16,
    pub weight: u32,
    pub priority: u32,
    pub locality: Locality,
}

/// Which addresses to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum DnsFamily {
    #[default]
    Auto,
    V4Only,
    V6Only,
    V4Preferred,
    All,
}

/// Endpoint choice.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum LbPolicy {
    RoundRobin {
        slow_start: Option<SlowStart>,
    },
    LeastRequest {
        choices: u32,
        slow_start: Option<SlowStart>,
    },
    Random,
    RingHash {
        minimum: u64,
        maximum: u64,
    },
    Maglev {
        table_size: u64,
    },
    /// The discovery decides.
    ClusterProvided,
}

/// A new endpoint gets more load gradually.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SlowStart {
    pub window: Duration,
    pub aggression: f64,
    /// Percent.
    pub min_weight: f64,
}

/// How localities count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum LocalityMode {
    /// All endpoints of a priority alike.
    None,
    /// First a locality by its weight, then an endpoint.
    Weighted,
    ZoneAware,
}

/// Limits; `u32::MAX` means none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CircuitBreakers {
    pub max_connections: u32,
    pub max_pending_requests: u32,
    pub max_requests: u32,
    pub max_retries: u32,
    pub retry_budget: Option<RetryBudget>,
}

/// Retries as a share of active requests, over `max_retries`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RetryBudget {
    pub percent: f64,
    pub min_concurrency: u32,
}

/// Ejection of endpoints that misbehave. A count of 0 turns that detector off.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct OutlierDetection {
    pub consecutive_5xx: u32,
    pub consecutive_gateway_failure: u32,
    pub consecutive_local_origin_failure: u32,
    pub split_external_local_origin: bool,
    pub interval: Duration,
    pub base_ejection: Duration,
    pub max_ejection: Duration,
    pub max_ejection_percent: u32,
}

/// HTTP to the upstream.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UpstreamHttp {
    pub version: UpstreamVersion,
    /// Of a pooled connection. Envoy's default is one hour.
    pub idle_timeout: Option<Duration>,
    pub max_connection_duration: Option<Duration>,
    /// `None`: no limit.
    pub max_requests_per_connection: Option<u32>,
    pub max_concurrent_streams: Option<u32>,
    pub preserve_header_case: bool,
    /// Persistent sessions: the host named by the override wins.
    pub override_host: bool,
}

/// Protocol spoken upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum UpstreamVersion {
    Http1,
    Http2,
    /// What the client spoke.
    SameAsDownstream,
    /// ALPN decides.
    Auto,
}

/// TLS to the upstream.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UpstreamTls {
    pub sni: Option<String>,
    /// SNI from the request's host.
    pub auto_sni: bool,
    pub alpn: Vec<String>,
    /// The server's certificate must chain to these. `None`: it is not verified (`insecureSkipVerify`
    /// or no CA configured, as the user said).
    pub roots: Option<CertSource>,
    /// One of these SANs must be there; empty: not checked.
    pub sans: Vec<StringMatcher>,
    /// The name in SNI must match the certificate.
    pub auto_san: bool,
    pub client_cert: Option<CertSource>,
    pub crl: Option<CertSource>,
}

/// Where key material comes from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum CertSource {
    /// A secret by its SDS name (`kubernetes://…`, `file-root:…`, `default`, `ROOTCA`).
    Sds(String),
    File(String),
    /// Key pair on disk.
    Files {
        cert: String,
        key: String,
    },
    Inline(Vec<u8>),
    /// The machine's own roots.
    System,
}

/// Seconds and counts; 0 or `None`: the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct TcpKeepalive {
    pub probes: Option<u32>,
    pub time: Option<Duration>,
    pub interval: Option<Duration>,
}

/// HBONE connections the waypoint opens (`connect_originate`).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Originate {
    /// The server's URI SAN must match one; empty: any of the trusted roots.
    pub peer_sans: Vec<StringMatcher>,
    pub connect_timeout: Duration,
    /// Of a pooled HBONE connection.
    pub idle_timeout: Option<Duration>,
    /// Port dialled; 15008.
    pub port: u16,
    pub initial_stream_window: Option<u32>,
    pub initial_connection_window: Option<u32>,
}

/// Endpoints of one cluster.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Assignment {
    pub name: String,
    pub endpoints: Vec<Endpoint>,
    /// (priority, locality, weight) of each group, for weighted localities.
    pub localities: Vec<LocalityWeight>,
    /// Percent; Envoy's default is 140.
    pub overprovisioning: u32,
}

/// Weight of one locality in one priority.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LocalityWeight {
    pub locality: Locality,
    pub priority: u32,
    pub weight: u32,
}

/// Region, zone, sub-zone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, PartialOrd, Ord, Serialize)]
pub struct Locality {
    pub region: String,
    pub zone: String,
    pub sub_zone: String,
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Endpoint {
    pub target: EndpointTarget,
    pub weight: u32,
    pub priority: u32,
    pub locality: Locality,
    pub health: Health,
    /// Host name for automatic host rewrite.
    pub hostname: Option<String>,
    pub workload: Option<WorkloadName>,
}

/// How an endpoint is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub enum EndpointTarget {
    /// CONNECT `authority` over HBONE to `waypoint` or, without one, to the authority's own host.
    Hbone { authority: SocketAddr, waypoint: Option<SocketAddr> },
    /// Straight; the first is tried first.
    Plain { address: SocketAddr, additional: Vec<SocketAddr> },
    /// Not reachable with what is built: skipped by load balancing, counted as unhealthy.
    Unreachable { reason: String },
}

/// Whether the control plane thinks it can take requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Health {
    Healthy,
    Unhealthy,
    Draining,
    Degraded,
}

/// `istio.workload` of an endpoint's metadata.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct WorkloadName {
    pub name: String,
    pub namespace: String,
    pub canonical_name: String,
    pub canonical_revision: String,
    pub cluster: String,
}
