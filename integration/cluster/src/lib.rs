//! The scenes on a real cluster: the shop by `kubectl apply`, clients by `kubectl exec`, configuration by a real istiod.
//!
//! The cluster is the one of `make cluster` (two nodes `node-a` and `node-b` on this machine); what only that one offers
//! (commands on a node, the link between the nodes, the API server's process) is in [`Cluster`]'s methods of that kind.
mod edits;
mod kubectl;
pub mod scenes;
mod world;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use strata_lab::{Call, Capture, Ground, LabError, Result, Running};

use edits::Edits;
pub use kubectl::{Kubectl, output};
use world::World;

/// Namespace of Strata and of istiod.
pub const SYSTEM: &str = "istio-system";
/// Device all nodes hang on.
const BRIDGE: &str = "strata0";
/// Address of this machine on it (integration/cluster/env.sh).
pub const MACHINE: &str = "10.99.0.1";
/// For pods to become ready: images are there, nothing is pulled.
const PODS: Duration = Duration::from_secs(90);

/// A cluster with Strata, istiod and the shop on it.
#[derive(Debug)]
pub struct Cluster {
    kubectl: Kubectl,
    edits: Mutex<Edits>,
    world: World,
    folder: tempfile::TempDir,
    runs: AtomicU64,
}

impl Cluster {
    /// Brings the shop (manifests/samples/shop) onto the cluster that `$KUBECONFIG` names, as it is before any scene.
    ///
    /// # Errors
    /// If there is no such cluster, or the shop does not become ready; the error says what is missing.
    pub fn connect() -> Result<Cluster> {
        let kubectl = Kubectl::new();
        kubectl.words("get --raw /readyz").map_err(|error| {
            LabError::Machine(format!(
                "no cluster answers: {error}\nstart one with `make cluster` (KUBECONFIG is printed)"
            ))
        })?;
        let folder = tempfile::tempdir().map_err(|source| LabError::Io { what: "temporary folder".into(), source })?;
        let world = World::start(folder.path())?;
        let cluster = Cluster { kubectl, edits: Mutex::default(), world, folder, runs: AtomicU64::new(0) };
        cluster.shop()?;
        Ok(cluster)
    }

    /// kubectl on this cluster.
    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// A folder for files of this run.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The shop anew: what an earlier run left in place goes.
    fn shop(&self) -> Result<()> {
        let kubectl = &self.kubectl;
        kubectl.words("delete namespace shop outside --ignore-not-found --timeout=180s")?;
        for file in ["00-namespaces", "02-accounts", "03-pods", "04-services"] {
            let path = repository().join(format!("manifests/samples/shop/{file}.yaml"));
            // Server-side, so that the scenes' edits are merged with it and not with kubectl's own notes.
            kubectl.run(&["apply", "--server-side", "--field-manager=shop", "-f", &path.display().to_string()])?;
        }
        let waypoint = repository().join("manifests/samples/cluster/waypoint.yaml");
        kubectl.run(&["apply", "--server-side", "--field-manager=shop", "-f", &waypoint.display().to_string()])?;
        let ready = |namespace: &str| {
            kubectl.words(&format!("wait -n {namespace} pod --all --for=condition=Ready --timeout={}s", PODS.as_secs()))
        };
        ready("shop").and_then(|_| ready("outside")).map_err(|error| {
            let events = kubectl.words("get events -A --field-selector type=Warning --sort-by=.lastTimestamp");
            LabError::Other(format!("the shop is not ready: {error}\n{}", events.unwrap_or_default()))
        })?;
        Ok(())
    }

    /// Name of the pod that runs a part: the agent or the node proxy of a node, a waypoint.
    ///
    /// # Errors
    /// If there is none that runs.
    pub fn part(&self, namespace: &str, label: &str, node: Option<&str>) -> Result<String> {
        let place = node.map(|node| format!("--field-selector spec.nodeName={node}")).unwrap_or_default();
        let pods = self.kubectl.get(&format!("pods -n {namespace} -l {label} {place}"))?;
        let mut running = pods["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null() && pod["status"]["phase"] == "Running");
        let name = running.next().and_then(|pod| pod["metadata"]["name"].as_str());
        name.map(str::to_owned).ok_or_else(|| LabError::Other(format!("no pod with label {label} runs in {namespace}")))
    }

    /// The agent of a node.
    ///
    /// # Errors
    /// As [`Cluster::part`].
    pub fn agent(&self, node: &str) -> Result<String> {
        self.part(SYSTEM, "app.kubernetes.io/name=strata-agent", Some(node))
    }

    /// `GET path` of a process of ours as text.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn ask(&self, process: &str, path: &str) -> Result<String> {
        if let Some((namespace, waypoint)) = process.split_once('/') {
            // The lab calls the pods NAME-1.
            let gateway = waypoint.strip_suffix("-1").unwrap_or(waypoint);
            let pod = self.part(namespace, &format!("gateway.networking.k8s.io/gateway-name={gateway}"), None)?;
            return self.kubectl.exec(namespace, &pod, &["/usr/local/bin/pilot-agent", "request", "GET", path]);
        }
        let (part, node) = process.split_once('-').unwrap_or((process, ""));
        let agent = self.agent(node)?;
        self.kubectl.exec(SYSTEM, &agent, &["strata", "--run-dir", "/run/strata", "get", part, path])
    }

