//! Decoding, indexes and resolution.
use std::net::{IpAddr, SocketAddr};

use prost::Message;
use xds_proto::istio::workload as w;
use xds_proto::type_url;

use super::*;

fn pod(name: &str, ip: [u8; 4]) -> w::Workload {
    w::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        service_account: name.to_owned(),
        addresses: vec![ip.to_vec().into()],
        tunnel_protocol: w::TunnelProtocol::Hbone.into(),
        node: "a".to_owned(),
        ..Default::default()
    }
}

fn member(mut workload: w::Workload, service: &str, ports: &[(u32, u32)]) -> w::Workload {
    let ports = ports.iter().map(|(s, t)| w::Port { service_port: *s, target_port: *t, app_protocol: 0 }).collect();
    workload.services.insert(format!("shop/{service}"), w::PortList { ports });
    workload
}

fn service(name: &str, vip: [u8; 4], ports: &[(u32, u32)]) -> w::Service {
    w::Service {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        hostname: format!("{name}.shop"),
        addresses: vec![w::NetworkAddress { network: String::new(), address: vip.to_vec().into(), length: None }],
        ports: ports.iter().map(|(s, t)| w::Port { service_port: *s, target_port: *t, app_protocol: 0 }).collect(),
        ..Default::default()
    }
}

struct Fixture {
    builder: MeshBuilder,
    view: MeshView,
}

impl Fixture {
    fn new() -> Fixture {
        let (builder, view) = MeshBuilder::new(MeshConfig::default());
        let mut fixture = Fixture { builder, view };
        fixture.workload(pod("client", [10, 0, 0, 1]));
        fixture
    }

    fn workload(&mut self, workload: w::Workload) {
        let name = workload.uid.clone();
        let rejected = self.put(&name, w::address::Type::Workload(workload));
        assert_eq!(rejected, []);
    }

    fn service(&mut self, service: w::Service) {
        let name = format!("{}/{}", service.namespace, service.hostname);
        let rejected = self.put(&name, w::address::Type::Service(service));
        assert_eq!(rejected, []);
    }

