//! The plugin's binary and its network configuration on the node, where the container runtime looks for them.
//!
//! The configuration appears when the agent can serve an ADD, and not before: it is what makes the kubelet call the
//! node Ready. Every file is replaced at once, so that a runtime that looks meanwhile sees the old or the new one. What
//! another plugin wrote is never changed: chained, Strata's own file repeats the other's configuration with one plugin
//! more and sorts before it, and with that file gone everything is as it was.
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::state::replace_file;

/// Name of the plugin: `type` in the configuration, and of the binary.
const PLUGIN: &str = "strata-cni";
/// Sorts before what else is there; runtimes take the first.
const OWN_FILE: &str = "05-strata.conflist";
const CHAINED_FILE: &str = "00-strata.conflist";
/// Newest version of the specification, for runtimes that choose; the others read `cniVersion`.
const VERSIONS: [&str; 2] = ["1.0.0", "1.1.0"];

/// Why the plugin is not installed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: not a network configuration list: {reason}", path.display())]
    Malformed { path: PathBuf, reason: String },
    #[error("{}: no network configuration to chain behind (--cni-chain)", folder.display())]
    NothingToChain { folder: PathBuf },
}

/// Where things go.
#[derive(Debug, Clone)]
pub(crate) struct Installation {
    /// The plugin's binary as it came with the agent.
    pub(crate) plugin: PathBuf,
    /// Folder the runtime runs plugins from, as this process sees it (`/opt/cni/bin` on the node).
    pub(crate) bin_dir: PathBuf,
    /// Folder the runtime reads configurations from (`/etc/cni/net.d` on the node).
    pub(crate) conf_dir: PathBuf,
    /// The agent's socket, as the runtime sees it.
    pub(crate) socket: PathBuf,
    /// Come after the plugins of the first configuration in the folder.
    pub(crate) chained: bool,
}

impl Installation {
    /// Installs or repairs; true if anything was written.
    ///
    /// # Errors
    /// The file that cannot be read or written; the others are as before.
    pub(crate) fn ensure(&self) -> Result<bool, InstallError> {
        let configuration = if self.chained { self.chained_configuration()? } else { self.own_configuration() };
        let binary = self.ensure_binary()?;
        let text = format!("{configuration:#}\n");
        let path = self.configuration_path();
        let written = fs::read_to_string(&path).is_ok_and(|present| present == text);
        if !written {
            replace_file(&path, text.as_bytes()).map_err(|source| InstallError::Io { path, source })?;
        }
        Ok(binary || !written)
    }

