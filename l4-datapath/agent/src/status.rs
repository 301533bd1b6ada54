//! The status folder's file of this node: what the API server's status subresource is in a cluster.
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::state::replace_file;

/// Set exactly while capture is in force; istiod and strata-control read it.
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// What is reported of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodReport {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) enrolled: bool,
    /// Why it is not in the mesh although it should be.
    pub(crate) problem: Option<String>,
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
        let mut report = PodReport { namespace: "shop".into(), name: "a".into(), ips, enrolled: true, problem: None };
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
