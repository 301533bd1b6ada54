//! Endpoints of a cluster, grouped by locality.
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use crate::mesh::{Locality, Mesh, Origin, Resolution, Service, Workload};
use xds_proto::istio::workload as wds;

use crate::pb::{self, core, endpoint, internal_address, metadata, socket_address, structure, text, u32v};

/// Name of the filter metadata that holds the next hop's authority.
pub(crate) const ORIGINAL_DST: &str = "envoy.filters.listener.original_dst";

/// Which cluster the endpoints are for.
pub(crate) struct Wanted<'a> {
    pub(crate) cluster: String,
    pub(crate) service: &'a Service,
    pub(crate) port: u16,
    /// Labels of the subset; empty: everything.
    pub(crate) labels: BTreeMap<String, String>,
    /// `outbound|` clusters choose the transport by endpoint metadata.
    pub(crate) outbound: bool,
    /// Which localities come first.
    pub(crate) preference: Option<Preference>,
    /// Only endpoints on these nodes; `None`: all.
    pub(crate) nodes: Option<BTreeSet<String>>,
}

/// Where the waypoint is, and what it prefers. Numbers of priorities are made contiguous afterwards.
#[derive(Debug, Clone)]
pub(crate) struct Preference {
    pub(crate) own: Locality,
    pub(crate) by: By,
}

/// What makes one locality better than another.
#[derive(Debug, Clone)]
pub(crate) enum By {
    /// These labels, from the first on, as many as are equal.
    Labels(Vec<String>),
    /// Nearness; then the region to fail over to, if one is named for the own.
    Nearness { failover: BTreeMap<String, String> },
}

impl Preference {
    fn rank(&self, other: &Locality) -> usize {
        let own = &self.own;
        match &self.by {
            By::Labels(labels) => {
                let equal = labels.iter().take_while(|label| match label.as_str() {
                    "topology.kubernetes.io/region" => own.region == other.region,
                    "topology.kubernetes.io/zone" => own.zone == other.zone,
                    "topology.istio.io/subzone" => own.subzone == other.subzone,
                    // One network and one cluster: always the same.
                    _ => true,
                });
                labels.len() - equal.count()
            }
            By::Nearness { failover } => {
                let region = own.region == other.region;
                let zone = region && own.zone == other.zone;
                match (zone && own.subzone == other.subzone, zone, region) {
                    (true, ..) => 0,
                    (_, true, _) => 1,
                    (_, _, true) => 2,
                    _ if failover.get(&own.region) == Some(&other.region) => 3,
                    // Somewhere else was named: this is the last resort.
                    _ => 4,
                }
            }
        }
    }
}

/// The load assignment, healthy endpoints only.
pub(crate) fn assignment(mesh: &Mesh<'_>, wanted: &Wanted<'_>) -> endpoint::ClusterLoadAssignment {
    let mut localities: BTreeMap<&Locality, Vec<(Option<IpAddr>, endpoint::LbEndpoint)>> = BTreeMap::new();
    for member in wanted.service.endpoints.iter().filter(|member| member.healthy) {
        let Some(workload) = mesh.workloads.get(&member.uid) else { continue };
        if !crate::mesh::selects(&wanted.labels, &workload.labels) {
            continue;
        }
        if wanted.nodes.as_ref().is_some_and(|nodes| !nodes.contains(&workload.node)) {
            continue;
        }
        let Some(port) = member.ports.get(&wanted.port) else { continue };
        let members = localities.entry(&workload.locality).or_default();
        // Where no family is asked for, the first address stands for the workload: two would be two endpoints.
        let either = wanted.service.ip_families == wds::IpFamilies::Automatic;
        let addresses = member.addresses.iter().filter(|ip| wanted.service.has_family(**ip));
        for ip in addresses.take(if either { 1 } else { usize::MAX }) {
            members.push((Some(*ip), lb_endpoint(mesh, workload, SocketAddr::new(*ip, *port), wanted.outbound)));
        }
        // A name only where names are resolved: elsewhere nothing could connect to it.
        if !workload.hostname.is_empty() && matches!(wanted.service.resolution, Resolution::Dns { .. }) {
            let address = socket_address(&workload.hostname, u32::from(*port));
            members.push((None, endpoint_at(address, metadata([("istio", described(mesh, workload))]), workload)));
        }
    }
    localities.retain(|_, members| !members.is_empty());
    let rank = |locality: &Locality| wanted.preference.as_ref().map_or(0, |preference| preference.rank(locality));
    let ranks: BTreeSet<usize> = localities.keys().map(|locality| rank(locality)).collect();
    let priority = |locality: &Locality| ranks.range(..rank(locality)).count();
    let endpoints = localities.into_iter().map(|(locality, mut members)| {
        members.sort_by_key(|(ip, _)| *ip);
        let lb_endpoints: Vec<_> = members.into_iter().map(|(_, member)| member).collect();
        let weights = lb_endpoints.iter().filter_map(|member| member.load_balancing_weight);
        let weight = weights.fold(0_u32, |sum, weight| sum.saturating_add(weight.value));
        endpoint::LocalityLbEndpoints {
            locality: (*locality != Locality::default()).then(|| core::Locality {
                region: locality.region.clone(),
                zone: locality.zone.clone(),
                sub_zone: locality.subzone.clone(),
            }),
            load_balancing_weight: u32v(weight),
            lb_endpoints,
            priority: u32::try_from(priority(locality)).unwrap_or(u32::MAX),
            ..endpoint::LocalityLbEndpoints::default()
        }
    });
    endpoint::ClusterLoadAssignment {
        cluster_name: wanted.cluster.clone(),
        endpoints: endpoints.collect(),
        ..endpoint::ClusterLoadAssignment::default()
    }
}

/// What telemetry knows of it.
fn described(mesh: &Mesh<'_>, workload: &Workload) -> pb::Struct {
    let named = text(&format!(
        "{};{};{};{};{}",
        workload.workload_name,
        workload.namespace,
        workload.canonical_name,
        workload.canonical_revision,
        mesh.options.cluster_id
    ));
    structure([("workload", named)])
}

fn lb_endpoint(mesh: &Mesh<'_>, workload: &Workload, address: SocketAddr, outbound: bool) -> endpoint::LbEndpoint {
    let istio = described(mesh, workload);
    let (address, metadata) = if workload.hbone {
        let target = address.to_string();
        let local = structure([("local", text(&target))]);
        let address = internal_address("connect_originate", &target);
        let mut found = metadata([("istio", istio), (ORIGINAL_DST, local)]);
        if outbound {
            let tunnel = structure([("tunnel", text("http"))]);
            found.filter_metadata.insert("envoy.transport_socket_match".into(), tunnel);
        }
        (address, found)
    } else {
        (socket_address(&address.ip().to_string(), u32::from(address.port())), metadata([("istio", istio)]))
    };
    endpoint_at(address, metadata, workload)
}

fn endpoint_at(address: core::Address, metadata: core::Metadata, workload: &Workload) -> endpoint::LbEndpoint {
    let host = endpoint::Endpoint { address: Some(address), ..endpoint::Endpoint::default() };
    // Nobody looks after endpoints that are only written down.
    let watched = !matches!(workload.origin, Origin::ServiceEntry | Origin::WorkloadEntry);
    let health = if watched { core::HealthStatus::Healthy } else { core::HealthStatus::Unknown };
    endpoint::LbEndpoint {
        health_status: health as i32,
        metadata: Some(metadata),
        load_balancing_weight: u32v(workload.weight.max(1)),
        host_identifier: Some(pb::endpoint::lb_endpoint::HostIdentifier::Endpoint(host)),
    }
}
