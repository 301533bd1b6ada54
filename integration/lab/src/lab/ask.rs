//! What scenes learn of a mesh.
use std::fs;
use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use strata_runtime::client;

use super::Lab;
use crate::error::Doing;
use crate::kubelet::RunningPod;
use crate::{LabError, Result, sys};

/// Longest an admin question may take.
const PATIENCE: Duration = Duration::from_secs(5);

impl Lab {
    /// Runs `work` on a pod that has its sandbox.
    pub(super) fn with_pod<T>(&self, pod: &str, work: impl FnOnce(&mut RunningPod) -> T) -> Result<T> {
        let key = pod.split_once('/').map(|(namespace, name)| (namespace.to_owned(), name.to_owned()));
        let key = key.ok_or_else(|| LabError::Other(format!("{pod:?} is not of the form NAMESPACE/NAME")))?;
        for kubelet in &self.inner.kubelets {
            if let Some(found) = kubelet.lock().running.get_mut(&key) {
                return Ok(work(found));
            }
        }
        Err(LabError::Other(format!("no pod {pod} is running")))
    }

    /// Addresses of a pod, IPv4 first.
    ///
    /// # Errors
    /// If it is not running.
    pub fn pod_ips(&self, namespace: &str, name: &str) -> Result<Vec<IpAddr>> {
        self.with_pod(&format!("{namespace}/{name}"), |pod| {
            let mut ips = pod.ips.clone();
            ips.sort_by_key(IpAddr::is_ipv6);
            ips
        })
    }

    /// Network namespace of a pod.
    ///
    /// # Errors
    /// If it is not running.
    pub fn pod_netns(&self, pod: &str) -> Result<PathBuf> {
        self.with_pod(pod, |pod| pod.netns.clone())
    }

