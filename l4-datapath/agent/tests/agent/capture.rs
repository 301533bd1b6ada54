//! Enrolment over the real handoff; the test plays the proxy's end.
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use l4_netns::run_in;
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use strata_abi::listener;
use strata_handoff::message::ShortCut;
use strata_handoff::{AgentMessage, PodInfo, ProxyEnd, ProxyMessage, VERSION};
use tokio::runtime::Runtime;

use crate::node::{Node, Pod, Sandbox, eventually};

/// What a proxy does, as far as the lower layer sees it.
struct Proxy {
    runtime: Runtime,
    connection: ProxyEnd,
    listeners: HashMap<(String, u32), Socket>,
    pods: HashMap<String, (PodInfo, OwnedFd)>,
}

impl Proxy {
    fn connect(node: &Node) -> Proxy {
        Proxy::answering_for(node, &[])
    }

    /// One that answers DNS queries in the place of `resolvers`.
    fn answering_for(node: &Node, resolvers: &[IpAddr]) -> Proxy {
        let runtime = Runtime::new().unwrap();
        let connection = runtime.block_on(async { ProxyEnd::connect(&node.run_dir().join("handoff.sock")) }).unwrap();
        let proxy = Proxy { runtime, connection, listeners: HashMap::new(), pods: HashMap::new() };
        let resolvers = resolvers.to_vec();
        proxy.say(&ProxyMessage::Hello { version: VERSION, pid: std::process::id(), resolvers }, &[]);
        assert_eq!(proxy.hear().0, AgentMessage::Hello { version: VERSION, node: node.name.clone() });
        proxy
    }

    fn say(&self, message: &ProxyMessage, sockets: &[&Socket]) {
        let fds: Vec<_> = sockets.iter().map(|socket| socket.as_fd()).collect();
        self.runtime.block_on(self.connection.send(message, &fds)).unwrap();
    }

    fn hear(&self) -> (AgentMessage, Vec<OwnedFd>) {
        let wait = async { tokio::time::timeout(Duration::from_secs(10), self.connection.recv()).await };
        self.runtime.block_on(wait).expect("a message in time").unwrap()
    }

    /// Takes messages until the snapshot's end, or the first one otherwise.
    fn snapshot(&mut self) -> usize {
        let mut count = 0;
        loop {
            match self.hear() {
                (AgentMessage::PodAdded { pod }, mut fds) => {
                    count += 1;
                    self.pods.insert(pod.uid.clone(), (pod, fds.remove(0)));
                }
                (AgentMessage::SnapshotSent, _) => return count,
                (other, _) => panic!("{other:?}"),
            }
        }
    }

    fn added(&mut self) -> String {
        match self.hear() {
            (AgentMessage::PodAdded { pod }, mut fds) => {
                let uid = pod.uid.clone();
                self.pods.insert(uid.clone(), (pod, fds.remove(0)));
                uid
            }
            (other, _) => panic!("{other:?}"),
        }
    }

    /// Listens inside the pod and hands the sockets over.
    fn listen(&mut self, uid: &str) {
        let kinds: Vec<u32> = (0..listener::COUNT).collect();
        for kind in &kinds {
            let socket = run_in(self.pods[uid].1.as_fd(), || listening(*kind)).unwrap();
            self.listeners.insert((uid.to_owned(), *kind), socket);
        }
        let sockets: Vec<&Socket> = kinds.iter().map(|kind| &self.listeners[&(uid.to_owned(), *kind)]).collect();
        self.say(&ProxyMessage::Listeners { uid: uid.to_owned(), kinds: kinds.clone() }, &sockets);
    }

    /// The next connection at a listener: where it wanted to go, and from where; None if none comes.
    fn accept(&self, uid: &str, kind: u32) -> Option<(SocketAddr, SocketAddr)> {
        let socket = &self.listeners[&(uid.to_owned(), kind)];
        socket.set_nonblocking(true).unwrap();
        let mut found = None;
        eventually(|| {
            found = socket.accept().ok();
            found.is_some()
        });
        let (accepted, peer) = found?;
        Some((accepted.local_addr().unwrap().as_socket()?, peer.as_socket()?))
    }
}

