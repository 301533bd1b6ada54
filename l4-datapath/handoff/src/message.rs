//! What the two ends say. One JSON object a datagram, tagged by `type`; unknown fields are ignored so that
//! a newer end can add some, an unknown `type` is an error the receiver logs and skips.
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Version of the protocol; ends with different versions refuse each other in `Hello`.
pub const VERSION: u32 = 1;

/// Agent to proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AgentMessage {
    /// Answers the proxy's `Hello`.
    Hello { version: u32, node: String },
    /// An enrolled pod, with one descriptor: its network namespace. Sent again after a reconnect.
    PodAdded { pod: PodInfo },
    /// The pod is gone or no longer enrolled: close its listeners, drain its connections.
    PodRemoved { uid: String },
    /// Every enrolled pod has been sent; pods the proxy knows and did not hear of are gone.
    SnapshotSent,
}

/// Proxy to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ProxyMessage {
    /// First message of a connection.
    Hello {
        version: u32,
        pid: u32,
        /// Resolvers in whose place the proxy answers DNS queries inside pods. Earlier proxies say nothing of it.
        #[serde(default)]
        resolvers: Vec<IpAddr>,
    },
    /// The proxy listens inside the pod: one descriptor for each kind (`strata_abi::listener`), in this order.
    Listeners { uid: String, kinds: Vec<u32> },
    /// The proxy could not listen inside the pod; the pod stays unenrolled and its status says why.
    PodFailed { uid: String, error: String },
    /// These two pods may talk straight (DIRECT).
    Grant(ShortCut),
    /// New connections go through the proxy again.
    Revoke(ShortCut),
    /// All short-cuts end.
    RevokeAll,
    /// The proxy's authorization refused a connection: becomes a flow event of layer `mesh`.
    Refused(Refused),
}

/// A pod as the proxy needs to know it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PodInfo {
    /// `Kubernetes//Pod/NAMESPACE/NAME`, the uid istiod uses for pods.
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub service_account: String,
    pub node: String,
    pub ips: Vec<IpAddr>,
    /// Key part of the listener map.
    pub pod_index: u32,
}

/// A caller, a destination pod of the same node, and its port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShortCut {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub port: u16,
}

/// A refused connection and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub src: IpAddr,
    pub src_port: u16,
    pub dst: IpAddr,
    pub dst_port: u16,
    /// The policy that decided, `namespace/name`; empty if none did (no ALLOW policy matched).
    pub policy: String,
    /// Short and stable: `denied by policy`, `plaintext to a STRICT workload` ...
    pub reason: String,
}
