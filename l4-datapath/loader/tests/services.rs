//! Services and policy on real sockets between two pods of an unmeshed node.
mod support;

use std::net::IpAddr;

use strata_abi::{
    Addr, Backend, BackendKey, DropReason, PolicyEntry, PolicyKey, Prefix, Service, ServiceKey, direction,
    policy_verdict, proto, stat,
};
use support::net::World;

#[test]
fn helper_process() {
    support::helper::main();
}

const VIP4: &str = "10.201.200.1";
const VIP6: &str = "fd01:200::1";

fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().expect("an address").into()
}

/// A service on 80/`proto` with one backend, or none.
fn service(world: &World, set: u32, vip: &str, proto: u8, backend: Option<(IpAddr, u16)>) {
    let maps = world.datapath.maps();
    if let Some((ip, port)) = backend {
        let backend = Backend { addr: ip.into(), port, flags: 1 };
        maps.backends.insert(&BackendKey { backend_set: set, slot: 0 }, &backend).expect("BACKENDS");
    }
    let count = u32::from(backend.is_some());
    let service = Service { backend_set: set, backend_count: count, affinity_seconds: 0, flags: 0 };
    maps.services.insert(&ServiceKey { addr: addr(vip), port: 80, proto, _pad: 0 }, &service).expect("SERVICES");
    maps.services
        .insert(&ServiceKey { addr: addr(vip), port: 0, proto: 0, _pad: 0 }, &Service::default())
        .expect("SERVICES");
}

#[test]
fn tcp_and_udp_services_are_translated_at_the_socket() {
    let world = World::new("svc", 2);
    let (client_v4, client_v6) = (world.pods[0].v4, world.pods[0].v6);
    let server = &world.pods[1];
    service(&world, 1, VIP4, proto::TCP, Some((server.v4.into(), 8080)));
    service(&world, 2, VIP6, proto::TCP, Some((server.v6.into(), 8080)));
    service(&world, 3, VIP4, proto::UDP, Some((server.v4.into(), 5353)));
    service(&world, 4, VIP6, proto::UDP, Some((server.v6.into(), 5353)));
    let mut app = world.app(1);
    // Dual stack, so that accept() on an AF_INET6 listener is seen not to be touched by getpeername6.
    assert_eq!(app.run("serve tcp [::]:8080"), "serving");
    assert_eq!(app.run(&format!("serve udp {}:5353", server.v4)), "serving");
    assert_eq!(app.run(&format!("serve udp [{}]:5353", server.v6)), "serving");
    let mut client = world.app(0);

    let said = client.run(&format!("tcp {VIP4}:80"));
    assert!(said.starts_with(&format!("connected={VIP4}:80 app peer=[::ffff:{client_v4}]:")), "{said}");
    assert!(said.ends_with(&format!("local=[::ffff:{}]:8080", server.v4)), "{said}");
    let said = client.run(&format!("tcp [{VIP6}]:80"));
    assert!(said.starts_with(&format!("connected=[{VIP6}]:80 app peer=[{client_v6}]:")), "{said}");
    let said = client.run(&format!("tcp [::ffff:{VIP4}]:80"));
    assert!(said.starts_with(&format!("connected=[::ffff:{VIP4}]:80 app peer=[::ffff:{client_v4}]:")), "{said}");

    assert_eq!(client.run(&format!("udp sendto {VIP4}:80")), format!("from={VIP4}:80 said=hello"));
    assert_eq!(client.run(&format!("udp sendto [{VIP6}]:80")), format!("from=[{VIP6}]:80 said=hello"));
    assert_eq!(client.run(&format!("udp sendto [::ffff:{VIP4}]:80")), format!("from=[::ffff:{VIP4}]:80 said=hello"));
    assert_eq!(client.run(&format!("udp connect {VIP4}:80")), format!("connected={VIP4}:80 from={VIP4}:80 said=hello"));
    assert_eq!(
        client.run(&format!("udp connect [{VIP6}]:80")),
        format!("connected=[{VIP6}]:80 from=[{VIP6}]:80 said=hello")
    );
    // Not through a service: nothing is touched.
    let said = client.run(&format!("tcp {}:8080", server.v4));
    assert!(said.starts_with(&format!("connected={}:8080 app peer=[::ffff:{client_v4}]", server.v4)), "{said}");

    // The node's own processes use services too, and find the node's ports at their loopback, which is nobody else's.
    service(&world, 5, "127.0.0.1", proto::TCP, Some((server.v4.into(), 8080)));
    for called in [VIP4, "127.0.0.1"] {
        let said = world.host().run(&format!("tcp {called}:80"));
        assert!(said.starts_with(&format!("connected={called}:80 app")), "{said}");
    }
    assert_eq!(client.run("tcp 127.0.0.1:80"), "ECONNREFUSED");
    assert_eq!(world.outsider(0).run("tcp 127.0.0.1:80"), "ECONNREFUSED");
    assert!(world.datapath.maps().stats.get(stat::CONNECT_TRANSLATED).expect("STATS") >= 8);
}

