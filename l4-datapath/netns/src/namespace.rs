//! Opening, identifying, entering and making network namespaces.
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};

use crate::Error;

/// Identifies a namespace while it lives: device and inode of its nsfs file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsId {
    pub device: u64,
    pub inode: u64,
}

/// Opens a namespace by path (`/run/netns/NAME`, `/proc/PID/ns/net`). The descriptor keeps it alive.
///
/// # Errors
/// [`Error::Namespace`] if there is nothing, [`Error::NotANamespace`] if it is something else.
pub fn open(path: &Path) -> Result<OwnedFd, Error> {
    let file = File::open(path).map_err(|source| Error::Namespace { action: "open", path: path.to_owned(), source })?;
    let fail = |errno: nix::Error| Error::Namespace { action: "stat", path: path.to_owned(), source: errno.into() };
    let kind = nix::sys::statfs::fstatfs(&file).map_err(fail)?.filesystem_type();
    // A namespace of another kind (mount, pid) is on nsfs as well; only NS_GET_NSTYPE tells.
    if kind.0 != libc::NSFS_MAGIC as _ || namespace_type(file.as_fd()) != Some(libc::CLONE_NEWNET) {
        return Err(Error::NotANamespace { path: path.to_owned() });
    }
    Ok(file.into())
}

/// `NS_GET_NSTYPE` (ioctl_ns(2)).
fn namespace_type(fd: BorrowedFd<'_>) -> Option<i32> {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: the descriptor is open and this request takes no argument.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    (kind >= 0).then_some(kind)
}

/// The namespace this process runs in.
///
/// # Errors
/// If `/proc` is not mounted.
pub fn current() -> Result<OwnedFd, Error> {
    open(Path::new("/proc/thread-self/ns/net"))
}

/// Device and inode of an open namespace.
///
/// # Errors
/// If the descriptor cannot be examined.
pub fn id_of(netns: BorrowedFd<'_>) -> Result<NetnsId, Error> {
    let stat = nix::sys::stat::fstat(netns).map_err(|errno| Error::Namespace {
        action: "stat",
        path: fd_path(netns),
        source: errno.into(),
    })?;
    Ok(NetnsId { device: stat.st_dev, inode: stat.st_ino })
}

/// The namespace's cookie (`SO_NETNS_COOKIE`): what the kernel programs know it by. Never reused until reboot.
///
/// # Errors
/// If the namespace cannot be entered.
pub fn cookie_of(netns: BorrowedFd<'_>) -> Result<u64, Error> {
    let fail = |source| Error::Namespace { action: "read the cookie", path: fd_path(netns), source };
    run_in(netns, || {
        let socket = std::net::UdpSocket::bind(("0.0.0.0", 0))?;
        let mut cookie = 0u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        // SAFETY: `cookie` and `length` live through the call and `length` is cookie's size.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_NETNS_COOKIE,
                std::ptr::from_mut(&mut cookie).cast(),
                &mut length,
            )
        };
        if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
    })?
    .map_err(fail)
}

/// Runs `work` on a thread of its own inside `netns`; blocks until it is done. The caller's thread stays where it is.
///
/// Sockets the work opens, and `/proc/sys/net` files it opens, belong to the namespace.
///
/// # Errors
/// If no thread can be started or the namespace cannot be entered.
///
/// # Panics
/// If `work` panics, with its panic.
pub fn run_in<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    let fail = |action, source| Error::Namespace { action, path: fd_path(netns), source };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
            setns(netns, CloneFlags::CLONE_NEWNET).map_err(|errno| fail("enter", errno.into()))?;
            Ok(work())
        });
        match thread.map_err(|source| fail("start a thread for", source))?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn fd_path(netns: BorrowedFd<'_>) -> PathBuf {
    let link = format!("/proc/self/fd/{}", netns.as_raw_fd());
    std::fs::read_link(&link).unwrap_or_else(|_| link.into())
}

/// A namespace bound to a path, as container runtimes make them for pods. Dropping removes it.
#[derive(Debug)]
pub struct PersistentNetns {
    path: PathBuf,
}

impl PersistentNetns {
    /// Makes a new namespace and binds it to `path`; loopback is left down, as the runtimes leave it.
    ///
    /// # Errors
    /// If `path` exists or the kernel refuses.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let fail = |action, source| Error::Namespace { action, path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|source| fail("create the folder", source))?;
        }
        File::create_new(path).map_err(|source| fail("create", source))?;
        let bound = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| fail("unshare", errno.into()))?;
                let flags = nix::mount::MsFlags::MS_BIND;
                nix::mount::mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, flags, None::<&str>)
                    .map_err(|errno| fail("bind", errno.into()))
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        // Made before the check, so that a failed bind removes the empty file as well.
        let netns = Self { path: path.to_owned() };
        bound.map(|()| netns)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PersistentNetns {
    fn drop(&mut self) {
        // Not mounted or already gone: the goal is reached either way.
        let _unmounted = nix::mount::umount2(&self.path, nix::mount::MntFlags::MNT_DETACH);
        let _removed = std::fs::remove_file(&self.path);
    }
}
