//! Verdicts, drop reasons and reserved identities: append-only numbers, never reused.

/// What happened to a connection or packet.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Forwarded = 1,
    Dropped = 2,
    /// Steered to the node proxy.
    Redirected = 3,
    /// Would have been dropped; the policy only audits.
    Audited = 4,
    /// Forwarded to a chosen backend of a service.
    Translated = 5,
    /// Forwarded pod to pod under a short-cut grant (DIRECT).
    Direct = 6,
}

/// Why something was dropped; 0 when it was not.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DropReason {
    None = 0,
    /// A policy isolates the subject and no rule allows the peer.
    PolicyDenied = 1,
    /// A rule denies explicitly.
    PolicyDenyRule = 2,
    /// The service exists and has no ready backend.
    NoBackend = 3,
    /// The address is a service's and the port is none of its ports.
    UnknownServicePort = 4,
    /// A meshed pod's TCP tried to leave around the proxy.
    MeshBypass = 5,
    /// A packet left a pod with a source address that is not the pod's.
    SpoofedSource = 6,
    /// Capture is in force and the proxy has no listener: fail closed.
    NoListener = 7,
    /// The packet could not be parsed.
    Malformed = 8,
    /// Refused by the proxy's authorization (reported through the handoff).
    Unauthorized = 9,
    /// Plaintext to a workload that accepts mutual TLS only (reported through the handoff).
    PlaintextRefused = 10,
    /// The interface is no known pod's (the agent has not registered it yet, or has forgotten it).
    UnknownPod = 11,
}

/// Numeric security identities below [`FIRST_LOCAL_IDENTITY`] are reserved.
pub mod identity {
    pub const UNKNOWN: u32 = 0;
    /// This node.
    pub const HOST: u32 = 1;
    /// Any address no object describes.
    pub const WORLD: u32 = 2;
    /// A pod of no known workload.
    pub const UNMANAGED: u32 = 3;
    pub const HEALTH: u32 = 4;
    /// Another node of the cluster.
    pub const REMOTE_NODE: u32 = 6;
    /// First number allocated by a node for a set of labels.
    pub const FIRST_POD: u32 = 256;
    /// First number allocated by a node for a CIDR that a policy names.
    pub const FIRST_CIDR: u32 = 1 << 24;
}

/// First identity that is not reserved.
pub const FIRST_LOCAL_IDENTITY: u32 = identity::FIRST_POD;

/// IP protocol numbers used in keys; 0 stands for any.
pub mod proto {
    pub const ANY: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
}

/// Direction of a policy, seen from its subject.
pub mod direction {
    pub const INGRESS: u8 = 0;
    pub const EGRESS: u8 = 1;
}
