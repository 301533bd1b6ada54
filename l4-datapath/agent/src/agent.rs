//! The agent's one task: owns pods, addresses and maps, and takes every event in turn.
//!
//! One owner means no locks and one order of things: an ADD, a changed object and a proxy's listeners never overlap.
//! Other tasks (sockets, sources, flows) send [`Event`]s and get answers back.
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use compat_objects::ObjectSet;
use compat_objects::source::Snapshot;
use l4_cni::protocol::{AttachmentId, Request, Response};
use l4_loader::Datapath;
use l4_netns::{Netlink, NetnsId, NodeRoute};
use strata_abi::{ProxyPlace, identity};
use strata_runtime::ReadyGuard;
use tokio::sync::{mpsc, oneshot, watch};

use crate::arrivals::Arrival;
use crate::derive::Derived;
use crate::edge::EdgeState;
use crate::enrolment::Phase;
use crate::flows::Reporter;
use crate::handoff::{Outgoing, ProxyEvent};
use crate::install::Installation;
use crate::ipam::Ipam;
use crate::metrics::AgentMetrics;
use crate::names::SharedNames;
use crate::objects::NodeFacts;
use crate::state::{PodState, Registry, StateDir, StateError};
use crate::status::Status;
use crate::tables::Tables;

/// How often vanished pods are looked for and waiting ones tried again.
const TICK: Duration = Duration::from_secs(1);
/// How often the maps are read back and compared.
const VERIFY_EVERY: u32 = 60;
/// How many ticks lie between two attempts to enrol a pod that was refused.
const RETRY_EVERY: u32 = 10;
/// How long captured connections may go on after a pod left the mesh, before its rules go.
const DRAIN: Duration = Duration::from_secs(60);

/// What happens.
#[derive(Debug)]
pub(crate) enum Event {
    Cni(Request, oneshot::Sender<Response>),
    Proxy(ProxyEvent),
    Query(Query, oneshot::Sender<serde_json::Value>),
}

/// What the admin interface asks.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Query {
    Status,
    ConfigDump,
}

/// A pod and what the agent holds of it.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) state: PodState,
    /// Keeps the namespace alive until the pod is let go.
    pub(crate) netns: Arc<OwnedFd>,
    pub(crate) security_id: u32,
    /// Bits of `pod_flag` that the objects give.
    pub(crate) flags: u32,
    /// The sources describe the pod.
    pub(crate) described: bool,
    /// The objects want it in the mesh.
    pub(crate) wanted: bool,
    /// Identity the pod's own capture program was loaded with; None: not by this agent.
    pub(crate) captured_as: Option<u32>,
    pub(crate) phase: Phase,
    pub(crate) problem: Option<String>,
    /// A CNI ADD that waits for the pod's capture.
    pub(crate) waiting: Option<Waiting>,
    /// When the rules of a pod that left the mesh may go.
    pub(crate) rules_until: Option<Instant>,
}

/// The answer of an ADD, ready to be sent.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) reply: oneshot::Sender<Response>,
    pub(crate) response: Response,
    pub(crate) until: Instant,
}

impl Pod {
    pub(crate) fn new(state: PodState, netns: Arc<OwnedFd>) -> Pod {
        let phase = if state.enrolled { Phase::Enrolled { announced: false } } else { Phase::Out };
        Pod {
            wanted: state.enrolled,
            state,
            netns,
            security_id: identity::UNMANAGED,
            flags: 0,
            described: false,
            captured_as: None,
            phase,
            problem: None,
            waiting: None,
            rules_until: None,
        }
    }
}

/// The proxy in charge.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) connection: u64,
    pub(crate) pid: u32,
    pub(crate) place: ProxyPlace,
    pub(crate) out: mpsc::Sender<Outgoing>,
}

/// Where objects come from.
pub(crate) struct Source {
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(crate) status: Option<Status>,
    /// Objects and CNI calls come from the same place, the API server: an ADD whose pod is not known waits for it.
    pub(crate) waits_for_pods: bool,
    /// Kept until objects are in force.
    pub(crate) ready: ReadyGuard,
}

/// What [`Agent::new`] needs.
pub(crate) struct Parts {
    pub(crate) node: Arc<str>,
    pub(crate) datapath: Datapath,
    pub(crate) tables: Tables,
    pub(crate) netlink: Netlink,
    pub(crate) state: StateDir,
    pub(crate) source: Source,
    pub(crate) names: SharedNames,
    pub(crate) reporter: Reporter,
    pub(crate) metrics: AgentMetrics,
    pub(crate) uplink: Option<(u32, u32)>,
    pub(crate) installation: Option<Installation>,
    pub(crate) cni_results_dir: Option<PathBuf>,
    pub(crate) edge: EdgeState,
}

