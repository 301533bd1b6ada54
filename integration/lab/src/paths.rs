//! Where a lab keeps its things, and the description the CLI reads.
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Doing;
use crate::{LabError, Result, sys};

/// Folder of all labs.
pub(crate) const ROOT: &str = "/run/strata-lab";

/// Everything of one lab is below these or starts with these names.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    pub id: String,
    /// Run folder: sockets, logs, state.
    pub root: PathBuf,
    pub cgroup: PathBuf,
    pub bpffs: PathBuf,
}

impl Paths {
    pub(crate) fn new(id: &str) -> Result<Paths> {
        if id.is_empty() || id.len() > 20 || !id.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()) {
            return Err(LabError::other(format!("{id:?}: a mesh's name has lower-case letters and digits only")));
        }
        Ok(Paths {
            id: id.to_owned(),
            root: Path::new(ROOT).join(id),
            cgroup: sys::cgroup_root()?.join(format!("strata-lab-{id}")),
            bpffs: Path::new("/sys/fs/bpf").join(format!("strata-lab-{id}")),
        })
    }

    /// Name of a network namespace of this lab.
    pub(crate) fn netns_name(&self, what: &str) -> String {
        format!("strata-{}-{what}", self.id)
    }

    pub(crate) fn netns(&self, what: &str) -> PathBuf {
        Path::new("/run/netns").join(self.netns_name(what))
    }

    pub(crate) fn pod_netns(&self, namespace: &str, name: &str) -> String {
        format!("pod-{namespace}-{name}")
    }

    pub(crate) fn run_dir(&self, node: &str) -> PathBuf {
        self.root.join(node)
    }

    pub(crate) fn control_dir(&self) -> PathBuf {
        self.root.join("control")
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.control_dir().join("state")
    }

    pub(crate) fn status_dir(&self) -> PathBuf {
        self.root.join("status")
    }

    pub(crate) fn edits_dir(&self) -> PathBuf {
        self.root.join("edits")
    }

    pub(crate) fn log(&self, process: &str) -> PathBuf {
        self.root.join("logs").join(format!("{process}.log"))
    }

    pub(crate) fn pod_dir(&self, namespace: &str, name: &str) -> PathBuf {
        self.root.join("pods").join(format!("{namespace}-{name}"))
    }

    pub(crate) fn node_cgroup(&self, node: &str) -> PathBuf {
        self.cgroup.join(node)
    }

    pub(crate) fn pod_cgroup(&self, node: &str, namespace: &str, name: &str) -> PathBuf {
        self.node_cgroup(node).join("pods").join(format!("{namespace}_{name}"))
    }

    pub(crate) fn lock_file(id: &str) -> PathBuf {
        Path::new(ROOT).join(format!("{id}.lock"))
    }
}

/// `lab.json`: where the processes of a running mesh can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    pub id: String,
    pub pid: u32,
    /// The folders of objects, earliest first; the last is the status folder.
    pub sources: Vec<PathBuf>,
    pub nodes: Vec<NodeDescription>,
    /// Admin socket of strata-control.
    pub control: PathBuf,
    /// Below it, one folder per pod; a waypoint has its admin socket `proxy.sock` there.
    pub pods: PathBuf,
    pub logs: PathBuf,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDescription {
    pub name: String,
    pub netns: PathBuf,
    /// Admin sockets.
    pub agent: PathBuf,
    pub proxy: PathBuf,
    pub cgroup: PathBuf,
    pub bpffs: PathBuf,
}

impl Description {
    /// Admin sockets of the waypoints that run, by `namespace-name` of their pods.
    #[must_use]
    pub fn waypoints(&self) -> Vec<(String, PathBuf)> {
        let Ok(folders) = fs::read_dir(&self.pods) else { return Vec::new() };
        let socket = |folder: fs::DirEntry| {
            let socket = folder.path().join("proxy.sock");
            socket.exists().then(|| (folder.file_name().to_string_lossy().into_owned(), socket))
        };
        let mut found: Vec<_> = folders.flatten().filter_map(socket).collect();
        found.sort();
        found
    }
}

/// The meshes that run on this machine.
///
/// # Errors
/// If the folder of labs exists but cannot be read.
pub fn running() -> Result<Vec<Description>> {
    let folders = match fs::read_dir(ROOT) {
        Ok(folders) => folders,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).doing(ROOT),
    };
    let read = |folder: fs::DirEntry| {
        let text = fs::read_to_string(folder.path().join("lab.json")).ok()?;
        let lab: Description = serde_json::from_str(&text).ok()?;
        Path::new("/proc").join(lab.pid.to_string()).exists().then_some(lab)
    };
    Ok(folders.flatten().filter_map(read).collect())
}
