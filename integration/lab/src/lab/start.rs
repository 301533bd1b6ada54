//! Bringing a mesh up.
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use compat_objects::source::DirectorySource;
use parking_lot::{Mutex, RwLock};

use super::{Inner, Lab, Options, copy_folder};
use crate::error::Doing;
use crate::kubelet::Kubelet;
use crate::network::{self, Node, WORLD_GATEWAY, WORLD_ISSUER};
use crate::paths::{Description, NodeDescription, Paths};
use crate::process::{Spec, Supervised};
use crate::{LabError, Result, cleanup, sys};

/// What the lab executes.
const BINARIES: [&str; 6] =
    ["strata-agent", "strata-proxy", "strata-control", "strata-cni", "strata-echo", "strata-lab-watch"];
/// How long a part may take to become ready.
const START: Duration = Duration::from_secs(30);

impl Lab {
    /// Builds the mesh and waits until its parts and pods are ready.
    ///
    /// # Errors
    /// What is missing on this machine, wrong in the folder, or did not become ready; nothing is left behind.
    pub fn start(options: Options) -> Result<Lab> {
        sys::check_privileges()?;
        let paths = Paths::new(&options.id)?;
        let bin = binaries(options.bin.as_deref())?;
        let lock = cleanup::lock(&options.id)?;
        cleanup::remove(&options.id)?;
        cleanup::sweep()?;
        let prepared = prepare(&options, paths, bin).and_then(|inner| Ok((watcher(&inner)?, inner)));
        let (watcher, inner) = prepared.inspect_err(|_| {
            // The error that stopped us is the one to show.
            let _ = cleanup::remove(&options.id);
            let _ = fs::remove_file(Paths::lock_file(&options.id));
        })?;
        let xds_address = xds_address(&inner.nodes)?;
        let inner = Arc::new(inner);
        // From here on dropping cleans up.
        let mut lab =
            Lab { inner, threads: Vec::new(), watcher: Some(watcher), keep_logs: options.keep_logs, _lock: lock };
        lab.bring_up(&xds_address)?;
        Ok(lab)
    }

    fn bring_up(&mut self, xds_address: &str) -> Result<()> {
        let inner = self.inner.clone();
        let (paths, nodes) = (&inner.paths, &inner.nodes);
        network::make_nodes(paths, nodes)?;
        network::make_world(paths, nodes)?;
        for (name, spec) in inner.world_specs() {
            self.supervise(&name, spec)?;
        }
        self.supervise("control", inner.control_spec())?;
        let text = serde_json::to_string_pretty(&inner.description).unwrap_or_default();
        sys::replace(&paths.root.join("lab.json"), &text).doing("lab.json")?;
        let root_certificate = paths.state_dir().join("root-cert.pem");
        self.wait_until("strata-control's root certificate", START, || root_certificate.exists())?;
        self.wait_ready("control", START)?;
        for node in nodes {
            self.supervise(&format!("agent-{}", node.name), inner.agent_spec(node))?;
        }
        for node in nodes {
            self.wait_ready(&format!("agent-{}", node.name), START)?;
            self.supervise(&format!("proxy-{}", node.name), inner.proxy_spec(node, xds_address))?;
        }
        let tending = inner.clone();
        self.thread("lab-tend", move || tending.tend())?;
        for index in 0..nodes.len() {
            let kubelet = inner.clone();
            self.thread("lab-kubelet", move || kubelet.run_kubelet(index))?;
        }
        for node in nodes {
            self.wait_ready(&format!("proxy-{}", node.name), START)?;
        }
        self.wait_for_pods(START)
    }

    fn thread(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        self.threads.push(std::thread::Builder::new().name(name.into()).spawn(work).doing(name)?);
        Ok(())
    }

    fn supervise(&self, name: &str, spec: Spec) -> Result<()> {
        let process = Supervised::start(spec)?;
        self.inner.processes.lock().insert(name.to_owned(), process);
        Ok(())
    }
}

