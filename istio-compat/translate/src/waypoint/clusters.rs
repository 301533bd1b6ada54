//! Clusters: the fixed ones of every waypoint, and those of services.
mod fixed;
mod secrets;
mod upstream;

use std::collections::BTreeSet;

use compat_objects::istio::{Subset, TrafficPolicy};
use compat_objects::{HasMeta, Kind, ObjectKey};

use super::destinations::inbound_vip;
use super::endpoints::{By, ORIGINAL_DST, Preference, Wanted, assignment};
use xds_proto::istio::workload as wds;

use super::{Builder, Outbound, traffic_policy};
use crate::mesh::{AppProtocol, Resolution, Service, ServicePort, exported, full_hostname, host_covers};
use crate::pb::{
    self, any, cluster, endpoint, ext, list, metadata, nested, raw_buffer, seconds, structure, text, transport_socket,
};
use ext::transport_sockets::internal_upstream::v3 as internal;
pub(crate) use fixed::{as_downstream, dns_cache, downstream_tls, http1, http2, set_http_options};
use fixed::{discovery, passthrough, to_listener, unlimited};
pub(crate) use secrets::Referred;

/// A cluster and, where its endpoints are discovered, its endpoints.
pub(crate) type WithEndpoints = (cluster::Cluster, Option<endpoint::ClusterLoadAssignment>);

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// The DestinationRules that apply to one service, as one.
#[derive(Default)]
pub(crate) struct Rule {
    /// Path of the rule's object, for metadata.
    pub(crate) config: Option<String>,
    pub(crate) object: Option<ObjectKey>,
    pub(crate) policy: Option<TrafficPolicy>,
    pub(crate) subsets: Vec<Subset>,
}

impl Builder<'_, '_> {
    /// Every cluster of the waypoint.
    pub(crate) fn clusters(&self) -> Vec<WithEndpoints> {
        let mut all: Vec<WithEndpoints> = vec![
            (self.connect_originate(), None),
            (to_listener("encap", "connect_originate"), None),
            (to_listener("main_internal", "main_internal"), None),
            (self.inner_connect_originate(), None),
            (self.outer_connect_originate(), None),
        ];
        for service in self.mesh.services_of(&self.waypoint.key) {
            let rule = self.rule(service);
            for port in governed(service) {
                for kind in kinds(port.protocol) {
                    all.push(self.inbound(service, port, kind, None, &rule));
                    all.extend(rule.subsets.iter().map(|s| self.inbound(service, port, kind, Some(s), &rule)));
                }
            }
        }
        for outbound in self.outbound.borrow().iter() {
            all.extend(self.outbound(outbound));
        }
        all
    }

    /// The rule for a service: the waypoint's namespace, the service's, the root's; the most exact host first.
    pub(crate) fn rule(&self, service: &Service) -> Rule {
        let namespaces = [&self.waypoint.key.namespace, &service.namespace, &self.mesh.options.root_namespace];
        for namespace in namespaces {
            let mut found: Vec<_> = self
                .mesh
                .objects
                .destination_rules_in(namespace)
                .filter(|rule| rule.spec.workload_selector.is_none())
                .filter(|rule| exported(&rule.spec.export_to, namespace, &self.waypoint.key.namespace))
                .map(|rule| (full_hostname(&rule.spec.host, namespace), rule))
                .filter(|(host, _)| host_covers(host, &service.hostname))
                .collect();
            found.sort_by_key(|(host, rule)| (std::cmp::Reverse(host.len()), rule.created()));
            // Several rules for one host are one rule: the first policy counts, subsets add up.
            let Some((best, _)) = found.first() else { continue };
            let same: Vec<_> = found.iter().filter(|(host, _)| host == best).map(|(_, rule)| *rule).collect();
            let key = ObjectKey::new(Kind::DestinationRule, namespace.as_str(), same[0].name());
            let mut subsets: Vec<Subset> = Vec::new();
            for subset in same.iter().flat_map(|rule| &rule.spec.subsets) {
                if !subsets.iter().any(|known| known.name == subset.name) {
                    subsets.push(subset.clone());
                }
            }
            return Rule {
                config: Some(format!(
                    "/apis/networking.istio.io/v1/namespaces/{}/destination-rule/{}",
                    key.namespace, key.name
                )),
                policy: same.iter().find_map(|rule| rule.spec.traffic_policy.clone()),
                object: Some(key),
                subsets,
            };
        }
        Rule::default()
    }

