//! State as JSON, in the shapes istioctl reads (xds-contract 7.4).
use serde_json::{Map, Value, json};
use xds_model::wds::{Endpoint, GatewayAddress, GatewayDestination, IpFamilies, Mesh, Service, Workload};

use crate::config::{Flags, ISTIO_VERSION};
use crate::node::Shared;

/// What `strata status` shows.
pub(crate) fn status(shared: &Shared, pending: &[String]) -> Value {
    let mesh = shared.mesh.load();
    let mut pods: Vec<_> = shared
        .pods
        .all()
        .iter()
        .map(|pod| {
            let ips = mesh.workload(&pod.info.uid).map_or(&*pod.info.ips, |workload| pod.addresses(workload));
            json!({ "uid": pod.info.uid, "ips": ips, "identity": pod.identity })
        })
        .collect();
    pods.sort_by_key(|pod| pod["uid"].as_str().map(str::to_owned));
    let certificates = shared.identities.status();
    let certificates: Vec<_> =
        certificates.iter().map(|c| json!({ "identity": c.identity, "state": c.state, "error": c.error })).collect();
    json!({
        "component": "strata-proxy",
        "role": "node",
        "ready": pending.is_empty(),
        "pending": pending,
        "pid": std::process::id(),
        "version": env!("CARGO_PKG_VERSION"),
        "generation": mesh.generation(),
        "workloads": mesh.workloads().len(),
        "services": mesh.services().len(),
        "policies": mesh.policies().len(),
        "connections": shared.live.subjects().len(),
        "pods": pods,
        "certificates": certificates,
        "placed_waypoints": shared.placed.iter().map(|placed| placed.status()).collect::<Vec<_>>(),
        "short_cuts": shared.grants.in_force(),
    })
}

/// ztunnel's `/config_dump`.
pub(crate) fn config(shared: &Shared, settings: Value) -> Value {
    let mesh = shared.mesh.load();
    let mut workloads: Vec<_> = mesh.workloads().map(|w| workload(w)).collect();
    workloads.sort_by_key(|w| w["uid"].as_str().map(str::to_owned));
    let mut services: Vec<_> = mesh.services().map(|s| service(&mesh, s)).collect();
    services.sort_by_key(|s| (s["namespace"].as_str().map(str::to_owned), s["hostname"].as_str().map(str::to_owned)));
    let mut policies: Vec<_> = mesh.policies().map(|p| json!(**p)).collect();
    policies.sort_by_key(|p| (p["namespace"].as_str().map(str::to_owned), p["name"].as_str().map(str::to_owned)));
    let staged: Map<String, Value> =
        mesh.staged_services().map(|(key, list)| (key.to_string(), json!(endpoints(list)))).collect();
    json!({
        "workloads": workloads,
        "services": services,
        "policies": policies,
        "stagedServices": staged,
        "staticConfig": {},
        "version": { "version": env!("CARGO_PKG_VERSION"), "istioVersion": ISTIO_VERSION },
        "config": settings,
        "certificates": shared.identities.status(),
        "workloadState": workload_state(shared),
    })
}

/// The settings this process runs with; nothing secret is among them.
pub(crate) fn settings(flags: &Flags) -> Value {
    json!({
        "localNode": flags.node_name,
        "clusterId": flags.cluster_id,
        "network": flags.network,
        "trustDomain": flags.trust_domain,
        "xdsAddress": flags.xds_address,
        "caAddress": flags.ca_address(),
        "numWorkerThreads": flags.concurrency,
        "selfTerminationDeadline": format!("{}s", flags.drain_seconds),
    })
}