fn listening(kind: u32) -> Socket {
    let v6 = matches!(kind, listener::OUTBOUND_V6 | listener::INBOUND_V6 | listener::HBONE_V6);
    let socket = Socket::new(if v6 { Domain::IPV6 } else { Domain::IPV4 }, Type::STREAM, None).unwrap();
    let any: IpAddr = if v6 {
        socket.set_only_v6(true).unwrap();
        socket.set_ip_transparent_v6(true).unwrap();
        "::1".parse().unwrap()
    } else {
        socket.set_ip_transparent_v4(true).unwrap();
        "127.0.0.1".parse().unwrap()
    };
    socket.bind(&SocketAddr::from((any, 0)).into()).unwrap();
    socket.listen(64).unwrap();
    socket
}

/// A process of the node's cgroup inside a pod that connects and stays for a while.
fn client(node: &Node, pod: &Pod, to: IpAddr, port: u16) -> Child {
    let procs = node.cgroup().join("cgroup.procs");
    let script = format!("echo $$ > {} && exec 3<>/dev/tcp/{to}/{port} && sleep 2", procs.display());
    let mut command = Command::new("bash");
    command.args(["-c", &script]).stdout(Stdio::null()).stderr(Stdio::null());
    pod.sandbox.inside(|| command.spawn().unwrap())
}