    pub(crate) fn subset(&self, service: &Service, name: &str) -> Option<Subset> {
        self.rule(service).subsets.into_iter().find(|subset| subset.name == name)
    }

    fn inbound(
        &self,
        service: &Service,
        port: &ServicePort,
        kind: &str,
        subset: Option<&Subset>,
        rule: &Rule,
    ) -> WithEndpoints {
        let suffix = subset.map_or("", |subset| subset.name.as_str());
        let name = inbound_vip(port.number, kind, suffix, &service.hostname);
        let label = if suffix.is_empty() { kind.to_owned() } else { format!("{kind}/{suffix}") };
        let passthrough = passthrough(&[(ORIGINAL_DST, false), ("istio", false)]);
        let mut built = self.service_cluster(service, port, &name, Some(&label), subset, rule);
        let policy = traffic_policy::effective(rule.policy.as_ref(), subset, port.number);
        if let (Some(policy), Some(object)) = (&policy, &rule.object) {
            traffic_policy::apply(self, &mut built, policy, object, port.protocol);
        }
        let socket = self.upstream_socket(&mut built, service, port, policy.as_ref(), rule.object.as_ref());
        built.transport_socket = Some(transport_socket(
            "internal_upstream",
            any(&internal::InternalUpstreamTransport {
                passthrough_metadata: passthrough,
                transport_socket: Some(socket),
            }),
        ));
        let labels = subset.map(|subset| subset.labels.clone()).unwrap_or_default();
        let wanted = Wanted {
            cluster: name,
            service,
            port: port.number,
            labels,
            outbound: false,
            preference: self.preference(service, policy.as_ref()),
            nodes: self.nodes(service),
        };
        // Without a virtual address there is nothing to balance over: the client chose the pod.
        if service.object.kind == Kind::Service && service.vips.is_empty() && !service.selector.is_empty() {
            as_original_dst(&mut built);
        }
        self.with_endpoints(built, &wanted)
    }

    /// Endpoints that are resolved are in the cluster; those that are discovered beside it; other clusters have none.
    fn with_endpoints(&self, mut built: cluster::Cluster, wanted: &Wanted<'_>) -> WithEndpoints {
        let resolved = [cluster::cluster::DiscoveryType::StrictDns, cluster::cluster::DiscoveryType::LogicalDns];
        if resolved.iter().any(|kind| built.cluster_discovery_type == Some(discovery(*kind))) {
            built.load_assignment = Some(assignment(self.mesh, wanted));
        }
        let discovered = built.eds_cluster_config.is_some();
        (built, discovered.then(|| assignment(self.mesh, wanted)))
    }

