//! Puts the parts together and runs them.
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use compat_kubernetes::{AccessError, ApiServer, KubernetesSource, Scope};
use compat_objects::source::{DirectorySource, Snapshot, SourceError};
use strata_runtime::admin::Admin;
use strata_runtime::metrics::Registry;
use strata_runtime::{Readiness, ReadyGuard, drain, task};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use xds_proto::istio::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use xds_server::Clients;

use crate::ca::{Authority, CaError, CaService};
use crate::jwks::Fetcher;
use crate::keeper::Keeper;
use crate::metrics::Metrics;
use crate::state::{State, View};
use crate::tokens::Tokens;
use crate::{Config, Objects};

/// Why the control plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("sources: {0}")]
    Source(#[from] SourceError),
    #[error("API server: {0}")]
    Access(#[from] AccessError),
    #[error("listening on {addr}: {source}")]
    Listen { addr: SocketAddr, source: std::io::Error },
    #[error("TLS of the secure port: {0}")]
    Tls(tonic::transport::Error),
    #[error("admin: {0}")]
    Admin(std::io::Error),
}

/// A running control plane.
pub struct Control {
    trigger: drain::Trigger,
    /// Where plaintext is served, with the real port.
    pub xds_addr: SocketAddr,
    /// Where TLS is served, with the real port.
    pub secure_addr: SocketAddr,
    readiness: Readiness,
}

/// How long open streams get to end.
const DRAIN: Duration = Duration::from_secs(2);

impl Control {
    /// Starts everything; returns once both ports listen. Folders are read before that, so a client that connects
    /// right after gets their objects; those of an API server come when it has been listed, and nothing is served
    /// (nor is the process ready) until then.
    ///
    /// # Errors
    /// If the root, a port, the admin socket or the sources cannot be set up. Mistakes in objects are no error.
    pub async fn start(config: Config) -> Result<Self, ControlError> {
        let authority = Arc::new(Authority::open(&config.state_dir)?);
        let tokens = Tokens::new(config.state_dir.join("tokens"));
        let state = Arc::new(State::new(tokens, config.mesh.trust_domain.clone()));
        let (trigger, drain) = drain::channel();
        let (readiness, registry) = (Readiness::new(), Registry::new());
        let ready = readiness.task("first-translation");

        let xds = listen(config.xds_addr).await?;
        let secure = listen(config.secure_addr).await?;
        let address = |listener: &TcpListener, addr| {
            listener.local_addr().map_err(|source| ControlError::Listen { addr, source })
        };
        let xds_addr = address(&xds, config.xds_addr)?;
        let secure_addr = address(&secure, config.secure_addr)?;

        let plain_clients = serve(xds, None, &state, &authority, drain.clone())?;
        let tls = serving_tls(&authority)?;
        let secure_clients = serve(secure, Some(tls), &state, &authority, drain.clone())?;
        let clients = vec![plain_clients, secure_clients];
        let metrics = Metrics::new(&registry, clients.clone());
        admin(&config, &state, clients, readiness.clone(), registry, &drain).await?;

        let snapshots = match &config.objects {
            Objects::Folders(folders) => DirectorySource::new(folders.clone()).watch()?,
            Objects::Kubernetes(access) => {
                let api = ApiServer::connect(access).await?;
                tracing::info!(server = api.address(), "objects come from the API server");
                KubernetesSource::new(api, Scope::control_plane()).watch()
            }
        };
        let work = follow(snapshots, config, state, metrics, ready, drain);
        task::spawn("translate", work);
        Ok(Self { trigger, xds_addr, secure_addr, readiness })
    }

    /// What is still missing before the control plane is ready; empty when it is.
    pub fn pending(&self) -> Vec<String> {
        self.readiness.pending()
    }

    /// Ends: streams are closed, the listeners go away.
    pub async fn stop(self) {
        if !self.trigger.drain(DRAIN).await {
            tracing::info!("some streams did not end in time");
        }
    }
}

async fn listen(addr: SocketAddr) -> Result<TcpListener, ControlError> {
    TcpListener::bind(addr).await.map_err(|source| ControlError::Listen { addr, source })
}

/// One port: aggregated discovery and certificates.
fn serve(
    listener: TcpListener,
    tls: Option<ServerTlsConfig>,
    state: &Arc<State>,
    authority: &Arc<Authority>,
    mut drain: drain::Watch,
) -> Result<Clients, ControlError> {
    let (discovery, clients) = xds_server::service(state.clone());
    let ca = IstioCertificateServiceServer::new(CaService { authority: authority.clone(), state: state.clone() });
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .tcp_nodelay(true);
    if let Some(tls) = tls {
        server = server.tls_config(tls).map_err(ControlError::Tls)?;
    }
    let router = server.add_service(discovery).add_service(ca);
    task::spawn("grpc", async move {
        // Discovery streams never end by themselves, so the drain drops them: clients reconnect to whoever is next.
        tokio::select! {
            _ = drain.signaled() => {}
            served = router.serve_with_incoming(TcpListenerStream::new(listener)) => {
                if let Err(error) = served {
                    tracing::error!(%error, "gRPC server ended");
                }
            }
        }
    });
    Ok(clients)
}

fn serving_tls(authority: &Authority) -> Result<ServerTlsConfig, ControlError> {
    let names = ["istiod.istio-system.svc", "istiod.istio-system.svc.cluster.local", "strata-control", "localhost"];
    let (certificate, key) = authority.serving(&names, &own_addresses())?;
    let chain = format!("{certificate}{}", authority.root_pem());
    Ok(ServerTlsConfig::new().identity(Identity::from_pem(chain, key)))
}

/// Every address of this host.
fn own_addresses() -> Vec<IpAddr> {
    let mut found = vec![IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1_u16])];
    let interfaces = match nix::ifaddrs::getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            tracing::warn!(%error, "own addresses are unknown: the secure port answers to its names only");
            return found;
        }
    };
    for address in interfaces.filter_map(|interface| interface.address) {
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        let v6 = address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip()));
        found.extend(v4.or(v6).filter(|ip| !found.contains(ip)));
    }
    found
}

