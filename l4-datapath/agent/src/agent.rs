//! The agent's one task: owns pods, addresses and maps, and takes every event in turn.
//!
//! One owner means no locks and one order of things: an ADD, a changed object and a proxy's listeners never overlap.
//! Other tasks (sockets, sources, flows) send [`Event`]s and get answers back.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use compat_objects::ObjectSet;
use compat_objects::source::Snapshot;
use l4_cni::protocol::{AttachmentId, Request, Response};
use l4_loader::Datapath;
use l4_netns::{Netlink, NetnsId};
use strata_abi::identity;
use tokio::sync::{mpsc, oneshot, watch};

use crate::enrolment::Phase;
use crate::flows::Reporter;
use crate::handoff::{Outgoing, ProxyEvent};
use crate::ipam::Ipam;
use crate::metrics::AgentMetrics;
use crate::names::SharedNames;
use crate::objects::NodeFacts;
use crate::state::{PodState, Registry, StateDir, StateError};
use crate::status::StatusFile;
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
    pub(crate) out: mpsc::Sender<Outgoing>,
}

/// What [`Agent::new`] needs.
pub(crate) struct Parts {
    pub(crate) node: Arc<str>,
    pub(crate) datapath: Datapath,
    pub(crate) tables: Tables,
    pub(crate) netlink: Netlink,
    pub(crate) state: StateDir,
    pub(crate) status: Option<StatusFile>,
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(crate) names: SharedNames,
    pub(crate) reporter: Reporter,
    pub(crate) metrics: AgentMetrics,
    pub(crate) uplink: Option<(u32, u32)>,
    pub(crate) proxy_cgroup: PathBuf,
}

