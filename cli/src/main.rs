//! strata: `up` and `demo` start a mesh on this machine, `status` and `observe` look into a running one.
//!
//! It talks to the processes over their admin sockets only and holds no state of its own.
mod demo;
mod exec;
mod get;
mod observe;
mod output;
mod parts;
mod status;
mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Strata, a sidecar-less service mesh in two layers: eBPF decides how packets arrive, the proxy how requests
/// are governed.
#[derive(Parser)]
#[command(
    name = "strata",
    version,
    after_help = "\
Try it out, as root, nothing else needed:
  strata demo                           ten scenes on real traffic, measured
  strata demo --scene 5                 only the canary
  strata up manifests/samples/shop      the same mesh to play with; edit the YAML
Look into a running mesh from another terminal:
  strata status                         every part's health, every pod's state
  strata observe --follow               who talks to whom, and who decided
  strata exec shop/checkout-1 -- strata-echo call http://10.96.1.20/
  strata status -o json | jq '.pods[].identity'"
)]
struct Arguments {
    /// Folder of the mesh's sockets: every agent, proxy and control plane found below it counts. Without it: the mesh
    /// that `strata up` or `strata demo` runs, else /run/strata
    #[arg(long, global = true, env = "STRATA_RUN_DIR")]
    run_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the mesh that a folder of YAML describes, until Ctrl-C
    Up(up::Up),
    /// Play the scenes: what one would type, what to expect, what was measured
    Demo(demo::Demo),
    /// Run a command inside a pod of the mesh that runs on this machine
    Exec(exec::Exec),
    /// The health of every part and the state of every pod
    Status(status::Status),
    /// One path of a process's admin interface
    Get(get::Get),
    /// Connections and requests as they are decided, both layers in one stream
    Observe(observe::Observe),
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let run_dir = arguments.run_dir;
    let result = match arguments.command {
        Command::Up(up) => up.run().await,
        Command::Demo(demo) => demo.run().await,
        Command::Exec(exec) => exec.run(run_dir.as_deref()),
        Command::Status(status) => status.run(run_dir.as_deref()).await,
        Command::Get(get) => get.run(run_dir.as_deref()).await,
        Command::Observe(observe) => observe.run(run_dir.as_deref()).await,
    };
    match result {
        Ok(code) => code,
        Err(error) if output::closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("strata: {error:#}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        super::Arguments::command().debug_assert();
    }
}
