//! A node: a namespace with its own run folder, pins and cgroup, an agent process, and pods made by the plugin.
use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use l4_netns::{Netlink, PersistentNetns, run_in};
use serde_json::Value;

static COUNT: AtomicU32 = AtomicU32::new(0);
static CLEAN: Once = Once::new();
const CGROUP: &str = "/sys/fs/cgroup/unified";

/// Everything of this test run carries its process id, so that what a crashed run left can be told apart.
pub(crate) fn unique(name: &str) -> String {
    format!("bt{}-{}-{name}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Removes what crashed runs left.
fn clean_up() {
    let dead = |name: &str| {
        let pid = name.strip_prefix("bt").and_then(|rest| rest.split('-').next());
        pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists())
    };
    for folder in ["/run/netns", "/sys/fs/bpf", CGROUP] {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if !entry.file_name().to_str().is_some_and(dead) {
                continue;
            }
            let _unmounted = nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH);
            let _removed = std::fs::remove_file(&path);
            let _removed = if folder == CGROUP { remove_cgroup(&path) } else { std::fs::remove_dir_all(&path) };
        }
    }
}

fn remove_cgroup(path: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    std::fs::remove_dir(path)
}

/// The node; dropping it takes everything away.
pub(crate) struct Node {
    pub(crate) name: String,
    netns: PersistentNetns,
    folder: tempfile::TempDir,
    bpffs: PathBuf,
    cgroup: PathBuf,
    agent: Option<Child>,
    flags: Vec<String>,
    /// Where agents find other programs, if not where everybody does.
    programs: Option<PathBuf>,
}

impl Node {
    /// A node without an agent.
    pub(crate) fn new() -> Node {
        let node = Node::bare();
        node.write("node.yaml", &node.object(0));
        node
    }

