//! Waypoints placed on the node: what would be tunnelled to a pod of the waypoint is governed here instead.
//!
//! An engine never leaves its thread, a captured connection's task may: one hands the connection to the other
//! through a queue. What the configuration cannot govern yet is refused.
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Context;
use arc_swap::ArcSwap;
use l7_authn::JwksStore;
use l7_hbone::Pool;
use l7_http::{ConnInfo, Engine, EngineConfig};
use l7_identity::IdentityManager;
use l7_origination::Origination;
use l7_route::Snapshot;
use l7_telemetry::Security;
use serde_json::{Value, json};
use strata_runtime::{Readiness, drain, metrics, task};
use tokio::net::TcpStream;
use tokio::sync::{broadcast, mpsc};
use xds_model::spiffe::SpiffeId;
use xds_model::wds::MeshView;

use crate::config::{Flags, PodsFrom};
use crate::waypoint::config::{Handler, State};
use crate::waypoint::connector::{CLIENT, Client, HboneConnector};
use crate::waypoint::peers::MeshPeers;

/// Connections that may wait for a thread's engine.
const QUEUE: usize = 1024;

/// One waypoint this node serves for its own pods.
pub(crate) struct Placed {
    namespace: String,
    gateway: String,
    /// How the keys of its service start.
    key_prefix: String,
    pub own: SpiffeId,
    snapshot: Arc<ArcSwap<Snapshot>>,
    engines: Arc<l7_http::Shared>,
    origination: Arc<Origination>,
    state: Arc<State>,
}

/// A captured connection on its way to an engine.
pub(crate) struct Captured {
    pub client: TcpStream,
    pub info: ConnInfo,
    pub drain: drain::Watch,
}

/// All of `--placed-waypoint`, and the handler of each one's xDS stream, in the same order.
///
/// # Errors
/// If a name does not make a SPIFFE identity, or the pods are not our agent's.
pub(crate) fn placements(
    flags: &Flags,
    identities: &IdentityManager,
    events: &broadcast::Sender<Arc<str>>,
) -> anyhow::Result<(Vec<Placed>, Vec<Handler>)> {
    if flags.placed_waypoints.is_empty() {
        return Ok(Default::default());
    }
    anyhow::ensure!(
        flags.pods_from == PodsFrom::Agent,
        "--placed-waypoint: our agent vouches for whom it governs, and --pods-from names another"
    );
    // A registry of its own: both layers count TCP connections under Istio's names.
    let telemetry = l7_telemetry::Telemetry::new(&metrics::Registry::new());
    forward(telemetry.events().subscribe(), events.clone());
    let mut placed = Vec::new();
    let mut handlers = Vec::new();
    for name in &flags.placed_waypoints {
        let (namespace, gateway) = (name.namespace.clone(), name.gateway.clone());
        let own = SpiffeId::new(&flags.trust_domain, &namespace, &gateway)
            .with_context(|| format!("identity of --placed-waypoint {namespace}/{gateway}"))?;
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
        let runtime = tokio::runtime::Handle::current();
        let engines = l7_http::Shared::new(telemetry.clone(), JwksStore::default(), Some(runtime));
        let origination = Arc::new(Origination::new(identities.clone(), own.clone()));
        let (handler, state) = Handler::new(None, engines.clone(), origination.clone(), snapshot.clone());
        let key_prefix = format!("{namespace}/{gateway}.{namespace}.svc.");
        placed.push(Placed { namespace, gateway, key_prefix, own, snapshot, engines, origination, state });
        handlers.push(handler);
    }
    Ok((placed, handlers))
}

/// Request events appear in the node's own stream.
fn forward(mut from: broadcast::Receiver<Arc<str>>, to: broadcast::Sender<Arc<str>>) {
    task::spawn("request events", async move {
        loop {
            match from.recv().await {
                // Nobody listening is no error.
                Ok(event) => drop(to.send(event)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    });
}

impl Placed {
    /// Whether the service `key` (`NAMESPACE/HOSTNAME`) is this waypoint's.
    pub(crate) fn is(&self, key: &str) -> bool {
        key.starts_with(&self.key_prefix)
    }

    /// Why a connection of `peer` cannot be governed now.
    pub(crate) fn refusal(&self, peer: &SpiffeId) -> Option<String> {
        let snapshot = self.snapshot.load();
        let name = format!("waypoint {}/{} placed on this node", self.namespace, self.gateway);
        let Some(terminate) = snapshot.terminate.as_ref() else {
            return Some(format!("{name} has no configuration yet"));
        };
        if !terminate.accepts(peer.as_str()) {
            return Some(format!("{name} does not accept {peer}"));
        }
        // As in the waypoint role: policies on the tunnel itself cannot be honoured.
        (!terminate.rbac.is_empty()).then(|| format!("{name} has policies on its listener, which are not supported"))
    }

    /// What its engine is told of a connection of the pod `peer`; the kernel vouches for it.
    pub(crate) fn info(&self, client: SocketAddr, destination: SocketAddr, peer: &SpiffeId) -> ConnInfo {
        ConnInfo {
            peer: client,
            destination,
            peer_principal: Some(peer.shared()),
            local_principal: Some(self.own.shared()),
            tls: false,
            security: Security::KernelAttested,
            cookie: None,
        }
    }

    /// For `/status`.
    pub(crate) fn status(&self) -> Value {
        let mut status = self.state.status();
        if let Value::Object(status) = &mut status {
            status.retain(|key, _| matches!(key.as_str(), "generation" | "chains" | "clusters" | "rejections"));
        }
        status["namespace"] = json!(self.namespace);
        status["gateway"] = json!(self.gateway);
        status["identity"] = json!(self.own);
        status["configured"] = json!(self.snapshot.load().terminate.is_some());
        status
    }
}

/// Starts this thread's engine of each waypoint. To be called inside the thread's `LocalSet`.
pub(crate) fn engines(placed: &[Placed], mesh: &MeshView, pool: &Pool) -> Vec<mpsc::Sender<Captured>> {
    placed.iter().map(|placed| engine(placed, mesh, pool)).collect()
}

fn engine(placed: &Placed, mesh: &MeshView, pool: &Pool) -> mpsc::Sender<Captured> {
    let snapshot = placed.snapshot.clone();
    let connector = HboneConnector::new(
        pool.clone(),
        placed.own.clone(),
        mesh.clone(),
        snapshot.clone(),
        placed.origination.clone(),
    );
    let mut config = EngineConfig::new(snapshot, placed.engines.clone(), Rc::new(connector));
    config.peers = Arc::new(MeshPeers::new(mesh.clone()));
    let engine = Engine::new(config);
    let (sender, mut queue) = mpsc::channel(QUEUE);
    tokio::task::spawn_local(async move {
        while let Some(Captured { client, info, drain }) = queue.recv().await {
            let engine = engine.clone();
            tokio::task::spawn_local(async move {
                let from = Client { address: info.peer, destination: info.destination };
                CLIENT.scope(from, engine.serve(client, info, drain)).await;
            });
        }
    });
    sender
}

/// Keeps each waypoint's configuration current. A node without it serves everything else, so readiness does not
/// wait for it; `/status` tells.
pub(crate) fn follow(flags: &Flags, handlers: Vec<Handler>, metrics: &xds_client::Metrics, watch: &drain::Watch) {
    for (name, handler) in flags.placed_waypoints.iter().zip(handlers) {
        let ready = Readiness::new().task("xds of a placed waypoint");
        let config = flags.placed_xds(name);
        task::spawn(
            "xds of a placed waypoint",
            xds_client::run(config, handler, metrics.clone(), ready, watch.clone()),
        );
    }
}
