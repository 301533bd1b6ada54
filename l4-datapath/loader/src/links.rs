//! Links: attached once, pinned, and from then on replaced in place.
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::PathBuf,
};

use crate::{
    Error,
    filters::{self, Place},
    sys,
};

/// `enum bpf_attach_type` of the kernel for each cgroup hook. Programs of one hook run in the order they are attached in
/// (Documentation/bpf/cgroup: `BPF_F_ALLOW_MULTI`).
pub(crate) const CGROUP_HOOKS: [(&str, u32); 12] = [
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
    ("dns_connect4", 10),
    ("dns_connect6", 11),
    ("dns_sendmsg4", 14),
    ("dns_sendmsg6", 15),
];
/// tcx ingress and egress of the host-side interface.
pub(crate) const POD_HOOKS: [(&str, u32); 2] = [("to_pod", 47), ("from_pod", TCX_INGRESS)];
pub(crate) const TCX_INGRESS: u32 = 46;
pub(crate) const SK_LOOKUP: u32 = 36;

/// Which links of a pod are pinned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodLinks {
    pub from_pod: bool,
    pub to_pod: bool,
    pub sk_lookup: bool,
    /// The interface `from_pod` sits on; 0 if it is gone.
    pub ifindex: u32,
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'a> {
    Cgroup { folder: BorrowedFd<'a>, id: u64 },
    Interface { ifindex: u32 },
    Namespace { netns: BorrowedFd<'a>, inode: u32 },
}

impl<'a> Target<'a> {
    pub(crate) fn netns(netns: BorrowedFd<'a>) -> Result<Target<'a>, Error> {
        let stat = nix::sys::stat::fstat(netns).map_err(|errno| Error::Path {
            action: "stat",
            path: "network namespace".into(),
            source: errno.into(),
        })?;
        Ok(Target::Namespace { netns, inode: stat.st_ino as u32 })
    }

    fn number(&self) -> u32 {
        match self {
            Target::Cgroup { folder: fd, .. } | Target::Namespace { netns: fd, .. } => fd.as_raw_fd() as u32,
            Target::Interface { ifindex } => *ifindex,
        }
    }

    /// Whether a link found under a pin still hangs on this target: the target may have been removed (then the
    /// kernel reports 0) or made anew.
    fn holds(&self, info: &sys::LinkInfo) -> bool {
        match self {
            Target::Cgroup { id, .. } => info.cgroup_id() == *id,
            Target::Interface { ifindex } => info.ifindex_or_netns() == *ifindex,
            Target::Namespace { inode, .. } => info.ifindex_or_netns() == *inode,
        }
    }
}

impl std::fmt::Display for Target<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Cgroup { id, .. } => write!(f, "cgroup {id}"),
            Target::Interface { ifindex } => write!(f, "interface {ifindex}"),
            Target::Namespace { inode, .. } => write!(f, "network namespace {inode}"),
        }
    }
}

/// Name of the pin of a pod's link.
pub(crate) fn pod_link(program: &str, pod_index: u32) -> String {
    format!("{program}_{pod_index}")
}

/// The folder of pinned links.
#[derive(Debug)]
pub(crate) struct Links {
    dir: PathBuf,
}

impl Links {
    pub(crate) fn new(dir: PathBuf) -> Links {
        Links { dir }
    }

    /// After this, `program` runs at `target` and the link is pinned as `name`.
    pub(crate) fn ensure(
        &self,
        name: &str,
        program: BorrowedFd<'_>,
        attach_type: u32,
        target: Target<'_>,
    ) -> Result<(), Error> {
        let fail = |action, source| Error::Attach { program: name.into(), action, target: target.to_string(), source };
        let path = self.dir.join(name);
        match sys::obj_get(&path) {
            Ok(link) => {
                let info = sys::link_info(link.as_fd()).map_err(|e| fail("read the link at", e))?;
                if target.holds(&info) {
                    return sys::link_update(link.as_fd(), program).map_err(|e| fail("replace at", e));
                }
                std::fs::remove_file(&path).map_err(|e| fail("unpin the stale link of", e))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fail("open the pinned link at", error)),
        }
        let link = sys::link_create(program, target.number(), attach_type).map_err(|e| fail("attach to", e))?;
        sys::obj_pin(link.as_fd(), &path).map_err(|e| fail("pin the link at", e))
    }

    /// After this, `program` runs at a pod's interface: by a link, or by a filter where the kernel has none.
    pub(crate) fn ensure_at_pod(
        &self,
        (name, attach_type): (&str, u32),
        program: BorrowedFd<'_>,
        (pod_index, ifindex): (u32, u32),
        tcx: bool,
    ) -> Result<(), Error> {
        if tcx {
            return self.ensure(&pod_link(name, pod_index), program, attach_type, Target::Interface { ifindex });
        }
        filters::ensure(&self.dir, Place { program: name, ifindex, pod_index }, program)
    }

    /// The reverse of [`Links::ensure_at_pod`], whichever way it was; false if there was nothing.
    pub(crate) fn remove_at_pod(&self, program: &str, pod_index: u32) -> Result<bool, Error> {
        Ok(self.remove(&pod_link(program, pod_index))? | filters::remove(&self.dir, program, pod_index)?)
    }

    /// Detaches and unpins; false if there was no such link.
    pub(crate) fn remove(&self, name: &str) -> Result<bool, Error> {
        let path = self.dir.join(name);
        match sys::obj_get(&path) {
            Ok(link) => sys::link_detach(link.as_fd()).map_err(|source| Error::Path {
                action: "detach the link",
                path: path.clone(),
                source,
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(Error::Path { action: "open the pinned link", path, source }),
        }
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Error::Path { action: "unpin", path, source }),
        }
    }

    /// Links of pods by pod index.
    pub(crate) fn pods(&self) -> Result<BTreeMap<u32, PodLinks>, Error> {
        let fail = |source| Error::Path { action: "list", path: self.dir.clone(), source };
        let mut pods: BTreeMap<u32, PodLinks> = BTreeMap::new();
        for entry in std::fs::read_dir(&self.dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name();
            if let Some(place) = name.to_str().and_then(Place::read) {
                let links = pods.entry(place.pod_index).or_default();
                match place.program {
                    "from_pod" => {
                        links.from_pod = true;
                        links.ifindex = place.interface().map_or(0, |_| place.ifindex);
                    }
                    "to_pod" => links.to_pod = true,
                    _ => {}
                }
                continue;
            }
            let Some((program, index)) = name.to_str().and_then(|n| n.rsplit_once('_')) else { continue };
            let Ok(index) = index.parse::<u32>() else { continue };
            let links = pods.entry(index).or_default();
            match program {
                "from_pod" => {
                    links.from_pod = true;
                    let link = sys::obj_get(&entry.path()).map_err(fail)?;
                    links.ifindex = sys::link_info(link.as_fd()).map_err(fail)?.ifindex_or_netns();
                }
                "to_pod" => links.to_pod = true,
                "sk_lookup" => links.sk_lookup = true,
                _ => {}
            }
        }
        Ok(pods)
    }
}
