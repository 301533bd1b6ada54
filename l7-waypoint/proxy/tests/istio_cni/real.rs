//! As its parent, with Istio's own code in istio-cni's place (`integration/cluster/go/mesh/istio-node-agent`): its socket server, its
//! cache of pods, its rules by iptables or nftables.
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use crate::cni::Proxy;
use crate::policies::{deny_checkout, is_cut, payments, payments_service, strict};
use crate::world::{Control, Pod, Process, is_ready, link, wait_ready, workload};
use crate::{VIP, both, comes_true, join};

/// The program, in a namespace of its own: what it looks up in the node's is not this machine's affair.
struct IstioCni {
    _process: Process,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// What istio-cni writes them with.
#[derive(Clone, Copy, PartialEq)]
enum Rules {
    Iptables,
    Nftables,
}

/// Where `integration/cluster/build.sh` puts what it builds (env.sh).
fn program() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME"));
    let cache = || std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from);
    let cluster = std::env::var_os("STRATA_CLUSTER_DIR").map_or_else(|| cache().join("strata-cluster"), PathBuf::from);
    cluster.join("bin/istio-node-agent")
}

impl IstioCni {
    /// Starts it with pods that are there already: uid, name, and the namespace if it shall find one.
    fn start(node: &Pod, rules: Rules, socket: &Path, pods: &[(&str, &str, Option<&Pod>)]) -> IstioCni {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &node.name]).arg(program()).arg(socket);
        command.env("NATIVE_NFTABLES", (rules == Rules::Nftables).to_string());
        for (uid, name, pod) in pods {
            command.args([*uid, *name]).arg(pod.map_or("-".to_owned(), namespace));
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut cni = IstioCni { _process: Process(child), orders, answers };
        assert_eq!(cni.answer(), "listening", "{} is built by integration/cluster/build.sh mesh", program().display());
        cni
    }

    fn obey(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").unwrap();
        self.answer()
    }

    /// Its log goes to the same place.
    fn answer(&mut self) -> String {
        let ours = |line: &str| ["listening", "done", "failed:"].iter().any(|word| line.starts_with(word));
        let mut lines = (&mut self.answers).lines().map(Result::unwrap);
        lines.find(|line| ours(line)).unwrap_or_default()
    }
}

