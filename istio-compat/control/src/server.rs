//! Puts the parts together and runs them.
use std::collections::{BTreeSet, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use compat_kubernetes::{AccessError, AccessReviewer, ApiServer, KubernetesSource, Named, Scope, TokenReviewer};
use compat_objects::Fault;
use compat_objects::source::{DirectorySource, Snapshot, SourceError};
use compat_translate::{MeshOptions, MeshOutput, ObjectKey};
use strata_runtime::admin::Admin;
use strata_runtime::metrics::Registry;
use strata_runtime::{Readiness, ReadyGuard, drain, task};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use xds_proto::istio::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use xds_server::Clients;

use crate::accounts::{Accounts, ClusterAccounts};
use crate::ca::{Authority, CaError, CaService, Current};
use crate::cluster::authority::CaSecret;
use crate::cluster::{self, Cluster};
use crate::grants::Grants;
use crate::jwks::Fetcher;
use crate::keeper::Keeper;
use crate::metrics::Metrics;
use crate::serving::{self, ServingError};
use crate::state::{State, View};
use crate::tokens::Tokens;
use crate::{Config, Objects, State as Store};

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
    Tls(#[from] ServingError),
    #[error("what a cluster keeps needs a cluster: the objects must come from the API server")]
    NoCluster,
    #[error("admin: {0}")]
    Admin(std::io::Error),
}

/// A running control plane.
pub struct Control {
    trigger: drain::Trigger,
    /// Where plaintext is served, with the real port, if it is.
    pub xds_addr: Option<SocketAddr>,
    /// Where TLS is served, with the real port.
    pub secure_addr: SocketAddr,
    readiness: Readiness,
}

/// How long objects that are referred to are waited for.
const LOOKING_UP: Duration = Duration::from_secs(5);
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
        let api = match &config.objects {
            Objects::Folders(_) => None,
            Objects::Kubernetes(access) => Some(ApiServer::connect(access).await?),
        };
        let (authority, kept, accounts) = establish(&config, api.as_ref()).await?;
        let (signing, authority) = watch::channel(Arc::new(authority));
        let state = Arc::new(State::new(accounts, config.mesh.trust_domain.clone()));
        let (trigger, drain) = drain::channel();
        let (readiness, registry) = (Readiness::new(), Registry::new());
        let ready = readiness.task("first-translation");

        let mut clients = Vec::new();
        let xds_addr = match config.xds_addr {
            Some(addr) => {
                let (listener, addr) = listen(addr).await?;
                clients.push(serve(TcpListenerStream::new(listener), &state, &authority, drain.clone()));
                Some(addr)
            }
            None => None,
        };
        let (listener, secure_addr) = listen(config.secure_addr).await?;
        let incoming = serving::incoming(listener, &authority, names(&config), drain.clone())?;
        clients.push(serve(incoming, &state, &authority, drain.clone()));
        if let Some(kept) = kept {
            task::spawn("authority", kept.follow(signing, drain.clone()));
        }
        let metrics = Metrics::new(&registry, clients.clone());
        admin(&config, &state, clients, readiness.clone(), registry, &drain).await?;

        let source = match (&config.objects, &api) {
            (Objects::Kubernetes(_), Some(api)) => {
                tracing::info!(server = api.address(), "objects come from the API server");
                let mut scope = Scope::control_plane(&config.mesh.root_namespace);
                if let Store::Cluster(cluster) = &config.state {
                    scope.streams.push(cluster::defaults(&cluster.namespace));
                }
                let source = KubernetesSource::new(api.clone(), scope);
                let named = source.named();
                ObjectSource::new(source.watch(), Some(named))
            }
            (Objects::Folders(folders), _) => ObjectSource::new(DirectorySource::new(folders.clone()).watch()?, None),
            (Objects::Kubernetes(_), None) => return Err(ControlError::NoCluster),
        };
        let cluster = match (&config.state, &api) {
            (Store::Cluster(cluster), Some(api)) => {
                task::spawn("grants", Grants::review(state.clone(), drain.clone()));
                Some(Cluster::start(api, cluster.clone(), authority.clone()))
            }
            _ => None,
        };
        let work = follow(source, config, state, cluster, metrics, ready, drain);
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

/// The root, where it is read again if it may change, and who vouches for clients.
async fn establish(
    config: &Config,
    api: Option<&ApiServer>,
) -> Result<(Authority, Option<CaSecret>, Accounts), ControlError> {
    match (&config.state, api) {
        (Store::Folder(folder), _) => {
            Ok((Authority::open(folder)?, None, Accounts::Files(Tokens::new(folder.join("tokens")))))
        }
        (Store::Cluster(_), None) => Err(ControlError::NoCluster),
        (Store::Cluster(cluster), Some(api)) => {
            let accounts = ClusterAccounts {
                reviewer: TokenReviewer::new(api, cluster::AUDIENCE),
                access: AccessReviewer::new(api),
                node_proxy: (cluster.namespace.clone(), cluster::NODE_PROXY.to_owned()),
            };
            let (authority, kept) = CaSecret::first(api, &cluster.namespace).await?;
            Ok((authority, Some(kept), Accounts::Cluster(Box::new(accounts))))
        }
    }
}

async fn listen(addr: SocketAddr) -> Result<(TcpListener, SocketAddr), ControlError> {
    let failed = |source| ControlError::Listen { addr, source };
    let listener = TcpListener::bind(addr).await.map_err(failed)?;
    let real = listener.local_addr().map_err(failed)?;
    Ok((listener, real))
}

/// One port: aggregated discovery and certificates.
fn serve<S>(
    incoming: impl Stream<Item = std::io::Result<S>> + Send + Unpin + 'static,
    state: &Arc<State>,
    authority: &Current,
    mut drain: drain::Watch,
) -> Clients
where
    S: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let (discovery, clients) = xds_server::service(state.clone());
    let ca = IstioCertificateServiceServer::new(CaService { authority: authority.clone(), state: state.clone() });
    let router = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .tcp_nodelay(true)
        .add_service(discovery)
        .add_service(ca);
    task::spawn("grpc", async move {
        // Discovery streams never end by themselves, so the drain drops them: clients reconnect to whoever is next.
        tokio::select! {
            _ = drain.signaled() => {}
            served = router.serve_with_incoming(incoming) => {
                if let Err(error) = served {
                    tracing::error!(%error, "gRPC server ended");
                }
            }
        }
    });
    clients
}

