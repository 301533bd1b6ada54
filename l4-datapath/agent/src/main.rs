//! strata-agent: owns a node's kernel programs and maps; pods, addresses, services, policy, identities, flows.
//!
//! It knows nothing of requests, certificates or xDS: that is the upper layer's, behind the handoff.
mod admin;
mod agent;
mod args;
mod arrivals;
mod cni;
mod cni_results;
mod compile;
mod derive;
mod edge;
mod enrolment;
mod flows;
mod handoff;
mod health;
mod install;
mod ipam;
mod mesh;
mod metrics;
mod names;
mod objects;
mod orphans;
mod proxies;
mod reconcile;
mod sources;
mod state;
mod status;
mod tables;
mod uninstall;
mod wiring;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use clap::Parser;
use l4_flow::{Metrics, Publisher};
use l4_loader::{Datapath, LoadOptions};
use l4_netns::Netlink;
use strata_runtime::metrics::Registry;
use strata_runtime::{Readiness, admin::Admin, drain, logging, shutdown_signal};
use tokio::sync::mpsc;

use crate::agent::{Agent, Parts, Source};
use crate::args::Args;
use crate::edge::EdgeState;
use crate::flows::Reporter;
use crate::metrics::AgentMetrics;
use crate::state::StateDir;
use crate::tables::Tables;

/// Events that wait for the agent's task; senders wait when it is full.
const EVENTS: usize = 1024;
/// Flow lines kept for slow listeners.
const FLOW_LINES: usize = 4096;
/// How long calls under way may take at the end.
const DRAIN: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    logging::init("strata-agent");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match &args.remove_daemonset {
        Some(daemon_set) => runtime.block_on(sources::remove(&args, daemon_set)),
        None => runtime.block_on(run(args)),
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    let (readiness, registry) = (Readiness::new(), Registry::new());
    let started = readiness.task("datapath");
    let node: Arc<str> = args.node().into();
    let names = Arc::new(ArcSwap::default());
    let publisher = Publisher::new(FLOW_LINES);
    let reporter = Reporter {
        node: node.clone(),
        names: names.clone(),
        metrics: Metrics::register(&registry),
        publisher: publisher.clone(),
    };
    let metrics = AgentMetrics::register(&registry);
    let sources::Opened { snapshots, status, waits_for_pods, daemon_set } = sources::open(&args).await?;
    let source = Source { snapshots, status, waits_for_pods, ready: readiness.task("objects") };
    let cgroup = args.cgroup()?;
    let parts = parts(&args, cgroup.clone(), node.clone(), names, reporter.clone(), metrics, source).await?;
    let mut agent = Agent::new(parts)?;
    reporter.follow(agent.datapath.events()?);
    agent.adopt().await;
    // Policy of the adopted pods first, then this build's programs under them.
    agent.reconcile_and_report().await;
    agent.reattach();

    let (events, queue) = mpsc::channel(EVENTS);
    let (trigger, watch) = drain::channel();
    let public = Admin::new("strata-agent", readiness.clone(), registry.clone());
    let admin = Admin::new("strata-agent", readiness, registry).stream("/flows", publisher.sender());
    let admin = admin::with_queries(admin, &events);
    admin.serve_unix(&args.run_dir.join("agent.sock"), watch.clone()).await.context("agent.sock")?;
    if let Some(address) = args.admin_addr {
        admin.serve_tcp(address, watch.clone()).await.with_context(|| format!("--admin-addr {address}"))?;
    }
    if let Some(address) = args.metrics_addr {
        public.serve_tcp(address, watch.clone()).await.with_context(|| format!("--metrics-addr {address}"))?;
    }
    handoff::serve(&args.run_dir.join("handoff.sock"), node, cgroup, events.clone(), watch.clone())
        .context("handoff.sock")?;
    cni::serve(&args.run_dir.join("cni.sock"), events, watch).context("cni.sock")?;
    drop(started);
    agent.run(queue, shutdown_signal()).await;
    // Otherwise nothing is taken down: pods, programs and maps outlive the agent.
    if sources::is_uninstalled(daemon_set.as_ref()).await {
        agent.take_back(&args.bpffs, &args.run_dir).await;
        if !agent.status_written(DRAIN).await {
            tracing::warn!("not every pod could be told that it is out of the mesh");
        }
    }
    drop(agent);
    trigger.drain(DRAIN).await;
    Ok(())
}

async fn parts(
    args: &Args,
    cgroup: PathBuf,
    node: Arc<str>,
    names: names::SharedNames,
    reporter: Reporter,
    metrics: AgentMetrics,
    source: Source,
) -> anyhow::Result<Parts> {
    std::fs::create_dir_all(&args.run_dir).with_context(|| args.run_dir.display().to_string())?;
    let state = StateDir::open(&args.run_dir.join("state"))?;
    l4_netns::prepare_node()?;
    let netlink = Netlink::open()?;
    let uplink = match &args.uplink {
        Some(name) => Some(netlink.link(name).await.context("--uplink")?).map(|link| (link.index, link.mtu)),
        None => None,
    };
    if args.bpffs.starts_with("/sys/fs/bpf") {
        l4_loader::ensure_bpffs()?;
    }
    let datapath = Datapath::load(&LoadOptions { bpffs: args.bpffs.clone(), cgroup, features: None })?;
    let tables = Tables::read(datapath.maps(), &node, state.identities())?;
    Ok(Parts {
        node,
        datapath,
        tables,
        netlink,
        state,
        source,
        names,
        reporter,
        metrics,
        uplink,
        installation: args.installation()?,
        cni_results_dir: args.cni_results_dir.clone(),
        edge: EdgeState::new(args.edge()),
    })
}