fn namespace(pod: &Pod) -> String {
    format!("/run/netns/{}", pod.name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn istios_own_node_agent_with_iptables() {
    serves(5, Rules::Iptables).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn istios_own_node_agent_with_nftables() {
    serves(6, Rules::Nftables).await;
}

/// Pods of 10.45.`net`.0/24 join, talk, are denied, see istio-cni restarted, and leave.
async fn serves(net: u8, rules: Rules) {
    let [node, a, b, c] = [("n", 9), ("a", 1), ("b", 2), ("c", 3)]
        .map(|(name, host)| Pod::new(&format!("z{net}-{name}"), Ipv4Addr::new(10, 45, net, host)));
    let to_b = format!("10.45.{net}.2:8080");
    let says = |host: u8, text: &str| format!("10.45.{net}.{host} {text}");
    join(&a, &b, "eth0");
    link(&c, &b, "eth1");
    link(&c, &a, "eth2");
    b.echo(8080);
    let control = Control::start().await;
    control.workload(both(&a, workload(&a, "checkout")));
    control.workload(both(&b, payments(&b)));
    control.service(payments_service());
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("ztunnel.sock");
    // Our proxy is there first, and waits.
    let proxy = Proxy::start_at(&control, &socket, Some(&c));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!is_ready(&proxy.socket()).await);
    let mut cni = IstioCni::start(&node, rules, &socket, &[("5-a", "checkout", Some(&a))]);
    wait_ready(&proxy.socket()).await;
    assert_eq!(cni.obey(&format!("add 5-b payments {}", namespace(&b))), "done");

    assert_eq!(a.ask(&to_b, false, "direct").unwrap(), says(1, "direct"));
    assert_eq!(a.ask(VIP, false, "by name").unwrap(), says(1, "by name"));
    assert_eq!(a.ask(&format!("[fd45:{net}::2]:8080"), false, "in six").unwrap(), format!("fd45:{net}::1 in six"));
    assert_eq!(b.ask(VIP, false, "self").unwrap(), says(2, "self"));
    let metrics = proxy.metrics().await;
    assert!(metrics.contains("connection_security_policy=\"mutual_tls\"") && !metrics.contains("kernel_attested"));
    // Names: our relay, over both transports.
    let udp = c.run(|| UdpSocket::bind("0.0.0.0:53").unwrap()).join().unwrap();
    let tcp = c.run(|| TcpListener::bind("0.0.0.0:53").unwrap()).join().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        let (length, from) = udp.recv_from(&mut buffer).unwrap();
        udp.send_to(&[&buffer[..length], format!(" of {}", from.ip()).as_bytes()].concat(), from).unwrap();
        let (mut stream, from) = tcp.accept().unwrap();
        let mut query = [0; 7];
        stream.read_exact(&mut query).unwrap();
        assert_eq!(&query, b"\0\x05query");
        let answer = format!("query of {}", from.ip());
        stream.write_all(&[&(answer.len() as u16).to_be_bytes(), answer.as_bytes()].concat()).unwrap();
    });
    let answer = a.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.send_to(b"query", "10.96.0.10:53").unwrap();
        let mut buffer = [0; 64];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        format!("{from}: {}", String::from_utf8_lossy(&buffer[..length]))
    });
    assert_eq!(answer.join().unwrap(), format!("10.96.0.10:53: query of {}", a.ip));
    let answer = format!("query of {}", a.ip);
    let framed = format!("\0{}{answer}", char::from(answer.len() as u8));
    assert_eq!(a.ask("10.96.0.10:53", false, "\0\x05query").unwrap(), framed);

    // Plaintext, STRICT, a denied identity.
    assert_eq!(c.ask(&to_b, false, "plain").unwrap(), says(3, "plain"));
    control.policy(strict());
    let refused = |pod: &Pod, to: &str| is_cut(pod.connect(to, false).and_then(|mut stream| stream.read(&mut [0; 9])));
    comes_true("STRICT", || refused(&c, &to_b)).await;
    assert_eq!(a.ask(VIP, false, "mtls").unwrap(), says(1, "mtls"));
    control.policy(deny_checkout());
    comes_true("a denial", || refused(&a, VIP)).await;
    control.remove_policy("shop/no-checkout");
    comes_true("allowed again", || a.ask(VIP, false, "again").is_ok_and(|text| text == says(1, "again"))).await;

    // Restarted, it finds one pod's namespace and keeps the other: nothing that is open ends.
    let mut open = a.connect(VIP, false).unwrap();
    let mut buf = [0; 10];
    open.read_exact(&mut buf).unwrap();
    drop(cni);
    assert_eq!(a.ask(VIP, false, "alone").unwrap(), says(1, "alone"));
    let mut cni = IstioCni::start(&node, rules, &socket, &[("5-a", "checkout", Some(&a)), ("5-b", "payments", None)]);
    comes_true("it knows the proxy", || cni.obey(&format!("add 5-b payments {}", namespace(&b))) == "done").await;
    open.write_all(b"still").unwrap();
    open.read_exact(&mut buf[..5]).unwrap();
    assert_eq!(&buf[..5], b"still");
    assert_eq!(a.ask(VIP, false, "again").unwrap(), says(1, "again"));

    // A pod leaves and runs on, and its own ports are its own again.
    assert_eq!(cni.obey("remove 5-b payments"), "done");
    assert!(is_cut(open.read(&mut buf)), "a connection of a pod that left hangs");
    comes_true("nobody listens in it", || b.run(|| TcpListener::bind("0.0.0.0:15008").is_ok()).join().unwrap()).await;
    assert_eq!(c.ask(&to_b, false, "unmeshed").unwrap(), says(3, "unmeshed"));
    assert_eq!(cni.obey("delete 5-a checkout"), "done");
}
