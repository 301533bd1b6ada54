//! What became of this node's pods, told where the objects come from: in a file beside the folders of YAML, or on the
//! pods in the API server.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use compat_kubernetes::{About, EventWriter, Note, PodId, PodWriter, REDIRECTION};
use serde_json::{Value, json};

use crate::state::replace_file;

/// What is reported of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodReport {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// The object's uid; empty if it has none.
    pub(crate) uid: String,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) enrolled: bool,
    /// Why it is not in the mesh although it should be.
    pub(crate) problem: Option<String>,
}

/// Where it is told.
#[derive(Debug)]
pub(crate) enum Status {
    File(StatusFile),
    Api(ApiStatus),
}

impl Status {
    /// Tells what changed since the last call. `host`: the node's addresses.
    pub(crate) fn write(&mut self, pods: &[PodReport], host: &[IpAddr]) {
        match self {
            Status::File(file) => {
                if let Err(error) = file.write(pods, host) {
                    tracing::error!(%error, "status file could not be written");
                }
            }
            Status::Api(api) => api.write(pods),
        }
    }

    /// Waits until what was told has arrived; false if that took longer than `within`.
    pub(crate) async fn settled(&self, within: Duration) -> bool {
        match self {
            Status::File(_) => true,
            Status::Api(api) => api.pods.settled(within).await,
        }
    }
}

/// The annotation on each pod, and an Event on a pod that is not in the mesh although it should be. Addresses are
/// kubelet's to tell.
#[derive(Debug)]
pub(crate) struct ApiStatus {
    pods: PodWriter,
    events: EventWriter,
    /// Problems by pod, as told.
    problems: BTreeMap<PodId, String>,
}

impl ApiStatus {
    pub(crate) fn new(pods: PodWriter, events: EventWriter) -> ApiStatus {
        ApiStatus { pods, events, problems: BTreeMap::new() }
    }

    fn write(&mut self, reports: &[PodReport]) {
        let mut captured = BTreeMap::new();
        let mut problems = BTreeMap::new();
        for report in reports.iter().filter(|report| !report.uid.is_empty()) {
            let (namespace, name) = (report.namespace.clone(), report.name.clone());
            let id = PodId { namespace, name, uid: report.uid.clone() };
            if let Some(problem) = &report.problem {
                if self.problems.get(&id) != Some(problem) {
                    self.tell(&id, problem);
                }
                problems.insert(id.clone(), problem.clone());
            }
            captured.insert(id, report.enrolled);
        }
        self.problems = problems;
        self.pods.set(captured);
    }

    fn tell(&self, id: &PodId, problem: &str) {
        let about = About {
            api_version: "v1".to_owned(),
            kind: "Pod".to_owned(),
            namespace: id.namespace.clone(),
            name: id.name.clone(),
            uid: id.uid.clone(),
        };
        let text = problem.to_owned();
        self.events.tell(about, Note { reason: "CaptureFailed", action: "Capture", text, warning: true });
    }
}

/// Writes `pods-NODE.yaml` when it changes.
#[derive(Debug)]
pub(crate) struct StatusFile {
    path: PathBuf,
    written: Option<String>,
}

impl StatusFile {
    pub(crate) fn new(folder: &Path, node: &str) -> StatusFile {
        StatusFile { path: folder.join(format!("pods-{node}.yaml")), written: None }
    }

    /// Replaces the file if its content differs from what was written last.
    ///
    /// # Errors
    /// If it cannot be written; tried again at the next call.
    pub(crate) fn write(&mut self, pods: &[PodReport], host: &[IpAddr]) -> std::io::Result<()> {
        let text = render(pods, host);
        if self.written.as_ref() == Some(&text) {
            return Ok(());
        }
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        replace_file(&self.path, text.as_bytes())?;
        self.written = Some(text);
        Ok(())
    }
}

fn render(pods: &[PodReport], host: &[IpAddr]) -> String {
    let mut text = String::from("# Written by strata-agent; changes are overwritten.\n");
    for pod in pods {
        text.push_str("---\n");
        // Serialising a JSON value to YAML cannot fail: it has no exotic types.
        text.push_str(&serde_saphyr::to_string(&object(pod, host)).unwrap_or_default());
        if !text.ends_with('\n') {
            text.push('\n');
        }
    }
    text
}

fn object(pod: &PodReport, host: &[IpAddr]) -> Value {
    let mut metadata = json!({"name": pod.name, "namespace": pod.namespace});
    if pod.enrolled {
        metadata["annotations"] = json!({REDIRECTION: "enabled"});
    }
    let condition = |kind: &str| json!({"type": kind, "status": "True"});
    let mut conditions: Vec<Value> = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(condition).into();
    if let Some(problem) = &pod.problem {
        conditions.push(json!({
            "type": "strata.io/MeshCapture", "status": "False", "reason": "CaptureFailed", "message": problem,
        }));
    }
    let mut status = json!({
        "phase": "Running",
        "podIP": pod.ips.first(),
        "podIPs": pod.ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>(),
        "conditions": conditions,
    });
    if let Some(first) = host.first() {
        status["hostIP"] = json!(first);
        status["hostIPs"] = json!(host.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>());
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status})
}

#[cfg(test)]
mod tests {
    use compat_objects::HasMeta as _;
    use compat_objects::source::DirectorySource;

    use super::*;

    #[test]
    fn the_file_overlays_the_pods_objects() {
        let (objects, status) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop, labels: {app: a}}\nspec: {nodeName: n1, containers: [{name: c}]}\n";
        std::fs::write(objects.path().join("pod.yaml"), pod).unwrap();
        let mut file = StatusFile::new(status.path(), "n1");
        let ips: Vec<IpAddr> = vec!["10.1.0.5".parse().unwrap(), "fd01::5".parse().unwrap()];
        let host: Vec<IpAddr> = vec!["192.0.2.1".parse().unwrap()];
        let mut report = PodReport {
            namespace: "shop".into(),
            name: "a".into(),
            uid: String::new(),
            ips,
            enrolled: true,
            problem: None,
        };
        file.write(std::slice::from_ref(&report), &host).unwrap();
        let mut source = DirectorySource::new(vec![objects.path().into(), status.path().into()]);
        let snapshot = source.load();
        assert_eq!(snapshot.faults, []);
        let read = snapshot.objects.pod("shop", "a").unwrap();
        assert_eq!((read.label("app"), read.annotation(REDIRECTION)), (Some("a"), Some("enabled")));
        let status_read = read.status.as_ref().unwrap();
        assert_eq!(status_read.pod_ips.as_ref().unwrap()[1].ip, "fd01::5");
        assert_eq!(status_read.host_ip.as_deref(), Some("192.0.2.1"));

        (report.enrolled, report.problem) = (false, Some("proxy: no".into()));
        file.write(&[report], &host).unwrap();
        let snapshot = source.load();
        let read = snapshot.objects.pod("shop", "a").unwrap();
        assert_eq!(read.annotation(REDIRECTION), None);
        let conditions = read.status.as_ref().unwrap().conditions.as_ref().unwrap();
        assert_eq!(conditions.last().unwrap().message.as_deref(), Some("proxy: no"));
    }
}