    /// Two nodes that know each other, joined by a link named `up0`.
    pub(crate) fn pair() -> [Node; 2] {
        let nodes = [Node::bare(), Node::bare()];
        for node in &nodes {
            for (number, described) in nodes.iter().enumerate() {
                node.write(&format!("node{number}.yaml"), &described.object(number));
            }
        }
        let namespaces = [nodes[0].netns(), nodes[1].netns()];
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        runtime.block_on(async {
            let netlinks = namespaces.each_ref().map(|netns| Netlink::open_in(netns.as_fd()).expect("netlink"));
            let (mac, peer) = (l4_netns::mac_of("left"), l4_netns::mac_of("right"));
            let made = netlinks[0].add_veth(("up0", mac), ("up0", peer), namespaces[1].as_fd(), 1500);
            made.await.expect("veth");
            for (netlink, last) in netlinks.iter().zip(1u8..) {
                let link = netlink.link("up0").await.expect("up0");
                netlink.set_up(link.index).await.expect("up");
                netlink.add_address(link.index, [192, 0, 2, last].into(), 24).await.expect("address");
                let v6 = std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last.into());
                netlink.add_address(link.index, v6.into(), 64).await.expect("address");
            }
        });
        nodes
    }

    fn object(&self, number: usize) -> String {
        let (name, range, last) = (&self.name, 88 + number, 1 + number);
        format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [10.{range}.0.0/24, \"fd{range}::/64\"]}}\nstatus: {{addresses: [{{type: InternalIP, address: 192.0.2.{last}}}, {{type: InternalIP, address: \"2001:db8::{last}\"}}]}}\n"
        )
    }

    fn bare() -> Node {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test makes network namespaces and loads programs: run it as root"
        );
        CLEAN.call_once(clean_up);
        l4_loader::ensure_bpffs().expect("a BPF file system at /sys/fs/bpf");
        let name = unique("n");
        let netns = PersistentNetns::create(&Path::new("/run/netns").join(&name)).expect("namespace");
        let cgroup = Path::new(CGROUP).join(&name);
        std::fs::create_dir_all(&cgroup).expect("cgroup");
        let node = Node {
            bpffs: Path::new("/sys/fs/bpf").join(&name),
            // In memory, as /run is on a node: the agent waits for its state to be stored, on a disk for seconds if that is busy.
            folder: tempfile::tempdir_in("/dev/shm").expect("folder"),
            name,
            netns,
            cgroup,
            agent: None,
            flags: Vec::new(),
            programs: None,
        };
        std::fs::create_dir_all(node.objects()).expect("folder");
        std::fs::create_dir_all(node.cni_results()).expect("folder");
        node
    }

    pub(crate) fn objects(&self) -> PathBuf {
        self.folder.path().join("objects")
    }

    /// What the runtime's CNI library keeps.
    pub(crate) fn cni_results(&self) -> PathBuf {
        self.folder.path().join("cni-results")
    }

    pub(crate) fn status_file(&self) -> String {
        let path = self.folder.path().join("status").join(format!("pods-{}.yaml", self.name));
        std::fs::read_to_string(path).unwrap_or_default()
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// Replaces a file of objects at once.
    pub(crate) fn write(&self, file: &str, content: &str) {
        let path = self.objects().join(file);
        let new = self.objects().join(format!(".{file}.new"));
        std::fs::write(&new, content).expect("write");
        std::fs::rename(new, path).expect("rename");
    }

    pub(crate) fn remove(&self, file: &str) {
        std::fs::remove_file(self.objects().join(file)).expect("remove");
    }

    /// A pod's object, in namespace `shop`.
    pub(crate) fn describe(&self, pod: &str, labels: &str) {
        let node = &self.name;
        self.write(
            &format!("pod-{pod}.yaml"),
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {pod}, namespace: shop, uid: uid-{pod}, labels: {{{labels}}}}}\nspec: {{nodeName: {node}, containers: [{{name: c}}]}}\n"
            ),
        );
    }

    /// Further flags of agents to come.
    pub(crate) fn flags(&mut self, flags: &[&str]) {
        self.flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    }

    /// Agents to come find no other program but this shell script. The folder it is in.
    pub(crate) fn only_program(&mut self, name: &str, script: &str) -> PathBuf {
        let folder = self.folder.path().join("programs");
        std::fs::create_dir_all(&folder).expect("folder");
        std::fs::write(folder.join(name), format!("#!/bin/sh\n{script}\n")).expect("program");
        std::fs::set_permissions(folder.join(name), Permissions::from_mode(0o755)).expect("mode");
        self.programs = Some(folder.clone());
        folder
    }

    /// Agents to come find no other programs.
    pub(crate) fn without_programs(&mut self) {
        self.programs = Some("/nowhere".into());
    }

    pub(crate) fn start(&mut self) {
        let fd = l4_netns::open(self.netns.path()).expect("namespace");
        let mut command = Command::new(env!("CARGO_BIN_EXE_strata-agent"));
        let source = format!("dir:{}", self.objects().display());
        let status = self.folder.path().join("status");
        let status_source = format!("dir:{}", status.display());
        command.args(["--node-name", &self.name, "--source", &source, "--source", &status_source]);
        command.arg("--run-dir").arg(self.run_dir()).arg("--bpffs").arg(&self.bpffs);
        command.arg("--cni-results-dir").arg(self.cni_results());
        command.arg("--cgroup").arg(&self.cgroup).arg("--status-dir").arg(status);
        command.args(&self.flags);
        if let Some(programs) = &self.programs {
            command.env("PATH", programs);
        }
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path()).expect("log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // A child starts in the namespace of the thread that spawns it.
        let child = run_in(fd.as_fd(), || command.spawn()).expect("namespace").expect("strata-agent");
        self.agent = Some(child);
        let socket = self.run_dir().join("cni.sock");
        let ready = eventually(|| std::os::unix::net::UnixStream::connect(&socket).is_ok());
        assert!(ready, "the agent did not come up:\n{}", self.log());
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("agent.log")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub(crate) fn kill(&mut self) {
        let mut agent = self.agent.take().expect("a running agent");
        agent.kill().expect("kill");
        agent.wait().expect("wait");
    }

    /// Removes what the agent knows and loaded, as taking Strata off the node does: pods keep devices and routes.
    pub(crate) fn forget(&mut self) {
        self.kill();
        l4_loader::unload(&self.bpffs).expect("unload");
        std::fs::remove_dir_all(self.run_dir()).expect("run folder");
    }

    /// Ends the agent as an init system would.
    pub(crate) fn terminate(&mut self) {
        let mut agent = self.agent.take().expect("a running agent");
        let pid = nix::unistd::Pid::from_raw(agent.id().try_into().expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("SIGTERM");
        assert!(agent.wait().expect("wait").success(), "{}", self.log());
    }

    /// Executes the plugin as a container runtime does.
    pub(crate) fn cni(&self, command: &str, environment: &[(&str, &str)], more: &str) -> Outcome {
        let socket = self.run_dir().join("cni.sock");
        let input = format!(
            r#"{{"cniVersion":"1.1.0","name":"strata","type":"strata-cni","agentSocket":"{}"{more}}}"#,
            socket.display()
        );
        let mut child = Command::new(plugin())
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", "/opt/cni/bin")
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("strata-cni");
        child.stdin.take().expect("stdin").write_all(input.as_bytes()).expect("configuration");
        let output = child.wait_with_output().expect("strata-cni");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let json = if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text).expect("JSON") };
        Outcome { success: output.status.success(), json }
    }

    /// Makes a pod's namespace and ADDs it.
    pub(crate) fn pod(&self, name: &str) -> Pod {
        let sandbox = Sandbox::new(name);
        let result = sandbox.add(self);
        assert!(result.success, "{}\n{}", result.json, self.log());
        Pod::from_result(sandbox, &result.json)
    }

    pub(crate) fn status(&self) -> Value {
        self.get("/status")
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let socket = self.run_dir().join("agent.sock");
        runtime.block_on(strata_runtime::client::get_json(&socket, path)).expect("status")
    }

    pub(crate) fn get_text(&self, path: &str) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let socket = self.run_dir().join("agent.sock");
        runtime.block_on(strata_runtime::client::get_text(&socket, path)).expect("text")
    }

    /// Moves the calling process into the node's cgroup; for children only.
    pub(crate) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub(crate) fn netns(&self) -> OwnedFd {
        l4_netns::open(self.netns.path()).expect("namespace")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("agent's log of {}:\n{}", self.name, self.log());
        }
        if let Some(mut agent) = self.agent.take() {
            let _killed = agent.kill();
            let _waited = agent.wait();
        }
        let _unloaded = l4_loader::unload(&self.bpffs);
        let _removed = remove_cgroup(&self.cgroup);
    }
}