impl Inner {
    fn source_args(&self) -> Vec<String> {
        let mut folders = self.sources();
        folders.push(self.paths.status_dir());
        folders.iter().flat_map(|folder| ["--source".to_owned(), format!("dir:{}", folder.display())]).collect()
    }

    fn spec(&self, name: &str, program: &str, args: Vec<String>, netns: &str, cgroup: PathBuf) -> Spec {
        Spec {
            program: self.bin.join(program),
            args,
            env: Vec::new(),
            netns: self.paths.netns(netns),
            cgroup,
            log: self.paths.log(name),
        }
    }

    fn control_spec(&self) -> Spec {
        let mut args = self.source_args();
        args.extend(flags(&[
            ("--state-dir", self.paths.state_dir().display().to_string()),
            ("--run-dir", self.paths.control_dir().display().to_string()),
        ]));
        // Beside the nodes' subtrees: no node's programs see its sockets.
        self.spec("control", "strata-control", args, &self.nodes[0].name, self.paths.cgroup.join("control"))
    }

    fn agent_spec(&self, node: &Node) -> Spec {
        let mut args = flags(&[
            ("--node-name", node.name.clone()),
            ("--run-dir", self.paths.run_dir(&node.name).display().to_string()),
            ("--bpffs", self.paths.bpffs.join(&node.name).display().to_string()),
            ("--cgroup", self.paths.node_cgroup(&node.name).display().to_string()),
            ("--status-dir", self.paths.status_dir().display().to_string()),
            ("--uplink", network::UPLINK.to_owned()),
        ]);
        args.extend(self.source_args());
        let cgroup = self.paths.node_cgroup(&node.name).join("agent");
        self.spec(&format!("agent-{}", node.name), "strata-agent", args, &node.name, cgroup)
    }

    pub(super) fn proxy_spec(&self, node: &Node, xds_address: &str) -> Spec {
        let state = self.paths.state_dir();
        let ip = node.addresses.iter().find(|address| address.is_ipv4());
        let args = flags(&[
            ("--role", "node".to_owned()),
            ("--node-name", node.name.clone()),
            ("--run-dir", self.paths.run_dir(&node.name).display().to_string()),
            ("--xds-address", xds_address.to_owned()),
            ("--xds-root-ca", state.join("root-cert.pem").display().to_string()),
            ("--token-path", state.join("tokens/node").join(&node.name).display().to_string()),
            ("--instance-ip", ip.map(ToString::to_string).unwrap_or_default()),
            ("--name", format!("strata-proxy-{}", node.name)),
        ]);
        let cgroup = self.paths.node_cgroup(&node.name).join("proxy");
        self.spec(&format!("proxy-{}", node.name), "strata-proxy", args, &node.name, cgroup)
    }

    /// The bank's gateway and the token issuer, outside the cluster.
    fn world_specs(&self) -> Vec<(String, Spec)> {
        let cgroup = self.paths.cgroup.join("world");
        let address = |ip: &str, port: u16| format!("{ip}:{port}");
        let gateway = ["serve", "--name", "bank-gateway", "--namespace", "world"].map(str::to_owned).into_iter();
        let gateway = gateway.chain(flags(&[
            ("--http", address(WORLD_GATEWAY, 8080)),
            ("--tcp", address(WORLD_GATEWAY, 9000)),
            ("--udp", address(WORLD_GATEWAY, 9001)),
        ]));
        let keys = self.paths.root.join("issuer").display().to_string();
        let issuer = std::iter::once("jwks".to_owned())
            .chain(flags(&[("--keys", keys), ("--listen", address(WORLD_ISSUER, 9090))]));
        let spec = |name: &str, args: Vec<String>| {
            let name = format!("world-{name}");
            (name.clone(), self.spec(&name, "strata-echo", args, "world", cgroup.clone()))
        };
        vec![spec("gateway", gateway.collect()), spec("issuer", issuer.collect())]
    }
}

