//! The contract between the two layers: messages and file descriptors over one unix socket per node.
//!
//! This is the only crate both layers share besides `core` and `bpf/abi`. The agent listens and owns every
//! map; the proxy connects, gets the network namespaces of enrolled pods, and hands back its listeners and
//! short-cuts. It holds no BPF capability and needs none.

mod connection;
pub mod message;
mod seqpacket;

pub use connection::{AgentEnd, Connection, HandoffError, ProxyEnd};
pub use message::{AgentMessage, PodInfo, ProxyMessage, Refused, ShortCut, VERSION};
pub use seqpacket::{Listener, SeqPacket};
/// Kinds of listeners, the order of descriptors in [`ProxyMessage::Listeners`], the marks of a pod's rules, and the port
/// inside a pod that its DNS queries are led to.
pub use strata_abi::{DNS_CAPTURE_PORT, listener, mark};
