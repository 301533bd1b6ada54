//! Loads, pins, attaches and replaces the kernel programs and owns typed map handles: the only user of aya.
//!
//! Everything hangs on pins below `<bpffs>/v<ABI_VERSION>/`: maps by name, links in `links/`. So programs, maps and
//! connections outlive the agent; a new agent's [`Datapath::load`] reuses the maps (after comparing their shape) and
//! replaces the programs under the cgroup links in place. Links of pods are replaced by calling [`Datapath::attach_pod`]
//! and [`Datapath::attach_sk_lookup`] again for each pod; both are idempotent.
//!
//! This crate decides nothing: what goes into the maps is the agent's, what the programs make of it is
//! `strata-bpf-core`'s.
mod error;
mod events;
mod features;
mod filters;
mod links;
mod maps;
mod object;
mod sys;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

pub use error::Error;
pub use events::Events;
pub use features::Features;
pub use links::PodLinks;
pub use maps::{Changes, Config, Counters, Listeners, Maps, Table};
pub use object::object_bytes;
use strata_abi::ABI_VERSION;

use crate::links::{CGROUP_HOOKS, Links, Target};

/// Where a node's datapath lives.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Folder on a BPF file system; created if missing. Two nodes on one machine have two.
    pub bpffs: PathBuf,
    /// cgroup v2 folder: sockets of processes at or below it meet the connect hooks.
    pub cgroup: PathBuf,
    /// What of the kernel to use; `None`: all it has.
    pub features: Option<Features>,
}

/// What [`Datapath::attach_pod`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodAttach {
    pub pod_index: u32,
    /// Host-side interface of the pod, in the namespace the caller runs in.
    pub ifindex: u32,
}

/// What [`Datapath::attach_sk_lookup`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodLookup {
    pub pod_index: u32,
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
    pub netns_cookie: u64,
    pub security_id: u32,
}

/// The loaded datapath of one node. Dropping it detaches nothing: everything is pinned.
#[derive(Debug)]
pub struct Datapath {
    dir: PathBuf,
    features: Features,
    programs: object::Programs,
    links: Links,
    maps: Maps,
}

impl Datapath {
    /// Loads the programs, pins or reuses the maps, attaches or replaces the cgroup hooks.
    ///
    /// # Errors
    /// [`Error::NotBpffs`], [`Error::MapShape`] (another build's maps are pinned), [`Error::Program`] with the
    /// verifier's log, [`Error::Attach`]. After an error what was attached before is still attached and consistent.
    pub fn load(options: &LoadOptions) -> Result<Datapath, Error> {
        let dir = version_dir(&options.bpffs);
        let links_dir = dir.join("links");
        std::fs::create_dir_all(&links_dir).map_err(|source| Error::Path {
            action: "create",
            path: links_dir.clone(),
            source,
        })?;
        if !is_bpffs(&dir)? {
            return Err(Error::NotBpffs { path: options.bpffs.clone() });
        }
        let errno = match options.features {
            Some(features) => features.errno,
            None => features::errno()?,
        };
        let programs = object::load_all(&dir, errno)?;
        let tcx = match options.features {
            Some(features) => features.tcx,
            None => features::tcx(programs.get("from_pod")?),
        };
        let features = Features { errno, tcx };
        tracing::info!(?features, "programs loaded");
        let maps = Maps::open(&dir)?;
        let datapath = Datapath { dir, features, programs, links: Links::new(links_dir), maps };
        datapath.attach_cgroup(&options.cgroup)?;
        Ok(datapath)
    }

    fn attach_cgroup(&self, cgroup: &Path) -> Result<(), Error> {
        let fail = |source| Error::Path { action: "open the cgroup", path: cgroup.into(), source };
        let folder = std::fs::File::open(cgroup).map_err(fail)?;
        let id = cgroup_id(cgroup)?;
        for (name, attach_type) in CGROUP_HOOKS {
            let program = self.programs.get(name)?;
            self.links.ensure(name, program, attach_type, Target::Cgroup { folder: folder.as_fd(), id })?;
        }
        Ok(())
    }

    /// What of the kernel is used.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The maps.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Attaches `from_pod` and `to_pod` to the pod's host-side interface, or replaces what is attached by this
    /// build's programs. Fill `PODS_BY_IFINDEX` first: an interface it does not know drops everything.
    pub fn attach_pod(&self, pod: &PodAttach) -> Result<(), Error> {
        links::POD_HOOKS.into_iter().try_for_each(|hook| {
            let program = self.programs.get(hook.0)?;
            self.links.ensure_at_pod(hook, program, (pod.pod_index, pod.ifindex), self.features.tcx)
        })
    }

