//! Kernel settings below `/proc/sys/net`, of the namespace the calling thread is in.
use std::io;

use crate::Error;

/// Reads a setting named with slashes: `ipv4/ip_forward`.
///
/// # Errors
/// If the kernel has no such setting.
pub fn get(name: &str) -> Result<String, Error> {
    let path = format!("/proc/sys/net/{name}");
    let text = std::fs::read_to_string(path).map_err(|source| Error::Sysctl { name: name.to_owned(), source })?;
    Ok(text.trim().to_owned())
}

/// Writes a setting unless it has the value already (which also spares containers with a read-only `/proc/sys`).
///
/// # Errors
/// If the kernel has no such setting or refuses the value.
pub fn set(name: &str, value: &str) -> Result<(), Error> {
    if get(name)? == value {
        return Ok(());
    }
    let path = format!("/proc/sys/net/{name}");
    std::fs::write(path, value).map_err(|source| Error::Sysctl { name: name.to_owned(), source })
}

/// As [`set`], but a kernel without the setting (built without IPv6) is fine.
pub(crate) fn set_if_present(name: &str, value: &str) -> Result<(), Error> {
    match set(name, value) {
        Err(Error::Sysctl { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
