//! `strata exec`: a command inside a pod of the lab, as `kubectl exec` in a cluster.
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use strata_lab::Description;

use crate::parts;

/// Run a command in a pod's network namespace and cgroup.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  strata exec shop/checkout-1 -- strata-echo call http://10.96.1.20/ --count 10
  strata exec shop/frontend-1 -- strata-echo connect 10.96.1.20:80
  strata exec shop/payments-v1-a -- ip address")]
pub(crate) struct Exec {
    /// NAMESPACE/NAME
    pod: String,
    /// Program and arguments; our own programs are found beside this one
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Exec {
    pub(crate) fn run(self, run_dir: Option<&Path>) -> Result<ExitCode> {
        let Some((namespace, name)) = self.pod.split_once('/') else {
            bail!("{:?}: a pod is written NAMESPACE/NAME, such as shop/checkout-1", self.pod);
        };
        let Some(lab) = parts::lab(run_dir)? else {
            bail!("no mesh is running here\n\n{}", parts::HOW_TO_START);
        };
        let Some((netns, cgroup)) = place(&lab, namespace, name) else {
            bail!("no pod {} runs; `strata status` lists them", self.pod);
        };
        std::fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
            .with_context(|| format!("joining {}", cgroup.display()))?;
        let program = self.command.first().map(String::as_str).unwrap_or_default();
        let ours = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(program)));
        let program = ours.filter(|path| !program.contains('/') && path.is_file()).unwrap_or_else(|| program.into());
        let error = Command::new("nsenter")
            .arg(format!("--net={}", netns.display()))
            .arg("--")
            .arg(program)
            .args(&self.command[1..])
            .exec();
        Err(error).context("nsenter (of util-linux)")
    }
}

/// Network namespace and cgroup of a pod of this lab.
fn place(lab: &Description, namespace: &str, name: &str) -> Option<(PathBuf, PathBuf)> {
    lab.nodes.iter().find_map(|node| {
        let cgroup = node.cgroup.join("pods").join(format!("{namespace}_{name}"));
        let of_node = node.netns.file_name()?.to_str()?;
        let prefix = of_node.strip_suffix(&node.name)?;
        let netns = node.netns.with_file_name(format!("{prefix}pod-{namespace}-{name}"));
        (cgroup.is_dir() && netns.exists()).then_some((netns, cgroup))
    })
}
