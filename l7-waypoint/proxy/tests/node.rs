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
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType};
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
    // One that has heard nothing of the control plane leaves the pods to its predecessor, which knows all.
    control.refuse(true);
    let early = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        control.refuse(false);
    };
    assert!(proxy.succeed_after(early, &control, &pods).await.success());
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        assert!(caller.join().unwrap() > 100);
    }
}

/// A query for IPv4 addresses.
fn query(name: &str) -> Message {
    let mut message = Message::query();
    message.metadata.id = rand::random();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message
}

/// What an answer says: its code, or its addresses.
fn said(answer: &[u8], query: &Message) -> String {
    let answer = Message::from_vec(answer).unwrap();
    assert_eq!((answer.metadata.id, &answer.queries), (query.metadata.id, &query.queries));
    match answer.metadata.response_code {
        ResponseCode::NoError => answer.answers.iter().map(|record| record.data.to_string()).collect(),
        code => code.to_string(),
    }
}

/// Asks as the hooks would lead a pod's query, over UDP.
fn ask_for(pod: &Pod, name: &str) -> String {
    let query = query(name);
    let bytes = query.to_vec().unwrap();
    let answer = pod.run(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.connect("127.0.0.1:15053").unwrap();
        socket.send(&bytes).unwrap();
        let mut buffer = [0; 1232];
        let length = socket.recv(&mut buffer).expect("an answer");
        buffer[..length].to_vec()
    });
    said(&answer.join().unwrap(), &query)
}

/// A resolver to whom every name is 192.0.2.1; says who asks it.
fn resolver(pod: &Pod) -> std::sync::mpsc::Receiver<IpAddr> {
    let (sender, asked) = std::sync::mpsc::channel();
    let over_tcp = sender.clone();
    let answer = |query: &[u8]| {
        let mut message = Message::from_vec(query).unwrap();
        let owner = message.queries[0].name().clone();
        message.add_answer(Record::from_rdata(owner, 5, RData::A(Ipv4Addr::new(192, 0, 2, 1).into())));
        message.into_response().to_vec().unwrap()
    };
    let udp = pod.run(|| UdpSocket::bind("0.0.0.0:53").unwrap()).join().unwrap();
    let tcp = pod.run(|| TcpListener::bind("0.0.0.0:53").unwrap()).join().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 1232];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            udp.send_to(&answer(&buffer[..length]), from).unwrap();
            let _ = sender.send(from.ip());
        }
    });
    std::thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.unwrap();
            let from = stream.peer_addr().unwrap().ip();
            let mut length = [0; 2];
            while stream.read_exact(&mut length).is_ok() {
                let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut query).unwrap();
                let said = answer(&query);
                stream.write_all(&[&(said.len() as u16).to_be_bytes(), said.as_slice()].concat()).unwrap();
                let _ = over_tcp.send(from);
            }
        }
    });
    asked
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_meshs_names_are_answered_in_the_pod() {
    let a = Pod::new("h5-a", Ipv4Addr::new(10, 44, 5, 1));
    let dns = Pod::new("h5-dns", Ipv4Addr::new(10, 44, 5, 2));
    link(&a, &dns, "eth0");
    a.rules();
    let asked = resolver(&dns);
    let control = Control::start().await;
    control.workload(workload(&a, "checkout"));
    control.service(payments_service());
    let outside = w::Service {
        hostname: "api.example.com".to_owned(),
        addresses: vec![w::NetworkAddress { address: vec![240, 240, 0, 1].into(), ..Default::default() }],
        ..payments_service()
    };
    control.service(outside);
    let pods = [(&a, "checkout")];
    let mut proxy = NodeProxy::start_with(&control, &pods, &["--dns-resolvers", "10.44.5.2"]).await;

    let service = payments_service().hostname;
    // It listens once it knows names; here nothing else would answer in the meantime.
    let listens = || a.run(|| UdpSocket::bind("127.0.0.1:15053").is_err()).join().unwrap();
    for _ in 0..500 {
        if listens() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(ask_for(&a, &format!("{service}.")), "10.96.0.1");
    assert_eq!(ask_for(&a, "api.example.com."), "240.240.0.1");
    assert!(asked.try_recv().is_err(), "the resolver was asked for what the mesh knows");
    // What it does not know is asked for in the pod's name.
    assert_eq!(ask_for(&a, "example.org."), "192.0.2.1");
    assert_eq!(asked.recv().unwrap(), IpAddr::V4(a.ip));
    // Over TCP, steered as any connection of the pod: both on one connection.
    let stream = a.connect("10.44.5.2:53", true);
    let mut stream = stream.unwrap();
    for (name, expected) in [(format!("{service}."), "10.96.0.1"), ("example.org.".to_owned(), "192.0.2.1")] {
        let query = query(&name);
        let bytes = query.to_vec().unwrap();
        stream.write_all(&[&(bytes.len() as u16).to_be_bytes(), bytes.as_slice()].concat()).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(said(&answer, &query), expected);
    }
    assert_eq!(asked.recv().unwrap(), IpAddr::V4(a.ip));
    let metrics = proxy.metrics().await;
    for expected in
        ["istio_dns_requests_total 5", "istio_dns_upstream_requests_total 2", "istio_dns_upstream_failures_total 0"]
    {
        assert!(metrics.lines().any(|line| line == expected), "{expected}:\n{metrics}");
    }

    // No name is lost when a successor takes over.
    let stop = Arc::new(AtomicBool::new(false));
    let asking = {
        let (stop, name) = (stop.clone(), format!("{service}."));
        a.run(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let (mut answered, mut buffer) = (0u32, [0; 1232]);
            while !stop.load(Ordering::Relaxed) {
                let query = query(&name);
                socket.send_to(&query.to_vec().unwrap(), SocketAddr::from(([127, 0, 0, 1], 15053))).unwrap();
                let length = socket.recv(&mut buffer).expect("an answer");
                assert_eq!(said(&buffer[..length], &query), "10.96.0.1");
                answered += 1;
            }
            answered
        })
    };
    assert!(proxy.succeed(&control, &pods).await.success());
    stop.store(true, Ordering::Relaxed);
    assert!(asking.join().unwrap() > 100);
}
