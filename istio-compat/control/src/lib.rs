//! The embedded control plane: folders of YAML or the Kubernetes API in, delta xDS and workload certificates out.
//!
//! It decides nothing about traffic itself: what the objects mean is `compat-translate`'s answer, and what a client
//! may see or be is decided by its token. Must not depend on either layer.
pub mod ca;
mod jwks;
mod keeper;
mod metrics;
mod server;
mod state;
pub mod tokens;

use std::net::SocketAddr;
use std::path::PathBuf;

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

/// What a control plane is started with.
#[derive(Debug, Clone)]
pub struct Config {
    pub objects: Objects,
    /// Root key, root certificate and tokens; survives restarts.
    pub state_dir: PathBuf,
    /// Plaintext xDS and CA.
    pub xds_addr: SocketAddr,
    /// The same over TLS.
    pub secure_addr: SocketAddr,
    /// Where `control.sock` goes.
    pub run_dir: PathBuf,
    /// Admin over TCP, if wanted.
    pub admin_addr: Option<SocketAddr>,
    pub mesh: MeshOptions,
}
