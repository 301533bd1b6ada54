//! What the agent must know after a restart: the pods it wired, and the numbers it gave.
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use l4_cni::protocol::{AttachmentId, PodName};
use l4_policy::IdentityAllocator;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ipam::{Lease, Positions};

/// Why the state cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Malformed { path: PathBuf, source: serde_json::Error },
    #[error("{}: another agent runs on this run folder", path.display())]
    Locked { path: PathBuf },
}

/// A wired pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodState {
    pub(crate) attachment: AttachmentId,
    pub(crate) pod: PodName,
    pub(crate) netns: PathBuf,
    /// Device and inode of the namespace: its path may name another one later.
    pub(crate) netns_id: (u64, u64),
    /// What the kernel programs know the namespace by.
    pub(crate) netns_cookie: u64,
    pub(crate) lease: Lease,
    /// Node-local number, never given twice.
    pub(crate) pod_index: u32,
    pub(crate) host_device: String,
    /// 0 until the device is made.
    pub(crate) ifindex: u32,
    /// Another plugin made the device and gave the addresses.
    #[serde(default)]
    pub(crate) chained: bool,
    /// Capture is in force.
    #[serde(default)]
    pub(crate) enrolled: bool,
    /// As the objects said last: a new agent may have to tell a proxy before it knows them.
    #[serde(default)]
    pub(crate) service_account: Option<String>,
}

impl PodState {
    /// The uid the mesh knows the pod by.
    pub(crate) fn uid(&self) -> String {
        l4_policy::pod_uid(&self.pod.namespace, &self.pod.name)
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.lease.addresses()
    }
}

/// Content of `pods.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registry {
    /// Namespaces and devices do not survive a reboot.
    pub(crate) boot_id: String,
    pub(crate) last_pod_index: u32,
    pub(crate) positions: Positions,
    pub(crate) pods: Vec<PodState>,
}

/// The folder, locked for this process.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    _lock: nix::fcntl::Flock<File>,
}

impl StateDir {
    /// Opens (and makes) the folder and locks it.
    ///
    /// # Errors
    /// [`StateError::Locked`] if another process has it.
    pub(crate) fn open(path: &Path) -> Result<StateDir, StateError> {
        let io = |source| StateError::Io { path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(io)?;
        let lock = OpenOptions::new().create(true).write(true).truncate(false).open(path.join("lock")).map_err(io)?;
        let lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock);
        let lock = lock.map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => StateError::Locked { path: path.to_owned() },
            errno => io(errno.into()),
        })?;
        Ok(StateDir { path: path.to_owned(), _lock: lock })
    }

    /// The pods of this boot; none after a reboot.
    ///
    /// # Errors
    /// If the file is there and cannot be read: guessing would give addresses twice.
    pub(crate) fn registry(&self) -> Result<Registry, StateError> {
        let boot_id = boot_id();
        let stored: Registry = self.load("pods.json")?.unwrap_or_default();
        if stored.boot_id == boot_id {
            return Ok(stored);
        }
        Ok(Registry { boot_id, last_pod_index: stored.last_pod_index, positions: stored.positions, pods: Vec::new() })
    }

    /// # Errors
    /// If the file cannot be written; the old one is then still there.
    pub(crate) fn save_registry(&self, registry: &Registry) -> Result<(), StateError> {
        self.save("pods.json", registry)
    }

    /// Numbers of identities and rules given before. An unreadable file costs only their stability.
    pub(crate) fn identities(&self) -> IdentityAllocator {
        self.load("identities.json")
            .unwrap_or_else(|error| {
                tracing::warn!(%error, "identities are numbered anew");
                None
            })
            .unwrap_or_default()
    }

    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn save_identities(&self, text: &str) -> Result<(), StateError> {
        self.replace("identities.json", text.as_bytes())
    }

    fn load<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let path = self.path.join(name);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StateError::Io { path, source }),
        };
        serde_json::from_str(&text).map(Some).map_err(|source| StateError::Malformed { path, source })
    }

    fn save<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StateError> {
        let text = serde_json::to_vec_pretty(value)
            .map_err(|source| StateError::Malformed { path: self.path.join(name), source })?;
        self.replace(name, &text)
    }

    fn replace(&self, name: &str, content: &[u8]) -> Result<(), StateError> {
        let path = self.path.join(name);
        replace_file(&path, content).map_err(|source| StateError::Io { path, source })
    }
}

/// Replaces a file at once and durably: readers see the old or the new content, never a part.
pub(crate) fn replace_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    // Hidden, so that whoever reads the folder meanwhile leaves it out.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_data()?;
    std::fs::rename(&temporary, path)
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(index: u32) -> PodState {
        PodState {
            attachment: AttachmentId { container_id: format!("c{index}"), ifname: "eth0".into() },
            pod: PodName { namespace: "shop".into(), name: format!("p{index}"), uid: "u".into() },
            netns: "/run/netns/x".into(),
            netns_id: (4, u64::MAX),
            netns_cookie: u64::MAX,
            lease: Lease { v4: Some([10, 1, 0, 2].into()), v6: None },
            pod_index: index,
            host_device: "st1".into(),
            ifindex: 7,
            chained: false,
            enrolled: true,
            service_account: Some("web".into()),
        }
    }

    #[test]
    fn pods_survive_a_restart_and_not_a_reboot() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        let registry = Registry { last_pod_index: 9, pods: vec![pod(9)], ..state.registry().unwrap() };
        state.save_registry(&registry).unwrap();
        assert_eq!(state.registry().unwrap(), registry);
        state.save_registry(&Registry { boot_id: "another".into(), ..registry }).unwrap();
        let after = state.registry().unwrap();
        assert_eq!((after.pods.len(), after.last_pod_index), (0, 9));
    }

    #[test]
    fn one_agent_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let first = StateDir::open(folder.path()).unwrap();
        assert!(matches!(StateDir::open(folder.path()), Err(StateError::Locked { .. })));
        drop(first);
        StateDir::open(folder.path()).unwrap();
    }

    #[test]
    fn a_damaged_registry_is_not_guessed() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("pods.json"), "{").unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        assert!(matches!(state.registry(), Err(StateError::Malformed { .. })));
        std::fs::write(folder.path().join("identities.json"), "{").unwrap();
        state.identities();
    }
}
