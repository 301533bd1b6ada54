//! Workloads and services as plain types; the meaning of each field is xds-contract section 2.1.
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

use crate::spiffe::SpiffeId;

/// Key of a service: `namespace/hostname`, also its resource name.
pub type ServiceKey = Arc<str>;

/// A pod or an external endpoint with an identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Primary key, stable over changes of address: `CLUSTER//Pod/NAMESPACE/NAME` for pods.
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    /// Empty for workloads known by `hostname` only.
    #[serde(rename = "workloadIps")]
    pub addresses: Vec<IpAddr>,
    /// To be resolved by DNS where there is no address.
    pub hostname: Option<Arc<str>>,
    pub network: Arc<str>,
    #[serde(rename = "protocol")]
    pub tunnel: Tunnel,
    /// From trust domain, namespace and service account.
    pub identity: SpiffeId,
    /// Used only for traffic that is not addressed to a service.
    pub waypoint: Option<GatewayAddress>,
    /// East-west gateway of the workload's network.
    pub network_gateway: Option<GatewayAddress>,
    pub node: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub workload_name: Arc<str>,
    pub workload_type: WorkloadType,
    /// The application terminates HBONE itself.
    pub native_tunnel: bool,
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Services the workload is an endpoint of, with the ports that override the service's.
    pub services: BTreeMap<ServiceKey, Vec<Port>>,
    /// Names (`namespace/name`) of the policies that select this workload.
    pub authorization_policies: Vec<Arc<str>>,
    pub status: Health,
    pub cluster_id: Arc<str>,
    pub locality: Locality,
    /// The address is the node's, shared: never looked up by address, never captured.
    pub host_network: bool,
    /// Weight in the random choice of an endpoint.
    pub capacity: u32,
}

/// A name with virtual addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub key: ServiceKey,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
    #[serde(rename = "vips")]
    pub addresses: Vec<VirtualAddress>,
    pub ports: Vec<Port>,
    /// Further identities any endpoint may present.
    pub subject_alt_names: Vec<SpiffeId>,
    pub waypoint: Option<GatewayAddress>,
    /// Sampled per connection; all weights zero falls back to `waypoint`.
    pub weighted_waypoints: Vec<(GatewayAddress, u32)>,
    pub load_balancing: LoadBalancing,
    pub ip_families: IpFamilies,
    /// Wins where several services claim one name or address.
    pub canonical: bool,
    /// For gateways; a node proxy ignores it.
    pub ingress_use_waypoint: bool,
    /// Only clients of the same namespace see the service.
    pub private: bool,
}

impl Service {
    /// The port list's entry for a service port.
    pub fn port(&self, service_port: u16) -> Option<&Port> {
        self.ports.iter().find(|port| port.service_port == service_port)
    }

    /// Whether traffic to this service goes through a waypoint.
    pub fn has_waypoint(&self) -> bool {
        self.waypoint.is_some() || self.weighted_waypoints.iter().any(|(_, weight)| *weight > 0)
    }
}

/// How a workload wants to be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Tunnel {
    #[serde(rename = "TCP")]
    None,
    Hbone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Health {
    Healthy,
    Unhealthy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkloadType {
    Deployment,
    CronJob,
    Pod,
    Job,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

/// Where decapsulated bytes go if not to the application's own port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ApplicationTunnel {
    /// Precede the bytes with a PROXY protocol v2 header.
    pub proxy_protocol: bool,
    /// 0: the port that was asked for.
    pub port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    pub service_port: u16,
    /// 0: see the endpoint's own list.
    pub target_port: u16,
}

/// An address of a service in one network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VirtualAddress {
    pub network: Arc<str>,
    pub prefix: IpNet,
}

/// A waypoint or a network gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayAddress {
    pub destination: GatewayDestination,
    /// The gateway's HBONE port; 15008 where the control plane does not say.
    pub hbone_mtls_port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum GatewayDestination {
    /// A service by key.
    Service(ServiceKey),
    /// A service's VIP or a workload's address.
    Address { network: Arc<str>, ip: IpAddr },
}

/// Order and rule of choice among a service's endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancing {
    pub routing_preference: Vec<LocalityScope>,
    pub mode: LoadBalancingMode,
    /// Unhealthy endpoints are chosen too.
    pub allow_unhealthy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum LocalityScope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum LoadBalancingMode {
    #[default]
    Standard,
    /// Every scope must match.
    Strict,
    /// The longest prefix of matching scopes wins.
    Failover,
    /// The connection goes where the client sent it.
    Passthrough,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum IpFamilies {
    Automatic,
    V4Only,
    V6Only,
    Dual,
}

impl IpFamilies {
    /// Whether an endpoint's address may be chosen.
    pub fn allows(self, ip: IpAddr) -> bool {
        match self {
            IpFamilies::Automatic | IpFamilies::Dual => true,
            IpFamilies::V4Only => ip.is_ipv4(),
            IpFamilies::V6Only => ip.is_ipv6(),
        }
    }
}

/// An address as a socket address, IPv4 in its own family even where it came mapped.
pub fn unmapped(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
