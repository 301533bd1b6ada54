//! Role node: the captured connections of this node's pods.
mod grants;
mod handoff;
mod inbound;
mod live;
mod local;
mod outbound;
mod passthrough;
mod placed;
mod pods;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use l7_hbone::{Pool, PoolConfig};
use l7_identity::IdentityManager;
use parking_lot::Mutex;
use strata_handoff::ProxyMessage;
use strata_runtime::admin::Admin;
use strata_runtime::{Readiness, drain, metrics, shutdown_signal, task};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use xds_model::wds::{MeshBuilder, MeshConfig, MeshView, Workload};
use xds_proto::type_url;

use crate::config::{Flags, Switch};
use crate::mesh::MeshHandler;
use crate::telemetry::Telemetry;
use crate::workers::Workers;
use grants::Grants;
use live::Live;
use placed::{Captured, Placed};
use pods::{Pod, Pods};

/// Messages to the agent that may wait for the socket.
const AGENT_QUEUE: usize = 4096;
/// How long a connection waits for the control plane to know its workload (ztunnel).
const WORKLOAD_WAIT: Duration = Duration::from_secs(5);
/// Time to connect to an application or a plaintext destination.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What all threads of the node role read.
pub(crate) struct Shared {
    pub mesh: MeshView,
    pub identities: IdentityManager,
    pub pods: Pods,
    pub telemetry: Telemetry,
    pub grants: Grants,
    pub live: Live,
    /// Waypoints served here.
    pub placed: Vec<Placed>,
    pub agent: mpsc::Sender<ProxyMessage>,
    /// Taken when the drain starts: only connections that are open by then hold it up.
    drain: Mutex<Option<drain::Watch>>,
}

/// One data-plane thread.
pub(crate) struct Worker {
    pub shared: Arc<Shared>,
    pub pool: Pool,
    /// To this thread's engines, as `Shared::placed` lists them.
    placed: Vec<mpsc::Sender<Captured>>,
}

impl Shared {
    /// To be held while a connection is open; `None` once the process drains and takes no more.
    fn watch(&self) -> Option<drain::Watch> {
        self.drain.lock().clone()
    }

    /// The control plane's view of a pod; waits a little for it to arrive.
    async fn workload_of(&self, pod: &Pod) -> Option<Arc<Workload>> {
        if let Some(workload) = self.mesh.load().workload(&pod.info.uid) {
            return Some(workload.clone());
        }
        let mut changes = self.mesh.changes();
        let wait = async {
            loop {
                if changes.changed().await.is_err() {
                    return None;
                }
                if let Some(workload) = self.mesh.load().workload(&pod.info.uid) {
                    return Some(workload.clone());
                }
            }
        };
        tokio::time::timeout(WORKLOAD_WAIT, wait).await.ok().flatten()
    }
}

/// Runs until SIGTERM, then drains.
pub(crate) async fn run(flags: Flags) -> anyhow::Result<()> {
    let readiness = Readiness::new();
    let registry = metrics::Registry::new();
    let (trigger, watch) = drain::channel();
    // Configuration is followed, and open connections are judged by it, until the end.
    let (configuring, configured) = drain::channel();
    let (builder, mesh) = MeshBuilder::new(MeshConfig {
        trust_domain: flags.trust_domain.as_str().into(),
        network: flags.network.as_str().into(),
    });
    let identities = IdentityManager::new(flags.ca(), tokio::runtime::Handle::current());
    let (agent, messages) = mpsc::channel(AGENT_QUEUE);
    let telemetry = Telemetry::new(&registry);
    let (placed, placed_handlers) = placed::placements(&flags, &telemetry.events())?;
    let shared = Arc::new(Shared {
        mesh: mesh.clone(),
        identities: identities.clone(),
        pods: Pods::default(),
        telemetry,
        grants: Grants::new(flags.shortcut == Switch::On, mesh.clone(), agent.clone()),
        live: Live::default(),
        placed,
        agent,
        drain: Mutex::new(Some(watch.clone())),
    });
    let state = shared.clone();
    let workers = Workers::start(flags.concurrency, &watch, CancellationToken::new(), move |_| {
        let pool = Pool::new(state.identities.clone(), PoolConfig::default());
        let placed = placed::engines(&state.placed, &state.mesh, &pool);
        Arc::new(Worker { pool, shared: state.clone(), placed })
    })
    .context("data-plane threads")?;

    let admin = crate::admin::node(&flags, &shared, readiness.clone(), registry.clone());
    let public = Admin::new("strata-proxy", readiness.clone(), registry.clone());
    crate::admin::serve(admin, public, &flags, &watch).await?;
    let xds_metrics = xds_client::Metrics::register(&registry);
    for placed in &shared.placed {
        shared.identities.prefetch(&placed.own);
    }
    placed::follow(&flags, placed_handlers, &xds_metrics, &configured);
    let xds = xds_client::run(
        flags.xds(&[type_url::ADDRESS, type_url::AUTHORIZATION]),
        MeshHandler { builder },
        xds_metrics,
        readiness.task("xds"),
        configured.clone(),
    );
    task::spawn("xds", xds);
    task::spawn("policy", live::follow(shared.clone(), configured.clone()));
    task::spawn("grants", grants::follow(shared.clone(), configured));
    let path = flags.run_dir.join("handoff.sock");
    let handoff =
        handoff::run(path, flags.trust_domain.clone(), shared.clone(), workers, messages, readiness.task("handoff"));
    let handoff = task::spawn("handoff", handoff);
    drop(watch);

    shutdown_signal().await;
    // The handoff connection stays until the end: the agent keeps the pods captured while we drain.
    shared.pods.stop_listening();
    shared.drain.lock().take();
    let clean = trigger.drain(flags.drain_deadline()).await;
    handoff.abort();
    drop(configuring);
    tracing::info!(clean, "drained");
    Ok(())
}