/// Folders and what the objects say; nothing runs yet.
fn prepare(options: &Options, paths: Paths, bin: PathBuf) -> Result<Inner> {
    for folder in ["logs", "status", "edits", "pods", "control"] {
        let folder = paths.root.join(folder);
        fs::create_dir_all(&folder).doing(folder.display())?;
    }
    fs::create_dir_all(&paths.cgroup).doing(paths.cgroup.display())?;
    let live = live_folder(options, &paths)?;
    let snapshot = DirectorySource::new(vec![live.clone()]).load();
    if let Some(fault) = snapshot.errors().next() {
        return Err(LabError::Other(fault.to_string()));
    }
    let nodes = network::nodes(&snapshot.objects)?;
    let description = describe(&paths, &nodes, &live);
    let xds_address = xds_address(&nodes)?;
    let kubelet = |node: &Node| Mutex::new(Kubelet::new(&node.name, paths.clone(), bin.clone(), xds_address.clone()));
    Ok(Inner {
        kubelets: nodes.iter().map(kubelet).collect(),
        processes: Mutex::new(BTreeMap::new()),
        objects: RwLock::new(snapshot),
        stopping: AtomicBool::new(false),
        paths,
        bin,
        live,
        nodes,
        description,
    })
}

fn flags(flags: &[(&str, String)]) -> Vec<String> {
    flags.iter().flat_map(|(flag, value)| [(*flag).to_owned(), value.clone()]).collect()
}

fn xds_address(nodes: &[Node]) -> Result<String> {
    let ip = nodes[0].addresses.iter().find(|address| address.is_ipv4());
    ip.map(|ip| format!("https://{ip}:15012")).ok_or_else(|| LabError::other("the first node has no IPv4 address"))
}

/// The folder of this program, or the one above for test programs (`target/debug/deps`).
fn binaries(given: Option<&Path>) -> Result<PathBuf> {
    let own = std::env::current_exe().doing("own program")?;
    let candidates = match given {
        Some(folder) => vec![folder.to_owned()],
        None => own.ancestors().skip(1).take(2).map(Path::to_owned).collect(),
    };
    let missing = |folder: &Path| BINARIES.into_iter().filter(|name| !folder.join(name).is_file()).collect::<Vec<_>>();
    if let Some(folder) = candidates.iter().find(|folder| missing(folder).is_empty()) {
        return Ok(folder.clone());
    }
    let lacking = candidates.iter().map(|folder| format!("{} lacks {}", folder.display(), missing(folder).join(", ")));
    let text = format!("binaries are missing (`make build` builds them): {}", lacking.collect::<Vec<_>>().join("; "));
    Err(LabError::Machine(text))
}

fn live_folder(options: &Options, paths: &Paths) -> Result<PathBuf> {
    let dir = fs::canonicalize(&options.dir).doing(options.dir.display())?;
    if !options.copy {
        return Ok(dir);
    }
    let live = paths.root.join("live");
    copy_folder(&dir, &live)?;
    Ok(live)
}

fn describe(paths: &Paths, nodes: &[Node], live: &Path) -> Description {
    let node = |node: &Node| NodeDescription {
        name: node.name.clone(),
        netns: paths.netns(&node.name),
        agent: paths.run_dir(&node.name).join("agent.sock"),
        proxy: paths.run_dir(&node.name).join("proxy.sock"),
        cgroup: paths.node_cgroup(&node.name),
        bpffs: paths.bpffs.join(&node.name),
    };
    Description {
        id: paths.id.clone(),
        pid: std::process::id(),
        sources: vec![live.to_owned(), paths.edits_dir(), paths.status_dir()],
        nodes: nodes.iter().map(node).collect(),
        control: paths.control_dir().join("control.sock"),
        pods: paths.root.join("pods"),
        logs: paths.root.join("logs"),
    }
}

/// Whoever cleans up when we are killed.
fn watcher(inner: &Inner) -> Result<(Child, ChildStdin)> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(inner.bin.join("strata-lab-watch"));
    command.arg(&inner.paths.id).process_group(0).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().doing("strata-lab-watch")?;
    let stdin = child.stdin.take().ok_or_else(|| LabError::other("strata-lab-watch has no standard input"))?;
    Ok((child, stdin))
}
