//! Between the cluster and the outside: what pods send out leaves by the node's address (masquerade), what comes in at
//! node ports, external addresses and host ports goes to pods.
//!
//! Inside the cluster nothing is translated per packet (ADR 0012): connections are pointed at a backend when they begin.
//! A caller outside has no such beginning here, so the kernel's own NAT does it, by the one table `inet strata`.
//! [`Edge::ruleset`] is pure; [`apply`] replaces the table at once, and connections that are open stay as they are.
mod nft;
mod ruleset;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use l4_lb::{Outside, Published};

pub use nft::{Error, apply, is_there, remove};

/// What the table of one node is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edge {
    /// Ranges of all nodes' pods.
    pub pods: BTreeSet<IpNet>,
    /// Those of this node.
    pub own_pods: BTreeSet<IpNet>,
    /// Addresses of all nodes.
    pub nodes: BTreeSet<IpAddr>,
    /// Those of this node.
    pub own_addresses: BTreeSet<IpAddr>,
    /// What pods send to other destinations than pods and nodes leaves by the node's address.
    pub masquerade: bool,
    /// Destinations outside that know the way back to pods.
    pub except: BTreeSet<IpNet>,
    /// What callers outside reach.
    pub published: BTreeMap<Published, Outside>,
}