/// See the module.
pub(crate) struct Agent {
    pub(crate) node: Arc<str>,
    pub(crate) datapath: Datapath,
    pub(crate) tables: Tables,
    pub(crate) netlink: Netlink,
    state: StateDir,
    status: Option<StatusFile>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(crate) snapshot: Arc<Snapshot>,
    names: SharedNames,
    pub(crate) reporter: Reporter,
    metrics: AgentMetrics,
    /// Index and MTU of the device towards the other nodes, if named.
    pub(crate) uplink: Option<(u32, u32)>,
    pub(crate) own_netns: NetnsId,
    pub(crate) registry: Registry,
    pub(crate) ipam: Ipam,
    pub(crate) pods: BTreeMap<AttachmentId, Pod>,
    pub(crate) facts: NodeFacts,
    /// The objects as they are for this node, of the last reconciliation that worked.
    pub(crate) objects: ObjectSet,
    pub(crate) proxy: Option<Proxy>,
    /// Earlier proxies that still hold their connection, while they drain.
    pub(crate) retired: Vec<Proxy>,
    /// Objects have been in force since this agent's start: the last good ones are known.
    knows_objects: bool,
    /// Why the objects are not in force as a whole.
    pub(crate) problem: Option<String>,
    /// Number of the last identities written to the state folder.
    saved_numbers: String,
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
        let mut snapshots = parts.snapshots;
        let snapshot = snapshots.borrow_and_update().clone();
        let agent = Agent {
            node: parts.node,
            datapath: parts.datapath,
            tables: parts.tables,
            netlink: parts.netlink,
            state: parts.state,
            status: parts.status,
            snapshots,
            snapshot,
            names: parts.names,
            reporter: parts.reporter,
            metrics: parts.metrics,
            uplink: parts.uplink,
            own_netns: l4_netns::id_of(std::os::fd::AsFd::as_fd(&own))?,
            ipam: Ipam::new(registry.positions),
            registry,
            pods: BTreeMap::new(),
            facts: NodeFacts::default(),
            objects: ObjectSet::default(),
            proxy: None,
            retired: Vec::new(),
            knows_objects: false,
            problem: None,
            saved_numbers: String::new(),
            ticks: 0,
        };
        let proxy_cgroup = l4_loader::cgroup_id(&parts.proxy_cgroup)?;
        // Short-cuts of a proxy that may be gone are not trusted; the next proxy grants again.
        agent.datapath.maps().config.update(|config| {
            config.proxy_cgroup = proxy_cgroup;
            config.grant_generation += 1;
        })?;
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
        self.snapshot = self.snapshots.borrow_and_update().clone();
        for fault in &self.snapshot.faults {
            tracing::warn!(%fault, "object");
        }
        self.reconcile_and_report().await;
    }

    async fn tick(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        self.reporter.set_lost(self.datapath.maps());
        let gone: Vec<AttachmentId> =
            self.pods.values().filter(|pod| has_vanished(pod)).map(|pod| pod.state.attachment.clone()).collect();
        for attachment in &gone {
            tracing::info!(%attachment, "the pod's network namespace is gone, the pod is removed");
            self.remove_pod(attachment).await;
        }
        if !gone.is_empty() {
            self.reconcile_and_report().await;
        }
        if self.ticks.is_multiple_of(VERIFY_EVERY) {
            match self.tables.refresh(self.datapath.maps()) {
                Ok(()) => self.reconcile_and_report().await,
                Err(error) => tracing::error!(%error, "maps could not be read back"),
            }
        }
        self.retry_mesh(self.ticks.is_multiple_of(RETRY_EVERY)).await;
        self.metrics.set_pods(self.pods.values());
    }

    /// Everything that follows from objects and pods, in order. Errors are kept for status and logged.
    pub(crate) async fn reconcile_and_report(&mut self) {
        if let Err(error) = self.reconcile() {
            tracing::error!(%error, "objects are not in force, the last good ones stay");
        }
        if !self.knows_objects {
            // Whatever an earlier agent put in force stays: nothing is known that could replace it.
            return;
        }
        self.sync_routes().await;
        self.sync_mesh().await;
        self.write_status();
    }

    /// Brings the maps in line with objects and pods.
    ///
    /// # Errors
    /// If a compilation or a map write failed; what was in force stays as far as possible.
    pub(crate) fn reconcile(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        let result = self.try_reconcile();
        self.metrics.reconciled(start.elapsed(), result.is_ok());
        self.problem = result.as_ref().err().map(|error| format!("{error:#}"));
        result
    }

    fn try_reconcile(&mut self) -> anyhow::Result<()> {
        self.check_source()?;
        let facts = crate::objects::node_facts(&self.snapshot.objects, &self.node, self.uplink.map(|(index, _)| index));
        if facts.problems != self.facts.problems {
            facts.problems.iter().for_each(|problem| tracing::warn!(%problem, "node"));
        }
        self.ipam.set_ranges(&facts.pod_ranges);
        let local: Vec<crate::objects::LocalPod<'_>> = self
            .pods
            .values()
            .map(|pod| (pod.state.pod.namespace.as_str(), pod.state.pod.name.as_str(), &pod.state.lease))
            .collect();
        let objects = crate::objects::effective(&self.snapshot.objects, &self.node, &local);
        let next = self.tables.compile(self.datapath.maps(), &objects)?;
        // Before the maps: a crash in between must not give the same numbers to others.
        let numbers = next.numbers();
        if numbers != self.saved_numbers {
            self.state.save_identities(&numbers)?;
            self.saved_numbers = numbers;
        }
        for pod in self.pods.values_mut() {
            crate::mesh::describe(pod, &objects, &self.node, next.identity_of(&pod.state.uid()));
        }
        let unmanaged: Vec<IpAddr> =
            self.pods.values().filter(|pod| !pod.described).flat_map(|pod| pod.state.addresses()).collect();
        let records = self.records();
        let changed = self.tables.apply(self.datapath.maps(), next, &records, &unmanaged)?;
        self.set_config(&facts.addresses, changed)?;
        self.facts = facts;
        self.names.store(Arc::new(crate::names::Names::build(
            &objects,
            &self.tables.in_force,
            self.facts.names.clone(),
        )));
        self.objects = objects;
        self.knows_objects = true;
        Ok(())
    }

    /// Refuses a source that would make policy vanish for no other reason than that it cannot be read.
    fn check_source(&self) -> anyhow::Result<()> {
        if self.pods.is_empty() {
            return Ok(());
        }
        if self.snapshot.objects.is_empty() {
            anyhow::bail!("the sources hold no object at all; what is in force stays");
        }
        // Later, the source itself keeps the last good version of what is broken; a new agent has none.
        let of_policy = |fault: &&compat_objects::Fault| {
            fault.object.is_empty()
                || ["NetworkPolicy ", "Namespace ", "Pod "].iter().any(|kind| fault.object.starts_with(kind))
        };
        match self.snapshot.errors().find(of_policy) {
            Some(fault) if !self.knows_objects => {
                anyhow::bail!(
                    "since its start the agent knows no good version of this; what is in force stays: {fault}"
                )
            }
            _ => Ok(()),
        }
    }

    fn set_config(&self, addresses: &[IpAddr], policy_changed: bool) -> Result<(), l4_loader::Error> {
        let first = |v4: bool| addresses.iter().find(|address| address.is_ipv4() == v4).map(|a| (*a).into());
        let config = &self.datapath.maps().config;
        let present = config.get()?;
        let mut wanted = present;
        wanted.node_v4 = first(true).unwrap_or_default();
        wanted.node_v6 = first(false).unwrap_or_default();
        wanted.policy_generation += u64::from(policy_changed);
        if wanted != present { config.set(&wanted) } else { Ok(()) }
    }

    async fn sync_routes(&mut self) {
        match l4_netns::sync_node_routes(&self.netlink, &self.facts.routes).await {
            Ok((0, 0)) => {}
            Ok((added, removed)) => tracing::info!(added, removed, "routes to other nodes' pods"),
            Err(error) => tracing::warn!(%error, "routes to other nodes' pods are incomplete"),
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

    /// Writes the status folder's file.
    pub(crate) fn write_status(&mut self) {
        if !self.knows_objects {
            return;
        }
        let reports = self.pods.values().filter(|pod| pod.described && pod.state.ifindex != 0).map(crate::mesh::report);
        let reports: Vec<_> = reports.collect();
        let Some(status) = &mut self.status else { return };
        if let Err(error) = status.write(&reports, &self.facts.addresses) {
            tracing::error!(%error, "status file could not be written");
        }
    }
}

/// Waits for the next tick without looking at a closed source again.
async fn tick_only(tick: &mut tokio::time::Interval) {
    tick.tick().await;
}

/// Whether the path no longer names the pod's namespace.
fn has_vanished(pod: &Pod) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match std::fs::metadata(&pod.state.netns) {
        Ok(found) => (found.dev(), found.ino()) != pod.state.netns_id,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// How long the rules of a pod that left the mesh stay.
pub(crate) fn drain_deadline() -> Instant {
    Instant::now() + DRAIN
}
