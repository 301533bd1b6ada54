//! Where objects come from and status goes to: folders of YAML, or the API server.
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use compat_kubernetes::{
    Access, AccessError, ApiServer, EventWriter, KubernetesSource, PodWriter, Presence, SERVICE_ACCOUNT, Scope,
    remove_daemon_set,
};
use compat_objects::source::{DirectorySource, Snapshot};
use tokio::sync::watch;

use crate::args::{Args, Named, Source};
use crate::status::{ApiStatus, Status, StatusFile};

/// How long the end of the agent waits for the API server's word on its DaemonSet.
const CONFIRM: Duration = Duration::from_secs(3);

/// How long all agents may take to give their nodes back.
const REMOVAL: Duration = Duration::from_secs(240);

/// Everything of one source.
pub(crate) struct Opened {
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(crate) status: Option<Status>,
    pub(crate) waits_for_pods: bool,
    /// The agent's own DaemonSet, if it was named.
    pub(crate) daemon_set: Option<Presence>,
}

/// Opens what the command line names.
///
/// # Errors
/// A combination that makes no sense, missing credentials, or no file notifications.
pub(crate) async fn open(args: &Args) -> anyhow::Result<Opened> {
    let kubernetes = args.sources.contains(&Source::Kubernetes);
    if kubernetes {
        return open_api(args).await;
    }
    if args.kubeconfig.is_some() || args.daemonset.is_some() {
        bail!("--kubeconfig and --daemonset need --source kubernetes");
    }
    let folder = |source: &Source| match source {
        Source::Directory(path) => Some(path.clone()),
        Source::Kubernetes => None,
    };
    let folders: Vec<PathBuf> = args.sources.iter().filter_map(folder).collect();
    let status = args.status_dir.as_deref().map(|folder| Status::File(StatusFile::new(folder, args.node())));
    let snapshots = DirectorySource::new(folders).watch()?;
    Ok(Opened { snapshots, status, waits_for_pods: false, daemon_set: None })
}

async fn open_api(args: &Args) -> anyhow::Result<Opened> {
    if args.sources.len() > 1 {
        bail!("--source kubernetes stands alone, without dir:PATH and once");
    }
    if args.status_dir.is_some() {
        bail!("--status-dir goes with --source dir:PATH; with --source kubernetes status is written to the API server");
    }
    let api = connect(args).await.context("--source kubernetes")?;
    tracing::info!(server = api.address(), "objects come from the API server");
    let follow = |named: &Named| Presence::of_daemon_set(&api, &named.namespace, &named.name);
    let daemon_set = args.daemonset.as_ref().map(follow);
    let snapshots = KubernetesSource::new(api.clone(), Scope::node(args.node())).watch();
    let pods = PodWriter::start(&api, snapshots.clone());
    let events = EventWriter::start(&api, "strata-agent", args.node());
    let status = Some(Status::Api(ApiStatus::new(pods, events)));
    Ok(Opened { snapshots, status, waits_for_pods: true, daemon_set })
}

async fn connect(args: &Args) -> Result<ApiServer, AccessError> {
    let access = match &args.kubeconfig {
        Some(path) => Access::Kubeconfig(path.clone()),
        None => Access::InCluster(SERVICE_ACCOUNT.into()),
    };
    ApiServer::connect(&access).await
}

/// Ends all agents of a DaemonSet, each of which then takes its node back.
///
/// # Errors
/// If the API server refuses, or agents do not end in time.
pub(crate) async fn remove(args: &Args, daemon_set: &Named) -> anyhow::Result<()> {
    let api = connect(args).await.context("--remove-daemonset")?;
    let Named { namespace, name } = daemon_set;
    let agents = remove_daemon_set(&api, namespace, name, REMOVAL).await.context("--remove-daemonset")?;
    tracing::info!(agents, "all agents have ended");
    Ok(())
}

/// Whether the agent ends for good: its DaemonSet was there and is deleted.
pub(crate) async fn is_uninstalled(daemon_set: Option<&Presence>) -> bool {
    match daemon_set {
        Some(daemon_set) => daemon_set.confirm_deleted(CONFIRM).await,
        None => false,
    }
}