    /// Takes the configuration away, then the binary. What is not there is no error.
    ///
    /// # Errors
    /// The file that cannot be removed.
    pub(crate) fn remove(&self) -> Result<(), InstallError> {
        for path in [self.configuration_path(), self.bin_dir.join(PLUGIN)] {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(InstallError::Io { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn configuration_path(&self) -> PathBuf {
        self.conf_dir.join(if self.chained { CHAINED_FILE } else { OWN_FILE })
    }

    fn ensure_binary(&self) -> Result<bool, InstallError> {
        let read = |path: &Path| fs::read(path).map_err(|source| InstallError::Io { path: path.into(), source });
        let wanted = read(&self.plugin)?;
        let path = self.bin_dir.join(PLUGIN);
        if fs::read(&path).is_ok_and(|present| present == wanted) {
            return Ok(false);
        }
        let io = |source| InstallError::Io { path: path.clone(), source };
        // Executable before it gets its name: the runtime may call it in the next moment.
        let new = self.bin_dir.join(format!(".{PLUGIN}.new"));
        fs::write(&new, wanted).map_err(io)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).map_err(io)?;
        fs::rename(&new, &path).map_err(io)?;
        Ok(true)
    }

    fn plugin_entry(&self) -> Value {
        json!({"type": PLUGIN, "agentSocket": self.socket})
    }

    fn own_configuration(&self) -> Value {
        json!({"cniVersion": VERSIONS[0], "cniVersions": VERSIONS, "name": "strata", "plugins": [self.plugin_entry()]})
    }

    fn chained_configuration(&self) -> Result<Value, InstallError> {
        let path = self.first_other()?;
        let text = fs::read(&path).map_err(|source| InstallError::Io { path: path.clone(), source })?;
        let malformed = |reason: String| InstallError::Malformed { path: path.clone(), reason };
        let mut other: Map<String, Value> = serde_json::from_slice(&text).map_err(|e| malformed(e.to_string()))?;
        if !other.contains_key("plugins") {
            other = list_of_one(other);
        }
        let Some(Value::Array(plugins)) = other.get_mut("plugins") else {
            return Err(malformed("`plugins` is no list".into()));
        };
        plugins.push(self.plugin_entry());
        Ok(Value::Object(other))
    }

    /// The configuration the runtime would take if Strata's were not there.
    fn first_other(&self) -> Result<PathBuf, InstallError> {
        let folder = &self.conf_dir;
        let io = |source| InstallError::Io { path: folder.clone(), source };
        let mut found: Option<PathBuf> = None;
        for entry in fs::read_dir(folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let known = ["conflist", "conf", "json"].iter().any(|e| path.extension().is_some_and(|found| found == *e));
            let ours = name == OWN_FILE || name == CHAINED_FILE || name.starts_with('.');
            if known && !ours && found.as_ref().is_none_or(|first| path < *first) {
                found = Some(path);
            }
        }
        found.ok_or_else(|| InstallError::NothingToChain { folder: folder.clone() })
    }
}

/// A configuration of a single plugin, as a list (CNI specification, "Network configuration format").
fn list_of_one(mut plugin: Map<String, Value>) -> Map<String, Value> {
    let mut list = Map::new();
    for field in ["cniVersion", "name"] {
        if let Some(value) = plugin.remove(field) {
            list.insert(field.into(), value);
        }
    }
    list.insert("plugins".into(), json!([plugin]));
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        _folder: tempfile::TempDir,
        installation: Installation,
    }

    fn node(chained: bool) -> Node {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["bin", "net.d"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("plugin"), "#!version 1").unwrap();
        let (plugin, bin_dir, conf_dir) = (at("plugin"), at("bin"), at("net.d"));
        let socket = "/run/strata/cni.sock".into();
        Node { _folder: folder, installation: Installation { plugin, bin_dir, conf_dir, socket, chained } }
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names.into_iter().map(|name| name.into_string().unwrap()).collect()
    }

    #[test]
    fn installed_once_upgraded_in_place_removed_whole() {
        let Node { _folder, installation } = node(false);
        assert!(installation.ensure().unwrap());
        assert!(!installation.ensure().unwrap(), "nothing to do the second time");
        let binary = installation.bin_dir.join(PLUGIN);
        assert_eq!(fs::metadata(&binary).unwrap().permissions().mode() & 0o777, 0o755);
        fs::write(&installation.plugin, "#!version 2").unwrap();
        assert!(installation.ensure().unwrap());
        assert_eq!(fs::read_to_string(&binary).unwrap(), "#!version 2");
        assert_eq!(names(&installation.conf_dir), [OWN_FILE]);
        installation.remove().unwrap();
        installation.remove().unwrap();
        assert!(names(&installation.bin_dir).is_empty() && names(&installation.conf_dir).is_empty());
    }

    #[test]
    fn chained_repeats_the_other_and_leaves_it_alone() {
        let Node { _folder, installation } = node(true);
        assert!(matches!(installation.ensure(), Err(InstallError::NothingToChain { .. })));
        let other = r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp", "mtu": 1400}]}"#;
        fs::write(installation.conf_dir.join("10-net.conflist"), other).unwrap();
        fs::write(installation.conf_dir.join("99-late.conf"), r#"{"type": "bridge"}"#).unwrap();
        installation.ensure().unwrap();
        let read = || fs::read_to_string(installation.conf_dir.join(CHAINED_FILE)).unwrap();
        let list: Value = serde_json::from_str(&read()).unwrap();
        assert_eq!(list["name"], "net");
        assert_eq!(list["plugins"][0], json!({"type": "ptp", "mtu": 1400}));
        assert_eq!(list["plugins"][1], json!({"type": PLUGIN, "agentSocket": "/run/strata/cni.sock"}));
        // The other plugin is configured anew: ours follows.
        fs::write(installation.conf_dir.join("10-net.conflist"), other.replace("1400", "1500")).unwrap();
        assert!(installation.ensure().unwrap());
        assert!(read().contains("1500"));
        installation.remove().unwrap();
        assert_eq!(names(&installation.conf_dir), ["10-net.conflist", "99-late.conf"]);
    }

    #[test]
    fn a_single_plugin_becomes_a_list() {
        let Node { _folder, installation } = node(true);
        let other = r#"{"cniVersion": "0.4.0", "name": "net", "type": "bridge"}"#;
        fs::write(installation.conf_dir.join("10-net.conf"), other).unwrap();
        installation.ensure().unwrap();
        let text = fs::read(installation.conf_dir.join(CHAINED_FILE)).unwrap();
        let list: Value = serde_json::from_slice(&text).unwrap();
        let ours = json!({"type": PLUGIN, "agentSocket": "/run/strata/cni.sock"});
        assert_eq!(list, json!({"cniVersion": "0.4.0", "name": "net", "plugins": [{"type": "bridge"}, ours]}));
    }

    #[test]
    fn what_cannot_be_read_is_named_and_nothing_is_written() {
        let Node { _folder, installation } = node(true);
        fs::write(installation.conf_dir.join("10-net.conflist"), "{").unwrap();
        let error = installation.ensure().unwrap_err().to_string();
        assert!(error.contains("10-net.conflist"), "{error}");
        assert_eq!(names(&installation.conf_dir), ["10-net.conflist"]);
        assert!(names(&installation.bin_dir).is_empty());
    }
}