async fn admin(
    config: &Config,
    state: &Arc<State>,
    clients: Vec<Clients>,
    readiness: Readiness,
    registry: Registry,
    drain: &drain::Watch,
) -> Result<(), ControlError> {
    let (for_status, for_dump, pending) = (state.clone(), state.clone(), readiness.clone());
    let admin = Admin::new("strata-control", readiness, registry)
        .json("/status", move || {
            let status = status(&for_status, &clients, &pending);
            async move { status }
        })
        .json("/config_dump", move || {
            let dump = for_dump.view().dump();
            async move { dump }
        });
    admin.serve_unix(&config.run_dir.join("control.sock"), drain.clone()).await.map_err(ControlError::Admin)?;
    if let Some(addr) = config.admin_addr {
        admin.serve_tcp(addr, drain.clone()).await.map_err(ControlError::Admin)?;
    }
    Ok(())
}

fn status(state: &State, clients: &[Clients], readiness: &Readiness) -> serde_json::Value {
    let view = state.view();
    let mut objects = serde_json::Map::new();
    for (key, _) in view.objects.iter() {
        let count = objects.entry(key.kind.name()).or_insert_with(|| 0.into());
        *count = (count.as_u64().unwrap_or(0) + 1).into();
    }
    let clients: Vec<_> = clients.iter().flat_map(Clients::snapshot).collect();
    let nacks: Vec<String> = clients
        .iter()
        .flat_map(|client| {
            let errors = client.types.iter().filter_map(|(url, status)| Some((url, status.error.as_ref()?)));
            errors.map(|(url, error)| format!("{}: {url}: {error}", client.node)).collect::<Vec<_>>()
        })
        .collect();
    serde_json::json!({
        "component": "strata-control",
        "pending": readiness.pending(),
        "objects": objects,
        "faults": view.faults,
        "clients": clients,
        "nacks": nacks,
    })
}

/// Translates every snapshot of the sources.
async fn follow(
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    config: Config,
    state: Arc<State>,
    metrics: Metrics,
    ready: ReadyGuard,
    mut drain: drain::Watch,
) {
    let mut keeper = Keeper::default();
    let mut ready = Some(ready);
    let mut jwks = Fetcher::start(drain.clone());
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        if !snapshot.synced {
            // A part of the objects would take from clients what the rest gives them.
            snapshot.faults.iter().for_each(|fault| tracing::warn!(%fault, "waiting for the API server"));
            tokio::select! {
                _ = drain.signaled() => return,
                changed = snapshots.changed() => if changed.is_err() { return },
            }
            continue;
        }
        let started = Instant::now();
        if let Err(error) = state.tokens().update(&snapshot.objects) {
            tracing::error!(%error, "tokens could not be written; new nodes and service accounts have none");
        }
        let mut options = config.mesh.clone();
        options.jwks = jwks.keys();
        let output = keeper.translate(&snapshot.objects, &options);
        jwks.wanted(&output.jwks_uris, &snapshot.objects);
        let mut faults: Vec<String> = snapshot.faults.iter().map(ToString::to_string).collect();
        faults.extend(output.faults.iter().map(ToString::to_string));
        report(&state.view().faults, &faults);
        let count = faults.len();
        state.publish(View::new(snapshot.objects.clone(), output, faults));
        metrics.translated(started.elapsed(), count);
        tracing::debug!(objects = snapshot.objects.len(), took = ?started.elapsed(), "translated");
        // Dropping the guard is what makes the process ready.
        drop(ready.take());
        tokio::select! {
            _ = drain.signaled() => return,
            () = jwks.changed() => {}
            changed = snapshots.changed() => if changed.is_err() {
                tracing::error!("the sources are no longer watched; what is served stays as it is");
                drain.signaled().await;
                return;
            },
        }
    }
}

/// Logs what came up and what was corrected since last time.
fn report(before: &[String], now: &[String]) {
    for fault in now.iter().filter(|fault| !before.contains(fault)) {
        tracing::warn!(fault, "configuration");
    }
    for fault in before.iter().filter(|fault| !now.contains(fault)) {
        tracing::info!(fault, "corrected");
    }
}
