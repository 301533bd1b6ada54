//! Where a node proxy runs: its cgroup, by which the kernel programs know its sockets, and its own network namespace.
//!
//! The kernel says who is at the other end of the handoff socket; nothing here is taken on the proxy's word.
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use strata_abi::{MAX_PROXIES, ProxyPlace};

use crate::agent::{Agent, Proxy};

/// Why a proxy cannot be told apart from other processes, and so is not let in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    #[error("its process cannot be seen: the agent must share the node's pid namespace (hostPID)")]
    Invisible,
    #[error("process {pid} is in no cgroup below {}", root.display())]
    NoCgroup { pid: u32, root: PathBuf },
    #[error(transparent)]
    Kernel(#[from] l4_loader::Error),
}

/// Finds the place of the process `pid` in the hierarchy of the cgroup2 folder `cgroup`. `home`: the cookie of its network
/// namespace.
pub(crate) fn locate(pid: Option<u32>, home: u64, cgroup: &Path) -> Result<ProxyPlace, PlaceError> {
    let pid = pid.ok_or(PlaceError::Invisible)?;
    // Also outside of the folder whose sockets this agent's programs see: the guard on packets asks for it all the same.
    let is_cgroup = |folder: &&Path| folder.join("cgroup.procs").exists();
    let root = cgroup.ancestors().take_while(is_cgroup).last().unwrap_or(cgroup);
    let folder = folder_of(pid, root).ok_or_else(|| PlaceError::NoCgroup { pid, root: root.to_owned() })?;
    Ok(ProxyPlace { cgroup: l4_loader::cgroup_id(&folder)?, home })
}

/// The folder whose cgroup.procs lists the process. `/proc/PID/cgroup` would name it relative to a cgroup namespace
/// that need not be the one this mount was made in.
fn folder_of(pid: u32, root: &Path) -> Option<PathBuf> {
    let mut pending = vec![root.to_owned()];
    while let Some(folder) = pending.pop() {
        // A cgroup that goes away meanwhile is not the proxy's.
        let procs = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        if procs.lines().any(|line| line.parse() == Ok(pid)) {
            return Some(folder);
        }
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        pending.extend(entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
    }
    None
}

impl Agent {
    /// From now on the proxy's sockets in pods are left alone.
    ///
    /// # Errors
    /// If the map cannot be written.
    pub(crate) fn admit(&self, place: ProxyPlace) -> Result<(), l4_loader::Error> {
        self.write_proxies(|known| {
            if !known.contains(&place) {
                // The newest first: should there ever be too many, the one that drains longest loses its place.
                known.insert(0, place);
            }
        })
    }

    /// Forgets proxies that are gone. With `patience` those that an earlier agent admitted may still come back, as long
    /// as none has.
    pub(crate) fn forget_gone_proxies(&self, patience: bool) {
        let here: Vec<ProxyPlace> = self.proxy.iter().chain(&self.retired).map(|proxy: &Proxy| proxy.place).collect();
        if here.is_empty() && patience {
            return;
        }
        if let Err(error) = self.write_proxies(|known| known.retain(|place| here.contains(place))) {
            tracing::error!(%error, "a proxy that is gone could not be forgotten");
        }
    }

    /// Queries of meshed pods to these resolvers are the proxy's to answer, wherever it listens for them. So nothing has
    /// to be undone when it goes: its sockets go with it.
    pub(crate) fn lead_queries(&self, resolvers: &[IpAddr]) {
        let wanted = resolvers.iter().map(|ip| (ip.to_canonical().into(), 1)).collect();
        if let Err(error) = self.datapath.maps().resolvers.sync(&wanted) {
            tracing::error!(%error, "the pods' DNS queries go past the proxy");
        }
    }

    fn write_proxies(&self, change: impl FnOnce(&mut Vec<ProxyPlace>)) -> Result<(), l4_loader::Error> {
        let present = self.datapath.maps().config.get()?;
        let mut known: Vec<ProxyPlace> = present.proxies.into_iter().filter(|place| place.cgroup != 0).collect();
        change(&mut known);
        known.resize(MAX_PROXIES, ProxyPlace::default());
        let mut wanted = present;
        wanted.proxies.copy_from_slice(&known);
        if wanted == present { Ok(()) } else { self.datapath.maps().config.set(&wanted) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_nobody_sees_is_refused() {
        let error = locate(None, 1, Path::new("/sys/fs/cgroup")).unwrap_err();
        assert!(error.to_string().contains("hostPID"), "{error}");
    }

    #[test]
    fn the_folder_is_found_by_its_processes() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("kubepods/pod1/container");
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::write(root.path().join("cgroup.procs"), "1\n2\n").unwrap();
        std::fs::write(inner.join("cgroup.procs"), "41\n4242\n").unwrap();
        assert_eq!(folder_of(4242, root.path()), Some(inner));
        assert_eq!(folder_of(42, root.path()), None);
    }
}
