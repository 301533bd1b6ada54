//! What the container runtime's CNI library (libcni) keeps of every ADD, one JSON file an attachment, in
//! `/var/lib/cni/results`: whose each pod's namespace is, whichever plugin made the device.
use std::path::{Path, PathBuf};

use l4_cni::protocol::AttachmentId;
use serde::Deserialize;

/// Of a file: what says whose an attachment is. Field names are libcni's (`cachedInfo`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cached {
    kind: String,
    container_id: String,
    if_name: String,
    netns: PathBuf,
    #[serde(default)]
    cni_args: Vec<(String, String)>,
}

/// An attachment the runtime remembers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CniResult {
    pub(crate) attachment: AttachmentId,
    pub(crate) netns: PathBuf,
    /// Kubernetes' uid of the pod.
    pub(crate) uid: String,
}

/// Every attachment of a pod that the folder tells of; files of other kinds and versions are passed over.
pub(crate) fn read(folder: &Path) -> Vec<CniResult> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::warn!(folder = %folder.display(), %error, "pods that ran before cannot be looked for there");
            return Vec::new();
        }
    };
    let texts = entries.flatten().filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    let mut results: Vec<CniResult> = texts.filter_map(|text| parse(&text)).collect();
    results.sort_by(|a, b| a.attachment.cmp(&b.attachment));
    results
}

fn parse(text: &str) -> Option<CniResult> {
    let cached: Cached = serde_json::from_str(text).ok()?;
    let (_, uid) = cached.cni_args.into_iter().find(|(name, _)| name == "K8S_POD_UID")?;
    let attachment = AttachmentId { container_id: cached.container_id, ifname: cached.if_name };
    // Runtimes add every pod's loopback by the same library, and meta-plugins further devices; a pod's own is eth0 (CRI).
    let is_pods = cached.kind == "cniCacheV1" && attachment.ifname == "eth0";
    is_pods.then_some(CniResult { attachment, netns: cached.netns, uid })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_libcni_writes() {
        let file = |ifname: &str| {
            format!(
                r#"{{"kind":"cniCacheV1","containerId":"0a","config":"e30=","ifName":"{ifname}","networkName":"ptp",
                "netns":"/var/run/netns/cni-1","cniArgs":[["IgnoreUnknown","1"],["K8S_POD_UID","u-1"]],"result":{{}}}}"#
            )
        };
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in
            [("ptp-0a-eth0", file("eth0")), ("net-0a-net1", file("net1")), ("old", r#"{"ips":[]}"#.into())]
        {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let attachment = AttachmentId { container_id: "0a".into(), ifname: "eth0".into() };
        let expected = CniResult { attachment, netns: "/var/run/netns/cni-1".into(), uid: "u-1".into() };
        assert_eq!(read(folder.path()), [expected]);
        assert!(read(&folder.path().join("none")).is_empty());
    }
}