/// See the module.
pub(crate) struct Agent {
    pub(crate) node: Arc<str>,
    pub(crate) datapath: Datapath,
    pub(crate) tables: Tables,
    pub(crate) netlink: Netlink,
    pub(crate) state: StateDir,
    status: Option<Status>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) waits_for_pods: bool,
    /// ADDs that wait for their pods.
    pub(crate) arrivals: Vec<Arrival>,
    pub(crate) ready: Option<ReadyGuard>,
    pub(crate) names: SharedNames,
    pub(crate) reporter: Reporter,
    pub(crate) metrics: AgentMetrics,
    /// Index and MTU of the device towards the other nodes, if named.
    pub(crate) uplink: Option<(u32, u32)>,
    /// The plugin's place on the node, if this agent is to put it there.
    pub(crate) installation: Option<Installation>,
    /// Where the runtime's CNI library keeps results.
    pub(crate) cni_results_dir: Option<PathBuf>,
    /// Between the cluster and the outside.
    pub(crate) edge: EdgeState,
    /// Why the plugin is not there, as logged last.
    install_problem: Option<String>,
    pub(crate) own_netns: NetnsId,
    pub(crate) registry: Registry,
    pub(crate) ipam: Ipam,
    pub(crate) pods: BTreeMap<AttachmentId, Pod>,
    /// Running pods that this agent did not add and whose objects are not known yet.
    pub(crate) orphans: Vec<PodState>,
    pub(crate) facts: NodeFacts,
    /// What followed from the objects last time.
    pub(crate) derived: Option<Derived>,
    /// Routes the kernel has, as far as is known.
    pub(crate) routes_in_place: Option<Vec<NodeRoute>>,
    /// The objects as they are for this node, of the last reconciliation that worked.
    pub(crate) objects: ObjectSet,
    pub(crate) proxy: Option<Proxy>,
    /// Earlier proxies that still hold their connection, while they drain.
    pub(crate) retired: Vec<Proxy>,
    /// Objects have been in force since this agent's start: the last good ones are known.
    pub(crate) knows_objects: bool,
    /// A proxy was not told of pods because their accounts were not known.
    pub(crate) held_back: bool,
    /// Why the objects are not in force as a whole.
    pub(crate) problem: Option<String>,
    /// Number of the last identities written to the state folder.
    pub(crate) saved_numbers: String,
    ticks: u32,
}

impl Agent {
    /// An agent over what an earlier one left; call [`Agent::adopt`] next.
    ///
    /// # Errors
    /// If the state cannot be read.
    pub(crate) fn new(parts: Parts) -> anyhow::Result<Agent> {
        let registry = parts.state.registry()?;
        let own = l4_netns::current()?;
        let mut snapshots = parts.source.snapshots;
        let snapshot = snapshots.borrow_and_update().clone();
        let agent = Agent {
            node: parts.node,
            datapath: parts.datapath,
            tables: parts.tables,
            netlink: parts.netlink,
            state: parts.state,
            status: parts.source.status,
            snapshots,
            snapshot,
            waits_for_pods: parts.source.waits_for_pods,
            arrivals: Vec::new(),
            ready: Some(parts.source.ready),
            names: parts.names,
            reporter: parts.reporter,
            metrics: parts.metrics,
            uplink: parts.uplink,
            installation: parts.installation,
            cni_results_dir: parts.cni_results_dir,
            edge: parts.edge,
            install_problem: None,
            own_netns: l4_netns::id_of(std::os::fd::AsFd::as_fd(&own))?,
            ipam: Ipam::new(registry.positions),
            registry,
            pods: BTreeMap::new(),
            orphans: Vec::new(),
            facts: NodeFacts::default(),
            derived: None,
            routes_in_place: None,
            objects: ObjectSet::default(),
            proxy: None,
            retired: Vec::new(),
            knows_objects: false,
            held_back: false,
            problem: None,
            saved_numbers: String::new(),
            ticks: 0,
        };
        // Short-cuts of a proxy that may be gone are not trusted; the next proxy grants again.
        agent.datapath.maps().config.update(|config| config.grant_generation += 1)?;
        agent.datapath.maps().grants.clear()?;
        Ok(agent)
    }

