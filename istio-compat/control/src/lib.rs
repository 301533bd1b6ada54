//! The embedded control plane: folders of YAML in, delta xDS and workload certificates out.
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

use compat_translate::MeshOptions;
pub use server::{Control, ControlError};

/// What a control plane is started with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folders (or files) of YAML, earliest first.
    pub sources: Vec<PathBuf>,
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
