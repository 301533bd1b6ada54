//! Pure: NetworkPolicies, Pods, Namespaces and Nodes -> identities and the contents of the policy map.
//!
//! No I/O, no kernel. [`compile`] makes the tables, [`explain`] answers one question straight from the objects,
//! by code of its own, so that each can be checked with the other.
//!
//! Cost: one compilation takes time proportional to policies times identities; the tables of two compilations
//! differ only where the objects did (numbers are stable), so that map writes are proportional to the change.
mod cidr;
mod compile;
mod explain;
mod identity;
mod network;
mod ports;
mod rules;
mod selector;

pub use compile::{Compiled, Error, compile};
pub use explain::{Explanation, Party, Side, explain};
pub use identity::{IdentityAllocator, IdentityInfo, IdentitySource, pod_uid};
pub use rules::RuleRef;

#[cfg(test)]
mod tests;
