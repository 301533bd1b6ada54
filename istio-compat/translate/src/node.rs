//! What node proxies get: workloads, services, L4 authorization.
mod authorization;
pub(crate) use authorization::block;
mod peer_authentication;

use xds_proto::istio::workload as wds;
use xds_proto::type_url;

use crate::mesh::services::octets;
use crate::mesh::{Mesh, Origin, Service, Workload};
use crate::{Faults, MeshOutput, wire};

/// Fills `addresses`, `workloads` and `authorizations`.
pub(crate) fn build(mesh: &Mesh<'_>, output: &mut MeshOutput, faults: &mut Faults) {
    let policies = authorization::build(mesh, output, faults);
    let strict = peer_authentication::build(mesh, output);
    for workload in mesh.workloads.values() {
        let mut names = policies.names_for(workload);
        names.extend(strict.names_for(workload));
        names.sort();
        let message = self::workload(mesh, workload, names);
        output.workloads.insert(workload.uid.clone(), wire::pack(type_url::WORKLOAD, &message));
        let address = wds::Address { r#type: Some(wds::address::Type::Workload(message)) };
        output.addresses.insert(workload.uid.clone(), wire::pack(type_url::ADDRESS, &address));
    }
    for (key, service) in &mesh.services {
        let address = wds::Address { r#type: Some(wds::address::Type::Service(self::service(mesh, key, service))) };
        output.addresses.insert(key.clone(), wire::pack(type_url::ADDRESS, &address));
    }
}

fn workload(mesh: &Mesh<'_>, workload: &Workload, authorization_policies: Vec<String>) -> wds::Workload {
    let ports = |ports: &Vec<(u16, u16)>| wds::PortList {
        ports: ports
            .iter()
            .map(|(service, target)| wds::Port {
                service_port: u32::from(*service),
                target_port: u32::from(*target),
                app_protocol: 0,
            })
            .collect(),
    };
    let trust_domain = mesh.options.trust_domain.as_str();
    let locality = &workload.locality;
    let tunnel = if workload.hbone { wds::TunnelProtocol::Hbone } else { wds::TunnelProtocol::None };
    let status = if workload.healthy { wds::WorkloadStatus::Healthy } else { wds::WorkloadStatus::Unhealthy };
    let kind = match workload.origin {
        Origin::Slice => wds::WorkloadType::Deployment,
        Origin::Pod | Origin::WorkloadEntry | Origin::ServiceEntry => wds::WorkloadType::Pod,
    };
    let network = if workload.host_network { wds::NetworkMode::HostNetwork } else { wds::NetworkMode::Standard };
    wds::Workload {
        uid: workload.uid.clone(),
        name: workload.name.clone(),
        namespace: workload.namespace.clone(),
        addresses: workload.addresses.iter().map(|ip| octets(*ip).into()).collect(),
        hostname: workload.hostname.clone(),
        // As istiod: one is what everybody has.
        capacity: (workload.weight > 1).then_some(workload.weight),
        tunnel_protocol: tunnel as i32,
        // Empty means the default, and that is how istiod writes it.
        trust_domain: if trust_domain == "cluster.local" { String::new() } else { trust_domain.to_owned() },
        service_account: workload.service_account.clone(),
        waypoint: gateway_address(mesh, workload.waypoint.as_ref()),
        node: workload.node.clone(),
        canonical_name: workload.canonical_name.clone(),
        canonical_revision: workload.canonical_revision.clone(),
        workload_type: kind as i32,
        workload_name: workload.workload_name.clone(),
        services: workload.services.iter().map(|(key, list)| (key.clone(), ports(list))).collect(),
        authorization_policies,
        status: status as i32,
        cluster_id: mesh.options.cluster_id.clone(),
        locality: (*locality != crate::mesh::Locality::default()).then(|| wds::Locality {
            region: locality.region.clone(),
            zone: locality.zone.clone(),
            subzone: locality.subzone.clone(),
        }),
        network_mode: network as i32,
        ..wds::Workload::default()
    }
}

fn service(mesh: &Mesh<'_>, key: &str, service: &Service) -> wds::Service {
    use crate::mesh::ports::Target;
    wds::Service {
        name: service.name.clone(),
        namespace: service.namespace.clone(),
        hostname: service.hostname.clone(),
        addresses: service
            .vips
            .iter()
            .map(|net| wds::NetworkAddress {
                network: String::new(),
                address: octets(net.network()).into(),
                length: (net.prefix_len() < net.max_prefix_len()).then(|| u32::from(net.prefix_len())),
            })
            .collect(),
        ports: service
            .ports
            .iter()
            .map(|port| wds::Port {
                service_port: u32::from(port.number),
                // A named target differs from pod to pod: the pods say it.
                target_port: match port.target {
                    Target::Number(number) => u32::from(number),
                    Target::Name(_) => 0,
                },
                app_protocol: port.protocol.wds() as i32,
            })
            .collect(),
        waypoint: gateway_address(mesh, service.waypoint.as_ref()),
        load_balancing: service.load_balancing.clone(),
        ip_families: service.ip_families as i32,
        subject_alt_names: service.subject_alt_names.clone(),
        visibility: match service.export_to.as_slice() {
            [only] if only == "." => wds::service::Visibility::Namespace as i32,
            _ => wds::service::Visibility::Public as i32,
        },
        canonical: mesh.is_canonical(key, service),
        ..wds::Service::default()
    }
}

fn gateway_address(mesh: &Mesh<'_>, key: Option<&crate::mesh::WaypointKey>) -> Option<wds::GatewayAddress> {
    Some(mesh.waypoints.get(key?)?.gateway_address())
}