    /// Waits until every pod of the objects runs and is ready.
    ///
    /// # Errors
    /// [`LabError::Timeout`] with the pods that are not, and why.
    pub fn wait_for_pods(&self, limit: Duration) -> Result<()> {
        let began = Instant::now();
        loop {
            let missing = self.pods_missing();
            if missing.is_empty() {
                return Ok(());
            }
            if began.elapsed() > limit {
                let reasons = self.inner.kubelets.iter().flat_map(|k| k.lock().failures().collect::<Vec<_>>());
                let logs = missing.iter().map(|pod| {
                    let log = self.inner.paths.log(&format!("pod-{}", pod.replace('/', "-")));
                    format!("\n{pod}: {}", sys::tail(&log, 5))
                });
                let detail = format!(
                    ": {}; {}{}",
                    missing.join(", "),
                    reasons.collect::<Vec<_>>().join("; "),
                    logs.collect::<String>()
                );
                return Err(LabError::Timeout { what: "pods to be ready".into(), seconds: limit.as_secs(), detail });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn pods_missing(&self) -> Vec<String> {
        use compat_objects::HasMeta;
        let objects = self.inner.objects.read().objects.clone();
        let running = self.inner.pods();
        let node = |name: Option<&String>| name.is_some_and(|name| self.inner.nodes.iter().any(|n| n.name == *name));
        objects
            .pods()
            .filter(|pod| pod.spec.as_ref().is_some_and(|spec| node(spec.node_name.as_ref())))
            .map(|pod| (pod.namespace().to_owned(), pod.name().to_owned()))
            .filter(|key| running.get(key).is_none_or(|status| !status.ready))
            .map(|(namespace, name)| format!("{namespace}/{name}"))
            .collect()
    }

    /// Admin socket of a process (`control`, `agent-NODE`, `proxy-NODE`) or of a waypoint pod (`NAMESPACE/NAME`).
    #[must_use]
    pub fn socket(&self, process: &str) -> PathBuf {
        let paths = &self.inner.paths;
        match (process.split_once('/'), process.split_once('-')) {
            (Some((namespace, name)), _) => paths.pod_dir(namespace, name).join("proxy.sock"),
            (None, Some(("agent", node))) => paths.run_dir(node).join("agent.sock"),
            (None, Some(("proxy", node))) => paths.run_dir(node).join("proxy.sock"),
            _ => paths.control_dir().join("control.sock"),
        }
    }

    /// `GET path` of a process' admin interface as JSON.
    ///
    /// # Errors
    /// If it does not answer with JSON.
    pub fn admin(&self, process: &str, path: &str) -> Result<Value> {
        block_on(client::get_json(&self.socket(process), path))
    }

    /// `GET path` of a process' admin interface as text: metrics, recent `/flows` or `/requests` lines.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn admin_text(&self, process: &str, path: &str) -> Result<String> {
        block_on(client::get_text(&self.socket(process), path))
    }

    /// The recent events of a process, oldest first: `/flows` of agents, `/requests` of proxies and waypoints.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn events(&self, process: &str) -> Result<Vec<Value>> {
        let path = if process.starts_with("agent-") { "/flows" } else { "/requests" };
        let text = self.admin_text(process, path)?;
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Waits until a process says it is ready.
    ///
    /// # Errors
    /// [`LabError::Timeout`] with the end of its log.
    pub fn wait_ready(&self, process: &str, limit: Duration) -> Result<Duration> {
        let ready = || self.admin_text(process, "/healthz/ready").is_ok();
        self.wait_until(&format!("{process} to be ready"), limit, ready).map_err(|error| match error {
            LabError::Timeout { what, seconds, .. } => {
                let said = self.admin_text(process, "/healthz/ready").err().map(|e| e.to_string()).unwrap_or_default();
                let detail = format!(": {said}\n{}", sys::tail(&self.inner.paths.log(process), 15));
                LabError::Timeout { what, seconds, detail }
            }
            other => other,
        })
    }

    pub(super) fn status_pid(&self, process: &str) -> Option<u64> {
        self.admin(process, "/status").ok()?["pid"].as_u64()
    }

    /// The end of a process' log (`control`, `agent-NODE`, `proxy-NODE`, `pod-NAMESPACE-NAME`).
    #[must_use]
    pub fn log_tail(&self, process: &str, lines: usize) -> String {
        sys::tail(&self.inner.paths.log(process), lines)
    }

    /// Writes the state of everything into a folder: logs, objects, dumps of every process, addresses and routes.
    ///
    /// # Errors
    /// If the folder cannot be written; a process that does not answer is noted in its file.
    pub fn dump(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).doing(folder.display())?;
        let paths = &self.inner.paths;
        for part in ["logs", "status", "edits", "live"] {
            let from = paths.root.join(part);
            if from.is_dir() {
                super::copy_folder(&from, &folder.join(part))?;
            }
        }
        let mut processes = self.processes();
        processes.extend(self.inner.pods().into_keys().map(|(namespace, name)| format!("{namespace}/{name}")));
        for process in processes.iter().filter(|process| self.socket(process).exists() && !process.starts_with("world"))
        {
            for path in ["/status", "/config_dump", "/metrics"] {
                let text = self.admin_text(process, path).unwrap_or_else(|error| error.to_string());
                let file = folder.join(format!("{}{}", process.replace('/', "-"), path.replace('/', "-")));
                fs::write(&file, text).doing(file.display())?;
            }
        }
        let prefix = paths.netns_name("");
        for entry in fs::read_dir("/run/netns").doing("/run/netns")?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(short) = name.strip_prefix(&prefix) {
                let show = |args: &str| sys::ip(&format!("-n {name} {args}")).unwrap_or_else(|error| error.to_string());
                let text = ["addr", "route show table all", "-6 route", "rule", "-6 rule"].map(show).join("\n");
                let file = folder.join(format!("net-{short}.txt"));
                fs::write(&file, text).doing(file.display())?;
            }
        }
        Ok(())
    }
}

fn block_on<T>(question: impl Future<Output = std::result::Result<T, client::ClientError>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().doing("runtime")?;
    let answer = runtime.block_on(async { tokio::time::timeout(PATIENCE, question).await });
    answer.map_err(|_| LabError::other("no answer from the admin socket"))?.map_err(LabError::other)
}
