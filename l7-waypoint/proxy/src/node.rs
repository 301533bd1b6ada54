//! Role node: the captured connections of this node's pods.
mod dns;
mod enrolment;
mod grants;
mod handoff;
mod inbound;
mod live;
mod local;
mod outbound;
mod passthrough;
mod placed;
mod pods;
mod zds;

use std::net::IpAddr;
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
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use xds_model::wds::{MeshBuilder, MeshConfig, MeshView, Workload};
use xds_proto::type_url;

use crate::config::{Flags, PodsFrom, Switch};
use crate::mesh::MeshHandler;
use crate::telemetry::Telemetry;
use crate::workers::Workers;
use dns::Dns;
use enrolment::Enrolment;
use grants::Grants;
use handoff::Agent;
use live::Live;
use placed::{Captured, Placed};
use pods::{Pod, Pods};
use zds::IstioCni;

/// Messages to the agent that may wait for the socket.
const AGENT_QUEUE: usize = 4096;
/// How long a connection waits for the control plane to know its workload (ztunnel).
const WORKLOAD_WAIT: Duration = Duration::from_secs(5);
/// Time to connect to an application or a plaintext destination.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a listener goes on accepting that nothing new is steered to, because a successor has it or the pod leaves the mesh:
/// handshakes that had begun end here.
const LATECOMERS: Duration = Duration::from_secs(1);

/// What readiness waits for: the first whole answer of the control plane.
const XDS: &str = "xds";

/// What all threads of the node role read.
pub(crate) struct Shared {
    pub mesh: MeshView,
    pub identities: IdentityManager,
    pub pods: Pods,
    pub telemetry: Telemetry,
    pub grants: Grants,
    pub dns: Arc<Dns>,
    pub live: Live,
    /// Waypoints served here.
    pub placed: Vec<Placed>,
    pub agent: mpsc::Sender<ProxyMessage>,
    /// Taken when the listeners close: the drain waits for connections that came in by then.
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
    /// To be held while listening and while a connection is open; `None` once the process takes no more.
    fn watch(&self) -> Option<drain::Watch> {
        self.drain.lock().clone()
    }

    /// The control plane's view of a pod that has address `ip`; waits a little for it to arrive.
    async fn workload_at(&self, pod: &Pod, ip: IpAddr) -> Option<Arc<Workload>> {
        // Our agent's word on addresses is final.
        if !pod.info.ips.is_empty() && !pod.owns(ip) {
            return None;
        }
        let find = || self.mesh.load().workload(&pod.info.uid).filter(|workload| pod.is_at(ip, workload)).cloned();
        if let Some(workload) = find() {
            return Some(workload);
        }
        let mut changes = self.mesh.changes();
        let wait = async {
            loop {
                // A change before `changes` was made is found by looking first.
                if let Some(workload) = find() {
                    return Some(workload);
                }
                changes.changed().await.ok()?;
            }
        };
        tokio::time::timeout(WORKLOAD_WAIT, wait).await.ok().flatten()
    }
}

/// Runs until SIGTERM, then drains.
pub(crate) async fn run(flags: Flags) -> anyhow::Result<()> {
    let by_agent = flags.pods_from == PodsFrom::Agent;
    let readiness = Readiness::new();
    let (configured_once, pods_known) = (readiness.task(XDS), readiness.task("pods"));
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
    let (placed, placed_handlers) = placed::placements(&flags, &identities, &telemetry.events())?;
    let shared = Arc::new(Shared {
        mesh: mesh.clone(),
        identities: identities.clone(),
        pods: Pods::default(),
        telemetry,
        grants: Grants::new(by_agent && flags.shortcut == Switch::On, mesh.clone(), agent.clone()),
        dns: Arc::new(Dns::new(&flags, mesh.clone(), &registry)),
        live: Live::default(),
        placed,
        agent,
        drain: Mutex::new(Some(watch.clone())),
    });
    let workers = workers(&flags, &shared).context("data-plane threads")?;

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
        configured_once,
        configured.clone(),
    );
    task::spawn("xds", xds);
    task::spawn("policy", live::follow(shared.clone(), configured.clone()));
    task::spawn("grants", grants::follow(shared.clone(), configured));
    let enrolment = Enrolment::new(&flags, shared.clone(), workers, pods_known)
        .context("the own network namespace cannot be opened")?;
    let pods = follow_pods(&flags, readiness, enrolment, messages);
    drop(watch);

    shutdown_signal().await;
    // The agent's connection stays until the end: it keeps the pods captured while we drain. istio-cni gives new pods to
    // whoever connected last, and they are no longer for us.
    if !by_agent {
        pods.abort();
    }
    let deadline = flags.drain_deadline();
    let stop_listening = async {
        tokio::time::sleep(LATECOMERS.min(deadline / 5)).await;
        shared.pods.stop_listening();
        shared.drain.lock().take();
    };
    let (clean, ()) = tokio::join!(trigger.drain(deadline), stop_listening);
    pods.abort();
    drop(configuring);
    tracing::info!(clean, "drained");
    Ok(())
}

/// The data-plane threads, each with its own pool and engines.
fn workers(flags: &Flags, shared: &Arc<Shared>) -> std::io::Result<Workers<Arc<Worker>>> {
    let shared = shared.clone();
    Workers::start(flags.concurrency, CancellationToken::new(), move |_| {
        let pool = Pool::new(shared.identities.clone(), PoolConfig::default());
        let placed = placed::engines(&shared.placed, &shared.mesh, &pool);
        Arc::new(Worker { pool, shared: shared.clone(), placed })
    })
}

/// Takes in the pods of whoever tells of them, until aborted. `messages` are for our agent only. It begins when the control
/// plane has told everything (so does ztunnel): who serves pods before would take connections from a predecessor that knows
/// more.
fn follow_pods(
    flags: &Flags,
    readiness: Readiness,
    pods: Enrolment,
    messages: mpsc::Receiver<ProxyMessage>,
) -> JoinHandle<()> {
    let path = flags.pods_socket();
    let configured = async move { readiness.done(XDS).await };
    match flags.pods_from {
        PodsFrom::Agent => task::spawn("handoff", async move {
            configured.await;
            enrolment::follow(&path, Agent { messages }, pods).await;
        }),
        PodsFrom::Zds(_) => {
            let cni = IstioCni::new(&flags.cluster_id, &flags.node_name);
            task::spawn("zds", async move {
                configured.await;
                enrolment::follow(&path, cni, pods).await;
            })
        }
    }
}