#[test]
fn a_service_without_backends_and_an_undefined_port_refuse_at_once() {
    let world = World::new("none", 1);
    service(&world, 1, VIP4, proto::TCP, None);
    service(&world, 2, VIP6, proto::UDP, None);
    let mut client = world.app(0);
    assert_eq!(client.run(&format!("tcp {VIP4}:80")), "ECONNREFUSED");
    assert_eq!(client.run(&format!("tcp {VIP4}:81")), "ECONNREFUSED");
    assert_eq!(client.run(&format!("udp sendto [{VIP6}]:80")), "ECONNREFUSED");
    let stats = &world.datapath.maps().stats;
    assert_eq!(stats.get(stat::DROPS + DropReason::NoBackend as u32).expect("STATS"), 2);
    assert_eq!(stats.get(stat::DROPS + DropReason::UnknownServicePort as u32).expect("STATS"), 1);
}

fn policy(world: &World, prefix: u32, key: PolicyKey, verdict: u8, rule: u32) {
    let entry = PolicyEntry { verdict, _pad: [0; 3], rule };
    world.datapath.maps().policy.insert(&Prefix::new(prefix, key), &entry).expect("POLICY");
}

#[test]
fn policy_denies_with_an_errno_and_reaches_open_connections() {
    let world = World::new("pol", 3);
    let server = &world.pods[2];
    let (allowed, server_id) = (world.pods[0].security_id, server.security_id);
    let mut app = world.app(2);
    assert_eq!(app.run("serve tcp 0.0.0.0:8080"), "serving");
    let mut checkout = world.app(0);
    let mut frontend = world.app(1);
    let target = format!("{}:8080", server.v4);
    // Open before any policy exists.
    assert!(frontend.run(&format!("hold {target}")).contains("app peer"));
    assert_eq!(frontend.run("say"), "hello");

    let any = PolicyKey { subject: server_id, peer: 0, direction: direction::INGRESS, proto: 0, port_be: [0; 2] };
    let from_checkout = PolicyKey { peer: allowed, proto: proto::TCP, port_be: 8080u16.to_be_bytes(), ..any };
    policy(&world, PolicyKey::PREFIX_FULL, from_checkout, policy_verdict::ALLOW, 7);
    policy(&world, PolicyKey::PREFIX_ANY_PROTO, any, policy_verdict::DENY_DEFAULT, 9);

    let said = checkout.run(&format!("tcp {target}"));
    assert!(said.contains("app peer"), "{said}");
    assert_eq!(frontend.run(&format!("tcp {target}")), "EPERM");
    // A socket the connect hook does not see meets the same policy at the server's device.
    assert_eq!(world.outsider(1).run(&format!("tcp {target}")), "TimedOut");
    // The open connection is cut, though the server's egress is not isolated.
    assert_ne!(frontend.run("say"), "hello");
    // This node is always allowed (probes).
    assert!(world.host().run(&format!("tcp {target}")).contains("app peer"));

    assert!(checkout.run(&format!("hold {target}")).contains("app peer"));
    assert_eq!(checkout.run("say"), "hello");
    world.datapath.maps().policy.remove(&Prefix::new(PolicyKey::PREFIX_FULL, from_checkout)).expect("POLICY");
    assert_ne!(checkout.run("say"), "hello");
}

#[test]
fn a_pod_cannot_speak_with_anothers_address() {
    let world = World::new("spoof", 2);
    let mut app = world.app(1);
    assert_eq!(app.run("serve udp 0.0.0.0:5353"), "serving");
    support::net::ip(&format!("-n {} addr add 10.201.1.99/32 dev eth0", world.pods[0].name));
    support::net::ip(&format!(
        "-n {} route replace default via 169.254.1.1 dev eth0 onlink src 10.201.1.99",
        world.pods[0].name
    ));
    let before = world.datapath.maps().stats.get(stat::DROPS + DropReason::SpoofedSource as u32).expect("STATS");
    let mut client = world.app(0);
    let said = client.run(&format!("udp sendto {}:5353", world.pods[1].v4));
    assert!(!said.contains("said"), "{said}");
    let after = world.datapath.maps().stats.get(stat::DROPS + DropReason::SpoofedSource as u32).expect("STATS");
    assert!(after > before);
}
