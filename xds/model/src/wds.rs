//! What a node proxy knows: workloads, services, L4 policies ([`Mesh`]), decoded from `istio.workload.Address`
//! and `istio.security.Authorization`, and the pure question it answers, [`Mesh::resolve_outbound`].
//!
//! One writer ([`MeshBuilder`]) applies deltas; readers hold an immutable [`Mesh`] through a [`MeshView`].

mod decode;
mod mesh;
mod policy;
mod resolve;
mod types;

#[cfg(test)]
mod tests;

pub use decode::DecodeError;
pub use mesh::{Endpoint, Mesh, MeshBuilder, MeshConfig, MeshView, Rejected};
pub use policy::{Action, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch, Unreadable};
pub use resolve::{Peer, ResolveError, Upstream, Via};
pub use types::*;
