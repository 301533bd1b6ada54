//! What plugin and agent say to each other: one JSON line each way over the agent's `cni.sock`, then the end.
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Longest line in bytes; a GC call lists every attachment of the node.
pub const MAX_LINE: u64 = 4 << 20;

/// Plugin to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Request {
    Add(Add),
    /// Nothing there is fine.
    Del {
        attachment: AttachmentId,
    },
    Check(Check),
    /// Every attachment that is not listed is removed.
    Gc {
        valid: Vec<AttachmentId>,
    },
    /// Whether ADD would succeed now.
    Status,
}

/// What CNI identifies an attachment by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttachmentId {
    pub container_id: String,
    pub ifname: String,
}

impl std::fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

/// The pod a container belongs to, from `CNI_ARGS`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
    /// Kubernetes' uid; empty if the runtime did not say.
    #[serde(default)]
    pub uid: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Add {
    pub attachment: AttachmentId,
    /// Path of the network namespace.
    pub netns: PathBuf,
    pub pod: PodName,
    /// Another plugin made the device and chose these addresses; only policy, services and capture are ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chained: Option<Vec<IpAddr>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub attachment: AttachmentId,
    pub netns: PathBuf,
    /// The addresses the runtime remembers from ADD.
    pub addresses: Vec<IpAddr>,
}

/// Agent to plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Response {
    Added(Added),
    /// DEL, CHECK, GC and STATUS: it is as it should be.
    Done,
    Failed(Failure),
}

/// What ADD made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    pub host: Device,
    pub pod: Device,
    pub addresses: Vec<Address>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub name: String,
    pub mac: String,
    pub mtu: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    pub address: IpNet,
    pub gateway: IpAddr,
}

/// An error in CNI's terms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}{}{details}", if details.is_empty() { "" } else { ": " })]
pub struct Failure {
    /// [`crate::code`].
    pub code: u32,
    /// Short and stable.
    pub message: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl Failure {
    pub fn new(code: u32, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into(), details: String::new() }
    }

    #[must_use]
    pub fn because(mut self, details: impl std::fmt::Display) -> Failure {
        self.details = details.to_string();
        self
    }
}