    fn service_cluster(
        &self,
        service: &Service,
        port: &ServicePort,
        name: &str,
        label: Option<&str>,
        subset: Option<&Subset>,
        rule: &Rule,
    ) -> cluster::Cluster {
        // A ServiceEntry may have several hosts: telemetry tells them apart, as istiod's does.
        let called = if service.object.kind == Kind::ServiceEntry { &service.hostname } else { &service.name };
        let described = structure([
            ("host", text(&service.hostname)),
            ("name", text(called)),
            ("namespace", text(&service.namespace)),
        ]);
        let mut istio = structure([("services", list(vec![nested(described)]))]);
        if let Some(label) = label {
            istio.fields.insert("subset".into(), text(label));
        }
        let has_policy = traffic_policy::effective(rule.policy.as_ref(), subset, port.number).is_some();
        if let Some(config) = rule.config.as_ref().filter(|_| has_policy) {
            istio.fields.insert("config".into(), text(config));
        }
        let mut options = std::collections::HashMap::new();
        if port.protocol.is_http2() {
            options.insert(HTTP_OPTIONS.to_owned(), any(&http2(false)));
        } else if port.protocol.is_unknown() {
            options.insert(HTTP_OPTIONS.to_owned(), any(&as_downstream()));
        }
        let prefers = service.load_balancing.as_ref().is_some_and(|lb| lb.mode == FAILOVER);
        let mut built = cluster::Cluster {
            name: name.to_owned(),
            alt_stat_name: format!("{name};"),
            circuit_breakers: Some(unlimited()),
            common_lb_config: Some(cluster::cluster::CommonLbConfig {
                healthy_panic_threshold: Some(pb::types::v3::Percent::default()),
                locality_config_specifier: prefers.then(traffic_policy::locality_weighted),
                ..Default::default()
            }),
            connect_timeout: seconds(10),
            cluster_discovery_type: Some(discovery(cluster::cluster::DiscoveryType::Eds)),
            eds_cluster_config: Some(cluster::cluster::EdsClusterConfig {
                eds_config: Some(pb::ads()),
                service_name: name.to_owned(),
            }),
            lb_policy: cluster::cluster::LbPolicy::LeastRequest as i32,
            metadata: Some(metadata([("istio", istio)])),
            typed_extension_protocol_options: options,
            ..cluster::Cluster::default()
        };
        match service.resolution {
            Resolution::Static => {}
            Resolution::Dns { round_robin } => fixed::resolve(&mut built, round_robin),
            Resolution::Passthrough => as_original_dst(&mut built),
            Resolution::PerRequest => fixed::resolve_per_request(&mut built, service),
        }
        built
    }

    /// A service some other waypoint, or none, fronts.
    fn outbound(&self, outbound: &Outbound) -> Option<WithEndpoints> {
        let service = self.mesh.services.get(&outbound.service)?;
        let port = service.port(outbound.port)?;
        let rule = self.rule(service);
        let subset = rule.subsets.iter().find(|subset| subset.name == outbound.subset);
        let name = format!("outbound|{}|{}|{}", outbound.port, outbound.subset, service.hostname);
        let label = subset.map(|subset| subset.name.as_str());
        let mut built = self.service_cluster(service, port, &name, label, subset, &rule);
        let tunnel = internal::InternalUpstreamTransport {
            passthrough_metadata: passthrough(&[(ORIGINAL_DST, false), ("istio", true), ("istio", false)]),
            transport_socket: Some(raw_buffer("envoy.transport_sockets.raw_buffer")),
        };
        let socket = transport_socket("envoy.transport_sockets.internal_upstream", any(&tunnel));
        built.transport_socket_matches = vec![
            cluster::cluster::TransportSocketMatch {
                name: "hbone".into(),
                r#match: Some(structure([("tunnel", text("http"))])),
                transport_socket: Some(socket),
            },
            cluster::cluster::TransportSocketMatch {
                name: "tlsMode-disabled".into(),
                r#match: Some(structure([])),
                transport_socket: Some(raw_buffer("envoy.transport_sockets.raw_buffer")),
            },
        ];
        let policy = traffic_policy::effective(rule.policy.as_ref(), subset, port.number);
        if let (Some(policy), Some(object)) = (&policy, &rule.object) {
            traffic_policy::apply(self, &mut built, policy, object, port.protocol);
            if upstream::asks_for_tls(Some(policy)).is_some() {
                // Its own waypoint speaks TLS to it, or nobody does.
                let reason =
                    "TLS is spoken by the waypoint of the service itself, not by another: the destination is closed";
                self.error(object, "spec.trafficPolicy.tls", reason);
                close(&mut built);
            }
        }
        let labels = subset.map(|subset| subset.labels.clone()).unwrap_or_default();
        let wanted = Wanted {
            cluster: name,
            service,
            port: port.number,
            labels,
            outbound: true,
            preference: self.preference(service, policy.as_ref()),
            nodes: self.nodes(service),
        };
        Some(self.with_endpoints(built, &wanted))
    }

