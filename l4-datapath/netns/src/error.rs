//! Errors of this crate.
use std::io;
use std::path::PathBuf;

/// Why a network operation failed; each names what was to be done to what.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A namespace could not be opened, entered, made or removed.
    #[error("network namespace {}: {action}: {source}", path.display())]
    Namespace { action: &'static str, path: PathBuf, source: io::Error },
    /// The path exists and is no network namespace.
    #[error("{} is not a network namespace", path.display())]
    NotANamespace { path: PathBuf },
    /// The kernel refused a netlink request.
    #[error("{action}: {source}")]
    Netlink { action: String, source: io::Error },
    /// No netlink socket could be opened.
    #[error("netlink socket: {0}")]
    Socket(io::Error),
    #[error("no network device named {name}")]
    NoSuchDevice { name: String },
    #[error("sysctl {name}: {source}")]
    Sysctl { name: String, source: io::Error },
    /// The wiring of a pod differs from what was set up.
    #[error("{0}")]
    Broken(String),
}

impl Error {
    /// The kernel's errno, if it was the kernel that refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Namespace { source, .. }
            | Error::Netlink { source, .. }
            | Error::Socket(source)
            | Error::Sysctl { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
