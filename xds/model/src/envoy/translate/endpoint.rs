//! Endpoints.
use std::mem::take;
use std::net::{IpAddr, SocketAddr};

use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::config::endpoint::v3 as wire;

use super::common::{metadata_json, u32_of};
use super::report::{At, Refusable, Refusal, Report, refuse_rest};
use crate::envoy::cluster::{
    Assignment, DnsHost, Endpoint, EndpointTarget, Health, Locality, LocalityWeight, WorkloadName,
};

/// What the metadata of an endpoint calls the addresses of its tunnel.
const ORIGINAL_DST: &str = "envoy.filters.listener.original_dst";
/// The internal listener that makes a tunnel.
const CONNECT_ORIGINATE: &str = "connect_originate";
/// Envoy's default, in percent.
const OVERPROVISIONING: u32 = 140;
const HBONE_PORT: u16 = 15008;

/// Reads a whole assignment.
pub(super) fn assignment(mut message: wire::ClusterLoadAssignment, report: &mut Report) -> Refusable<Assignment> {
    let mut out = Assignment {
        name: take(&mut message.cluster_name),
        overprovisioning: OVERPROVISIONING,
        ..Assignment::default()
    };
    if let Some(mut policy) = message.policy.take() {
        if let Some(factor) = u32_of(policy.overprovisioning_factor.take()) {
            out.overprovisioning = factor;
        }
        refuse_rest(&policy).at("policy")?;
    }
    for group in take(&mut message.endpoints) {
        read_group(group, &mut out, report)?;
    }
    refuse_rest(&message)?;
    Ok(out)
}

fn read_group(mut group: wire::LocalityLbEndpoints, out: &mut Assignment, report: &mut Report) -> Refusable<()> {
    let locality = group.locality.take().map(locality).unwrap_or_default();
    let priority = take(&mut group.priority);
    if let Some(weight) = u32_of(group.load_balancing_weight.take()) {
        out.localities.push(LocalityWeight { locality: locality.clone(), priority, weight });
    }
    group.metadata.take();
    for member in take(&mut group.lb_endpoints) {
        out.endpoints.push(endpoint(member, locality.clone(), priority, report)?);
    }
    refuse_rest(&group).at("endpoints")
}

fn locality(message: core::Locality) -> Locality {
    let core::Locality { region, zone, sub_zone } = message;
    Locality { region, zone, sub_zone }
}

fn health(status: i32) -> Health {
    match core::HealthStatus::try_from(status) {
        Ok(core::HealthStatus::Unknown | core::HealthStatus::Healthy) => Health::Healthy,
        Ok(core::HealthStatus::Draining) => Health::Draining,
        Ok(core::HealthStatus::Degraded) => Health::Degraded,
        Ok(core::HealthStatus::Unhealthy | core::HealthStatus::Timeout) | Err(_) => Health::Unhealthy,
    }
}

fn endpoint(
    mut message: wire::LbEndpoint,
    locality: Locality,
    priority: u32,
    report: &mut Report,
) -> Refusable<Endpoint> {
    let mut host = match message.host_identifier.take() {
        Some(wire::lb_endpoint::HostIdentifier::Endpoint(host)) => host,
        Some(wire::lb_endpoint::HostIdentifier::EndpointName(name)) => {
            return Err(Refusal::new("endpoint_name", format!("{name}: not supported")));
        }
        None => return Err(Refusal::new("host_identifier", "missing")),
    };
    let metadata = message.metadata.take();
    let hostname = Some(take(&mut host.hostname)).filter(|name| !name.is_empty());
    let target = target(&mut host, metadata.as_ref());
    host.health_check_config.take();
    report.ignore_rest("endpoint", &host);
    if let EndpointTarget::Unreachable { reason } = &target {
        report.fails_closed("endpoint", format!("is not used: {reason}"));
    }
    let out = Endpoint {
        target,
        weight: u32_of(message.load_balancing_weight.take()).unwrap_or(1),
        priority,
        locality,
        health: health(take(&mut message.health_status)),
        hostname,
        workload: metadata.as_ref().and_then(workload),
    };
    refuse_rest(&message)?;
    Ok(out)
}

/// How the endpoint is reached; what is not built makes it unreachable rather than the cluster invalid.
fn target(host: &mut wire::Endpoint, metadata: Option<&core::Metadata>) -> EndpointTarget {
    let address = host.address.take().and_then(|address| address.address);
    let additional = take(&mut host.additional_addresses);
    let result = match address {
        Some(core::address::Address::EnvoyInternalAddress(internal)) => internal_target(internal, metadata),
        Some(core::address::Address::SocketAddress(address)) => plain_target(address, additional, metadata),
        Some(core::address::Address::Pipe(_)) => Err("unix sockets are not supported".to_owned()),
        None => Err("no address".to_owned()),
    };
    result.unwrap_or_else(|reason| EndpointTarget::Unreachable { reason })
}

