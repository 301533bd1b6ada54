//! Pure: Services and EndpointSlices -> the contents of the service and backend maps, for callers inside the cluster, and
//! what callers outside it may use ([`Outside`]).
//!
//! No I/O, no kernel: the agent writes the result into maps. One compilation costs time proportional to all
//! services and endpoints of the cluster; the result is compared with the maps, so writes are proportional to
//! the change.
mod backend_sets;
mod endpoints;
mod outside;
mod services;

pub use backend_sets::BackendSets;
pub use outside::{HealthCheck, HostPort, Outside, Published, host_ports};
pub use services::{Compiled, compile, node_addresses};

#[cfg(test)]
mod tests;
