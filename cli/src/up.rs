//! `strata up`: a mesh that runs until Ctrl-C.
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use strata_lab::{Lab, Options};

use crate::output::{self, Tone, paint};

/// Run the mesh that a folder of YAML describes.
#[derive(clap::Args)]
#[command(after_help = "\
The folder holds ordinary Kubernetes, Istio and Gateway API objects. Two Node objects are needed; each becomes a
network namespace with its own agent and node proxy, each Pod one on its node. Save a file and it counts.
Examples:
  strata up manifests/samples/shop
  cp manifests/samples/scenes/ambient.yaml /run/strata-lab/up/edits/   # in another terminal: into the mesh
  strata exec shop/checkout-1 -- strata-echo call http://10.96.1.20/ --count 10
  strata status; strata observe --follow")]
pub(crate) struct Up {
    /// Folder of YAML; read where it is, with everything below it
    dir: PathBuf,
    /// Name of the mesh; two of different names run side by side
    #[arg(long, default_value = "up")]
    name: String,
    /// Where strata-agent and the others are, if not beside this program
    #[arg(long)]
    bin: Option<PathBuf>,
}

impl Up {
    pub(crate) async fn run(self) -> Result<ExitCode> {
        if !self.dir.is_dir() {
            bail!("{}: no such folder; the sample is manifests/samples/shop", self.dir.display());
        }
        let mut options = Options::new(&self.name, &self.dir);
        options.bin = self.bin.clone();
        eprintln!("Starting the mesh of {} ...", self.dir.display());
        let Some(lab) = start(options).await? else { return Ok(ExitCode::from(130)) };
        output::line(&welcome(&lab))?;
        strata_runtime::shutdown_signal().await;
        eprintln!("\nStopping: processes, namespaces and pinned programs go ...");
        tokio::task::spawn_blocking(move || drop(lab)).await.context("stopping")?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Builds a mesh; none if a signal came first. What was built until then is taken down again.
pub(crate) async fn start(options: Options) -> Result<Option<Lab>> {
    let building = tokio::task::spawn_blocking(move || Lab::start(options));
    tokio::pin!(building);
    tokio::select! {
        built = &mut building => Ok(Some(built.context("starting")??)),
        () = strata_runtime::shutdown_signal() => {
            eprintln!("\nStopping ...");
            let built = building.await.context("starting")?;
            tokio::task::spawn_blocking(move || drop(built)).await.context("stopping")?;
            Ok(None)
        }
    }
}

fn welcome(lab: &Lab) -> String {
    let live = lab.live();
    let scenes = live.parent().map_or_else(|| PathBuf::from("scenes"), |parent| parent.join("scenes"));
    let edits = lab.root().join("edits");
    format!(
        "{heading} Its YAML is in {live}; save a file there and it counts. What you put into\n\
         {edits} overlays it, object by object, field by field.\n\
         \n\
         In another terminal:\n\
         \x20 strata status\n\
         \x20 strata observe --follow\n\
         \x20 strata exec shop/checkout-1 -- strata-echo call http://10.96.1.20/ --count 10\n\
         Bring the shop into the mesh, and out again by removing the file:\n\
         \x20 cp {ambient} {edits}/\n\
         Logs: {logs}\n\
         Ctrl-C ends it and removes everything.",
        heading = paint("The mesh runs.", Tone::Strong),
        live = live.display(),
        edits = edits.display(),
        ambient = scenes.join("ambient.yaml").display(),
        logs = lab.description().logs.display(),
    )
}