    /// `strata-echo call` from outside the cluster, arguments separated by blanks.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn call_from_outside(&self, arguments: &str) -> Result<Call> {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        serde_json::from_str(&self.world.call(&words)?).map_err(LabError::other)
    }

    /// Where `make cluster` keeps binaries, modules and state.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
        let cache = || std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
        std::env::var_os("STRATA_CLUSTER_DIR").map_or_else(|| cache().join("strata-cluster"), PathBuf::from)
    }

    /// Runs a script of integration/cluster.
    ///
    /// # Errors
    /// If it fails.
    pub fn script(&self, name: &str, args: &[&str]) -> Result<String> {
        let path = repository().join("integration/cluster").join(name);
        let mut command = Command::new(&path);
        command.args(args);
        output(command, &format!("{name} {}", args.join(" ")), None)
    }
}

impl Ground for Cluster {
    fn edit(&self, name: &str, yaml: &str) -> Result<()> {
        self.edits.lock().unwrap_or_else(PoisonError::into_inner).place(&self.kubectl, name, yaml)
    }

    fn lead(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn remove_edit(&self, name: &str) -> Result<()> {
        self.edits.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.kubectl, name)
    }

    fn typed(&self, file: &str) -> String {
        format!("kubectl apply --server-side -f manifests/samples/scenes/{file}")
    }

    fn admin(&self, process: &str, path: &str) -> Result<Value> {
        let text = self.ask(process, path)?;
        serde_json::from_str(&text).map_err(|error| LabError::Other(format!("{process} {path}: {error}: {text}")))
    }

    fn events(&self, process: &str) -> Result<Vec<Value>> {
        let path = if process.starts_with("agent-") { "/flows" } else { "/requests" };
        Ok(self.ask(process, path)?.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    fn waypoint_connected(&self) -> Result<bool> {
        let pods = self.kubectl.get("pods -n shop -l gateway.networking.k8s.io/gateway-name=waypoint")?;
        let mut conditions = pods["items"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|pod| pod["status"]["conditions"].as_array().cloned().unwrap_or_default());
        Ok(conditions.any(|condition| condition["type"] == "Ready" && condition["status"] == "True"))
    }

    fn client(&self, pod: &str, args: &[&str]) -> Result<Value> {
        let (namespace, name) = split(pod)?;
        let text = self.kubectl.exec(namespace, name, &[&["strata-echo"], args].concat())?;
        serde_json::from_str(&text)
            .map_err(|error| LabError::Other(format!("{pod}: {}: {error}: {text}", args.join(" "))))
    }

    fn spawn(&self, pod: &str, args: &[&str]) -> Result<Running> {
        let (namespace, name) = split(pod)?;
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let mark = format!("/tmp/run-{number}");
        // The signal that ends it must reach the program in the pod, not the kubectl that shows its output.
        let script = format!("echo $$ > {mark}; exec strata-echo {}", quoted(args));
        let command = self.kubectl.command(["exec", "-n", namespace, name, "--", "sh", "-c", &script]);
        let stop = format!("kill -TERM $(cat {mark})");
        let stop = self.kubectl.command(["exec", "-n", namespace, name, "--", "sh", "-c", &stop]);
        let log = self.folder.path().join(format!("client-{number}.log"));
        Ok(Running::start(command, format!("{pod}: strata-echo {}", args.join(" ")), log)?.stopped_by(stop))
    }

    fn pod_ips(&self, namespace: &str, name: &str) -> Result<Vec<IpAddr>> {
        let pod = self.kubectl.get(&format!("pod -n {namespace} {name}"))?;
        let ips = pod["status"]["podIPs"].as_array().into_iter().flatten();
        let mut ips: Vec<IpAddr> = ips.filter_map(|ip| ip["ip"].as_str()?.parse().ok()).collect();
        ips.sort_by_key(IpAddr::is_ipv6);
        Ok(ips)
    }

    fn nodes(&self) -> Vec<String> {
        vec!["node-a".into(), "node-b".into()]
    }

    fn on_node(&self, node: &str, command: &[&str]) -> Result<String> {
        self.script("on-node.sh", &[&[node], command].concat())
    }

    fn capture_link(&self) -> Result<Capture> {
        let (file, log) = (self.folder.path().join("capture.pcap"), self.folder.path().join("tcpdump.log"));
        Capture::start(Command::new("tcpdump"), BRIDGE, file, &log)
    }

    fn token(&self, args: &[&str]) -> Result<String> {
        self.world.token(args)
    }
}

fn split(pod: &str) -> Result<(&str, &str)> {
    pod.split_once('/').ok_or_else(|| LabError::Other(format!("{pod:?} is not of the form NAMESPACE/NAME")))
}

/// Words for a shell.
fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("'{}'", word.replace('\'', r"'\''"))).collect::<Vec<_>>().join(" ")
}

/// The repository's root.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
