//! `strata-control`: see the library.
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use compat_control::{Access, ClusterConfig, Config, Control, Objects, State, WaypointConfig};
use compat_translate::MeshOptions;

/// The embedded control plane: serves xDS (as istiod does) and workload certificates from folders of YAML or
/// from the objects of a Kubernetes API server.
///
/// Every client needs a token: --state-dir/tokens/node/NODE for a node's proxy,
/// --state-dir/tokens/sa/NAMESPACE/ACCOUNT for a waypoint. They are written for every Node and ServiceAccount in the
/// sources and stay the same over restarts, as does the root certificate, --state-dir/root-cert.pem.
///
/// With --in-cluster it takes istiod's place in a Kubernetes cluster: tokens are service accounts' own, the root is
/// in Secret cacerts or istio-ca-secret and its certificate in ConfigMap istio-ca-root-cert of every namespace, every Gateway of
/// class istio-waypoint gets its Deployment, and objects get their status. Nothing is served in plaintext then.
#[derive(Debug, Parser)]
#[command(name = "strata-control", version)]
struct Args {
    /// Where objects come from: `kubernetes`, the API server; or `dir:PATH`, repeatable, later ones overlaying earlier
    /// ones object by object.
    #[arg(long = "source", required = true, value_name = "kubernetes|dir:PATH")]
    sources: Vec<String>,
    /// How to reach the API server; default: KUBERNETES_SERVICE_HOST and _PORT with the pod's service account.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Keeps the root key and the tokens (mode 0600).
    #[arg(long, env = "STRATA_STATE_DIR", default_value = "/var/lib/strata/control")]
    state_dir: PathBuf,
    /// Takes istiod's place in the cluster of --source kubernetes; the namespace this process runs in.
    #[arg(long, value_name = "NAMESPACE", requires = "waypoint_image")]
    in_cluster: Option<String>,
    /// Image of the waypoints that are made.
    #[arg(long, value_name = "IMAGE", requires = "in_cluster")]
    waypoint_image: Option<String>,
    /// When their image is pulled: Always, IfNotPresent or Never.
    #[arg(long, default_value = "IfNotPresent", requires = "in_cluster")]
    waypoint_pull_policy: String,
    /// Secret with credentials for their image, in each waypoint's namespace; repeatable.
    #[arg(long = "waypoint-pull-secret", value_name = "NAME", requires = "in_cluster")]
    waypoint_pull_secrets: Vec<String>,
    /// Makes the Deployments of waypoints. false leaves those there are as they are: while another control plane takes over.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, requires = "in_cluster")]
    deploy_waypoints: bool,
    /// Where waypoints find this process. [default: https://strata-control.NAMESPACE.svc:15012]
    #[arg(long, value_name = "https://HOST:PORT", requires = "in_cluster")]
    own_address: Option<String>,
    /// Plaintext xDS and CA, for loopback and labs; tokens are required here too.
    #[arg(long, default_value = "0.0.0.0:15010", conflicts_with = "in_cluster")]
    xds_addr: SocketAddr,
    /// xDS and CA over TLS, with a certificate of the own root.
    #[arg(long, default_value = "0.0.0.0:15012")]
    secure_addr: SocketAddr,
    /// Where control.sock (status, metrics, config dump) goes.
    #[arg(long, env = "STRATA_RUN_DIR", default_value = "/run/strata")]
    run_dir: PathBuf,
    /// Admin over TCP as well; keep it on loopback.
    #[arg(long)]
    admin_addr: Option<SocketAddr>,
    /// Readiness (/healthz/ready) and metrics (/metrics) over TCP, and nothing else.
    #[arg(long)]
    status_addr: Option<SocketAddr>,
    /// Trust domain of the identities issued.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    trust_domain: String,
    /// Namespace of mesh-wide policies.
    #[arg(long, env = "ROOT_NAMESPACE", default_value = "istio-system")]
    root_namespace: String,
    /// Cluster part of workload names.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    cluster_id: String,
    /// Network of this cluster's pods, told to waypoints.
    #[arg(long, env = "NETWORK", default_value = "")]
    network: String,
}

impl Args {
    fn objects(&self) -> anyhow::Result<Objects> {
        if self.sources.iter().any(|source| source == "kubernetes") {
            ensure!(self.sources.len() == 1, "--source kubernetes stands alone, without dir:PATH and once");
            let in_cluster = || Access::InCluster(compat_control::SERVICE_ACCOUNT.into());
            return Ok(Objects::Kubernetes(self.kubeconfig.clone().map_or_else(in_cluster, Access::Kubeconfig)));
        }
        ensure!(self.kubeconfig.is_none(), "--kubeconfig needs --source kubernetes");
        let mut folders = Vec::new();
        for source in &self.sources {
            match source.split_once(':') {
                Some(("dir", path)) if !path.is_empty() => folders.push(PathBuf::from(path)),
                _ => bail!("--source {source}: write kubernetes or dir:PATH"),
            }
        }
        Ok(Objects::Folders(folders))
    }

    fn state(&self, objects: &Objects) -> anyhow::Result<State> {
        let (Some(namespace), Some(image)) = (&self.in_cluster, &self.waypoint_image) else {
            return Ok(State::Folder(self.state_dir.clone()));
        };
        ensure!(matches!(objects, Objects::Kubernetes(_)), "--in-cluster needs --source kubernetes");
        let address = self.own_address.clone();
        Ok(State::Cluster(ClusterConfig {
            namespace: namespace.clone(),
            deploy_waypoints: self.deploy_waypoints,
            waypoint: WaypointConfig {
                image: image.clone(),
                pull_policy: self.waypoint_pull_policy.clone(),
                pull_secrets: self.waypoint_pull_secrets.clone(),
                address: address.unwrap_or_else(|| format!("https://strata-control.{namespace}.svc:15012")),
                trust_domain: self.trust_domain.clone(),
                cluster_id: self.cluster_id.clone(),
                network: self.network.clone(),
            },
        }))
    }

    fn config(self) -> anyhow::Result<Config> {
        let objects = self.objects()?;
        Ok(Config {
            state: self.state(&objects)?,
            objects,
            xds_addr: self.in_cluster.is_none().then_some(self.xds_addr),
            secure_addr: self.secure_addr,
            run_dir: self.run_dir,
            admin_addr: self.admin_addr,
            status_addr: self.status_addr,
            mesh: MeshOptions {
                trust_domain: self.trust_domain,
                root_namespace: self.root_namespace,
                cluster_id: self.cluster_id,
                ..MeshOptions::default()
            },
        })
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    strata_runtime::logging::init("strata-control");
    let config = Args::parse().config()?;
    let control = Control::start(config).await.context("starting the control plane")?;
    strata_runtime::shutdown_signal().await;
    control.stop().await;
    Ok(())
}
