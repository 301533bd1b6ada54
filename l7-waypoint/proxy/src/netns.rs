//! Work inside another network namespace.
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sched::{CloneFlags, setns};

/// A network namespace held open.
#[derive(Debug, Clone)]
pub(crate) struct Netns {
    inside: Arc<OwnedFd>,
    /// The process's own, to return to.
    home: Arc<OwnedFd>,
}

/// The namespace this thread is in.
pub(crate) fn current() -> io::Result<Arc<OwnedFd>> {
    Ok(Arc::new(File::open("/proc/thread-self/ns/net")?.into()))
}

impl Netns {
    pub(crate) fn new(inside: OwnedFd, home: Arc<OwnedFd>) -> Netns {
        Netns { inside: Arc::new(inside), home }
    }

    /// Whether both are the same namespace.
    pub(crate) fn is(&self, other: &Netns) -> bool {
        let inode = |netns: &Netns| nix::sys::stat::fstat(netns.inside.as_fd()).map(|stat| (stat.st_dev, stat.st_ino));
        matches!((inode(self), inode(other)), (Ok(one), Ok(two)) if one == two)
    }

    /// Runs `work` (which must not block: it is for making sockets) inside the namespace on this thread.
    ///
    /// # Errors
    /// If the namespace cannot be entered, or what `work` returns.
    pub(crate) fn run<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        setns(self.inside.as_fd(), CloneFlags::CLONE_NEWNET)?;
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        if let Err(error) = setns(self.home.as_fd(), CloneFlags::CLONE_NEWNET) {
            // Going on would send this thread's other connections out of a pod that is not theirs.
            tracing::error!(%error, "cannot return to the own network namespace");
            std::process::abort();
        }
        match outcome {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Runs `work` inside the namespace on a thread of its own.
    ///
    /// # Errors
    /// If the thread or the namespace is not to be had, or what `work` returns.
    pub(crate) fn run_on_thread<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
                setns(self.inside.as_fd(), CloneFlags::CLONE_NEWNET)
                    .map_err(|error| io::Error::other(format!("entering the network namespace: {error}")))?;
                work()
            })?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside the namespace panicked")))
        })
    }
}
