//! The node role beside istio-cni: real sockets, descriptors and rules; only istio-cni itself is played by the test.
//! Needs root and nft.
#![allow(unreachable_pub, dead_code, reason = "support modules are shared by tests")]
#[path = "support/bpf.rs"]
mod bpf;
#[path = "../../identity/tests/support/ca.rs"]
mod ca;
#[path = "support/cni.rs"]
mod cni;
#[path = "support/policies.rs"]
mod policies;
#[cfg(feature = "cluster-tests")]
#[path = "istio_cni/real.rs"]
mod real;
#[path = "support/world.rs"]
mod world;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use cni::{Cni, Proxy, capture, release};
use policies::{denied_by_identity, is_cut, payments, payments_service, plaintext_ends_with_strict};
use world::{Control, Pod, is_ready, link, run, wait_ready, workload};
use xds_proto::istio::zds::workload_request::Payload;
use xds_proto::istio::{workload as w, zds};

const VIP: &str = "10.96.0.1:80";

/// Joins two pods, in both families and with a way to everywhere, as CNI plugins make them.
fn join(a: &Pod, b: &Pod, device: &str) {
    link(a, b, device);
    for pod in [a, b] {
        let Pod { name, ip } = pod;
        let own = v6(pod);
        run(&format!(
            "ip netns exec {name} sysctl -qw net.ipv6.conf.{device}.accept_dad=0;
             ip -n {name} -6 address add {own}/64 dev {device} nodad;
             ip -n {name} route replace default dev {device} src {ip}"
        ));
    }
}

fn v6(pod: &Pod) -> String {
    let [.., net, host] = pod.ip.octets();
    format!("fd45:{net}::{host}")
}

/// As the control plane knows a pod with both families.
fn both(pod: &Pod, workload: w::Workload) -> w::Workload {
    let v6: std::net::Ipv6Addr = v6(pod).parse().unwrap();
    let addresses = vec![pod.ip.octets().to_vec().into(), v6.octets().to_vec().into()];
    w::Workload { addresses, ..workload }
}

