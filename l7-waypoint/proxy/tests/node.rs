//! The node role on real sockets: two nodes, network namespaces as pods, certificates and xDS over gRPC.
//! Needs root. Only the agent is played by the test: its end of the handoff, rules in the pods, `sk_lookup`.
#![allow(unreachable_pub, dead_code, reason = "support modules are shared by tests")]
#[path = "support/bpf.rs"]
mod bpf;
#[path = "../../identity/tests/support/ca.rs"]
mod ca;
#[path = "support/policies.rs"]
mod policies;
#[path = "support/world.rs"]
mod world;

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use policies::{denied_by_identity, is_cut, payments, payments_service, plaintext_ends_with_strict, strict};
use strata_handoff::{ProxyMessage, ShortCut};
use world::{Control, NodeProxy, Pod, exchange, link, workload};
use xds_proto::istio::workload as w;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn between_two_nodes() {
    let a = Pod::new("h1-a", Ipv4Addr::new(10, 44, 1, 1));
    let b = Pod::new("h1-b", Ipv4Addr::new(10, 44, 1, 2));
    let c = Pod::new("h1-c", Ipv4Addr::new(10, 44, 1, 3));
    link(&a, &b, "eth0");
    link(&c, &b, "eth1");
    a.rules();
    b.rules();
    b.echo(8080);
    let control = Control::start().await;
    control.workload(workload(&a, "checkout"));
    control.workload(payments(&b));
    control.service(payments_service());
    let mut near = NodeProxy::start(&control, &[(&a, "checkout")]).await;
    let mut far = NodeProxy::start(&control, &[(&b, "payments")]).await;

    // The application sees the true client, by pod address and by service address.
    assert_eq!(a.ask("10.44.1.2:8080", true, "direct").unwrap(), "10.44.1.1 direct");
    assert_eq!(a.ask("10.96.0.1:80", true, "by name").unwrap(), "10.44.1.1 by name");
    // Large both ways.
    let large = "x".repeat(8 << 20);
    let mut stream = a.connect("10.96.0.1:80", true).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let sent = large.clone();
    let sender = std::thread::spawn(move || {
        writer.write_all(sent.as_bytes()).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut back = String::new();
    stream.read_to_string(&mut back).unwrap();
    sender.join().unwrap();
    assert!(back == format!("10.44.1.1 {large}"), "{} bytes came back", back.len());
    let metrics = far.metrics().await;
    let opened = metrics
        .lines()
        .find(|line| {
            line.starts_with("istio_tcp_connections_opened_total")
                && line.contains("reporter=\"destination\"")
                && line.contains("source_principal=\"spiffe://cluster.local/ns/shop/sa/checkout\"")
                && line.contains("connection_security_policy=\"mutual_tls\"")
        })
        .unwrap_or_else(|| panic!("not counted:\n{metrics}"));
    assert!(opened.ends_with(" 3"), "{opened}");

    // A known service is never passed through: an undefined port is refused.
    assert!(is_cut(a.connect("10.96.0.1:81", true).and_then(|mut stream| stream.read(&mut [0; 9]))));

    // Unmeshed plaintext is served until STRICT says otherwise, open connections included.
    plaintext_ends_with_strict(&control, &c, "10.44.1.2:8080", "10.44.1.3 ");
    let policy = far.told(|message| match message {
        ProxyMessage::Refused(refused) => Some((refused.policy.clone(), refused.dst_port)),
        _ => None,
    });
    assert_eq!(policy.await, ("shop/strict".to_owned(), 8080));
    assert_eq!(a.ask("10.96.0.1:80", true, "mtls").unwrap(), "10.44.1.1 mtls");

    // A policy about the identity cuts the tunnel and refuses the next.
    denied_by_identity(&control, &a, "10.96.0.1:80", true);
    assert!(near.metrics().await.contains("response_flags=\"DENY\""));
    control.remove_policy("shop/no-checkout");
    let mut answer = a.ask("10.96.0.1:80", true, "again");
    for _ in 0..50 {
        if answer.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        answer = a.ask("10.96.0.1:80", true, "again");
    }
    assert_eq!(answer.unwrap(), "10.44.1.1 again");

    // A draining proxy finishes what is open.
    let mut open = a.connect("10.96.0.1:80", true).unwrap();
    let mut buf = [0; 10];
    open.read_exact(&mut buf).unwrap();
    near.terminate();
    open.write_all(b"last words").unwrap();
    let mut words = [0; 10];
    open.read_exact(&mut words).unwrap();
    assert_eq!(&words, b"last words");
    drop(open);
    assert!(near.wait().success());
}

/// checkout and payments on one node, at 10.44.`net`.1 and .2, and who configures them.
async fn neighbours(net: u8) -> (Pod, Pod, Control) {
    let a = Pod::new(&format!("h{net}-a"), Ipv4Addr::new(10, 44, net, 1));
    let b = Pod::new(&format!("h{net}-b"), Ipv4Addr::new(10, 44, net, 2));
    link(&a, &b, "eth0");
    a.rules();
    b.rules();
    b.echo(8080);
    let control = Control::start().await;
    control.workload(workload(&a, "checkout"));
    control.workload(payments(&b));
    control.service(payments_service());
    (a, b, control)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_one_node() {
    let (a, b, control) = neighbours(2).await;
    control.policy(strict());
    let mut proxy = NodeProxy::start(&control, &[(&a, "checkout"), (&b, "payments")]).await;

    // Straight to the application, though STRICT: the kernel vouches for the caller.
    assert_eq!(a.ask("10.96.0.1:80", true, "near").unwrap(), "10.44.2.1 near");
    assert!(proxy.metrics().await.contains("connection_security_policy=\"kernel_attested\""));
    let expected = ShortCut { src: a.ip.into(), dst: b.ip.into(), port: 8080 };
    let granted = proxy.told(|message| match message {
        ProxyMessage::Grant(short_cut) => Some(*short_cut),
        _ => None,
    });
    assert_eq!(granted.await, expected);

    // Without its agent the proxy goes on; when it is back it gets the same listeners, and open connections stay.
    let mut open = a.connect("10.96.0.1:80", true).unwrap();
    let pods = [(&a, "checkout"), (&b, "payments")];
    let alone = || assert_eq!(a.ask("10.96.0.1:80", true, "alone").unwrap(), "10.44.2.1 alone");
    assert_eq!(proxy.restart_agent(&pods, alone).await, 2);
    open.write_all(b"still").unwrap();
    let mut text = [0; 15];
    open.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"10.44.2.1 still");
    // The agent forgot the grants; the next connection brings one again.
    assert_eq!(a.ask("10.96.0.1:80", true, "anew").unwrap(), "10.44.2.1 anew");
    let granted = proxy.told(|message| match message {
        ProxyMessage::Grant(short_cut) => Some(*short_cut),
        _ => None,
    });
    assert_eq!(granted.await, expected);

    // A pod that calls its own service.
    assert_eq!(b.ask("10.96.0.1:80", true, "self").unwrap(), "10.44.2.2 self");

    // A waypoint in front: the short-cut would go round it.
    let waypoint = w::GatewayAddress {
        destination: Some(w::gateway_address::Destination::Hostname(w::NamespacedHostname {
            namespace: "shop".to_owned(),
            hostname: "waypoint.shop.svc.cluster.local".to_owned(),
        })),
        hbone_mtls_port: 15008,
    };
    control.service(w::Service { waypoint: Some(waypoint), ..payments_service() });
    let revoked = proxy.told(|message| match message {
        ProxyMessage::Revoke(short_cut) => Some(*short_cut),
        _ => None,
    });
    assert_eq!(revoked.await, expected);
    // No waypoint is there: refused, not passed by.
    assert!(is_cut(a.connect("10.96.0.1:80", true).and_then(|mut stream| stream.read(&mut [0; 9]))));
}

/// The kernel has drawn a backend before the proxy does: those behind a short-cut have had their share.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_behind_a_short_cut_is_drawn_again() {
    let a = Pod::new("k2-a", Ipv4Addr::new(10, 44, 3, 1));
    let b = Pod::new("k2-b", Ipv4Addr::new(10, 44, 3, 2));
    let c = Pod::new("k2-c", Ipv4Addr::new(10, 44, 3, 3));
    link(&a, &b, "eth0");
    link(&a, &c, "eth1");
    for pod in [&a, &b, &c] {
        pod.rules();
    }
    b.echo(8080);
    c.echo(8080);
    let control = Control::start().await;
    control.workload(workload(&a, "checkout"));
    control.workload(payments(&b));
    let second = w::Workload { services: payments(&c).services, ..workload(&c, "payments-2") };
    control.workload(second);
    control.service(payments_service());
    let pods = [(&a, "checkout"), (&b, "payments"), (&c, "payments-2")];
    let mut proxy = NodeProxy::start(&control, &pods).await;
    // Two connections, two endpoints, each time: by chance alone that would happen once in 64 runs. Nothing takes
    // the short-cuts here, so all connections come to the proxy.
    for _ in 0..6 {
        let mut granted = Vec::new();
        for _ in 0..2 {
            assert_eq!(a.ask("10.96.0.1:80", true, "hello").unwrap(), "10.44.3.1 hello");
            let grant = proxy.told(|message| match message {
                ProxyMessage::Grant(short_cut) => Some(short_cut.dst),
                _ => None,
            });
            granted.push(grant.await);
        }
        granted.sort();
        assert_eq!(granted, [b.ip, c.ip]);
        proxy.restart_agent(&pods, || {}).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_takes_over_without_a_lost_connection() {
    let (a, b, control) = neighbours(4).await;
    let pods = [(&a, "checkout"), (&b, "payments")];
    let mut proxy = NodeProxy::start(&control, &pods).await;
    let stop = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let stop = stop.clone();
            a.run(move || {
                let mut answered = 0u32;
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(exchange("10.96.0.1:80", true, "on").unwrap(), "10.44.4.1 on", "after {answered}");
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    for _ in 0..3 {
        assert!(proxy.succeed(&control, &pods).await.success());
    }
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        assert!(caller.join().unwrap() > 100);
    }
}
