//! `strata-bench`: Strata beside its peers in one run, as ratios. `make bench` builds with LTO and calls it;
//! `docs/benchmarks.md` keeps what it printed last.
//!
//! Variants are interleaved and repeated, the median by CPU counts: the machines this runs on are shared and
//! noisy, so ratios of one run are worth something and absolute figures little.
mod control;
mod l4;
mod measure;
mod peers;
mod waypoint;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use comfy_table::Table;

use crate::measure::{Sample, median, wrk};
use crate::peers::Peer;

/// Measures Strata beside its peers.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// What wrk does to each variant.
#[derive(Args, Clone, Copy)]
struct Load {
    /// Seconds of load in each run.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Keep-alive connections of the load generator.
    #[arg(long, default_value_t = 64)]
    connections: u32,
    /// Runs of each variant.
    #[arg(long, default_value_t = 3)]
    runs: u32,
}

#[derive(Subcommand)]
enum Command {
    /// HTTP/1.1 through one worker each of Strata's engine, Envoy, nginx and HAProxy: a header route and a
    /// 90/10 split to two upstreams.
    Http {
        #[command(flatten)]
        load: Load,
        /// The engine under test; found beside this program by default.
        #[arg(long)]
        engine: Option<PathBuf>,
    },
    /// HTTP from HBONE to plaintext and to HBONE through a waypoint of one worker, Strata's and Envoy, with the same xDS
    /// resources: a header route and a 90/10 split to two upstreams.
    Waypoint {
        #[command(flatten)]
        load: Load,
    },
    /// Round trips and throughput between pods: plain veth, DIRECT, node proxy, HBONE. Needs root. Run it under
    /// `taskset -c 0`: waking a second, idle virtual CPU costs more than what is measured.
    L4 {
        /// Runs of each path.
        #[arg(long, default_value_t = 3)]
        runs: u32,
    },
    /// The control plane's translation of meshes of several sizes, after one pod changed. No
    /// peer: istiod does this only with a cluster around it.
    Control {
        /// Pods; half as many services, two pods each, in 50 namespaces with a waypoint each.
        #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000])]
        pods: Vec<usize>,
        /// Runs of each size.
        #[arg(long, default_value_t = 5)]
        runs: u32,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Http { load, engine } => http(load, engine),
        Command::Waypoint { load } => waypoint::run(load),
        Command::L4 { runs } => l4::run(runs),
        Command::Control { pods, runs } => control::run(&pods, runs),
    }
}

fn http(load: Load, engine: Option<PathBuf>) -> Result<()> {
    let Load { seconds, connections, runs } = load;
    let folder = tempfile::tempdir()?;
    let engine = match engine {
        Some(engine) => engine,
        None => std::env::current_exe()?.with_file_name("strata-engine"),
    };
    let _upstreams = peers::upstreams(folder.path())?;
    let variants = [
        peers::strata(&engine, 19010)?,
        peers::envoy(folder.path(), 19011)?,
        peers::nginx_proxy(folder.path(), 19012)?,
        peers::haproxy(folder.path(), 19013)?,
    ];
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); variants.len()];
    for variant in &variants {
        // Warms connections, caches and branch predictors; not counted.
        wrk(&url(variant), &[], variant.pid(), connections, 1)?;
    }
    for run in 1..=runs {
        for (variant, samples) in variants.iter().zip(&mut samples) {
            eprintln!("run {run}/{runs}: {}", variant.name);
            samples.push(wrk(&url(variant), &[], variant.pid(), connections, seconds)?);
        }
    }
    let medians = samples.into_iter().map(median).collect::<Result<Vec<_>>>()?;
    print(&variants, &medians)
}

fn url(peer: &Peer) -> String {
    format!("http://127.0.0.1:{}/", peer.port)
}

fn print(variants: &[Peer], medians: &[Sample]) -> Result<()> {
    let envoy = variants.iter().position(|variant| variant.name == "envoy").context("envoy is the yardstick")?;
    let mut table = Table::new();
    table.set_header(["proxy, 1 worker", "requests/s", "CPU us/request", "/ Envoy", "p50 ms", "p99 ms"]);
    for (variant, sample) in variants.iter().zip(medians) {
        table.add_row([
            variant.name.to_owned(),
            format!("{:.0}", sample.requests_per_second),
            format!("{:.1}", sample.cpu_us),
            format!("{:.2}", sample.cpu_us / medians[envoy].cpu_us),
            format!("{:.2}", sample.p50_ms),
            format!("{:.2}", sample.p99_ms),
        ]);
    }
    println!("{table}");
    Ok(())
}