    fn put(&mut self, name: &str, content: w::address::Type) -> Vec<Rejected> {
        let body = w::Address { r#type: Some(content) }.encode_to_vec();
        self.builder.apply(type_url::ADDRESS, [(name, body.as_slice())], std::iter::empty())
    }

    fn resolve(&self, dst: &str, seed: u64) -> Result<Upstream, ResolveError> {
        let mesh = self.view.load();
        let source = mesh.workload("Kubernetes//Pod/shop/client").unwrap().clone();
        mesh.resolve_outbound(&source, dst.parse().unwrap(), seed)
    }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn a_vip_goes_to_an_endpoint_by_hbone_whichever_arrived_first() {
    for service_first in [true, false] {
        let mut mesh = Fixture::new();
        let payments = member(pod("payments", [10, 0, 0, 2]), "payments.shop", &[(80, 8080)]);
        if service_first {
            mesh.service(service("payments", [10, 96, 0, 1], &[(80, 0)]));
            mesh.workload(payments);
        } else {
            mesh.workload(payments);
            assert_eq!(mesh.view.load().staged_services().count(), 1);
            mesh.service(service("payments", [10, 96, 0, 1], &[(80, 0)]));
        }
        let Ok(Upstream::Hbone { addr: dial, authority, identities, peer, via }) = mesh.resolve("10.96.0.1:80", 1)
        else {
            panic!("no tunnel")
        };
        assert_eq!((dial, authority, via), (addr("10.0.0.2:15008"), addr("10.0.0.2:8080"), Via::Endpoint));
        assert_eq!(identities[0].as_str(), "spiffe://cluster.local/ns/shop/sa/payments");
        assert_eq!(&*peer.service.unwrap().key, "shop/payments.shop");
    }
}

#[test]
fn a_known_service_is_never_passed_through() {
    let mut mesh = Fixture::new();
    mesh.service(service("payments", [10, 96, 0, 1], &[(80, 8080)]));
    let key: ServiceKey = "shop/payments.shop".into();
    assert_eq!(
        mesh.resolve("10.96.0.1:80", 1).unwrap_err(),
        ResolveError::NoHealthyEndpoint { service: key.clone(), port: 80 }
    );
    assert_eq!(
        mesh.resolve("10.96.0.1:81", 1).unwrap_err(),
        ResolveError::UndefinedPort { service: key.clone(), port: 81 }
    );
    let mut sick = member(pod("payments", [10, 0, 0, 2]), "payments.shop", &[(80, 8080)]);
    sick.status = w::WorkloadStatus::Unhealthy.into();
    mesh.workload(sick);
    assert!(matches!(mesh.resolve("10.96.0.1:80", 1), Err(ResolveError::NoHealthyEndpoint { .. })));
    assert!(matches!(mesh.resolve("8.8.8.8:53", 1), Ok(Upstream::Passthrough { .. })));
}

#[test]
fn plaintext_and_direct_pod_addresses() {
    let mut mesh = Fixture::new();
    let mut plain = pod("plain", [10, 0, 0, 3]);
    plain.tunnel_protocol = 0;
    mesh.workload(plain);
    let Ok(Upstream::Plain { addr: dial, .. }) = mesh.resolve("[::ffff:10.0.0.3]:99", 1) else { panic!("not plain") };
    assert_eq!(dial, addr("10.0.0.3:99"));
}

fn waypoint_gateway() -> Option<w::GatewayAddress> {
    Some(w::GatewayAddress {
        destination: Some(w::gateway_address::Destination::Hostname(w::NamespacedHostname {
            namespace: "shop".to_owned(),
            hostname: "waypoint.shop".to_owned(),
        })),
        hbone_mtls_port: 15008,
    })
}

#[test]
fn a_waypoint_stands_in_between_except_for_itself() {
    let mut mesh = Fixture::new();
    mesh.service(w::Service { waypoint: waypoint_gateway(), ..service("payments", [10, 96, 0, 1], &[(80, 8080)]) });
    mesh.workload(member(pod("payments", [10, 0, 0, 2]), "payments.shop", &[(80, 8080)]));
    assert!(matches!(mesh.resolve("10.96.0.1:80", 1), Err(ResolveError::NoWaypoint { .. })));
    mesh.service(service("waypoint", [10, 96, 0, 9], &[(15008, 15008)]));
    mesh.workload(member(pod("wp", [10, 0, 0, 9]), "waypoint.shop", &[(15008, 15008)]));
    let Ok(Upstream::Hbone { addr: dial, authority, identities, via, .. }) = mesh.resolve("10.96.0.1:80", 1) else {
        panic!("no tunnel")
    };
    assert_eq!((dial, authority, via), (addr("10.0.0.9:15008"), addr("10.96.0.1:80"), Via::Waypoint));
    assert_eq!(identities[0].as_str(), "spiffe://cluster.local/ns/shop/sa/wp");
    let view = mesh.view.load();
    let wp = view.workload("Kubernetes//Pod/shop/wp").unwrap();
    let payments = view.workload("Kubernetes//Pod/shop/payments").unwrap();
    let Ok(Upstream::Hbone { via, .. }) = view.resolve_outbound(wp, addr("10.96.0.1:80"), 1) else {
        panic!("no tunnel")
    };
    assert_eq!(via, Via::Endpoint);
    assert_eq!(view.waypoint_towards(payments, addr("10.96.0.1:80"), 1), Some("shop/waypoint.shop"));
    assert_eq!(view.waypoint_towards(payments, addr("10.0.0.2:8080"), 1), None);
    assert_eq!(view.waypoint_towards(wp, addr("10.96.0.1:80"), 1), None);
    assert!(view.is_own_waypoint(payments, &wp.identity));
    assert!(!view.is_own_waypoint(payments, &payments.identity));
    assert!(!view.is_own_waypoint(wp, &wp.identity));
    assert!(view.is_behind_waypoint(payments, 8080));
    assert!(!view.is_behind_waypoint(payments, 9));
}

#[test]
fn weights_and_locality() {
    let mut mesh = Fixture::new();
    let mut preferring = service("payments", [10, 96, 0, 1], &[(80, 8080)]);
    mesh.service(preferring.clone());
    for (name, ip, capacity, node) in [("one", 2, 9, "a"), ("two", 3, 1, "b"), ("none", 4, 0, "a")] {
        let mut workload = member(pod(name, [10, 0, 0, ip]), "payments.shop", &[]);
        workload.capacity = Some(capacity);
        workload.node = node.to_owned();
        mesh.workload(workload);
    }
    let count = |mesh: &Fixture, ip: &str| {
        let ip: IpAddr = ip.parse().unwrap();
        let hit =
            |seed| matches!(mesh.resolve("10.96.0.1:80", seed), Ok(Upstream::Hbone { addr, .. }) if addr.ip() == ip);
        (0..2000).filter(|seed| hit(*seed)).count()
    };
    let (one, two, none) = (count(&mesh, "10.0.0.2"), count(&mesh, "10.0.0.3"), count(&mesh, "10.0.0.4"));
    assert!((1740..=1860).contains(&one) && one + two == 2000 && none == 0, "{one} {two} {none}");
    use w::load_balancing::{Mode, Scope};
    preferring.load_balancing = Some(w::LoadBalancing {
        routing_preference: vec![Scope::Node.into()],
        mode: Mode::Strict.into(),
        health_policy: 0,
    });
    mesh.service(preferring.clone());
    assert_eq!(count(&mesh, "10.0.0.2"), 2000);
    let body = w::Address { r#type: None }.encode_to_vec();
    assert_eq!(mesh.builder.apply(type_url::ADDRESS, [("x", body.as_slice())], ["Kubernetes//Pod/shop/one"]).len(), 1);
    mesh.workload(member(w::Workload { node: "b".to_owned(), ..pod("none", [10, 0, 0, 4]) }, "payments.shop", &[]));
    assert!(matches!(mesh.resolve("10.96.0.1:80", 1), Err(ResolveError::NoHealthyEndpoint { .. })));
    preferring.load_balancing.as_mut().unwrap().mode = Mode::Failover.into();
    mesh.service(preferring);
    assert!(mesh.resolve("10.96.0.1:80", 1).is_ok());
}

#[test]
fn bad_resources_are_named_and_leave_the_old_ones() {
    let mut mesh = Fixture::new();
    let mut legacy = pod("client", [10, 0, 0, 7]);
    legacy.tunnel_protocol = w::TunnelProtocol::LegacyIstioMtls.into();
    let rejected = mesh.put("Kubernetes//Pod/shop/client", w::address::Type::Workload(legacy));
    assert_eq!(rejected.len(), 1);
    assert!(rejected[0].reason.contains("LEGACY_ISTIO_MTLS"), "{rejected:?}");
    assert!(mesh.view.load().workload_by_ip("10.0.0.1".parse().unwrap()).is_some());
    let mut short = pod("x", [10, 0, 0, 7]);
    short.addresses = vec![vec![1, 2, 3].into()];
    let rejected = mesh.put("Kubernetes//Pod/shop/x", w::address::Type::Workload(short));
    assert!(rejected[0].reason.contains("3 bytes"), "{rejected:?}");
    let rejected = mesh.put("shop/other", w::address::Type::Service(service("payments", [1, 1, 1, 1], &[(70_000, 0)])));
    assert!(rejected[0].reason.contains("70000"), "{rejected:?}");
    assert_eq!(mesh.builder.apply(type_url::ADDRESS, [("junk", &[0xff, 0xff][..])], std::iter::empty()).len(), 1);
}

#[test]
fn removal_and_change_leave_no_trace_in_the_indexes() {
    let mut mesh = Fixture::new();
    mesh.service(service("payments", [10, 96, 0, 1], &[(80, 8080)]));
    mesh.workload(member(pod("payments", [10, 0, 0, 2]), "payments.shop", &[]));
    mesh.workload(member(pod("payments", [10, 0, 0, 5]), "payments.shop", &[]));
    assert!(mesh.view.load().workload_by_ip("10.0.0.2".parse().unwrap()).is_none());
    assert_eq!(mesh.view.load().endpoints("shop/payments.shop").len(), 1);
    let before = *mesh.view.changes().borrow();
    mesh.builder.apply(type_url::ADDRESS, [], ["Kubernetes//Pod/shop/payments", "shop/payments.shop", "never/was"]);
    let view = mesh.view.load();
    assert!(*mesh.view.changes().borrow() > before);
    assert!(view.service_by_vip("10.96.0.1".parse().unwrap(), "shop").is_none());
    assert_eq!((view.workloads().len(), view.services().len(), view.endpoints("shop/payments.shop").len()), (1, 0, 0));
    assert!(matches!(mesh.resolve("10.96.0.1:80", 1), Ok(Upstream::Passthrough { .. })));
}

#[test]
fn private_services_and_ranges() {
    let mut mesh = Fixture::new();
    let mut private = service("secret", [10, 96, 0, 1], &[(80, 8080)]);
    private.namespace = "bank".to_owned();
    private.visibility = w::service::Visibility::Namespace.into();
    mesh.service(private);
    let mut range = service("range", [10, 96, 0, 0], &[(80, 8080)]);
    range.addresses[0].length = Some(16);
    mesh.service(range);
    let view = mesh.view.load();
    let ip = "10.96.0.1".parse().unwrap();
    assert_eq!(&*view.service_by_vip(ip, "shop").unwrap().name, "range");
    assert_eq!(&*view.service_by_vip(ip, "bank").unwrap().name, "secret");
}

/// Everything a real istiod sent for the recorded cases decodes.
#[test]
fn recorded_istiod_addresses_and_policies_are_taken_whole() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/testdata/istiod/recorded");
    let mut seen = 0;
    for case in std::fs::read_dir(&root).expect("integration/testdata/istiod/recorded") {
        let node = case.unwrap().path().join("node");
        let (mut builder, _view) = MeshBuilder::new(MeshConfig::default());
        for (file, url) in [("address.binpb", type_url::ADDRESS), ("authorization.binpb", type_url::AUTHORIZATION)] {
            let Ok(bytes) = std::fs::read(node.join(file)) else { continue };
            for (name, body) in recorded(&bytes) {
                let rejected = builder.apply(url, [(name.as_str(), body.as_slice())], std::iter::empty());
                assert_eq!(rejected, [], "{}", node.join(file).display());
                seen += 1;
            }
        }
    }
    assert!(seen > 100, "only {seen} recorded resources were found");
}

/// Reads a recorded delta response: resources with name and body.
fn recorded(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let response = xds_proto::envoy::envoy::service::discovery::v3::DeltaDiscoveryResponse::decode(bytes)
        .expect("a recorded file is a DeltaDiscoveryResponse");
    let body = |r: xds_proto::envoy::envoy::service::discovery::v3::Resource| {
        (r.name, r.resource.expect("recorded resource has a body").value)
    };
    response.resources.into_iter().map(body).collect()
}
