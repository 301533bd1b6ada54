//! The kubelet and container runtime of every node: pods of the objects -> namespaces, CNI calls and processes.
use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use compat_objects::core::{Container, Pod};
use compat_objects::{HasMeta, ObjectSet};
use nix::sys::signal::Signal;

use crate::endpoints::PodStatus;
use crate::error::Doing;
use crate::paths::Paths;
use crate::process::{Spec, Supervised};
use crate::{LabError, Result, cleanup, cni, network, sys};

/// A loopback connect that takes longer means not ready.
const PROBE: Duration = Duration::from_millis(200);
/// Before a pod that could not be started is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Namespace and name.
pub(crate) type PodKey = (String, String);

/// One node's pods.
pub(crate) struct Kubelet {
    pub node: String,
    pub paths: Paths,
    pub bin: PathBuf,
    /// Where waypoints find the control plane.
    pub xds_address: String,
    pub running: BTreeMap<PodKey, RunningPod>,
    failed: BTreeMap<PodKey, (Instant, String)>,
    started: u64,
}

/// A pod that has its sandbox.
#[derive(Debug)]
pub(crate) struct RunningPod {
    pub netns: PathBuf,
    pub cgroup: PathBuf,
    pub ips: Vec<IpAddr>,
    pub ready: bool,
    containers: Vec<Supervised>,
    /// What the containers were started from.
    specs: Vec<Container>,
    probe_port: Option<u16>,
    cni: cni::Call,
}

impl Kubelet {
    pub(crate) fn new(node: &str, paths: Paths, bin: PathBuf, xds_address: String) -> Kubelet {
        let (running, failed) = (BTreeMap::new(), BTreeMap::new());
        Kubelet { node: node.to_owned(), paths, bin, xds_address, running, failed, started: 0 }
    }

