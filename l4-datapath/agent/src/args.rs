//! The command line.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;

/// The node agent of Strata's lower layer: CNI, addresses, routes, services, network policy and socket capture,
/// by eBPF programs it loads and maps it fills.
///
/// Everything it sets up outlives it: stop it, kill it or replace it, and pods keep talking under the policy that was
/// in force; a new agent adopts what it finds.
#[derive(Debug, Clone, Parser)]
#[command(name = "strata-agent", version, max_term_width = 110)]
pub(crate) struct Args {
    /// Name of this node, as in the Node object and in the pods' spec.nodeName
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub(crate) node_name: String,
    /// Folder of this node's sockets (cni.sock, handoff.sock, agent.sock) and of the agent's state (state/)
    #[arg(long, default_value = "/run/strata", value_name = "DIR")]
    pub(crate) run_dir: PathBuf,
    /// Folder on a BPF file system for the pinned maps and links of this node
    #[arg(long, default_value = "/sys/fs/bpf/strata", value_name = "DIR")]
    pub(crate) bpffs: PathBuf,
    /// cgroup v2 folder: sockets of processes in it and below see services, policy and capture.
    /// Default: where cgroup v2 is mounted
    #[arg(long, value_name = "DIR")]
    pub(crate) cgroup: Option<PathBuf>,
    /// The node proxy's cgroup, a folder below --cgroup: its sockets are never captured
    #[arg(long, default_value = "proxy", value_name = "NAME")]
    pub(crate) proxy_cgroup: String,
    /// Where objects come from: dir:PATH, a folder of YAML. May be repeated, later ones overlay earlier ones
    #[arg(long = "source", value_name = "dir:PATH")]
    pub(crate) sources: Vec<Source>,
    /// Folder to write the status of this node's pods to, as pods-NODE.yaml
    #[arg(long, value_name = "DIR")]
    pub(crate) status_dir: Option<PathBuf>,
    /// Device that leads to the other nodes; default: the one the kernel's routing table says
    #[arg(long, value_name = "IFACE")]
    pub(crate) uplink: Option<String>,
    /// Serve the admin interface on this address as well, for example 127.0.0.1:15000 (always on RUN_DIR/agent.sock)
    #[arg(long, value_name = "ADDR")]
    pub(crate) admin_addr: Option<SocketAddr>,
}

/// Where objects come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    Directory(PathBuf),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Source, String> {
        match text.split_once(':') {
            Some(("dir", path)) if !path.is_empty() => Ok(Source::Directory(path.into())),
            _ => Err(format!("{text:?} is not of the form dir:PATH")),
        }
    }
}

impl Args {
    /// The cgroup to attach to.
    ///
    /// # Errors
    /// If none is given and cgroup v2 is not mounted.
    pub(crate) fn cgroup(&self) -> anyhow::Result<PathBuf> {
        match &self.cgroup {
            Some(path) => Ok(path.clone()),
            None => {
                let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
                cgroup2_mount(&mounts)
                    .ok_or_else(|| anyhow::anyhow!("cgroup v2 is not mounted; mount it or name a folder with --cgroup"))
            }
        }
    }
}

/// Mount point of the first cgroup2 file system (proc_pid_mountinfo(5)).
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        (after.split(' ').next() == Some("cgroup2")).then(|| before.split(' ').nth(4).map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_beside_cgroup1() {
        let text = "33 24 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n34 24 0:29 / /x rw - cgroup cgroup rw";
        assert_eq!(cgroup2_mount(text), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup2_mount("34 24 0:29 / /x rw - cgroup cgroup rw"), None);
    }

    #[test]
    fn sources_name_their_kind() {
        assert_eq!("dir:/a:b".parse(), Ok(Source::Directory("/a:b".into())));
        assert!("kubernetes".parse::<Source>().is_err());
        assert!("dir:".parse::<Source>().is_err());
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