    /// Takes events until the channel closes or `stop` resolves.
    pub(crate) async fn run(&mut self, mut events: mpsc::Receiver<Event>, stop: impl Future<Output = ()>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut stop = std::pin::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => return,
                event = events.recv() => match event {
                    Some(event) => self.handle(event).await,
                    None => return,
                },
                changed = self.snapshots.changed() => match changed {
                    Ok(()) => self.objects_changed().await,
                    // The source's thread ended: what is known stays in force.
                    Err(_) => tick_only(&mut tick).await,
                },
                _ = tick.tick() => self.tick().await,
            }
        }
    }

    async fn handle(&mut self, event: Event) {
        match event {
            Event::Cni(request, reply) => self.cni(request, reply).await,
            Event::Proxy(event) => self.proxy_event(event).await,
            Event::Query(query, reply) => {
                let answer = match query {
                    Query::Status => self.status(),
                    Query::ConfigDump => self.config_dump(),
                };
                // Whoever asked has gone: nothing to do.
                let _asked = reply.send(answer);
            }
        }
    }

    async fn objects_changed(&mut self) {
        let before = std::mem::replace(&mut self.snapshot, self.snapshots.borrow_and_update().clone());
        for fault in self.snapshot.faults.iter().filter(|fault| !before.faults.contains(fault)) {
            tracing::warn!(%fault, "object");
        }
        self.reconcile_and_report().await;
        self.retry_arrivals().await;
    }

    async fn tick(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        self.install_when_ready();
        self.reporter.set_lost(self.datapath.maps());
        let gone: Vec<AttachmentId> =
            self.pods.values().filter(|pod| has_vanished(&pod.state)).map(|pod| pod.state.attachment.clone()).collect();
        for attachment in &gone {
            tracing::info!(%attachment, "the pod's network namespace is gone, the pod is removed");
            self.remove_pod(attachment).await;
        }
        if !gone.is_empty() {
            self.reconcile_and_report().await;
        }
        self.forget_orphans(|_| false).await;
        if self.ticks.is_multiple_of(VERIFY_EVERY) {
            self.forget_gone_proxies(false);
            self.routes_in_place = None;
            match self.tables.refresh(self.datapath.maps()) {
                Ok(()) => self.reconcile_and_report().await,
                Err(error) => tracing::error!(%error, "maps could not be read back"),
            }
        }
        self.retry_arrivals().await;
        self.retry_mesh(self.ticks.is_multiple_of(RETRY_EVERY)).await;
        self.metrics.set_pods(self.pods.values());
    }

    /// The plugin appears on the node once an ADD would succeed, and again should somebody take it away.
    fn install_when_ready(&mut self) {
        let Some(installation) = &self.installation else { return };
        if self.ready().is_err() {
            return;
        }
        let problem = match installation.ensure() {
            Ok(true) => {
                tracing::info!(plugins = %installation.bin_dir.display(), configurations = %installation.conf_dir.display(), "the CNI plugin is installed");
                None
            }
            Ok(false) => None,
            Err(error) => Some(error.to_string()),
        };
        if problem != self.install_problem {
            if let Some(problem) = &problem {
                tracing::error!(problem, "the CNI plugin could not be installed");
            }
            self.install_problem = problem;
        }
    }

    /// Stores the pods; a failure is logged and the next change tries again.
    pub(crate) fn save(&mut self) -> Result<(), StateError> {
        self.registry.pods = self.pods.values().map(|pod| pod.state.clone()).collect();
        self.registry.positions = self.ipam.positions();
        self.state.save_registry(&self.registry)
    }

    pub(crate) fn save_or_log(&mut self) {
        if let Err(error) = self.save() {
            tracing::error!(%error, "the registry of pods could not be stored");
        }
    }

    /// Tells what became of the pods.
    pub(crate) fn write_status(&mut self) {
        if !self.knows_objects {
            return;
        }
        let told = self.pods.values().filter(|pod| pod.described && pod.state.ifindex != 0);
        let reports: Vec<_> = told.map(|pod| crate::mesh::report(pod, &self.objects)).collect();
        if let Some(status) = &mut self.status {
            status.write(&reports, &self.facts.addresses);
        }
    }

    /// Waits until what was told has arrived; false if that took longer than `within`.
    pub(crate) async fn status_written(&self, within: Duration) -> bool {
        match &self.status {
            Some(status) => status.settled(within).await,
            None => true,
        }
    }
}

/// Waits for the next tick without looking at a closed source again.
async fn tick_only(tick: &mut tokio::time::Interval) {
    tick.tick().await;
}

/// Whether the path no longer names the pod's namespace.
pub(crate) fn has_vanished(pod: &PodState) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match std::fs::metadata(&pod.netns) {
        Ok(found) => (found.dev(), found.ino()) != pod.netns_id,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// How long the rules of a pod that left the mesh stay.
pub(crate) fn drain_deadline() -> Instant {
    Instant::now() + DRAIN
}