/// Waits until it does.
async fn comes_true(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..100 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{what}: not within 10 s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_pods_over_hbone() {
    let a = Pod::new("z1-a", Ipv4Addr::new(10, 45, 1, 1));
    let b = Pod::new("z1-b", Ipv4Addr::new(10, 45, 1, 2));
    let c = Pod::new("z1-c", Ipv4Addr::new(10, 45, 1, 3));
    join(&a, &b, "eth0");
    link(&c, &b, "eth1");
    capture(&a);
    capture(&b);
    b.echo(8080);
    let control = Control::start().await;
    control.workload(both(&a, workload(&a, "checkout")));
    control.workload(both(&b, payments(&b)));
    control.service(payments_service());
    let folder = tempfile::tempdir().unwrap();
    let cni = Cni::start(folder.path());
    let mut proxy = Proxy::start(&control, &cni, None);
    let connection = cni.accept().await;
    assert_eq!(connection.add("1-a", "checkout", &a.file()).await, "");
    assert_eq!(connection.add("1-b", "payments", &b.file()).await, "");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!is_ready(&proxy.socket()).await, "ready before istio-cni named all pods");
    assert_eq!(connection.snapshot_sent().await, "");
    wait_ready(&proxy.socket()).await;

    // The application sees the true client: by address, by service, in the other family.
    assert_eq!(a.ask("10.45.1.2:8080", false, "direct").unwrap(), "10.45.1.1 direct");
    assert_eq!(a.ask(VIP, false, "by name").unwrap(), "10.45.1.1 by name");
    assert_eq!(a.ask("[fd45:1::2]:8080", false, "in six").unwrap(), "fd45:1::1 in six");
    // On one node, and yet with certificates: nothing of ours in the kernel vouches for the caller.
    let metrics = proxy.metrics().await;
    for reporter in ["source", "destination"] {
        let opened = metrics.lines().find(|line| {
            line.starts_with("istio_tcp_connections_opened_total")
                && line.contains(&format!("reporter=\"{reporter}\""))
                && line.contains("source_principal=\"spiffe://cluster.local/ns/shop/sa/checkout\"")
                && line.contains("connection_security_policy=\"mutual_tls\"")
        });
        assert!(opened.is_some(), "{reporter}:\n{metrics}");
    }
    assert!(!metrics.contains("kernel_attested"), "{metrics}");
    // Large both ways.
    let large = "x".repeat(4 << 20);
    let mut stream = a.connect(VIP, false).unwrap();
    let (mut writer, sent) = (stream.try_clone().unwrap(), large.clone());
    let sender = std::thread::spawn(move || {
        writer.write_all(sent.as_bytes()).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut back = String::new();
    stream.read_to_string(&mut back).unwrap();
    sender.join().unwrap();
    assert!(back == format!("10.45.1.1 {large}"), "{} bytes came back", back.len());
    // A pod that calls itself, by its service.
    assert_eq!(b.ask(VIP, false, "self").unwrap(), "10.45.1.2 self");
    // Our ports are no destination, from within or without.
    for own in ["10.45.1.2:15001", "10.45.1.2:15006"] {
        assert!(is_cut(c.connect(own, false).and_then(|mut stream| stream.read(&mut [0; 9]))), "{own}");
        assert!(is_cut(a.connect(own, false).and_then(|mut stream| stream.read(&mut [0; 9]))), "{own}");
    }
    assert!(is_cut(a.connect("127.0.0.1:15001", false).and_then(|mut stream| stream.read(&mut [0; 9]))));

    // Plaintext until STRICT, open connections included; then only who proves who it is.
    plaintext_ends_with_strict(&control, &c, "10.45.1.2:8080", "10.45.1.3 ");
    assert_eq!(a.ask(VIP, false, "mtls").unwrap(), "10.45.1.1 mtls");
    denied_by_identity(&control, &a, VIP, false);
    assert!(proxy.metrics().await.contains("response_flags=\"DENY\""));
    control.remove_policy("shop/no-checkout");
    comes_true("allowed again", || a.ask(VIP, false, "again").is_ok_and(|text| text == "10.45.1.1 again")).await;

    // An address the control plane does not know the pod by makes nobody else of it.
    run("ip -n z1-a address add 10.45.1.99/32 dev eth0; ip -n z1-a route replace default dev eth0 src 10.45.1.99");
    assert!(
        is_cut(a.connect(VIP, false).and_then(|mut stream| stream.read(&mut [0; 9]))),
        "a forged address was taken"
    );
    run("ip -n z1-a route replace default dev eth0 src 10.45.1.1");

    // A draining proxy finishes what is open, and takes no more pods.
    let mut open = a.connect(VIP, false).unwrap();
    let mut buf = [0; 10];
    open.read_exact(&mut buf).unwrap();
    proxy.child.terminate();
    assert!(connection.is_closed().await);
    open.write_all(b"last words").unwrap();
    let mut words = [0; 10];
    open.read_exact(&mut words).unwrap();
    assert_eq!(&words, b"last words");
    drop(open);
    assert!(proxy.child.0.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn istio_cni_comes_and_goes() {
    let a = Pod::new("z2-a", Ipv4Addr::new(10, 45, 2, 1));
    let b = Pod::new("z2-b", Ipv4Addr::new(10, 45, 2, 2));
    let c = Pod::new("z2-c", Ipv4Addr::new(10, 45, 2, 3));
    join(&a, &b, "eth0");
    link(&a, &c, "eth1");
    for pod in [&a, &b, &c] {
        capture(pod);
    }
    b.echo(8080);
    c.echo(8080);
    let control = Control::start().await;
    control.workload(both(&a, workload(&a, "checkout")));
    control.workload(both(&b, payments(&b)));
    control.workload(workload(&c, "stock"));
    control.service(payments_service());
    let folder = tempfile::tempdir().unwrap();
    let mut cni = Cni::start(folder.path());
    let proxy = Proxy::start(&control, &cni, None);
    let connection = cni.accept().await;
    for (uid, name, pod) in [("2-a", "checkout", &a), ("2-b", "payments", &b), ("2-c", "stock", &c)] {
        assert_eq!(connection.add(uid, name, &pod.file()).await, "");
    }
    assert_eq!(connection.snapshot_sent().await, "");
    wait_ready(&proxy.socket()).await;
    assert_eq!(a.ask("10.45.2.3:8080", false, "stock").unwrap(), "10.45.2.1 stock");

    // Without istio-cni everything goes on. What it names when it is back stays, the rest is gone.
    let mut open = a.connect(VIP, false).unwrap();
    let mut buf = [0; 10];
    open.read_exact(&mut buf).unwrap();
    cni.stop();
    drop(connection);
    assert_eq!(a.ask(VIP, false, "alone").unwrap(), "10.45.2.1 alone");
    cni.start_again();
    let connection = cni.accept().await;
    assert_eq!(connection.add("2-a", "checkout", &a.file()).await, "");
    assert_eq!(connection.keep("2-b").await, "");
    assert_eq!(connection.keep("nobody").await, "");
    assert_eq!(a.ask("10.45.2.3:8080", false, "kept").unwrap(), "10.45.2.1 kept");
    assert_eq!(connection.snapshot_sent().await, "");
    comes_true("a pod not named again is let go", || a.ask("10.45.2.3:8080", false, "?").is_err()).await;
    open.write_all(b"still").unwrap();
    let mut text = [0; 5];
    open.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"still");
    assert_eq!(a.ask(VIP, false, "again").unwrap(), "10.45.2.1 again");

    // A pod that leaves the mesh and stays: no rules, then gone; its open connections end.
    let mut leaving = a.connect(VIP, false).unwrap();
    leaving.read_exact(&mut buf).unwrap();
    assert_eq!(connection.del("unheard-of").await, "");
    release(&b);
    assert_eq!(connection.del("2-b").await, "");
    assert!(is_cut(leaving.read(&mut buf)), "a connection of a pod that left hangs");
    assert!(is_cut(open.read(&mut buf)));
    assert!(b.run(|| TcpListener::bind("0.0.0.0:15008").is_ok()).join().unwrap(), "still listening in a pod that left");

    // Back, while something has the port: told, tried again, and then served without being asked.
    let taken = b.run(|| TcpListener::bind("0.0.0.0:15008").unwrap()).join().unwrap();
    capture(&b);
    let error = connection.add("2-b", "payments", &b.file()).await;
    assert!(error.contains("0.0.0.0:15008"), "{error}");
    drop(taken);
    comes_true("the pod is served", || a.ask(VIP, false, "back").is_ok_and(|text| text == "10.45.2.1 back")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sandbox_made_anew_and_messages_that_make_no_sense() {
    let a = Pod::new("z3-a", Ipv4Addr::new(10, 45, 3, 1));
    let control = Control::start().await;
    let folder = tempfile::tempdir().unwrap();
    let cni = Cni::start(folder.path());
    let mut proxy = Proxy::start(&control, &cni, None);
    let connection = cni.accept().await;
    assert_eq!(connection.add("3", "stock", &a.file()).await, "");
    assert_eq!(connection.add("3", "stock", &a.file()).await, "", "told twice");
    assert_eq!(connection.snapshot_sent().await, "");
    wait_ready(&proxy.socket()).await;
    let listens = |pod: &Pod| !pod.run(|| TcpListener::bind("0.0.0.0:15008").is_ok()).join().unwrap();
    assert!(listens(&a));
    let anew = Pod::new("z3-b", Ipv4Addr::new(10, 45, 3, 1));
    assert_eq!(connection.add("3", "stock", &anew.file()).await, "");
    assert!(listens(&anew));
    comes_true("the old sandbox is let go", || !listens(&a)).await;
    // Its successor of the same name, which comes before it goes.
    let successor = Pod::new("z3-c", Ipv4Addr::new(10, 45, 3, 2));
    assert_eq!(connection.add("4", "stock", &successor.file()).await, "");
    assert_eq!(connection.del("3").await, "");
    assert!(listens(&successor));
    comes_true("the predecessor is let go", || !listens(&anew)).await;

    // A descriptor of something else is that pod's affair; a message that breaks the rules ends the connection.
    let error = connection.add("5", "stock", &std::fs::File::open("/dev/null").unwrap()).await;
    assert!(error.contains("entering the network namespace"), "{error}");
    assert_eq!(connection.del("5").await, "");
    let netns = a.file();
    let nameless = zds::AddWorkload { uid: "6".to_owned(), workload_info: None };
    let no_uid = zds::KeepWorkload { uid: String::new() };
    let wrong: [(Payload, bool, &str); 5] = [
        (Payload::Add(nameless.clone()), true, "AddWorkload.workload_info of pod 6 is missing"),
        (Payload::Add(nameless), false, "AddWorkload: 0 descriptors"),
        (Payload::Keep(no_uid), false, "KeepWorkload.uid is empty"),
        (Payload::Del(zds::DelWorkload { uid: "6".to_owned() }), true, "DelWorkload: 1 descriptors"),
        (Payload::Add(zds::AddWorkload::default()), true, "AddWorkload.uid is empty"),
    ];
    drop(connection);
    for (payload, with_descriptor, expected) in wrong {
        let connection = cni.accept().await;
        let descriptors = if with_descriptor { vec![netns.as_fd()] } else { Vec::new() };
        let error = connection.ask(payload, &descriptors).await;
        assert!(error.contains(expected), "{error}");
        assert!(connection.is_closed().await);
    }
    let connection = cni.accept().await;
    assert!(connection.say(b"\x12\x03\x12\x01\xff", &[]).await.contains("DelWorkload.uid"));
    let connection = cni.accept().await;
    assert_eq!(connection.add("4", "stock", &successor.file()).await, "");
    assert_eq!(connection.snapshot_sent().await, "");
    assert!(connection.snapshot_sent().await.contains("SnapshotSent after SnapshotSent"));
    assert!(listens(&successor), "a quarrel with istio-cni is not the pod's");
    proxy.child.terminate();
    assert!(proxy.child.0.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_resolved() {
    let a = Pod::new("z4-a", Ipv4Addr::new(10, 45, 4, 1));
    let resolver = Pod::new("z4-dns", Ipv4Addr::new(10, 45, 4, 2));
    join(&a, &resolver, "eth0");
    capture(&a);
    // Answers both transports with the query turned round, and says who asked.
    let (sender, asked) = std::sync::mpsc::channel();
    let over_tcp = sender.clone();
    let udp = resolver.run(|| UdpSocket::bind("0.0.0.0:53").unwrap()).join().unwrap();
    let tcp = resolver.run(|| TcpListener::bind("0.0.0.0:53").unwrap()).join().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            // First a forged answer, to another query.
            udp.send_to(b"\xff\xffforged", from).unwrap();
            udp.send_to(&[&buffer[..length], b" answered"].concat(), from).unwrap();
            sender.send(from.ip()).unwrap();
        }
    });
    std::thread::spawn(move || {
        let (mut stream, from) = tcp.accept().unwrap();
        let mut query = [0; 7];
        stream.read_exact(&mut query).unwrap();
        assert_eq!(&query, b"\0\x05query");
        stream.write_all(b"\0\x0equery answered").unwrap();
        over_tcp.send(from.ip()).unwrap();
    });
    let control = Control::start().await;
    let folder = tempfile::tempdir().unwrap();
    let cni = Cni::start(folder.path());
    let proxy = Proxy::start(&control, &cni, Some(&resolver));
    let connection = cni.accept().await;
    assert_eq!(connection.add("4-a", "checkout", &a.file()).await, "");
    assert_eq!(connection.snapshot_sent().await, "");
    wait_ready(&proxy.socket()).await;
    // To a resolver nobody is at: the rules lead to the proxy, the proxy to its own.
    let answer = a.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.connect("10.96.0.10:53").unwrap();
        socket.send(b"query").unwrap();
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    });
    assert_eq!(answer.join().unwrap(), "query answered");
    assert_eq!(a.ask("10.96.0.10:53", false, "\0\x05query").unwrap(), "\0\x0equery answered");
    // It sees the pod.
    assert_eq!((asked.recv().unwrap(), asked.recv().unwrap()), (a.ip.into(), a.ip.into()));
}