fn workload(workload: &Workload) -> Value {
    let mut out = json!(workload);
    out["serviceAccount"] = json!(workload.identity.service_account());
    out["trustDomain"] = json!(workload.identity.trust_domain());
    out["waypoint"] = json!(workload.waypoint.as_ref().map(gateway));
    out["networkGateway"] = json!(workload.network_gateway.as_ref().map(gateway));
    out["networkMode"] = json!(if workload.host_network { "HostNetwork" } else { "Standard" });
    let services: Vec<_> = workload.services.keys().collect();
    out["services"] = json!(services);
    out["applicationTunnel"] = json!(workload.application_tunnel.map(|tunnel| {
        json!({ "protocol": if tunnel.proxy_protocol { "PROXY" } else { "NONE" }, "port": tunnel.port })
    }));
    out
}

fn service(mesh: &Mesh, service: &Service) -> Value {
    let ports: Map<String, Value> =
        service.ports.iter().map(|port| (port.service_port.to_string(), json!(port.target_port))).collect();
    let (single, ranges): (Vec<_>, Vec<_>) =
        service.addresses.iter().partition(|vip| vip.prefix.prefix_len() == vip.prefix.max_prefix_len());
    let vips: Vec<_> = single.iter().map(|vip| format!("{}/{}", vip.network, vip.prefix.addr())).collect();
    let ranges: Vec<_> = ranges.iter().map(|vip| json!({ "cidr": vip.prefix, "network": vip.network })).collect();
    let balancing = &service.load_balancing;
    json!({
        "name": service.name,
        "namespace": service.namespace,
        "hostname": service.hostname,
        "vips": vips,
        "cidrVips": ranges,
        "ports": ports,
        "endpoints": endpoints(mesh.endpoints(&service.key)),
        "subjectAltNames": service.subject_alt_names,
        "waypoint": service.waypoint.as_ref().map(gateway),
        "loadBalancer": {
            "mode": balancing.mode,
            "routingPreferences": balancing.routing_preference,
            "healthPolicy": if balancing.allow_unhealthy { "AllowAll" } else { "OnlyHealthy" },
        },
        "ipFamilies": match service.ip_families {
            IpFamilies::Automatic => None,
            IpFamilies::V4Only => Some("IPv4"),
            IpFamilies::V6Only => Some("IPv6"),
            IpFamilies::Dual => Some("Dual"),
        },
        "canonical": service.canonical,
        "visibility": if service.private { "Namespace" } else { "Public" },
    })
}

fn endpoints(list: &[Endpoint]) -> Map<String, Value> {
    list.iter()
        .map(|endpoint| {
            let ports: Map<String, Value> =
                endpoint.ports.iter().map(|port| (port.service_port.to_string(), json!(port.target_port))).collect();
            let workload = &endpoint.workload;
            let body = json!({ "workloadUid": workload.uid, "port": ports, "status": workload.status });
            (workload.uid.to_string(), body)
        })
        .collect()
}

fn gateway(gateway: &GatewayAddress) -> Value {
    // ztunnel's one string for both: NAMESPACE/HOSTNAME or NETWORK/IP.
    let destination = match &gateway.destination {
        GatewayDestination::Service(key) => key.to_string(),
        GatewayDestination::Address { network, ip } => format!("{network}/{ip}"),
    };
    json!({ "destination": destination, "hboneMtlsPort": gateway.hbone_mtls_port })
}

fn workload_state(shared: &Shared) -> Map<String, Value> {
    let subjects = shared.live.subjects();
    let pods = shared.pods.all();
    pods.iter()
        .map(|pod| {
            let inbound: Vec<_> = subjects
                .iter()
                .filter(|subject| *subject.destination_uid == *pod.info.uid)
                .map(|subject| {
                    let protocol = if subject.identity.is_some() { "HBONE" } else { "TCP" };
                    json!({
                        "src": subject.source_ip.to_string(),
                        "originalDst": subject.destination.to_string(),
                        "actualDst": subject.destination.to_string(),
                        "protocol": protocol,
                    })
                })
                .collect();
            let info = json!({
                "name": pod.info.name,
                "namespace": pod.info.namespace,
                "serviceAccount": pod.info.service_account,
            });
            let body = json!({ "state": "Up", "connections": { "inbound": inbound, "outbound": [] }, "info": info });
            (pod.key.clone(), body)
        })
        .collect()
}