    /// Attaches the pod's own instance of `sk_lookup` to its network namespace, or replaces it in place.
    /// From then on new TCP connections to or looped back in the namespace are the proxy's: fill `LISTENERS` first.
    pub fn attach_sk_lookup(&self, pod: &PodLookup, netns: BorrowedFd<'_>) -> Result<(), Error> {
        let program = object::load_sk_lookup(&self.dir, pod, self.features.errno)?;
        let name = links::pod_link("sk_lookup", pod.pod_index);
        self.links.ensure(&name, program.as_fd(), links::SK_LOOKUP, Target::netns(netns)?)
    }

    /// Detaches a pod's `sk_lookup`; false if there was none. Connections already handed over go on.
    pub fn detach_sk_lookup(&self, pod_index: u32) -> Result<bool, Error> {
        self.links.remove(&links::pod_link("sk_lookup", pod_index))
    }

    /// Detaches everything of a pod, in the namespace its interface is in; false if there was nothing.
    pub fn detach_pod(&self, pod_index: u32) -> Result<bool, Error> {
        let mut found = self.detach_sk_lookup(pod_index)?;
        for (program, _) in links::POD_HOOKS {
            found |= self.links.remove_at_pod(program, pod_index)?;
        }
        Ok(found)
    }

    /// Which links of which pods are pinned: what a restarted agent compares with its pods.
    pub fn attached(&self) -> Result<BTreeMap<u32, PodLinks>, Error> {
        self.links.pods()
    }

    /// Opens the flow events; call inside a tokio runtime, once.
    pub fn events(&self) -> Result<Events, Error> {
        Events::open(&self.dir)
    }

    /// Instructions the verifier went through for each program, by name.
    pub fn instruction_counts(&self) -> &BTreeMap<String, u32> {
        self.programs.instruction_counts()
    }

    /// A loaded program, for test runs.
    pub fn program(&self, name: &str) -> Result<BorrowedFd<'_>, Error> {
        self.programs.get(name)
    }
}

/// The folder of pins of this ABI below `bpffs`.
pub fn version_dir(bpffs: &Path) -> PathBuf {
    bpffs.join(format!("v{ABI_VERSION}"))
}

/// Removes every pin below `bpffs`, and so every program and map nothing else holds; filters of pods' interfaces are taken
/// away first, in the namespace this runs in. Missing is fine.
pub fn unload(bpffs: &Path) -> Result<(), Error> {
    filters::detach_all(&version_dir(bpffs).join("links"));
    match std::fs::remove_dir_all(bpffs) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Path { action: "remove", path: bpffs.into(), source })
        }
        _ => Ok(()),
    }
}

/// The id by which the kernel programs know a cgroup v2 folder (`bpf_get_current_cgroup_id`): its inode number.
pub fn cgroup_id(cgroup: &Path) -> Result<u64, Error> {
    use std::os::unix::fs::MetadataExt;
    let metadata =
        std::fs::metadata(cgroup).map_err(|source| Error::Path { action: "stat", path: cgroup.into(), source })?;
    Ok(metadata.ino())
}

/// Mounts a BPF file system at `/sys/fs/bpf` unless one is there.
pub fn ensure_bpffs() -> Result<(), Error> {
    let path = Path::new("/sys/fs/bpf");
    if is_bpffs(path)? {
        return Ok(());
    }
    nix::mount::mount(Some("bpf"), path, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>)
        .map_err(|errno| Error::Path { action: "mount a BPF file system at", path: path.into(), source: errno.into() })
}

/// The cookie of a network namespace (`SO_NETNS_COOKIE`), by a socket opened inside it.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> Result<u64, Error> {
    use std::os::fd::AsRawFd;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `length` are live and of the size said.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &mut length,
        )
    };
    if result == 0 {
        return Ok(cookie);
    }
    let source = std::io::Error::last_os_error();
    Err(Error::Path { action: "read SO_NETNS_COOKIE of", path: "socket".into(), source })
}

fn is_bpffs(path: &Path) -> Result<bool, Error> {
    let stat = nix::sys::statfs::statfs(path).map_err(|errno| Error::Path {
        action: "statfs",
        path: path.into(),
        source: errno.into(),
    })?;
    Ok(stat.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}
