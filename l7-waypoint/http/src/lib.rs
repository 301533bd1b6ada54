//! The HTTP engine of the waypoint: a client's connection in, its requests judged and routed by the compiled snapshot,
//! sent to endpoints over pooled connections, answers out. HTTP/1.1, HTTP/2, upgrades and plain TCP.
//!
//! One [`Engine`] per data-plane worker (a thread with a current-thread runtime and a `LocalSet`); workers share one
//! [`Shared`]: compiled clusters with their outlier and circuit-breaker state. What decides lives in `l7-route`,
//! `l7-authz`, `l7-authn` and `l7-resilience`; here is the IO between them. How endpoints are reached (HBONE, TLS) is
//! the proxy's: see [`Connector`].

mod body;
mod call;
mod conn;
mod connector;
mod copy;
mod cors;
mod engine;
mod exchange;
mod exec;
mod ext_authz;
mod filters;
mod forward;
mod head;
mod io;
mod mirror;
mod pool;
mod prepared;
mod reply;
mod request;
mod server;
mod sniff;
mod tcp;
mod trace;
mod upgrade;
mod upstream;

pub use conn::ConnInfo;
pub use connector::{Connector, PlainConnector};
pub use engine::{Engine, EngineConfig, NoPeers};
pub use io::Io;
pub use prepared::Shared;