/// Asks `server` as a resolver's stub does, in a process of the node's cgroup inside the pod; what comes back.
fn ask(node: &Node, pod: &Pod, server: IpAddr) -> String {
    let procs = node.cgroup().join("cgroup.procs");
    // One datagram each way; bash closes its end only after the answer.
    let script = format!(
        "echo $$ > {} && exec 3<>/dev/udp/{server}/53 && printf query >&3 && timeout 2 dd bs=64 count=1 <&3 2>/dev/null",
        procs.display()
    );
    let mut command = Command::new("bash");
    command.args(["-c", &script]).stdin(Stdio::null()).stderr(Stdio::null());
    let output = pod.sandbox.inside(|| command.output().unwrap());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Answers every datagram at `addr` inside the pod.
fn answer(pod: &Pod, addr: SocketAddr, says: &'static str) {
    let socket = pod.sandbox.inside(|| UdpSocket::bind(addr).unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((1.., from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(says.as_bytes(), from);
        }
    });
}

fn mesh(labels: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n")
}

const AMBIENT: &str = "istio.io/dataplane-mode: ambient";

fn state_of(node: &Node, name: &str) -> Value {
    let status = node.status();
    status["pods"].as_array().unwrap().iter().find(|pod| pod["name"] == name).map(|pod| pod["mesh"].clone()).unwrap()
}

fn annotated(node: &Node) -> usize {
    node.status_file().matches("ambient.istio.io/redirection: enabled").count()
}

/// Two described pods in a namespace that is not in the mesh.
fn cluster() -> (Node, Pod, Pod) {
    let mut node = Node::new();
    node.write("namespace.yaml", &mesh(""));
    node.describe("a", "app: a");
    node.describe("b", "app: b");
    node.start();
    let (a, b) = (node.pod("a"), node.pod("b"));
    (node, a, b)
}

fn enrol(node: &Node, proxy: &mut Proxy, count: usize) {
    for _ in 0..count {
        let uid = proxy.added();
        proxy.listen(&uid);
    }
    assert!(eventually(|| annotated(node) == count), "{}\n{}", node.status(), node.status_file());
}

#[test]
fn labelling_a_namespace_captures_its_pods_and_unlabelling_frees_them() {
    let (node, a, b) = cluster();
    b.serve(8080);
    let mut proxy = Proxy::connect(&node);
    assert_eq!(proxy.snapshot(), 0);
    let mut before = a.connect(b.v4, 8080).expect("connection");
    node.write("namespace.yaml", &mesh(AMBIENT));
    enrol(&node, &mut proxy, 2);
    let (uid_a, uid_b) = ("Kubernetes//Pod/shop/a", "Kubernetes//Pod/shop/b");
    assert_eq!(proxy.pods[uid_a].0.ips, [a.v4, a.v6]);
    assert!(crate::node::exchange(&mut before), "a connection from before the enrolment broke");

    // Outbound: the listener sees where the client wanted to go, and the client's own address.
    for (to, kind) in [(b.v4, listener::OUTBOUND_V4), (b.v6, listener::OUTBOUND_V6)] {
        let mut process = client(&node, &a, to, 8080);
        let accepted = proxy.accept(uid_a, kind);
        let Some((destination, source)) = accepted else {
            panic!("nothing was captured\n{}\n{}", node.status(), node.log())
        };
        assert_eq!(
            (destination.ip(), destination.port(), source.ip()),
            (to, 8080, if to.is_ipv4() { a.v4 } else { a.v6 })
        );
        let _killed = process.kill();
        process.wait().unwrap();
    }
    // Inbound plaintext and HBONE, from a pod outside the mesh.
    node.describe("c", "istio.io/dataplane-mode: none");
    let c = node.pod("c");
    for (to, port, kind) in [
        (b.v4, 8080, listener::INBOUND_V4),
        (b.v6, 9999, listener::INBOUND_V6),
        (b.v4, 15008, listener::HBONE_V4),
        (b.v6, 15008, listener::HBONE_V6),
    ] {
        let _stream = c.connect(to, port).unwrap_or_else(|| panic!("{to}:{port} was not captured"));
        let (destination, _) = proxy.accept(uid_b, kind).expect("captured");
        assert_eq!((destination.ip(), destination.port()), (to, port));
    }

    node.write("namespace.yaml", &mesh(""));
    for _ in 0..2 {
        assert!(matches!(proxy.hear().0, AgentMessage::PodRemoved { .. }));
    }
    assert!(eventually(|| annotated(&node) == 0));
    assert!(eventually(|| c.connects(b.v4, 8080)), "{}", node.status());
}

#[test]
fn capture_outlives_agent_and_proxy_and_fails_closed() {
    let (mut node, a, b) = cluster();
    b.serve(8080);
    let mut proxy = Proxy::connect(&node);
    proxy.snapshot();
    node.write("namespace.yaml", &mesh(AMBIENT));
    enrol(&node, &mut proxy, 2);
    let uid = "Kubernetes//Pod/shop/b";
    node.describe("c", "istio.io/dataplane-mode: none");
    let c = node.pod("c");

    // The agent dies: the proxy's listeners go on.
    node.kill();
    assert!(c.connect(b.v4, 8080).is_some());
    proxy.accept(uid, listener::INBOUND_V4).expect("captured without the agent");
    node.start();
    assert!(c.connect(b.v4, 8080).is_some());
    proxy.accept(uid, listener::INBOUND_V4).expect("captured after the agent's restart");
    assert_eq!(state_of(&node, "b")["enrolled"], true);
    // Sources that cannot be read are no reason to let a pod out of the mesh.
    node.kill();
    node.write("broken.yaml", "kind: [");
    node.start();
    assert_eq!(state_of(&node, "b")["enrolled"], true);
    assert!(node.status()["problem"].as_str().unwrap().contains("broken.yaml"), "{}", node.status());
    assert_eq!(annotated(&node), 2);
    node.remove("broken.yaml");
    assert!(eventually(|| node.status()["problem"].is_null()), "{}", node.status());
    assert_eq!(state_of(&node, "b")["enrolled"], true);

    // The proxy comes back to the new agent, hears of both pods, and replaces its listeners without a gap.
    let mut successor = Proxy::connect(&node);
    assert_eq!(successor.snapshot(), 2);
    successor.listen(uid);
    assert!(eventually(|| {
        let _stream = c.connect(b.v4, 8080);
        let socket = &successor.listeners[&(uid.to_owned(), listener::INBOUND_V4)];
        socket.set_nonblocking(true).unwrap();
        socket.accept().is_ok()
    }));

    // Short-cuts: only between enrolled pods of this node, and only while the proxy lives.
    successor.say(&ProxyMessage::Grant(ShortCut { src: a.v4, dst: b.v4, port: 8080 }), &[]);
    successor.say(&ProxyMessage::Grant(ShortCut { src: c.v4, dst: b.v4, port: 8080 }), &[]);
    let grants = || node.get("/config_dump")["grants"].clone();
    assert!(eventually(|| grants().as_array().unwrap().len() == 1), "{}", grants());
    assert_eq!(grants()[0]["in_force"], true);
    assert_eq!(grants()[0]["src"], a.v4.to_string());

    // Both proxies die: nothing reaches the application around the mesh.
    drop(proxy);
    drop(successor);
    assert!(eventually(|| node.status()["proxy"].is_null()));
    assert_eq!(grants().as_array().unwrap().len(), 0);
    assert!(!c.connects(b.v4, 8080) && !c.connects(b.v6, 8080), "a captured pod is reachable without the proxy");
    assert_eq!(state_of(&node, "b")["enrolled"], true);
    assert_eq!(annotated(&node), 2);
}

#[test]
fn an_add_into_the_mesh_returns_when_the_pod_is_captured() {
    let mut node = Node::new();
    node.write("namespace.yaml", &mesh(AMBIENT));
    node.describe("a", "app: a");
    node.start();
    let mut proxy = Proxy::connect(&node);
    proxy.snapshot();
    let sandbox = Sandbox::new("a");
    std::thread::scope(|scope| {
        let add = scope.spawn(|| {
            let outcome = sandbox.add(&node);
            (outcome, annotated(&node))
        });
        let uid = proxy.added();
        proxy.listen(&uid);
        let (outcome, annotated) = add.join().unwrap();
        assert!(outcome.success, "{}", outcome.json);
        assert_eq!(annotated, 1, "ADD returned before capture was in force");
    });
    // A pod the proxy refuses is not started outside the mesh.
    // Counted by objects: the agent's own status file changes the generation as well.
    let known = node.status()["source"]["objects"].as_u64().unwrap();
    node.describe("b", "app: b");
    assert!(eventually(|| node.status()["source"]["objects"].as_u64().unwrap() > known));
    let refused = Sandbox::new("b");
    std::thread::scope(|scope| {
        let add = scope.spawn(|| refused.add(&node));
        let uid = proxy.added();
        proxy.say(&ProxyMessage::PodFailed { uid, error: "no room".into() }, &[]);
        let outcome = add.join().unwrap();
        assert_eq!(outcome.code(), Some(11), "{}", outcome.json);
        assert!(outcome.json["details"].as_str().unwrap().contains("no room"), "{}", outcome.json);
    });
    assert!(eventually(|| node.status()["pods"].as_array().unwrap().len() == 1), "{}", node.status());
}

#[test]
fn queries_of_meshed_pods_go_to_the_proxy_that_stands_for_their_resolver() {
    let (node, a, b) = cluster();
    for ip in [b.v4, b.v6] {
        answer(&b, (ip, 53).into(), "resolver");
    }
    let mut proxy = Proxy::answering_for(&node, &[b.v4, b.v6]);
    assert_eq!(proxy.snapshot(), 0);
    node.write("namespace.yaml", &mesh(AMBIENT));
    enrol(&node, &mut proxy, 2);
    // Meshed, and the proxy does not listen in this pod (yet).
    assert_eq!((ask(&node, &a, b.v4), ask(&node, &a, b.v6)), ("resolver".to_owned(), "resolver".to_owned()));
    for addr in ["127.0.0.1:15053", "[::1]:15053"] {
        answer(&a, addr.parse().unwrap(), "proxy");
    }
    assert_eq!((ask(&node, &a, b.v4), ask(&node, &a, b.v6)), ("proxy".to_owned(), "proxy".to_owned()));
    // A successor that answers no names.
    let mut next = Proxy::connect(&node);
    assert_eq!(next.snapshot(), 2);
    assert_eq!(ask(&node, &a, b.v4), "resolver");
}