/// What the plugin said.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) success: bool,
    pub(crate) json: Value,
}

impl Outcome {
    pub(crate) fn code(&self) -> Option<u64> {
        self.json["code"].as_u64()
    }
}

/// The plugin, beside the agent; built if nobody has yet.
fn plugin() -> PathBuf {
    static BUILD: Once = Once::new();
    let path = Path::new(env!("CARGO_BIN_EXE_strata-agent")).with_file_name("strata-cni");
    BUILD.call_once(|| {
        if !path.exists() {
            let built = Command::new(env!("CARGO")).args(["build", "-p", "l4-cni"]).status().expect("cargo");
            assert!(built.success(), "strata-cni could not be built");
        }
    });
    path
}

/// A pod's namespace and the names the runtime gives it.
pub(crate) struct Sandbox {
    pub(crate) container: String,
    pub(crate) pod: String,
    netns: PersistentNetns,
}

impl Sandbox {
    pub(crate) fn new(pod: &str) -> Sandbox {
        let container = unique(pod);
        let netns = PersistentNetns::create(&Path::new("/run/netns").join(&container)).expect("namespace");
        Sandbox { container, pod: pod.to_owned(), netns }
    }

    pub(crate) fn path(&self) -> String {
        self.netns.path().display().to_string()
    }

    pub(crate) fn call(&self, node: &Node, command: &str, more: &str) -> Outcome {
        let arguments =
            format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={pod};K8S_POD_UID=uid-{pod}", pod = self.pod);
        let environment = [
            ("CNI_CONTAINERID", self.container.as_str()),
            ("CNI_NETNS", &self.path()),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", &arguments),
        ];
        node.cni(command, &environment, more)
    }

    pub(crate) fn add(&self, node: &Node) -> Outcome {
        self.call(node, "ADD", "")
    }

    /// See [`Pod::serve`].
    pub(crate) fn serve(&self, port: u16) {
        let (tcp, udp) = self.inside(|| {
            (TcpListener::bind(("::", port)).expect("listen"), UdpSocket::bind(("::", port)).expect("bind"))
        });
        std::thread::spawn(move || {
            for stream in tcp.incoming().flatten() {
                std::thread::spawn(move || echo(stream));
            }
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((length, peer)) = udp.recv_from(&mut buffer) {
                let _sent = udp.send_to(&buffer[..length], peer);
            }
        });
    }

    /// Runs something inside the pod's namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let fd = l4_netns::open(self.netns.path()).expect("namespace");
        run_in(fd.as_fd(), work).expect("namespace")
    }
}

/// A pod after ADD.
pub(crate) struct Pod {
    pub(crate) sandbox: Sandbox,
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
    pub(crate) result: Value,
}

impl Pod {
    pub(crate) fn from_result(sandbox: Sandbox, result: &Value) -> Pod {
        let address = |index: usize| {
            let text = result["ips"][index]["address"].as_str().expect("an address");
            text.split('/').next().expect("an address").parse().expect("an address")
        };
        Pod { v4: address(0), v6: address(1), result: result.clone(), sandbox }
    }

    /// An echo server for TCP and UDP on all addresses of the pod, until the process ends.
    pub(crate) fn serve(&self, port: u16) {
        self.sandbox.serve(port);
    }

    /// One connection from this pod, with one exchange.
    pub(crate) fn connects(&self, to: IpAddr, port: u16) -> bool {
        self.connect(to, port).is_some_and(|mut stream| exchange(&mut stream))
    }

    pub(crate) fn connect(&self, to: IpAddr, port: u16) -> Option<TcpStream> {
        let address = SocketAddr::from((to, port));
        self.sandbox.inside(|| TcpStream::connect_timeout(&address, Duration::from_millis(700)).ok())
    }
}

fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 1500];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// Whether the peer echoes within a second.
pub(crate) fn exchange(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 4];
    stream.set_read_timeout(Some(Duration::from_secs(1))).expect("timeout");
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut buffer).is_ok() && &buffer == b"ping"
}

/// Waits for a condition, at most ten seconds.
pub(crate) fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    condition()
}
