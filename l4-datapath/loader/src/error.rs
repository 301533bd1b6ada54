//! Errors of this crate: each names the map, program or path and carries the kernel's errno.
use std::{io, path::PathBuf};

/// Why a datapath operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation outside the kernel's BPF objects.
    #[error("{action} {}: {source}", path.display())]
    Path { action: &'static str, path: PathBuf, source: io::Error },
    /// The folder for pins is not on a BPF file system.
    #[error("{} is not on a BPF file system; mount one with: mount -t bpf bpf /sys/fs/bpf", path.display())]
    NotBpffs { path: PathBuf },
    /// The kernel refused a map operation.
    #[error("map {map}: {operation}: {source}")]
    Map { map: &'static str, operation: &'static str, source: io::Error },
    /// A map has no room left.
    #[error("map {map} is full: it holds at most {max_entries} entries")]
    MapFull { map: &'static str, max_entries: u32 },
    /// A pinned map of an earlier start has another layout than this build's.
    #[error("pinned map {map} at {} has {found}, this build needs {expected}; remove {} once nothing uses it", path.display(), path.display())]
    MapShape { map: &'static str, path: PathBuf, found: String, expected: String },
    /// The object holds no such map or program.
    #[error("the kernel object has no {what} named {name}")]
    Missing { what: &'static str, name: String },
    /// The object could not be parsed, or a map not created.
    #[error("kernel object: {source}")]
    Object {
        #[source]
        source: Box<aya::EbpfError>,
    },
    /// The verifier (or the kernel before it) refused a program; the verifier's log is part of the message.
    #[error("program {program} was refused by the kernel: {}", describe(source))]
    Program {
        program: String,
        #[source]
        source: Box<aya::programs::ProgramError>,
    },
    /// A program could not be attached, replaced or its link pinned.
    #[error("program {program}: {action} {target}: {source}")]
    Attach { program: String, action: &'static str, target: String, source: io::Error },
}

/// The last lines of a verifier log tell why; all of it can be thousands.
fn describe(error: &aya::programs::ProgramError) -> String {
    match error {
        aya::programs::ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(40)..].join("\n");
            format!("{io_error}\n{tail}")
        }
        other => other.to_string(),
    }
}
