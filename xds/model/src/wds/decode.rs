//! Wire messages to plain types. Every message is destructured whole.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use xds_proto::istio::workload as wire;

use super::types::*;
use crate::spiffe::{SpiffeError, SpiffeId};

/// The HBONE port where the control plane leaves it out.
const HBONE_PORT: u16 = 15008;

/// Why a resource was refused; the previous version of it stays in force.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("not a message of its type: {0}")]
    Protobuf(#[from] prost::DecodeError),
    #[error("{field}: is empty")]
    Missing { field: &'static str },
    #[error("{field}: {value} is not a value this proxy knows")]
    UnknownEnum { field: &'static str, value: i32 },
    #[error("{field}: {length} bytes are not an IP address (4 or 16)")]
    Address { field: &'static str, length: usize },
    #[error("{field}: prefix length {length} does not fit {ip}")]
    PrefixLength { field: &'static str, ip: IpAddr, length: u32 },
    #[error("{field}: port {value} is out of range")]
    Port { field: &'static str, value: u32 },
    #[error("tunnel_protocol: LEGACY_ISTIO_MTLS is not supported, only NONE and HBONE")]
    LegacyTunnel,
    #[error("identity: {0}")]
    Identity(#[from] SpiffeError),
    #[error("resource is called \"{resource}\" but holds \"{content}\"")]
    Name { resource: String, content: String },
}

/// A decoded `istio.workload.Address`.
pub(super) enum Address {
    Workload(Workload),
    Service(Service),
}

/// The mesh's trust domain, used where a workload leaves its own out.
pub(super) fn address(message: wire::Address, trust_domain: &str) -> Result<Address, DecodeError> {
    let wire::Address { r#type } = message;
    match r#type.ok_or(DecodeError::Missing { field: "type" })? {
        wire::address::Type::Workload(message) => Ok(Address::Workload(workload(message, trust_domain)?)),
        wire::address::Type::Service(message) => Ok(Address::Service(service(message)?)),
    }
}

pub(super) fn workload(message: wire::Workload, trust_domain_default: &str) -> Result<Workload, DecodeError> {
    let wire::Workload {
        uid,
        name,
        namespace,
        addresses,
        hostname,
        network,
        tunnel_protocol,
        trust_domain,
        service_account,
        waypoint,
        network_gateway,
        node,
        canonical_name,
        canonical_revision,
        workload_type,
        workload_name,
        native_tunnel,
        application_tunnel,
        services,
        authorization_policies,
        status,
        cluster_id,
        locality,
        network_mode,
        extensions: _, // for other consumers; carries nothing a node proxy acts on
        capacity,
    } = message;
    if uid.is_empty() {
        return Err(DecodeError::Missing { field: "uid" });
    }
    let identity = SpiffeId::new(
        if trust_domain.is_empty() { trust_domain_default } else { &trust_domain },
        &namespace,
        if service_account.is_empty() { "default" } else { &service_account },
    )?;
    let addresses = addresses.iter().map(|a| ip("addresses", a)).collect::<Result<Vec<_>, _>>()?;
    let wire::Locality { region, zone, subzone } = locality.unwrap_or_default();
    Ok(Workload {
        uid: uid.into(),
        name: name.into(),
        namespace: namespace.into(),
        addresses,
        hostname: (!hostname.is_empty()).then(|| hostname.into()),
        network: network.into(),
        tunnel: match known("tunnel_protocol", tunnel_protocol)? {
            wire::TunnelProtocol::None => Tunnel::None,
            wire::TunnelProtocol::Hbone => Tunnel::Hbone,
            wire::TunnelProtocol::LegacyIstioMtls => return Err(DecodeError::LegacyTunnel),
        },
        identity,
        waypoint: gateway("waypoint", waypoint)?,
        network_gateway: gateway("network_gateway", network_gateway)?,
        node: node.into(),
        canonical_name: canonical_name.into(),
        canonical_revision: canonical_revision.into(),
        workload_name: workload_name.into(),
        // Telemetry only: a kind of a later release is no reason to lose the workload.
        workload_type: match wire::WorkloadType::try_from(workload_type) {
            Ok(wire::WorkloadType::Deployment) => WorkloadType::Deployment,
            Ok(wire::WorkloadType::Cronjob) => WorkloadType::CronJob,
            Ok(wire::WorkloadType::Job) => WorkloadType::Job,
            Ok(wire::WorkloadType::Pod) | Err(_) => WorkloadType::Pod,
        },
        native_tunnel,
        application_tunnel: application_tunnel.map(app_tunnel).transpose()?,
        services: services
            .into_iter()
            .map(|(key, wire::PortList { ports: list })| Ok((ServiceKey::from(key), ports("services.ports", list)?)))
            .collect::<Result<BTreeMap<_, _>, DecodeError>>()?,
        authorization_policies: authorization_policies.into_iter().map(Arc::from).collect(),
        status: match known("status", status)? {
            wire::WorkloadStatus::Healthy => Health::Healthy,
            wire::WorkloadStatus::Unhealthy => Health::Unhealthy,
        },
        cluster_id: if cluster_id.is_empty() { "Kubernetes".into() } else { cluster_id.into() },
        locality: Locality { region: region.into(), zone: zone.into(), subzone: subzone.into() },
        host_network: known::<wire::NetworkMode>("network_mode", network_mode)? == wire::NetworkMode::HostNetwork,
        capacity: capacity.unwrap_or(1),
    })
}

fn service(message: wire::Service) -> Result<Service, DecodeError> {
    let wire::Service {
        name,
        namespace,
        hostname,
        addresses,
        ports: port_list,
        subject_alt_names,
        waypoint,
        load_balancing: lb,
        ip_families,
        extensions: _, // see Workload
        canonical,
        ingress_use_waypoint,
        weighted_waypoints,
        visibility,
    } = message;
    if hostname.is_empty() {
        return Err(DecodeError::Missing { field: "hostname" });
    }
    let weighted_waypoints = weighted_waypoints
        .into_iter()
        .map(|wire::WeightedWaypoint { destination, weight }| {
            let destination = gateway("weighted_waypoints.destination", destination)?
                .ok_or(DecodeError::Missing { field: "weighted_waypoints.destination" })?;
            Ok((destination, weight))
        })
        .collect::<Result<Vec<_>, DecodeError>>()?;
    Ok(Service {
        key: format!("{namespace}/{hostname}").into(),
        name: name.into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        addresses: addresses.into_iter().map(virtual_address).collect::<Result<_, _>>()?,
        ports: ports("ports", port_list)?,
        // As the contract (4.4): a name that is no identity can never be presented, so leaving it out only narrows.
        subject_alt_names: subject_alt_names.iter().filter_map(|san| san.parse().ok()).collect(),
        waypoint: gateway("waypoint", waypoint)?,
        weighted_waypoints,
        load_balancing: lb.map(load_balancing).transpose()?.unwrap_or_default(),
        ip_families: match known("ip_families", ip_families)? {
            wire::IpFamilies::Automatic => IpFamilies::Automatic,
            wire::IpFamilies::Ipv4Only => IpFamilies::V4Only,
            wire::IpFamilies::Ipv6Only => IpFamilies::V6Only,
            wire::IpFamilies::Dual => IpFamilies::Dual,
        },
        canonical,
        ingress_use_waypoint,
        // The contract (2.1): a visibility of a later release counts as public.
        private: wire::service::Visibility::try_from(visibility) == Ok(wire::service::Visibility::Namespace),
    })
}

fn load_balancing(message: wire::LoadBalancing) -> Result<LoadBalancing, DecodeError> {
    use wire::load_balancing::{HealthPolicy, Mode, Scope};
    let wire::LoadBalancing { routing_preference, mode, health_policy } = message;
    let mut scopes = Vec::with_capacity(routing_preference.len());
    for scope in routing_preference {
        scopes.push(match known("load_balancing.routing_preference", scope)? {
            Scope::UnspecifiedScope => {
                return Err(DecodeError::Missing { field: "load_balancing.routing_preference" });
            }
            Scope::Region => LocalityScope::Region,
            Scope::Zone => LocalityScope::Zone,
            Scope::Subzone => LocalityScope::Subzone,
            Scope::Node => LocalityScope::Node,
            Scope::Cluster => LocalityScope::Cluster,
            Scope::Network => LocalityScope::Network,
        });
    }
    Ok(LoadBalancing {
        routing_preference: scopes,
        mode: match known("load_balancing.mode", mode)? {
            Mode::UnspecifiedMode => LoadBalancingMode::Standard,
            Mode::Strict => LoadBalancingMode::Strict,
            Mode::Failover => LoadBalancingMode::Failover,
            Mode::Passthrough => LoadBalancingMode::Passthrough,
        },
        allow_unhealthy: known::<HealthPolicy>("load_balancing.health_policy", health_policy)?
            == HealthPolicy::AllowAll,
    })
}

fn app_tunnel(message: wire::ApplicationTunnel) -> Result<ApplicationTunnel, DecodeError> {
    let wire::ApplicationTunnel { protocol, port: number } = message;
    Ok(ApplicationTunnel {
        proxy_protocol: match known("application_tunnel.protocol", protocol)? {
            wire::application_tunnel::Protocol::None => false,
            wire::application_tunnel::Protocol::Proxy => true,
        },
        port: port("application_tunnel.port", number)?,
    })
}

fn gateway(field: &'static str, message: Option<wire::GatewayAddress>) -> Result<Option<GatewayAddress>, DecodeError> {
    let Some(wire::GatewayAddress { destination, hbone_mtls_port }) = message else { return Ok(None) };
    let destination = match destination.ok_or(DecodeError::Missing { field })? {
        wire::gateway_address::Destination::Hostname(wire::NamespacedHostname { namespace, hostname }) => {
            GatewayDestination::Service(format!("{namespace}/{hostname}").into())
        }
        wire::gateway_address::Destination::Address(wire::NetworkAddress { network, address, length: _ }) => {
            GatewayDestination::Address { network: network.into(), ip: ip(field, &address)? }
        }
    };
    let hbone_mtls_port = match port(field, hbone_mtls_port)? {
        0 => HBONE_PORT,
        port => port,
    };
    Ok(Some(GatewayAddress { destination, hbone_mtls_port }))
}

fn virtual_address(message: wire::NetworkAddress) -> Result<VirtualAddress, DecodeError> {
    let wire::NetworkAddress { network, address, length } = message;
    let ip = ip("addresses", &address)?;
    let prefix = match length {
        None => IpNet::from(ip),
        Some(length) => u8::try_from(length)
            .ok()
            .and_then(|length| IpNet::new(ip, length).ok())
            .ok_or(DecodeError::PrefixLength { field: "addresses", ip, length })?
            .trunc(),
    };
    Ok(VirtualAddress { network: network.into(), prefix })
}

fn ports(field: &'static str, list: Vec<wire::Port>) -> Result<Vec<Port>, DecodeError> {
    list.into_iter()
        .map(|wire::Port { service_port, target_port, app_protocol: _ }| {
            // app_protocol is for those who parse requests; a node proxy carries bytes.
            Ok(Port { service_port: port(field, service_port)?, target_port: port(field, target_port)? })
        })
        .collect()
}

pub(super) fn ip(field: &'static str, bytes: &[u8]) -> Result<IpAddr, DecodeError> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).map(IpAddr::from).map_err(|_| DecodeError::Address { field, length: 4 }),
        16 => <[u8; 16]>::try_from(bytes)
            .map(|octets| IpAddr::from(octets).to_canonical())
            .map_err(|_| DecodeError::Address { field, length: 16 }),
        length => Err(DecodeError::Address { field, length }),
    }
}

fn port(field: &'static str, value: u32) -> Result<u16, DecodeError> {
    u16::try_from(value).map_err(|_| DecodeError::Port { field, value })
}

pub(super) fn known<E: TryFrom<i32>>(field: &'static str, value: i32) -> Result<E, DecodeError> {
    E::try_from(value).map_err(|_| DecodeError::UnknownEnum { field, value })
}