/// The names by which clients know the secure port.
fn names(config: &Config) -> Vec<String> {
    let namespace = match &config.state {
        Store::Cluster(cluster) => &cluster.namespace,
        Store::Folder(_) => &config.mesh.root_namespace,
    };
    let services = ["istiod", "strata-control"].map(|service| format!("{service}.{namespace}.svc"));
    let whole = services.iter().map(|service| format!("{service}.cluster.local"));
    let short = ["strata-control", "localhost"].map(str::to_owned);
    services.iter().cloned().chain(whole).chain(short).collect()
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
    let admin = Admin::new("strata-control", readiness.clone(), registry.clone())
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
    if let Some(addr) = config.status_addr {
        let public = Admin::new("strata-control", readiness, registry);
        public.serve_tcp(addr, drain.clone()).await.map_err(ControlError::Admin)?;
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

/// Where the objects come from.
struct ObjectSource {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Where not all are read: those that are referred to.
    named: Option<Named>,
    /// Why there are none yet, as far as it has been told.
    told: Vec<Fault>,
    /// Since when something that is referred to for the first time is looked up.
    looking_up: Option<Instant>,
}

impl ObjectSource {
    fn new(snapshots: watch::Receiver<Arc<Snapshot>>, named: Option<Named>) -> Self {
        Self { snapshots, named, told: Vec::new(), looking_up: None }
    }

    /// The objects as they are now, once they are whole: a part of them would take from clients what the rest gives them. `None` if
    /// they are no longer followed.
    async fn whole(&mut self) -> Option<Arc<Snapshot>> {
        loop {
            let snapshot = self.snapshots.borrow_and_update().clone();
            if snapshot.synced {
                return Some(snapshot);
            }
            for fault in snapshot.faults.iter().filter(|fault| !self.told.contains(*fault)) {
                tracing::info!(%fault, "waiting for the API server");
            }
            self.told.clone_from(&snapshot.faults);
            self.snapshots.changed().await.ok()?;
        }
    }

    /// Whether everything that is referred to has been looked up, as far as it will be; waits a little if not. What is referred to for
    /// the first time would be missing for a moment to those who have it.
    async fn has_looked_up(&mut self, referred: impl Iterator<Item = ObjectKey>, snapshot: &Snapshot) -> bool {
        let Some(named) = &self.named else { return true };
        let referred: BTreeSet<ObjectKey> = referred.collect();
        named.set(&referred);
        let waited = self.looking_up.get_or_insert_with(Instant::now).elapsed();
        if referred.is_subset(&snapshot.looked_up) || waited >= LOOKING_UP {
            self.looking_up = None;
            return true;
        }
        // An end of the snapshots is seen by whoever asks for the next one.
        drop(tokio::time::timeout(LOOKING_UP - waited, self.snapshots.changed()).await);
        false
    }
}

/// Translates every snapshot of the sources.
async fn follow(
    mut source: ObjectSource,
    config: Config,
    state: Arc<State>,
    mut cluster: Option<Cluster>,
    metrics: Metrics,
    ready: ReadyGuard,
    mut drain: drain::Watch,
) {
    let mut keeper = Keeper::default();
    let mut ready = Some(ready);
    let mut jwks = Fetcher::start(drain.clone());
    loop {
        let snapshot = tokio::select! {
            _ = drain.signaled() => return,
            snapshot = source.whole() => match snapshot {
                Some(snapshot) => snapshot,
                None => return,
            },
        };
        let started = Instant::now();
        if let Accounts::Files(tokens) = state.accounts()
            && let Err(error) = tokens.update(&snapshot.objects)
        {
            tracing::error!(%error, "tokens could not be written; new nodes and service accounts have none");
        }
        let mut options = config.mesh.clone();
        options.jwks = jwks.keys();
        let (before, objects) = (state.view(), snapshot.clone());
        let work = tokio::task::spawn_blocking(move || translated(keeper, &before, &objects, &options));
        let (output, view);
        (keeper, output, view) = match work.await {
            Ok(done) => done,
            Err(error) => {
                tracing::error!(%error, "translation ended; what is served stays as it is");
                drain.signaled().await;
                return;
            }
        };
        let parameters = cluster.iter().flat_map(|_| cluster::referred(&snapshot.objects));
        let referred = output.referred.iter().cloned().chain(parameters);
        let looked_up = tokio::select! {
            _ = drain.signaled() => return,
            looked_up = source.has_looked_up(referred, &snapshot) => looked_up,
        };
        if !looked_up {
            continue;
        }
        jwks.wanted(&output.jwks_uris, &snapshot.objects);
        if let Some(cluster) = &mut cluster {
            cluster.follow(&snapshot.objects, &output);
        }
        report(&state.view().faults, &view.faults);
        let count = view.faults.len();
        state.publish(view);
        let took = started.elapsed();
        metrics.translated(took, count);
        tracing::debug!(objects = snapshot.objects.len(), ?took, "translated");
        // Dropping the guard is what makes the process ready.
        drop(ready.take());
        // In a mesh so large that it matters, changes in quick succession are taken together: at most half of a CPU.
        tokio::select! {
            _ = drain.signaled() => return,
            () = tokio::time::sleep(took) => {}
        }
        tokio::select! {
            _ = drain.signaled() => return,
            () = jwks.changed() => {}
            () = written(&mut cluster) => {}
            changed = source.snapshots.changed() => if changed.is_err() {
                tracing::error!("the sources are no longer watched; what is served stays as it is");
                drain.signaled().await;
                return;
            },
        }
    }
}

/// The resources are in the view and no longer in the output.
fn translated(
    mut keeper: Keeper,
    before: &View,
    snapshot: &Snapshot,
    options: &MeshOptions,
) -> (Keeper, MeshOutput, View) {
    let mut output = keeper.translate(&snapshot.objects, options);
    let mut faults: Vec<String> = snapshot.faults.iter().map(ToString::to_string).collect();
    faults.extend(output.faults.iter().map(ToString::to_string));
    let view = before.next(snapshot.objects.clone(), &mut output, faults);
    (keeper, output, view)
}

/// Resolves when what cannot be written to the cluster has changed.
async fn written(cluster: &mut Option<Cluster>) {
    match cluster {
        Some(cluster) => cluster.changed().await,
        None => std::future::pending().await,
    }
}

/// Logs what came up and what was corrected since last time.
fn report(before: &[String], now: &[String]) {
    let (known, current): (HashSet<&String>, HashSet<&String>) = (before.iter().collect(), now.iter().collect());
    for fault in now.iter().filter(|fault| !known.contains(fault)) {
        tracing::warn!(fault, "configuration");
    }
    for fault in before.iter().filter(|fault| !current.contains(fault)) {
        tracing::info!(fault, "corrected");
    }
}
