//! `strata demo`: the scenes, one after the other, on one mesh.
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use comfy_table::{Cell, Color};
use strata_cluster::Cluster;
use strata_cluster::scenes as cluster_scenes;
use strata_lab::scenes::{ALL, Report, Scene};
use strata_lab::{Lab, Options};

use crate::output::{self, Format, Tone, paint};
use crate::up;

/// Play the scenes on real traffic.
#[derive(clap::Args)]
#[command(after_help = "\
Exit code 0: every check of every scene played held. 1: one did not. 130: interrupted.
Examples:
  strata demo                     all ten scenes
  strata demo --scene 3 --scene 5
  strata demo -o json > report.json
  strata demo --list
  strata demo --cluster           the same and more on a real cluster, with istiod")]
pub(crate) struct Demo {
    /// Only this scene; repeatable
    #[arg(long = "scene", value_parser = clap::value_parser!(u8).range(1..=20))]
    scenes: Vec<u8>,
    /// On the Kubernetes cluster that $KUBECONFIG names (`make cluster` makes one) instead of a mesh of namespaces
    #[arg(long)]
    cluster: bool,
    /// What there is to see
    #[arg(long)]
    list: bool,
    /// Folder of YAML that describes the shop; worked on as a copy
    #[arg(long, env = "STRATA_SHOP")]
    dir: Option<PathBuf>,
    /// Name of the mesh; two of different names run side by side
    #[arg(long, default_value = "demo")]
    name: String,
    /// Where strata-agent and the others are, if not beside this program
    #[arg(long)]
    bin: Option<PathBuf>,
    /// Leave the processes' logs here; with a failed scene also the state of everything
    #[arg(long)]
    keep: Option<PathBuf>,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

impl Demo {
    pub(crate) async fn run(self) -> Result<ExitCode> {
        if self.list {
            let lab = ALL.iter().map(|scene| (scene.number, scene.title)).collect();
            let cluster = || cluster_scenes::all().iter().map(|scene| (scene.number(), scene.title())).collect();
            let titles: Vec<(u8, &str)> = if self.cluster { cluster() } else { lab };
            for (number, title) in titles {
                output::line(&format!("{number:>2}  {title}"))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        if self.cluster {
            return self.run_on_cluster().await;
        }
        let chosen: Vec<Scene> =
            ALL.into_iter().filter(|s| self.scenes.is_empty() || self.scenes.contains(&s.number)).collect();
        let mut options = Options::new(&self.name, self.shop()?);
        options.copy = true;
        options.bin.clone_from(&self.bin);
        options.keep_logs.clone_from(&self.keep);
        let began = Instant::now();
        eprintln!("Building two nodes, seven pods and a control plane ...");
        let Some(lab) = up::start(options).await? else { return Ok(ExitCode::from(130)) };
        eprintln!("Ready after {:.1} s.\n", began.elapsed().as_secs_f64());
        let lab = Arc::new(lab);
        let reports = tokio::select! {
            reports = self.play(lab.clone(), &chosen) => Some(reports?),
            () = strata_runtime::shutdown_signal() => None,
        };
        let Some(reports) = reports else { return interrupted(lab).await };
        tokio::task::spawn_blocking(move || drop(lab)).await.context("stopping")?;
        self.conclude(&reports, began)
    }

    /// On a cluster nothing of ours has to be taken down: Ctrl-C leaves the shop there.
    async fn run_on_cluster(self) -> Result<ExitCode> {
        let began = Instant::now();
        tokio::task::spawn_blocking(move || {
            eprintln!("Bringing the shop onto the cluster ...");
            let cluster = Cluster::connect()?;
            eprintln!("Ready after {:.1} s.\n", began.elapsed().as_secs_f64());
            let mut reports = Vec::new();
            for scene in cluster_scenes::all() {
                if !self.scenes.is_empty() && !self.scenes.contains(&scene.number()) {
                    continue;
                }
                eprintln!("{}", paint(&format!("Scene {}: {} ...", scene.number(), scene.title()), Tone::Faint));
                let report = scene.play(&cluster);
                if self.output == Format::Table {
                    print(&report)?;
                }
                reports.push(report);
            }
            self.conclude(&reports, began)
        })
        .await
        .context("playing")?
    }

    fn conclude(&self, reports: &[Report], began: Instant) -> Result<ExitCode> {
        match self.output {
            Format::Table => summary(reports, began)?,
            format => output::document(format, &reports)?,
        }
        Ok(if reports.iter().all(Report::ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    async fn play(&self, lab: Arc<Lab>, scenes: &[Scene]) -> Result<Vec<Report>> {
        let mut reports = Vec::new();
        for scene in scenes.iter().copied() {
            eprintln!("{}", paint(&format!("Scene {}: {} ...", scene.number, scene.title), Tone::Faint));
            let stage = lab.clone();
            let report = tokio::task::spawn_blocking(move || scene.play(&*stage)).await;
            let report = report.with_context(|| format!("scene {}", scene.number))?;
            if self.output == Format::Table {
                print(&report)?;
            }
            if let (false, Some(folder)) = (report.ok(), &self.keep) {
                let (folder, lab) = (folder.join(format!("scene-{}", report.number)), lab.clone());
                tokio::task::spawn_blocking(move || lab.dump(&folder)).await.context("dumping")??;
            }
            reports.push(report);
        }
        Ok(reports)
    }

    /// The sample, wherever the demo is started from.
    fn shop(&self) -> Result<PathBuf> {
        if let Some(dir) = &self.dir {
            return Ok(dir.clone());
        }
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/samples/shop");
        let candidates = [PathBuf::from("manifests/samples/shop"), PathBuf::from(source)];
        match candidates.into_iter().find(|dir| dir.is_dir()) {
            Some(dir) => Ok(dir),
            None => bail!("manifests/samples/shop is not here; say where with --dir"),
        }
    }
}

/// Takes the mesh down under the scene that plays; what that scene thinks of it interests nobody.
async fn interrupted(lab: Arc<Lab>) -> Result<ExitCode> {
    eprintln!("\nInterrupted: taking everything down ...");
    let id = lab.id().to_owned();
    tokio::task::spawn_blocking(move || strata_lab::remove(&id)).await.context("stopping")??;
    // The scene's thread may hold the lab for long; the process's end ends it.
    std::mem::forget(lab);
    std::process::exit(130);
}

fn print(report: &Report) -> Result<()> {
    output::line(&paint(&format!("Scene {}: {}", report.number, report.title), Tone::Strong))?;
    let mut typed: Vec<&String> = Vec::new();
    for line in &report.type_this {
        if !typed.contains(&line) {
            typed.push(line);
        }
    }
    output::line("  type")?;
    for line in typed {
        output::line(&format!("    $ {line}"))?;
    }
    output::line("  expect")?;
    for line in wrap(&report.expect, 100) {
        output::line(&format!("    {line}"))?;
    }
    output::line("  measured")?;
    for line in &report.measured {
        output::line(&format!("    {line}"))?;
    }
    output::line("  checked")?;
    for check in &report.checks {
        if check.ok {
            output::line(&format!("    {} {}", paint("✓", Tone::Good), check.what))?;
        } else {
            output::line(&format!("    {} {}: {}", paint("✗", Tone::Bad), check.what, check.detail))?;
        }
    }
    output::line("")
}

fn summary(reports: &[Report], began: Instant) -> Result<()> {
    let mut table = output::table(&["", "SCENE", "", "CHECKS"]);
    for report in reports {
        let held = report.checks.iter().filter(|check| check.ok).count();
        let (mark, colour) = if report.ok() { ("✓", Color::Green) } else { ("✗", Color::Red) };
        table.add_row(vec![
            Cell::new(mark).fg(colour),
            Cell::new(report.number),
            Cell::new(&report.title),
            Cell::new(format!("{held} of {} held", report.checks.len())),
        ]);
    }
    output::line(&table.trim_fmt())?;
    let good = reports.iter().filter(|report| report.ok()).count();
    let text = format!("{good} of {} scenes held, {:.0} s", reports.len(), began.elapsed().as_secs_f64());
    output::line(&format!("\n{}", paint(&text, if good == reports.len() { Tone::Good } else { Tone::Bad })))
}

/// Breaks a text at blanks.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapping_keeps_every_word() {
        assert_eq!(wrap("one two  three", 7), ["one two", "three"]);
    }

    #[test]
    fn the_sample_is_found_from_anywhere() {
        use clap::{Args, FromArgMatches};
        let command = Demo::augment_args(clap::Command::new("demo"));
        let demo = Demo::from_arg_matches(&command.get_matches_from(["demo", "--scene", "5"])).unwrap();
        assert!(demo.shop().unwrap().join("03-pods.yaml").is_file());
    }
}
