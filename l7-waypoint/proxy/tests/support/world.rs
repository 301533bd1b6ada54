//! Pods as network namespaces, a control plane, and the agent's end of the handoff, around the real binary.
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prost::Message;
use strata_handoff::{AgentMessage, Listener, PodInfo, ProxyMessage, VERSION};
use tokio::sync::{mpsc, oneshot, watch};
use xds_proto::envoy::google::protobuf::Any;
use xds_proto::istio::{security, workload as w};
use xds_proto::type_url;
use xds_server::{Node, Resources, Source};

use crate::bpf::Lookup;
use crate::ca::{TOKEN, TestCa};
use xds_proto::istio::ca::istio_certificate_service_server::IstioCertificateServiceServer;

/// Runs a command that must succeed.
pub fn run(line: &str) {
    let output = Command::new("sh").args(["-ec", line]).output().expect("sh");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A pod's namespace, removed when dropped.
pub struct Pod {
    pub name: String,
    pub ip: Ipv4Addr,
}

impl Pod {
    /// Must be root: namespaces, marks and BPF need it.
    pub fn new(name: &str, ip: Ipv4Addr) -> Pod {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes network namespaces and loads BPF");
        let _ = Command::new("ip").args(["netns", "del", name]).output();
        run(&format!("ip netns add {name}; ip -n {name} link set lo up; ip -n {name} address add {ip}/32 dev lo"));
        run(&format!("ip -n {name} address del {ip}/32 dev lo"));
        Pod { name: name.to_owned(), ip }
    }

    /// What the agent's enrolment leaves in a pod: the two rules and routes, and the sysctl (capture-spike E1d, E3).
    pub fn rules(&self) {
        let Pod { name, ip } = self;
        run(&format!(
            "ip -n {name} rule add fwmark 0x539 pref 100 lookup 100; ip -n {name} route add local default dev lo table 100;
             ip -n {name} rule add fwmark 0x2539 pref 101 lookup 101;
             ip -n {name} route add local default dev lo src {ip} table 101;
             ip netns exec {name} sysctl -qw net.ipv4.tcp_fwmark_accept=1"
        ));
    }

    pub fn file(&self) -> std::fs::File {
        std::fs::File::open(format!("/run/netns/{}", self.name)).unwrap()
    }

    /// Runs `work` inside, on a thread of its own.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> std::thread::JoinHandle<T> {
        let file = self.file();
        std::thread::spawn(move || {
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    /// An application: says who its peer is, then echoes.
    pub fn echo(&self, port: u16) {
        let (sender, ready) = std::sync::mpsc::channel();
        self.run(move || {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap();
            sender.send(()).unwrap();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let hello = format!("{} ", stream.peer_addr().unwrap().ip().to_canonical());
                    let _ = stream.write_all(hello.as_bytes());
                    let mut buf = [0; 65536];
                    while let Ok(n @ 1..) = stream.read(&mut buf) {
                        if stream.write_all(&buf[..n]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        ready.recv().unwrap();
    }

    /// Connects as an application of the pod; `captured` as the connect hook would have it.
    pub fn connect(&self, to: &str, captured: bool) -> std::io::Result<TcpStream> {
        let to = to.to_owned();
        self.run(move || connect(&to, captured)).join().unwrap()
    }

    /// Sends `text`, closes that direction, returns all that comes back.
    pub fn ask(&self, to: &str, captured: bool, text: &str) -> std::io::Result<String> {
        let (to, text) = (to.to_owned(), text.to_owned());
        self.run(move || exchange(&to, captured, &text)).join().unwrap()
    }
}

/// From the namespace of the calling thread.
fn connect(to: &str, captured: bool) -> std::io::Result<TcpStream> {
    let to: SocketAddr = to.parse().unwrap();
    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
    if captured {
        socket.set_mark(strata_handoff::mark::CAPTURE)?;
    }
    socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}

/// As [`Pod::ask`], from the namespace of the calling thread.
pub fn exchange(to: &str, captured: bool, text: &str) -> std::io::Result<String> {
    let mut stream = connect(to, captured)?;
    stream.write_all(text.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// Joins two pods by a veth pair.
pub fn link(a: &Pod, b: &Pod, device: &str) {
    let (an, bn, ai, bi) = (&a.name, &b.name, a.ip, b.ip);
    run(&format!(
        "ip link add {device} netns {an} type veth peer name {device} netns {bn};
         ip -n {an} address add {ai}/32 dev {device}; ip -n {bn} address add {bi}/32 dev {device} 2>/dev/null || true;
         ip -n {an} link set {device} up; ip -n {bn} link set {device} up;
         ip -n {an} route add {bi}/32 dev {device} src {ai}; ip -n {bn} route add {ai}/32 dev {device} src {bi}"
    ));
}

type Table = BTreeMap<String, BTreeMap<String, Any>>;

/// xDS and CA in one.
pub struct Control {
    pub addr: SocketAddr,
    table: Arc<Mutex<Table>>,
    generation: Arc<watch::Sender<u64>>,
    ca: Arc<TestCa>,
}

struct Served {
    table: Arc<Mutex<Table>>,
    generation: Arc<watch::Sender<u64>>,
    ca: Arc<TestCa>,
}

impl Source for Served {
    type Caller = ();

    fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
    async fn authenticate(&self, metadata: &tonic::metadata::MetadataMap, _node: &Node) -> Result<(), tonic::Status> {
        if self.ca.refuse.load(Ordering::Relaxed) {
            return Err(tonic::Status::unavailable("told to refuse"));
        }
        match metadata.get("authorization") {
            Some(value) if value.as_bytes() == format!("Bearer {TOKEN}").as_bytes() => Ok(()),
            _ => Err(tonic::Status::unauthenticated("wrong token")),
        }
    }
    fn resources(&self, _caller: &(), _node: &Node, type_url: &str) -> Option<Resources> {
        Some(Resources::default().next(self.table.lock().unwrap().get(type_url).cloned().unwrap_or_default()))
    }
}

impl Control {
    pub async fn start() -> Control {
        let table = Arc::new(Mutex::new(Table::new()));
        let generation = Arc::new(watch::channel(1).0);
        let ca = TestCa::new();
        let served = Served { table: table.clone(), generation: generation.clone(), ca: ca.clone() };
        let (xds, _clients) = xds_server::service(Arc::new(served));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = IstioCertificateServiceServer::new(crate::ca::Service(ca.clone()));
        tokio::spawn(async move {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            let server = tonic::transport::Server::builder().add_service(xds).add_service(service);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        Control { addr, table, generation, ca }
    }

    /// Whether whoever comes anew is refused, for configuration and for certificates.
    pub fn refuse(&self, newcomers: bool) {
        self.ca.refuse.store(newcomers, Ordering::Relaxed);
    }

    /// Serves an encoded resource.
    pub fn put(&self, type_url: &str, name: String, value: Vec<u8>) {
        let any = Any { type_url: type_url.to_owned(), value };
        self.table.lock().unwrap().entry(type_url.to_owned()).or_default().insert(name, any);
        self.generation.send_modify(|generation| *generation += 1);
    }

    pub fn workload(&self, workload: w::Workload) {
        let name = workload.uid.clone();
        let message = w::Address { r#type: Some(w::address::Type::Workload(workload)) };
        self.put(type_url::ADDRESS, name, message.encode_to_vec());
    }

    pub fn service(&self, service: w::Service) {
        let name = format!("{}/{}", service.namespace, service.hostname);
        let message = w::Address { r#type: Some(w::address::Type::Service(service)) };
        self.put(type_url::ADDRESS, name, message.encode_to_vec());
    }

    pub fn policy(&self, policy: security::Authorization) {
        self.put(type_url::AUTHORIZATION, format!("{}/{}", policy.namespace, policy.name), policy.encode_to_vec());
    }

    pub fn remove_policy(&self, name: &str) {
        self.table.lock().unwrap().entry(type_url::AUTHORIZATION.to_owned()).or_default().remove(name);
        self.generation.send_modify(|generation| *generation += 1);
    }
}

/// A workload in namespace `shop` whose service account has its name.
pub fn workload(pod: &Pod, name: &str) -> w::Workload {
    w::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        service_account: name.to_owned(),
        workload_name: name.to_owned(),
        canonical_name: name.to_owned(),
        addresses: vec![pod.ip.octets().to_vec().into()],
        tunnel_protocol: w::TunnelProtocol::Hbone.into(),
        ..Default::default()
    }
}

/// A process that does not outlive its test.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    pub fn terminate(&self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    }
}

/// The binary as the proxy of node `n`; what it leaves behind is in `run_dir`.
pub fn node_command(control: &Control, run_dir: &Path) -> Command {
    let token = run_dir.join("token");
    std::fs::write(&token, TOKEN).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata-proxy"));
    command
        .args(["--role", "node", "--node-name", "n", "--run-dir"])
        .arg(run_dir)
        .args(["--xds-address", &format!("http://{}", control.addr), "--token-path"])
        .arg(token)
        .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()));
    command
}

/// Whether the proxy whose admin socket this is says that it is ready.
pub async fn is_ready(socket: &Path) -> bool {
    let status = strata_runtime::client::get_json(socket, "/status").await;
    status.is_ok_and(|status| status["ready"] == true)
}

pub async fn wait_ready(socket: &Path) {
    for _ in 0..200 {
        if is_ready(socket).await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("proxy at {} did not become ready", socket.display());
}

/// One node: the binary, and the agent's end of its handoff.
pub struct NodeProxy {
    child: Process,
    pub run_dir: tempfile::TempDir,
    pub messages: mpsc::UnboundedReceiver<ProxyMessage>,
    admin_socket: String,
    listener: Listener,
    sender: mpsc::UnboundedSender<ProxyMessage>,
    lookups: Vec<Lookup>,
    /// Ends the conversation with the proxy, and waits until it has.
    agent: Option<(oneshot::Sender<()>, tokio::task::JoinHandle<()>)>,
}

impl NodeProxy {
    /// Starts a proxy for `pods` (namespace and name of the workload) and waits until it listens in all of them.
    pub async fn start(control: &Control, pods: &[(&Pod, &str)]) -> NodeProxy {
        NodeProxy::start_with(control, pods, &[]).await
    }

    /// As `start`, with more flags.
    pub async fn start_with(control: &Control, pods: &[(&Pod, &str)], flags: &[&str]) -> NodeProxy {
        let run_dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&run_dir.path().join("handoff.sock")).unwrap();
        let child = Process(node_command(control, run_dir.path()).args(flags).spawn().unwrap());
        let (sender, messages) = mpsc::unbounded_channel();
        let admin_socket = "proxy.sock".to_owned();
        let lookups = Vec::new();
        let mut proxy = NodeProxy { child, run_dir, messages, admin_socket, listener, sender, lookups, agent: None };
        proxy.serve_agent(pods).await;
        wait_ready(&proxy.socket()).await;
        proxy
    }

    /// A second process for the same node, as an upgrade starts it. Once it listens, the first one is told to end; returns
    /// how it ended.
    pub async fn succeed(&mut self, control: &Control, pods: &[(&Pod, &str)]) -> std::process::ExitStatus {
        self.succeed_after(std::future::ready(()), control, pods).await
    }

    /// As `succeed`; the second process must not come for the pods before `early` is over.
    pub async fn succeed_after(
        &mut self,
        early: impl Future<Output = ()>,
        control: &Control,
        pods: &[(&Pod, &str)],
    ) -> std::process::ExitStatus {
        let old_agent = self.agent.take();
        self.admin_socket = format!("after-{}", self.admin_socket);
        let mut command = node_command(control, self.run_dir.path());
        let next = Process(command.args(["--admin-socket", &self.admin_socket]).spawn().unwrap());
        let mut old = std::mem::replace(&mut self.child, next);
        tokio::select! {
            biased;
            () = early => {}
            _ = self.listener.accept() => panic!("the successor came for the pods too early"),
        }
        self.serve_agent(pods).await;
        wait_ready(&self.socket()).await;
        old.terminate();
        let ended = tokio::task::spawn_blocking(move || old.0.wait().unwrap()).await.unwrap();
        drop(old_agent);
        ended
    }

    /// The agent goes away, and after `meanwhile` comes back with the same pods; returns how often it was given
    /// the listeners of a pod.
    pub async fn restart_agent(&mut self, pods: &[(&Pod, &str)], meanwhile: impl FnOnce()) -> usize {
        let (stop, stopped) = self.agent.take().unwrap();
        stop.send(()).unwrap();
        stopped.await.unwrap();
        meanwhile();
        self.serve_agent(pods).await
    }

    async fn serve_agent(&mut self, pods: &[(&Pod, &str)]) -> usize {
        let connection = self.listener.accept().await.unwrap();
        connection.send(&AgentMessage::Hello { version: VERSION, node: "n".to_owned() }, &[]).await.unwrap();
        let mut given = 0;
        for (number, (pod, name)) in pods.iter().enumerate() {
            let netns = pod.file();
            let info = PodInfo {
                uid: format!("Kubernetes//Pod/shop/{name}"),
                namespace: "shop".to_owned(),
                name: (*name).to_owned(),
                service_account: (*name).to_owned(),
                node: "n".to_owned(),
                ips: vec![IpAddr::V4(pod.ip)],
                pod_index: number as u32,
            };
            connection.send(&AgentMessage::PodAdded { pod: info }, &[netns.as_fd()]).await.unwrap();
            if self.lookups.len() <= number {
                self.lookups.push(Lookup::attach(netns.as_fd(), pod.ip).unwrap());
            }
            loop {
                let (message, descriptors) = connection.recv().await.unwrap();
                match message {
                    ProxyMessage::Listeners { kinds, .. } => {
                        for (kind, listener) in kinds.iter().zip(&descriptors).filter(|(kind, _)| **kind % 2 == 0) {
                            self.lookups[number].set(*kind, listener.as_fd()).unwrap();
                        }
                        given += 1;
                        break;
                    }
                    ProxyMessage::Hello { .. } => {}
                    other => panic!("unexpected {other:?}"),
                }
            }
        }
        connection.send(&AgentMessage::SnapshotSent, &[]).await.unwrap();
        let (stop, mut stopped) = oneshot::channel();
        let sender = self.sender.clone();
        let conversation = tokio::spawn(async move {
            loop {
                tokio::select! {
                    received = connection.recv() => match received {
                        Ok((message, _)) => drop(sender.send(message)),
                        Err(_) => break,
                    },
                    _ = &mut stopped => break,
                }
            }
        });
        self.agent = Some((stop, conversation));
        given
    }

    pub fn socket(&self) -> std::path::PathBuf {
        self.run_dir.path().join(&self.admin_socket)
    }

    /// The next message the agent gets that `wanted` takes.
    pub async fn told<T>(&mut self, wanted: impl Fn(&ProxyMessage) -> Option<T>) -> T {
        let wait = async {
            loop {
                let message = self.messages.recv().await.expect("handoff ended");
                if let Some(found) = wanted(&message) {
                    return found;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.expect("the agent was not told")
    }

    pub async fn metrics(&self) -> String {
        strata_runtime::client::get_text(&self.socket(), "/metrics").await.unwrap()
    }

    pub fn terminate(&self) {
        self.child.terminate();
    }

    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.child.0.wait().unwrap()
    }
}
