//! The command line.
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use clap::Parser;
use ipnet::IpNet;

use crate::edge::Wanted;
use crate::install::Installation;

/// The node agent of Strata's lower layer: CNI, addresses, routes, services, network policy and socket capture,
/// by eBPF programs it loads and maps it fills.
///
/// Everything it sets up outlives it: stop it, kill it or replace it, and pods keep talking under the policy that was
/// in force; a new agent adopts what it finds.
#[derive(Debug, Clone, Parser)]
#[command(name = "strata-agent", version, max_term_width = 110)]
pub(crate) struct Args {
    /// Name of this node, as in the Node object and in the pods' spec.nodeName
    #[arg(long, env = "NODE_NAME", value_name = "NAME", required_unless_present = "remove_daemonset")]
    pub(crate) node_name: Option<String>,
    /// Folder of this node's sockets (cni.sock, handoff.sock, agent.sock) and of the agent's state (state/)
    #[arg(long, default_value = "/run/strata", value_name = "DIR")]
    pub(crate) run_dir: PathBuf,
    /// Folder on a BPF file system for the pinned maps and links of this node
    #[arg(long, default_value = "/sys/fs/bpf/strata", value_name = "DIR")]
    pub(crate) bpffs: PathBuf,
    /// cgroup v2 folder, or a folder whose `unified` is one: sockets of processes in it and below see services, policy
    /// and capture. Default: where cgroup v2 is mounted
    #[arg(long, value_name = "DIR")]
    pub(crate) cgroup: Option<PathBuf>,
    /// Where objects come from: `kubernetes`, the API server; or dir:PATH, a folder of YAML, which may be repeated,
    /// later ones overlaying earlier ones
    #[arg(long = "source", value_name = "kubernetes|dir:PATH")]
    pub(crate) sources: Vec<Source>,
    /// How to reach the API server; default: KUBERNETES_SERVICE_HOST and _PORT with the pod's service account
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The agent's own DaemonSet. When that is deleted, the end of the agent takes everything back from the node
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub(crate) daemonset: Option<Named>,
    /// Do not run: delete this DaemonSet of agents, wait until each has taken its node back, and exit. `helm uninstall`
    /// does this first, while the agents may still write to the API server
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with = "daemonset")]
    pub(crate) remove_daemonset: Option<Named>,
    /// Folder to write the status of this node's pods to, as pods-NODE.yaml (with --source dir:PATH)
    #[arg(long, value_name = "DIR")]
    pub(crate) status_dir: Option<PathBuf>,
    /// Put the CNI plugin here: the folder the container runtime runs plugins from (/opt/cni/bin on the node). With
    /// --cni-conf-dir
    #[arg(long, value_name = "DIR", requires = "cni_conf_dir")]
    pub(crate) cni_bin_dir: Option<PathBuf>,
    /// Put the network configuration here, once an ADD would succeed: the folder the container runtime reads
    /// (/etc/cni/net.d on the node)
    #[arg(long, value_name = "DIR", requires = "cni_bin_dir")]
    pub(crate) cni_conf_dir: Option<PathBuf>,
    /// Come after the plugins of the first configuration in --cni-conf-dir, which stays as it is
    #[arg(long, requires = "cni_conf_dir")]
    pub(crate) cni_chain: bool,
    /// Folder in which the container runtime's CNI library keeps results (/var/lib/cni/results on the node): pods that
    /// another CNI plugin connected before this agent came are taken over
    #[arg(long, value_name = "DIR")]
    pub(crate) cni_results_dir: Option<PathBuf>,
    /// What pods send to addresses outside the cluster leaves by the node's address (needs the program nft). Without it
    /// the network outside must know the way back to pods
    #[arg(long)]
    pub(crate) masquerade: bool,
    /// Address ranges outside the cluster that know the way back to pods
    #[arg(long, value_name = "CIDR", value_delimiter = ',', requires = "masquerade")]
    pub(crate) masquerade_except: Vec<IpNet>,
    /// Serve node ports, hostPorts, external addresses and load balancers' addresses to callers outside the cluster
    /// (needs the program nft). Callers inside use them either way
    #[arg(long)]
    pub(crate) node_ports: bool,
    /// Device that leads to the other nodes; default: the one the kernel's routing table says
    #[arg(long, value_name = "IFACE")]
    pub(crate) uplink: Option<String>,
    /// Serve the admin interface on this address as well, for example 127.0.0.1:15000 (always on RUN_DIR/agent.sock)
    #[arg(long, value_name = "ADDR")]
    pub(crate) admin_addr: Option<SocketAddr>,
    /// Serve health and metrics, and nothing else, on this address for Prometheus, for example 0.0.0.0:9965
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics_addr: Option<SocketAddr>,
}

/// Where objects come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    Kubernetes,
    Directory(PathBuf),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Source, String> {
        match text.split_once(':') {
            None if text == "kubernetes" => Ok(Source::Kubernetes),
            Some(("dir", path)) if !path.is_empty() => Ok(Source::Directory(path.into())),
            _ => Err(format!("{text:?} is neither `kubernetes` nor of the form dir:PATH")),
        }
    }
}

/// An object of a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Named, String> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Named { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(format!("{text:?} is not of the form NAMESPACE/NAME")),
        }
    }
}

impl Args {
    /// What is to be done between the cluster and the outside.
    pub(crate) fn edge(&self) -> Wanted {
        let except = self.masquerade_except.iter().map(IpNet::trunc).collect();
        Wanted { masquerade: self.masquerade, except, node_ports: self.node_ports }
    }

    /// The node's name; empty only with `--remove-daemonset`.
    pub(crate) fn node(&self) -> &str {
        self.node_name.as_deref().unwrap_or_default()
    }

    /// Where the CNI plugin goes, if this agent is to put it anywhere.
    ///
    /// # Errors
    /// If the plugin did not come with the agent.
    pub(crate) fn installation(&self) -> anyhow::Result<Option<Installation>> {
        let (Some(bin_dir), Some(conf_dir)) = (self.cni_bin_dir.clone(), self.cni_conf_dir.clone()) else {
            return Ok(None);
        };
        let own = std::env::current_exe()?;
        let plugin = own.with_file_name("strata-cni");
        anyhow::ensure!(plugin.is_file(), "--cni-bin-dir: {} is missing", plugin.display());
        let socket = self.run_dir.join("cni.sock");
        Ok(Some(Installation { plugin, bin_dir, conf_dir, socket, chained: self.cni_chain }))
    }

    /// The cgroup to attach to; one that is named and not there is made.
    ///
    /// # Errors
    /// If none is given and cgroup v2 is not mounted, or the one given is none.
    pub(crate) fn cgroup(&self) -> anyhow::Result<PathBuf> {
        if let Some(path) = &self.cgroup {
            std::fs::create_dir_all(path).with_context(|| format!("--cgroup {}", path.display()))?;
        }
        match &self.cgroup {
            Some(path) if path.join("cgroup.procs").exists() => Ok(path.clone()),
            Some(path) if path.join("unified/cgroup.procs").exists() => Ok(path.join("unified")),
            Some(path) => anyhow::bail!("--cgroup {}: it is no cgroup v2 folder and has no `unified`", path.display()),
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
        assert_eq!("kubernetes".parse(), Ok(Source::Kubernetes));
        assert!("kubernetes:x".parse::<Source>().is_err());
        assert!("istio-system/".parse::<Named>().is_err());
        assert!("dir:".parse::<Source>().is_err());
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