    /// Only where all pods of the waypoint are in one place: they are all told the same.
    fn preference(&self, service: &Service, policy: Option<&TrafficPolicy>) -> Option<Preference> {
        let mut pods = self.mesh.pods_of(&self.waypoint.key);
        let own = pods.next()?.locality.clone();
        if pods.any(|pod| pod.locality != own) {
            return None;
        }
        let setting = policy.and_then(|policy| {
            policy.outlier_detection.as_ref()?;
            let setting = policy.load_balancer.as_ref()?.locality_lb_setting.as_ref()?;
            (setting.enabled != Some(false)).then_some(setting)
        });
        let by = match setting {
            Some(setting) if !setting.failover_priority.is_empty() => By::Labels(setting.failover_priority.clone()),
            Some(setting) if !setting.failover.is_empty() => {
                By::Nearness { failover: setting.failover.iter().map(|f| (f.from.clone(), f.to.clone())).collect() }
            }
            _ => {
                let lb = service.load_balancing.as_ref().filter(|lb| lb.mode == FAILOVER)?;
                By::Labels(lb.routing_preference.iter().filter_map(|scope| label_of(*scope)).collect())
            }
        };
        Some(Preference { own, by })
    }

    /// `internalTrafficPolicy: Local`, as seen from the waypoint's pods.
    fn nodes(&self, service: &Service) -> Option<BTreeSet<String>> {
        service.load_balancing.as_ref().filter(|lb| lb.mode == STRICT)?;
        let nodes: BTreeSet<String> = self.mesh.pods_of(&self.waypoint.key).map(|pod| pod.node.clone()).collect();
        (!nodes.is_empty()).then_some(nodes)
    }
}

const STRICT: i32 = wds::load_balancing::Mode::Strict as i32;
const FAILOVER: i32 = wds::load_balancing::Mode::Failover as i32;

/// The label that says which part of a topology an endpoint is in.
fn label_of(scope: i32) -> Option<String> {
    use wds::load_balancing::Scope;
    let label = match Scope::try_from(scope).ok()? {
        Scope::Region => "topology.kubernetes.io/region",
        Scope::Zone => "topology.kubernetes.io/zone",
        Scope::Subzone => "topology.istio.io/subzone",
        _ => return None,
    };
    Some(label.to_owned())
}

/// The ports a waypoint has to do with: where the name in each request says where it goes, there must be requests.
pub(crate) fn governed(service: &Service) -> impl Iterator<Item = &ServicePort> {
    let named = service.resolution == Resolution::PerRequest;
    service.tcp_ports().filter(move |port| !named || port.protocol.is_http())
}

/// Which chains and clusters a protocol needs.
pub(crate) fn kinds(protocol: AppProtocol) -> &'static [&'static str] {
    if protocol.is_http() {
        &["http"]
    } else if protocol.is_unknown() {
        &["tcp", "http"]
    } else {
        &["tcp"]
    }
}

/// Without endpoints: answered with 503.
pub(crate) fn close(built: &mut cluster::Cluster) {
    built.eds_cluster_config = None;
    built.cluster_discovery_type = Some(discovery(cluster::cluster::DiscoveryType::Static));
}

/// Where the client was going is where it goes.
pub(crate) fn as_original_dst(built: &mut cluster::Cluster) {
    built.cluster_discovery_type = Some(discovery(cluster::cluster::DiscoveryType::OriginalDst));
    built.lb_policy = cluster::cluster::LbPolicy::ClusterProvided as i32;
    built.lb_config = None;
    built.eds_cluster_config = None;
}
