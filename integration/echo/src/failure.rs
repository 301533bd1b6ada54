//! Names for what went wrong, as a user of socket calls knows them.
use std::io;

/// The errno's symbolic name (errno(3)); the kind's name where the error has no errno.
pub(crate) fn name(error: &io::Error) -> String {
    let known = match error.raw_os_error() {
        Some(libc::EPERM) => "EPERM",
        Some(libc::EACCES) => "EACCES",
        Some(libc::ECONNREFUSED) => "ECONNREFUSED",
        Some(libc::ECONNRESET) => "ECONNRESET",
        Some(libc::ECONNABORTED) => "ECONNABORTED",
        Some(libc::ETIMEDOUT) => "ETIMEDOUT",
        Some(libc::EHOSTUNREACH) => "EHOSTUNREACH",
        Some(libc::ENETUNREACH) => "ENETUNREACH",
        Some(libc::EPIPE) => "EPIPE",
        Some(libc::EINVAL) => "EINVAL",
        Some(libc::EADDRNOTAVAIL) => "EADDRNOTAVAIL",
        Some(libc::EADDRINUSE) => "EADDRINUSE",
        Some(other) => return format!("errno {other}"),
        None => return format!("{:?}", error.kind()),
    };
    known.to_owned()
}

/// The name of the innermost I/O error in a chain of causes, or the outermost error's text.
pub(crate) fn name_of(error: &(dyn std::error::Error + 'static)) -> String {
    let mut next = Some(error);
    let mut found = None;
    while let Some(error) = next {
        // An I/O error's source() leaves out the error it wraps; get_ref() has it.
        let io = error.downcast_ref::<io::Error>();
        found = io.map(name).or(found);
        let wrapped = io.and_then(io::Error::get_ref).map(|inner| inner as &(dyn std::error::Error + 'static));
        next = wrapped.or_else(|| error.source());
    }
    found.unwrap_or_else(|| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_has_its_name_wherever_it_hides() {
        let inner = io::Error::from_raw_os_error(libc::ECONNREFUSED);
        assert_eq!(name(&inner), "ECONNREFUSED");
        let outer = io::Error::other(inner);
        assert_eq!(name_of(&outer), "ECONNREFUSED");
        assert_eq!(name_of(&io::Error::from(io::ErrorKind::UnexpectedEof)), "UnexpectedEof");
    }
}
