//! Kernel settings below `/proc/sys/net`, of the namespace the calling thread is in.
//!
//! A container that is not privileged sees `/proc/sys` read-only; there the node's folder is mounted at
//! `/host/proc/sys/net`. Whichever path it is opened by, the kernel shows the opening thread's namespace.
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::Error;

/// Reads a setting named with slashes: `ipv4/ip_forward`.
///
/// # Errors
/// If the kernel has no such setting.
pub fn get(name: &str) -> Result<String, Error> {
    let text =
        std::fs::read_to_string(path_of(name)).map_err(|source| Error::Sysctl { name: name.to_owned(), source })?;
    Ok(text.trim().to_owned())
}

/// Writes a setting unless it has the value already.
///
/// # Errors
/// If the kernel has no such setting or refuses the value.
pub fn set(name: &str, value: &str) -> Result<(), Error> {
    if get(name)? == value {
        return Ok(());
    }
    std::fs::write(path_of(name), value).map_err(|source| Error::Sysctl { name: name.to_owned(), source })
}

fn path_of(name: &str) -> PathBuf {
    static FOLDER: OnceLock<&Path> = OnceLock::new();
    let first_present = || {
        let mounted = Path::new("/host/proc/sys/net");
        if mounted.is_dir() { mounted } else { Path::new("/proc/sys/net") }
    };
    FOLDER.get_or_init(first_present).join(name)
}

/// As [`set`], but a kernel without the setting (built without IPv6) is fine.
pub(crate) fn set_if_present(name: &str, value: &str) -> Result<(), Error> {
    match set(name, value) {
        Err(Error::Sysctl { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
