//! What every Strata process stands on: drain, readiness, named tasks, admin server, metrics registry,
//! logging. It knows nothing of meshes, packets or requests, and shows none of hyper's types.

pub mod admin;
pub mod client;
pub mod drain;
pub mod file;
pub mod logging;
pub mod metrics;
pub mod ready;
pub mod task;

pub use prometheus_client;
pub use ready::{Readiness, ReadyGuard};
pub use task::shutdown_signal;
