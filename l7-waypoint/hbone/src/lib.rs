//! HBONE: CONNECT tunnels over mutually authenticated HTTP/2, client pool and server (xds-contract section 4).
//!
//! The seam is the [`Tunnel`]: a read half, a write half, an authority and the peer's identity. The `h2` crate
//! is behind it and shows through nowhere. Nothing here authorizes; nothing here chooses destinations.

mod client;
mod error;
mod headers;
mod keepalive;
mod pool;
mod server;
mod tunnel;

pub use error::{ConnectError, ServerError};
pub use headers::{Baggage, forwarded_for, forwarded_value};
pub use pool::{ConnectRequest, Pool, PoolConfig, PoolKey};
pub use server::{Inbound, Server, accept_tls};
pub use tunnel::{Tunnel, TunnelReader, TunnelWriter};

/// HBONE's port (Istio).
pub const PORT: u16 = 15008;

/// Receive window of one stream, bytes (ztunnel). Far below the connection's, so that a reader who stops
/// does not stop its neighbours; see `../shared/research/hbone-path.md`, Fairness.
const STREAM_WINDOW: u32 = 4 << 20;
/// Receive window of a connection, bytes (ztunnel).
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Largest DATA frame taken, bytes (ztunnel).
const MAX_FRAME: u32 = 1 << 20;
/// Largest piece handed to the connection at once, bytes: larger ones make neighbours wait.
const MAX_PIECE: usize = 64 << 10;
