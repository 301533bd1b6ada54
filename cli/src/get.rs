//! `strata get`: one path of a process's admin interface, as the process answers.
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::ValueEnum;
use strata_runtime::client;

use crate::output;
use crate::parts::{self, Kind};

/// Exit code 2: there is no such part, or it does not answer.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  strata get agent /config_dump                what the kernel programs are told
  strata get proxy /metrics
  strata get agent /flows                      the flows of the last moments, one JSON object a line
On a node of a cluster:
  kubectl exec -n istio-system ds/strata-agent -- strata get proxy /status")]
pub(crate) struct Get {
    /// Whose
    part: Name,
    /// For example /status, /config_dump, /metrics, /healthz/ready
    path: String,
    /// Which one, where a mesh has several: a node's name in the lab
    #[arg(long)]
    node: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    Agent,
    Proxy,
    Control,
}

impl Get {
    pub(crate) async fn run(self, run_dir: Option<&Path>) -> Result<ExitCode> {
        let kind = match self.part {
            Name::Agent => Kind::Agent,
            Name::Proxy => Kind::Proxy,
            Name::Control => Kind::Control,
        };
        let mut found = parts::find(run_dir)?;
        found.retain(|part| part.kind == kind && self.node.as_ref().is_none_or(|node| part.place() == *node));
        match found.as_slice() {
            [part] => {
                output::line(client::get_text(&part.socket, &self.path).await?.trim_end())?;
                Ok(ExitCode::SUCCESS)
            }
            [] => bail!("no {} runs here", kind.name()),
            several => {
                let places: Vec<String> = several.iter().map(parts::Part::place).collect();
                bail!("several run here; say which one is meant with --node: {}", places.join(", "))
            }
        }
    }
}
