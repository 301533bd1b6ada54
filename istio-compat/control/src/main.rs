//! `strata-control`: see the library.
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Parser;
use compat_control::{Config, Control};
use compat_translate::MeshOptions;

/// The embedded control plane: serves xDS (as istiod does) and workload certificates from folders of YAML.
///
/// Every client needs a token: --state-dir/tokens/node/NODE for a node's proxy,
/// --state-dir/tokens/sa/NAMESPACE/ACCOUNT for a waypoint. They are written for every Node and ServiceAccount in the
/// sources and stay the same over restarts, as does the root certificate, --state-dir/root-cert.pem.
#[derive(Debug, Parser)]
#[command(name = "strata-control", version)]
struct Args {
    /// Where objects come from: `dir:PATH`, repeatable; later ones overlay earlier ones object by object.
    #[arg(long = "source", required = true, value_name = "dir:PATH")]
    sources: Vec<String>,
    /// Keeps the root key and the tokens (mode 0600).
    #[arg(long, env = "STRATA_STATE_DIR", default_value = "/var/lib/strata/control")]
    state_dir: PathBuf,
    /// Plaintext xDS and CA, for loopback and labs; tokens are required here too.
    #[arg(long, default_value = "0.0.0.0:15010")]
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
    /// Trust domain of the identities issued.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    trust_domain: String,
    /// Namespace of mesh-wide policies.
    #[arg(long, env = "ROOT_NAMESPACE", default_value = "istio-system")]
    root_namespace: String,
    /// Cluster part of workload names.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    cluster_id: String,
}

impl Args {
    fn config(self) -> anyhow::Result<Config> {
        let mut sources = Vec::new();
        for source in &self.sources {
            match source.split_once(':') {
                Some(("dir", path)) if !path.is_empty() => sources.push(PathBuf::from(path)),
                _ => bail!("--source {source}: write dir:PATH"),
            }
        }
        Ok(Config {
            sources,
            state_dir: self.state_dir,
            xds_addr: self.xds_addr,
            secure_addr: self.secure_addr,
            run_dir: self.run_dir,
            admin_addr: self.admin_addr,
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
