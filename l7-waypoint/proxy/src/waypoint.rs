//! Role waypoint: requests behind HBONE, governed by the snapshot compiled from xDS.
pub(crate) mod config;
pub(crate) mod connector;
mod extensions;
pub(crate) mod held;
pub(crate) mod peers;
mod proxy_protocol;
mod server;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use arc_swap::ArcSwap;
use l7_authn::JwksStore;
use l7_hbone::{Pool, PoolConfig};
use l7_http::{Engine, EngineConfig};
use l7_identity::IdentityManager;
use l7_origination::Origination;
use l7_route::Snapshot;
use l7_telemetry::Telemetry;
use strata_runtime::admin::Admin;
use strata_runtime::{Readiness, drain, metrics, shutdown_signal, task};
use tokio_util::sync::CancellationToken;
use xds_model::spiffe::SpiffeId;
use xds_model::wds::{MeshBuilder, MeshConfig};
use xds_proto::type_url;

use crate::admin::envoy::Envoy;
use crate::config::Flags;
use crate::workers::Workers;
use config::{Handler, State};
use connector::HboneConnector;
use peers::MeshPeers;
use server::Worker;

/// How long connections towards others get to end when the last request is over.
const GOODBYE: Duration = Duration::from_millis(300);

/// Runs until SIGTERM, then drains.
pub(crate) async fn run(flags: Flags) -> anyhow::Result<()> {
    let own = SpiffeId::new(&flags.trust_domain, &flags.namespace, &flags.service_account)
        .context("our own identity (--trust-domain, --namespace, --service-account)")?;
    let readiness = Readiness::new();
    let registry = metrics::Registry::new();
    let (trigger, watch) = drain::channel();
    // Configuration is followed until the end.
    let (configuring, configured) = drain::channel();
    let identities = IdentityManager::new(flags.ca(), tokio::runtime::Handle::current());
    let (builder, mesh) = MeshBuilder::new(MeshConfig {
        trust_domain: flags.trust_domain.as_str().into(),
        network: flags.network.as_str().into(),
    });
    let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let telemetry = Telemetry::new(&registry);
    let runtime = tokio::runtime::Handle::current();
    // istiod and strata-control fetch key sets themselves and send them inline.
    let engines = l7_http::Shared::new(telemetry.clone(), JwksStore::default(), Some(runtime));
    let peers = Arc::new(MeshPeers::new(mesh.clone()));
    let origination = Arc::new(Origination::new(identities.clone(), own.clone()));

    let listening = CancellationToken::new();
    let closing = CancellationToken::new();
    let workers = {
        let (identities, mesh, own, snapshot) = (identities.clone(), mesh.clone(), own.clone(), snapshot.clone());
        let (engines, origination) = (engines.clone(), origination.clone());
        Workers::start(flags.concurrency, closing.clone(), move |_| {
            let pool = Pool::new(identities.clone(), PoolConfig::default());
            let connector = HboneConnector::new(pool, own.clone(), mesh.clone(), snapshot.clone(), origination.clone());
            let mut config = EngineConfig::new(snapshot.clone(), engines.clone(), Rc::new(connector));
            config.peers = peers.clone();
            Rc::new(Worker {
                engine: Engine::new(config),
                identities: identities.clone(),
                own: own.clone(),
                snapshot: snapshot.clone(),
            })
        })
        .context("data-plane threads")?
    };

    // Before anybody can ask whether we are ready.
    let [configured_once, certificate, listens] = ["xds", "certificate", "listeners"].map(|task| readiness.task(task));
    let (handler, state) = Handler::new(Some(builder), engines, origination.clone(), snapshot);
    let admin = admin(&flags, &state, &identities, &origination, &telemetry, readiness.clone(), registry.clone());
    let public = Admin::new("strata-waypoint", readiness.clone(), registry.clone());
    crate::admin::serve(admin, public, &flags, &watch).await?;
    let types = [&config::TYPES[..], &[type_url::WORKLOAD]].concat();
    let metrics = xds_client::Metrics::register(&registry);
    task::spawn("xds", xds_client::run(flags.xds(&types), handler, metrics, configured_once, configured));
    let first = identities.clone();
    task::spawn("certificate", async move {
        while let Err(error) = first.certificate(&own).await {
            // The manager has logged why.
            tracing::debug!(%error, "waiting for the own certificate");
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        drop(certificate);
    });
    listen(&flags, &workers, &listening, &watch).await?;
    drop((watch, listens));

    shutdown_signal().await;
    let deadline = flags.drain_deadline();
    // Callers hear a little later than we do that our address is not to be used any more.
    let stop_listening = async {
        tokio::time::sleep(deadline / 2).await;
        listening.cancel();
    };
    let (clean, ()) = tokio::join!(trigger.drain(deadline), stop_listening);
    drop(configuring);
    // What is still open towards others ends as TLS and HTTP/2 want it.
    closing.cancel();
    tokio::time::sleep(GOODBYE).await;
    tracing::info!(clean, "drained");
    Ok(())
}

/// One listener of each family on every worker.
async fn listen(
    flags: &Flags,
    workers: &Workers<Rc<Worker>>,
    listening: &CancellationToken,
    watch: &drain::Watch,
) -> anyhow::Result<()> {
    let ips = match flags.hbone_ip {
        Some(ip) => vec![ip],
        None => vec![IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
    };
    for worker in 0..workers.count() {
        for ip in &ips {
            let addr = SocketAddr::new(*ip, flags.hbone_port);
            let socket = match server::bind(addr) {
                Ok(socket) => socket,
                // A host without IPv6.
                Err(error) if flags.hbone_ip.is_none() && ip.is_ipv6() => {
                    tracing::info!(%error, "no IPv6 listener");
                    continue;
                }
                Err(error) => return Err(error).with_context(|| format!("HBONE on {addr}")),
            };
            let (listening, watch) = (listening.clone(), watch.clone());
            let job = move |worker: Rc<Worker>| {
                tokio::task::spawn_local(server::serve(worker, socket, listening, watch));
            };
            workers.run(worker, job).await;
        }
    }
    tracing::info!(port = flags.hbone_port, "HBONE server listens");
    Ok(())
}

/// Our own view of the state, and Envoy's for the tools people have.
fn admin(
    flags: &Flags,
    state: &Arc<State>,
    identities: &IdentityManager,
    origination: &Arc<Origination>,
    telemetry: &Arc<Telemetry>,
    readiness: Readiness,
    registry: metrics::Registry,
) -> Admin {
    let pending = readiness.clone();
    let (for_status, for_dump) = (state.clone(), state.clone());
    let origination = origination.clone();
    let (certificates, all_certificates) = (identities.clone(), identities.clone());
    let (gateway, namespace) = (flags.gateway.clone(), flags.namespace.clone());
    let envoy = Envoy {
        flags: flags.clone(),
        state: state.clone(),
        identities: identities.clone(),
        readiness: readiness.clone(),
        started: Instant::now(),
    };
    let admin = Admin::new("strata-waypoint", readiness, registry)
        .json("/status", move || {
            let mut status = for_status.status();
            let pending = pending.pending();
            status["gateway"] = serde_json::json!(gateway);
            status["namespace"] = serde_json::json!(namespace);
            status["ready"] = serde_json::json!(pending.is_empty());
            status["pending"] = serde_json::json!(pending);
            let list = certificates.status();
            let list: Vec<_> = list
                .iter()
                .map(|c| serde_json::json!({ "identity": c.identity, "state": c.state, "error": c.error }))
                .collect();
            status["certificates"] = serde_json::json!(list);
            async move { status }
        })
        .json("/config_dump/strata", move || {
            let mut dump = for_dump.dump();
            dump["certificates"] = serde_json::json!(all_certificates.status());
            dump["secrets"] = serde_json::json!(origination.secrets().status());
            async move { dump }
        })
        .stream("/requests", telemetry.events());
    envoy.serve(admin)
}