fn internal_target(
    internal: core::EnvoyInternalAddress,
    metadata: Option<&core::Metadata>,
) -> Result<EndpointTarget, String> {
    let core::EnvoyInternalAddress { endpoint_id, address_name_specifier } = internal;
    let Some(core::envoy_internal_address::AddressNameSpecifier::ServerListenerName(listener)) = address_name_specifier
    else {
        return Err(format!("{endpoint_id}: no listener name"));
    };
    if listener != CONNECT_ORIGINATE {
        return Err(format!("{endpoint_id}: tunnels by {listener} are not supported"));
    }
    let tunnel = metadata.and_then(|metadata| metadata_json(metadata, ORIGINAL_DST)).unwrap_or_default();
    let text = |key: &str| tunnel.get(key).and_then(|value| value.as_str()).map(str::to_owned);
    let parse = |text: &str| text.parse::<SocketAddr>().map_err(|_| format!("{text} is not an address and port"));
    let authority = parse(&text("local").unwrap_or(endpoint_id))?;
    // Only the host counts: the port dialled is always HBONE's.
    let waypoint = text("waypoint").map(|text| parse(&text)).transpose()?;
    let waypoint = waypoint.map(|address| SocketAddr::new(address.ip(), HBONE_PORT));
    Ok(EndpointTarget::Hbone { authority, waypoint })
}

fn plain_target(
    address: core::SocketAddress,
    additional: Vec<wire::endpoint::AdditionalAddress>,
    metadata: Option<&core::Metadata>,
) -> Result<EndpointTarget, String> {
    let socket = metadata.and_then(|metadata| metadata_json(metadata, "envoy.transport_socket_match"));
    if let Some(mode) = socket.as_ref().and_then(|socket| socket.get("tlsMode")).and_then(|mode| mode.as_str())
        && mode != "disabled"
    {
        return Err(format!("{}: sidecar mutual TLS (tlsMode {mode}) is not supported", address.address));
    }
    let address = socket_address(address)?;
    let additional = additional
        .into_iter()
        .filter_map(|more| match more.address?.address? {
            core::address::Address::SocketAddress(address) => Some(socket_address(address)),
            _ => None,
        })
        .collect::<Result<_, _>>()?;
    Ok(EndpointTarget::Plain { address, additional })
}

fn socket_address(message: core::SocketAddress) -> Result<SocketAddr, String> {
    let ip: IpAddr =
        message.address.parse().map_err(|_| format!("{} is a name where an address is needed", message.address))?;
    match message.port_specifier {
        Some(core::socket_address::PortSpecifier::PortValue(port)) => {
            let port = u16::try_from(port).map_err(|_| format!("{port} is no port"))?;
            Ok(SocketAddr::new(ip, port))
        }
        _ => Err("no port number".to_owned()),
    }
}

fn workload(metadata: &core::Metadata) -> Option<WorkloadName> {
    let istio = metadata_json(metadata, "istio")?;
    let mut parts = istio.get("workload")?.as_str()?.split(';').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    Some(WorkloadName {
        name: next(),
        namespace: next(),
        canonical_name: next(),
        canonical_revision: next(),
        cluster: next(),
    })
}

/// The members of a DNS cluster, whose addresses are names (or addresses).
pub(super) fn dns_hosts(mut message: wire::ClusterLoadAssignment) -> Refusable<Vec<DnsHost>> {
    let mut hosts = Vec::new();
    for group in take(&mut message.endpoints) {
        let locality = group.locality.map(locality).unwrap_or_default();
        for member in group.lb_endpoints {
            let Some(wire::lb_endpoint::HostIdentifier::Endpoint(host)) = member.host_identifier else {
                return Err(Refusal::new("lb_endpoints", "no endpoint"));
            };
            let Some(core::address::Address::SocketAddress(address)) = host.address.and_then(|address| address.address)
            else {
                return Err(Refusal::new("lb_endpoints", "no socket address"));
            };
            let port = match address.port_specifier {
                Some(core::socket_address::PortSpecifier::PortValue(port)) => u16::try_from(port).ok(),
                _ => None,
            };
            hosts.push(DnsHost {
                host: address.address,
                port: port.ok_or_else(|| Refusal::new("lb_endpoints", "no port number"))?,
                weight: u32_of(member.load_balancing_weight).unwrap_or(1),
                priority: group.priority,
                locality: locality.clone(),
            });
        }
    }
    Ok(hosts)
}