    /// One round: starts and stops pods, restarts containers, probes. Says what failed.
    pub(crate) fn reconcile(&mut self, objects: &ObjectSet) -> Vec<LabError> {
        let mut errors = Vec::new();
        let mine = |pod: &&std::sync::Arc<Pod>| {
            pod.spec.as_ref().is_some_and(|spec| spec.node_name.as_deref() == Some(&self.node))
        };
        let wanted: BTreeMap<PodKey, _> =
            objects.pods().filter(mine).map(|pod| ((pod.namespace().into(), pod.name().into()), pod.clone())).collect();
        let containers = |key: &PodKey| wanted.get(key).and_then(|pod| Some(&pod.spec.as_ref()?.containers));
        let gone: Vec<PodKey> = self
            .running
            .iter()
            .filter(|(key, pod)| containers(key) != Some(&pod.specs))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            if let Some(pod) = self.running.remove(&key) {
                errors.extend(pod.stop().err());
            }
        }
        self.failed.retain(|key, _| wanted.contains_key(key));
        for (key, pod) in &wanted {
            let waits = self.failed.get(key).is_some_and(|(since, _)| since.elapsed() < RETRY);
            if self.running.contains_key(key) || waits {
                continue;
            }
            match self.start(key, pod) {
                Ok(running) => {
                    self.failed.remove(key);
                    self.running.insert(key.clone(), running);
                }
                Err(error) => {
                    self.failed.insert(key.clone(), (Instant::now(), error.to_string()));
                    errors.push(error);
                }
            }
        }
        self.running.values_mut().for_each(RunningPod::tend);
        errors
    }

    /// What the endpoint controller needs to know.
    pub(crate) fn statuses(&self) -> impl Iterator<Item = (PodKey, PodStatus)> {
        self.running.iter().map(|(key, pod)| (key.clone(), PodStatus { ips: pod.ips.clone(), ready: pod.ready }))
    }

    /// Pods that could not be started, with the reason.
    pub(crate) fn failures(&self) -> impl Iterator<Item = String> {
        self.failed.iter().map(|((namespace, name), (_, why))| format!("{namespace}/{name}: {why}"))
    }

    fn start(&mut self, key: &PodKey, pod: &Pod) -> Result<RunningPod> {
        let (namespace, name) = key;
        let sandbox = self.paths.pod_netns(namespace, name);
        self.started += 1;
        let call = cni::Call {
            plugin: self.bin.join("strata-cni"),
            node_netns: self.paths.netns(&self.node),
            node_cgroup: self.paths.node_cgroup(&self.node),
            agent_socket: self.paths.run_dir(&self.node).join("cni.sock"),
            container_id: format!("{}-{}-{}-{}", self.paths.id, namespace, name, self.started),
            netns: self.paths.netns(&sandbox),
            namespace: namespace.clone(),
            name: name.clone(),
            uid: pod.metadata.uid.clone().unwrap_or_else(|| format!("{namespace}-{name}")),
        };
        network::make_namespace(&self.paths, &sandbox)?;
        let added = call.add().inspect_err(|_| {
            // As runtimes do after a failed ADD; the first error is the one to show.
            let _ = call.del();
            let _ = cleanup::remove_namespace(&call.netns);
        });
        let mut running = RunningPod {
            netns: call.netns.clone(),
            cgroup: self.paths.pod_cgroup(&self.node, namespace, name),
            ips: added?,
            ready: false,
            containers: Vec::new(),
            specs: pod.spec.as_ref().map(|spec| spec.containers.clone()).unwrap_or_default(),
            probe_port: probe_port(pod),
            cni: call,
        };
        for container in running.specs.clone() {
            let spec = self.container(pod, &container, &running);
            match spec.and_then(Supervised::start) {
                Ok(process) => running.containers.push(process),
                Err(error) => {
                    let _ = running.stop();
                    return Err(error);
                }
            }
        }
        Ok(running)
    }

    /// What an image means here.
    fn container(&self, pod: &Pod, container: &Container, running: &RunningPod) -> Result<Spec> {
        let (namespace, name) = (pod.namespace(), pod.name());
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        let account = account.unwrap_or_else(|| "default".into());
        let mut args = Vec::new();
        let image = container.image.as_deref().unwrap_or_default();
        let program = match image.split(':').next() {
            Some("strata.io/echo") => "strata-echo",
            Some("strata.io/proxy") => {
                args = self.waypoint_args(namespace, name, &account, running)?;
                "strata-proxy"
            }
            _ => {
                let text = format!(
                    "Pod {namespace}/{name}: container {}: image {image:?} is not known to the lab (strata.io/echo and strata.io/proxy are)",
                    container.name
                );
                return Err(LabError::Other(text));
            }
        };
        args.extend(container.args.iter().flatten().cloned());
        let version = pod.label("version").unwrap_or_default().to_owned();
        let own = [("POD_NAME", name.to_owned()), ("POD_NAMESPACE", namespace.to_owned()), ("POD_VERSION", version)];
        let mut env: Vec<(String, String)> = own.map(|(key, value)| (key.to_owned(), value)).into();
        let given = container.env.iter().flatten();
        env.extend(given.filter_map(|var| Some((var.name.clone(), var.value.clone()?))));
        Ok(Spec {
            program: self.bin.join(program),
            args,
            env,
            netns: running.netns.clone(),
            cgroup: running.cgroup.clone(),
            log: self.paths.log(&format!("pod-{namespace}-{name}")),
        })
    }

    fn waypoint_args(&self, namespace: &str, name: &str, account: &str, pod: &RunningPod) -> Result<Vec<String>> {
        let run_dir = self.paths.pod_dir(namespace, name);
        fs::create_dir_all(&run_dir).doing(run_dir.display())?;
        let state = self.paths.state_dir();
        let ip = pod.ips.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let flags = [
            ("--role", "waypoint".to_owned()),
            ("--node-name", self.node.clone()),
            ("--run-dir", run_dir.display().to_string()),
            ("--xds-address", self.xds_address.clone()),
            ("--xds-root-ca", state.join("root-cert.pem").display().to_string()),
            ("--token-path", state.join("tokens/sa").join(namespace).join(account).display().to_string()),
            ("--instance-ip", ip.to_string()),
            ("--name", name.to_owned()),
            ("--namespace", namespace.to_owned()),
            ("--service-account", account.to_owned()),
        ];
        Ok(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect())
    }
}

impl RunningPod {
    fn tend(&mut self) {
        self.containers.iter_mut().for_each(Supervised::tend);
        let alive = self.containers.iter().all(|container| container.pid().is_some());
        // Once ready, a living process is enough: a probe a round would be load on two cores.
        self.ready = alive && (self.ready || self.probe());
    }

    /// Whether the first port answers on loopback, inside the pod.
    fn probe(&self) -> bool {
        let Some(port) = self.probe_port else { return true };
        let connect = || TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), PROBE);
        sys::in_netns(&self.netns, connect).is_ok()
    }

    /// As runtimes do: containers, then DEL, then the namespace.
    fn stop(mut self) -> Result<()> {
        self.containers.iter_mut().for_each(|container| container.stop(Signal::SIGTERM));
        let deleted = self.cni.del();
        cleanup::remove_namespace(&self.netns).doing(self.netns.display())?;
        deleted
    }

    /// Ends its processes; they are started again.
    pub(crate) fn kill(&mut self, signal: Signal) {
        self.containers.iter().for_each(|container| container.signal(signal));
        self.ready = false;
    }
}

fn probe_port(pod: &Pod) -> Option<u16> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    let tcp = ports.find(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"))?;
    u16::try_from(tcp.container_port).ok()
}
