//! The processes of a mesh, found by their admin sockets.
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use strata_lab::Description;

/// How deep below the run folder sockets are looked for: the lab has one folder for each node.
const DEPTH: usize = 3;

/// What a process is, by the name of its socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Control,
    Agent,
    Proxy,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Control => "strata-control",
            Kind::Agent => "strata-agent",
            Kind::Proxy => "strata-proxy",
        }
    }
}

/// A process that may be running.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Part {
    pub(crate) kind: Kind,
    pub(crate) socket: PathBuf,
}

impl Part {
    /// The folder's name: a node's in the lab.
    pub(crate) fn place(&self) -> String {
        let folder = self.socket.parent().and_then(Path::file_name);
        folder.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

/// Where a node's processes keep their sockets when nothing else is said.
const DEFAULT: &str = "/run/strata";

/// What to do when there is none.
pub(crate) const HOW_TO_START: &str = "Start one in another terminal, as root:\n  strata up manifests/samples/shop";

/// The mesh that `strata up` or `strata demo` runs in this folder; without a folder the only one on this machine.
///
/// # Errors
/// Several run and none was named.
pub(crate) fn lab(run_dir: Option<&Path>) -> Result<Option<Description>> {
    let mut labs = strata_lab::running()?;
    labs.retain(|lab| run_dir.is_none_or(|run_dir| lab.pods.parent() == Some(run_dir)));
    if labs.len() > 1 {
        let folders = labs.iter().filter_map(|lab| lab.pods.parent());
        let names: Vec<String> = folders.map(|folder| format!("  strata --run-dir {} ...", folder.display())).collect();
        bail!("several meshes run on this machine; say which one is meant:\n{}", names.join("\n"));
    }
    Ok(labs.pop())
}

/// Every admin socket below the folder; without one, of the mesh that runs on this machine.
///
/// # Errors
/// There is none: the error says how to start a mesh.
pub(crate) fn find(run_dir: Option<&Path>) -> Result<Vec<Part>> {
    let lab = if run_dir.is_some() { None } else { lab(None)? };
    let run_dir = run_dir.or(lab.as_ref().and_then(|lab| lab.pods.parent())).unwrap_or(Path::new(DEFAULT));
    let mut parts = Vec::new();
    collect(run_dir, DEPTH, &mut parts);
    parts.sort();
    if parts.is_empty() {
        bail!(
            "no mesh is running here: {} holds no admin socket\n\n{HOW_TO_START}\n\
             or, if one runs elsewhere, say where:\n  strata --run-dir DIR status",
            run_dir.display()
        );
    }
    Ok(parts)
}

fn collect(folder: &Path, depth: usize, parts: &mut Vec<Part>) {
    // A folder that can't be read holds nothing we may ask.
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let kind = match entry.file_name().to_str() {
            Some("control.sock") => Some(Kind::Control),
            Some("agent.sock") => Some(Kind::Agent),
            Some(name) if name.ends_with("proxy.sock") => Some(Kind::Proxy),
            _ => None,
        };
        match kind {
            Some(kind) => parts.push(Part { kind, socket: path }),
            None if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) => collect(&path, depth - 1, parts),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_found_at_any_depth_and_their_absence_teaches() {
        let folder = std::env::temp_dir().join(format!("strata-cli-parts-{}", std::process::id()));
        let node = folder.join("node-a");
        std::fs::create_dir_all(&node).unwrap();
        assert!(find(Some(&folder)).unwrap_err().to_string().contains("strata up"));
        for name in ["agent.sock", "proxy.sock", "cni.sock"] {
            std::fs::write(node.join(name), "").unwrap();
        }
        std::fs::write(folder.join("control.sock"), "").unwrap();
        let found = find(Some(&folder)).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found.iter().map(|part| part.kind).collect::<Vec<_>>(), [Kind::Control, Kind::Agent, Kind::Proxy]);
        assert_eq!(found[1].place(), "node-a");
    }
}
