//! The embedded control plane: folders of YAML or the Kubernetes API in, delta xDS and workload certificates out.
//!
//! It decides nothing about traffic itself: what the objects mean is `compat-translate`'s answer, and what a client
//! may see or be is decided by its token. Must not depend on either layer.
mod accounts;
pub mod ca;
mod cluster;
mod grants;
mod jwks;
mod keeper;
mod metrics;
mod server;
mod serving;
mod state;
pub mod tokens;

use std::net::SocketAddr;
use std::path::PathBuf;

pub use cluster::{ClusterConfig, WaypointConfig};
pub use compat_kubernetes::{Access, SERVICE_ACCOUNT};
use compat_translate::MeshOptions;
pub use server::{Control, ControlError};

/// Where objects come from.
#[derive(Debug, Clone)]
pub enum Objects {
    /// Folders (or files) of YAML, earliest first.
    Folders(Vec<PathBuf>),
    /// The API server.
    Kubernetes(Access),
}

/// Where the root is kept, and who vouches for clients.
#[derive(Debug, Clone)]
pub enum State {
    /// A folder: root key, root certificate and tokens; survives restarts.
    Folder(PathBuf),
    /// The cluster that the objects come from: the root in a Secret, service accounts' tokens reviewed by the API
    /// server. The process does there what istiod would do.
    Cluster(ClusterConfig),
}

/// What a control plane is started with.
#[derive(Debug, Clone)]
pub struct Config {
    pub objects: Objects,
    pub state: State,
    /// Plaintext xDS and CA, if wanted.
    pub xds_addr: Option<SocketAddr>,
    /// The same over TLS.
    pub secure_addr: SocketAddr,
    /// Where `control.sock` goes.
    pub run_dir: PathBuf,
    /// Admin over TCP, if wanted.
    pub admin_addr: Option<SocketAddr>,
    /// Readiness and metrics alone over TCP, if wanted.
    pub status_addr: Option<SocketAddr>,
    pub mesh: MeshOptions,
}
