//! One section per map: name, key, value.
use crate::Addr;

macro_rules! pod {
    ($($t:ty = $size:literal),* $(,)?) => {$(
        const _: () = assert!(core::mem::size_of::<$t>() == $size);
        // SAFETY: repr(C), no implicit padding (the size is asserted above against the sum of the fields), every bit pattern valid.
        unsafe impl crate::Plain for $t {}
    )*};
}

/// Map and program names, as pinned under `<bpffs>/v<ABI_VERSION>/`.
pub mod names {
    /// `HashMap<u64, PodRecord>`: network-namespace cookie -> pod.
    pub const PODS: &str = "PODS";
    /// `HashMap<u32, PodRecord>`: host-side ifindex -> pod.
    pub const PODS_BY_IFINDEX: &str = "PODS_BY_IFINDEX";
    /// `LpmTrie<Addr, Identity>`: address -> security identity.
    pub const IDENTITIES: &str = "IDENTITIES";
    /// `HashMap<ServiceKey, Service>`.
    pub const SERVICES: &str = "SERVICES";
    /// `HashMap<BackendKey, Backend>`.
    pub const BACKENDS: &str = "BACKENDS";
    /// `LpmTrie<PolicyKey, PolicyEntry>`.
    pub const POLICY: &str = "POLICY";
    /// `SockHash<ListenerKey>`: the proxy's listeners inside each pod.
    pub const LISTENERS: &str = "LISTENERS";
    /// `HashMap<GrantKey, Grant>`: short-cuts the upper layer granted.
    pub const GRANTS: &str = "GRANTS";
    /// `Array<NodeConfig>`, one element.
    pub const CONFIG: &str = "CONFIG";
    /// `RingBuf` of `FlowEvent`.
    pub const EVENTS: &str = "EVENTS";
    /// `PerCpuArray<u64>` indexed by `stat`.
    pub const STATS: &str = "STATS";
    /// `LruHashMap<FlowKey, FlowState>`: who opened a connection; see [`super::FlowKey`].
    pub const CONNTRACK: &str = "CONNTRACK";
    /// `SkStorage<Translation>`: what a connected socket asked for and what it got.
    pub const TRANSLATIONS: &str = "TRANSLATIONS";
    /// `LruHashMap<UdpPeerKey, VipRecord>`: the same for unconnected UDP, one entry a backend spoken to.
    pub const UDP_PEERS: &str = "UDP_PEERS";
    /// `LruHashMap<AffinityKey, AffinityEntry>`: session affinity by client.
    pub const AFFINITY: &str = "AFFINITY";
    /// `LruHashMap<FragmentKey, u64>`: first fragments that policy let pass (nanoseconds since boot).
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// `HashMap<Addr, u32>`: resolvers (port 53) in whose place the proxy answers meshed pods. The value means nothing.
    pub const RESOLVERS: &str = "RESOLVERS";

    /// Every map, in no particular order.
    pub const ALL: [&str; 17] = [
        PODS,
        PODS_BY_IFINDEX,
        IDENTITIES,
        SERVICES,
        BACKENDS,
        POLICY,
        LISTENERS,
        GRANTS,
        CONFIG,
        EVENTS,
        STATS,
        CONNTRACK,
        TRANSLATIONS,
        UDP_PEERS,
        AFFINITY,
        FRAGMENTS,
        RESOLVERS,
    ];
}

/// A pod of this node. Value of `PODS` and `PODS_BY_IFINDEX`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PodRecord {
    /// IPv4 address, mapped; unspecified if the pod has none.
    pub v4: Addr,
    /// IPv6 address; unspecified if the pod has none.
    pub v6: Addr,
    pub security_id: u32,
    /// Bits of [`pod_flag`].
    pub flags: u32,
    /// Host-side interface of the pod.
    pub ifindex: u32,
    /// Node-local number of the pod, key part of `LISTENERS`; never reused while the agent's state lives.
    pub pod_index: u32,
    pub netns_cookie: u64,
}

pub mod pod_flag {
    /// Capture is in force: outbound TCP is steered to the proxy, the guard is on.
    pub const ENROLLED: u32 = 1;
    /// The pod terminates and opens HBONE itself (a waypoint): nothing of it is captured, its
    /// port 15008 is exempt from NetworkPolicy as an enrolled pod's is.
    pub const WAYPOINT: u32 = 2;
}

/// Value of `IDENTITIES`. Key: `Addr` with prefix length 0..=128 (an IPv4 prefix is 96 + n).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Identity {
    pub security_id: u32,
    /// Bits of [`identity_flag`].
    pub flags: u32,
}

pub mod identity_flag {
    /// The address belongs to a pod of this node.
    pub const LOCAL_POD: u32 = 1;
}

/// Key of `SERVICES`. A service's address with `port` 0 and `proto` 0 marks the address as a
/// service's, so that an undefined port is refused rather than sent out.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServiceKey {
    pub addr: Addr,
    pub port: u16,
    pub proto: u8,
    pub _pad: u8,
}

/// Value of `SERVICES`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Service {
    /// Key part of `BACKENDS`; changes when the set of backends changes, so that a reader never mixes two sets.
    pub backend_set: u32,
    pub backend_count: u32,
    /// Session affinity (ClientIP) in seconds; 0 is none.
    pub affinity_seconds: u32,
    /// Bits of [`service_flag`].
    pub flags: u32,
}

pub mod service_flag {
    /// No cluster address, so that the mesh does not know the service by it: a node's, an external or a load balancer's.
    pub const OUTSIDE: u32 = 1;
}

/// Key of `BACKENDS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BackendKey {
    pub backend_set: u32,
    /// 0 .. backend_count.
    pub slot: u32,
}

/// Value of `BACKENDS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Backend {
    pub addr: Addr,
    pub port: u16,
    /// Bits of [`backend_flag`].
    pub flags: u16,
}

pub mod backend_flag {
    /// The backend is a pod of this node.
    pub const LOCAL: u16 = 1;
}

/// Key of `POLICY`, a longest-prefix-match trie: `subject, peer, direction` are always whole; `proto`
/// and `port_be` may be cut by the prefix (any protocol, any port, a power-of-two range of ports).
/// Two lookups decide: the peer's identity, then peer 0 (any). See `strata_bpf_core::policy`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PolicyKey {
    /// Security identity the policy selects.
    pub subject: u32,
    /// Security identity of the other side; 0 is any.
    pub peer: u32,
    pub direction: u8,
    pub proto: u8,
    /// Destination port in network byte order, so that a prefix is a range.
    pub port_be: [u8; 2],
}

impl PolicyKey {
    /// Prefix that fixes subject, peer and direction: any protocol.
    pub const PREFIX_ANY_PROTO: u32 = 72;
    /// Prefix that fixes the protocol too: any port.
    pub const PREFIX_ANY_PORT: u32 = 80;
    /// Prefix of one port.
    pub const PREFIX_FULL: u32 = 96;
}

/// Value of `POLICY`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PolicyEntry {
    /// [`policy_verdict`].
    pub verdict: u8,
    pub _pad: [u8; 3],
    /// Index into the agent's table of rules; 0 is "no rule: the default of an isolating policy".
    pub rule: u32,
}

pub mod policy_verdict {
    pub const ALLOW: u8 = 1;
    /// A rule denies: wins over every ALLOW.
    pub const DENY: u8 = 2;
    /// Default of an isolated subject that only audits.
    pub const AUDIT: u8 = 3;
    /// Default of an isolated subject: any ALLOW wins over it. `rule` names a policy that isolates.
    pub const DENY_DEFAULT: u8 = 4;
}

/// Key of `LISTENERS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ListenerKey {
    pub pod_index: u32,
    /// [`listener`].
    pub kind: u32,
}

/// Kinds of the proxy's listeners inside a pod.
pub mod listener {
    pub const OUTBOUND_V4: u32 = 0;
    pub const OUTBOUND_V6: u32 = 1;
    pub const INBOUND_V4: u32 = 2;
    pub const INBOUND_V6: u32 = 3;
    pub const HBONE_V4: u32 = 4;
    pub const HBONE_V6: u32 = 5;
    pub const COUNT: u32 = 6;
}

/// Key of `GRANTS`: this caller may talk to this pod's port without the proxy.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GrantKey {
    pub src: Addr,
    pub dst: Addr,
    pub port: u16,
    pub _pad: u16,
}

/// Value of `GRANTS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Grant {
    /// Generation of policy the grant was given under; valid only while `NodeConfig::grant_generation` is the same.
    pub generation: u64,
}

/// Key of `CONNTRACK`: a connection as its opener sees it. Written for every TCP SYN that passes, and for
/// UDP only where a policy isolates a side. Read only when the two directions' policies disagree,
/// so it carries no verdict: a policy change reaches open connections.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FlowKey {
    /// Who opened it.
    pub src: Addr,
    pub dst: Addr,
    pub src_port: u16,
    pub dst_port: u16,
    pub proto: u8,
    pub _pad: [u8; 3],
}

impl FlowKey {
    /// The same packets seen as a connection opened by the other side.
    #[inline(always)]
    pub const fn reversed(&self) -> FlowKey {
        FlowKey {
            src: self.dst,
            dst: self.src,
            src_port: self.dst_port,
            dst_port: self.src_port,
            proto: self.proto,
            _pad: [0; 3],
        }
    }
}

/// Value of `CONNTRACK`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FlowState {
    /// Nanoseconds since boot of the last packet that asked (UDP entries grow old by it).
    pub seen_ns: u64,
}

/// Value of `TRANSLATIONS` (by socket).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Translation {
    pub vip: Addr,
    pub backend: Addr,
    pub vip_port: u16,
    pub backend_port: u16,
}

/// Key of `UDP_PEERS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct UdpPeerKey {
    /// Socket cookie.
    pub cookie: u64,
    pub backend: Addr,
    pub backend_port: u16,
    pub _pad: [u8; 6],
}

/// Value of `UDP_PEERS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VipRecord {
    pub vip: Addr,
    pub vip_port: u16,
    pub _pad: u16,
}

/// Key of `AFFINITY`. The client is the caller's network namespace, which is its pod.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AffinityKey {
    pub netns_cookie: u64,
    pub addr: Addr,
    pub port: u16,
    pub proto: u8,
    pub _pad: [u8; 5],
}

/// Value of `AFFINITY`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AffinityEntry {
    /// Nanoseconds since boot of the last connection.
    pub last_ns: u64,
    /// The slot in the set it was chosen from; looked at again when the set has changed.
    pub slot: u32,
    pub port: u16,
    pub _pad: u16,
    pub addr: Addr,
}

/// Key of `FRAGMENTS`: an IP datagram (RFC 791 section 3.2, RFC 8200 section 4.5).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FragmentKey {
    pub src: Addr,
    pub dst: Addr,
    pub id: u32,
    pub proto: u8,
    pub _pad: [u8; 3],
}

/// Where a node proxy runs. All zero: none.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProxyPlace {
    /// Its cgroup v2 id: its sockets in pods are never captured and pass the guard.
    pub cgroup: u64,
    /// Network-namespace cookie of its own pod: there it is captured and translated like any process.
    pub home: u64,
}

/// Proxies of one node at a time: the one in charge and those that drain.
pub const MAX_PROXIES: usize = 4;

/// The one element of `CONFIG`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NodeConfig {
    /// In no order. An array here and no map: the connect hook has no stack left for a key.
    pub proxies: [ProxyPlace; MAX_PROXIES],
    /// Raised to revoke every short-cut at once.
    pub grant_generation: u64,
    /// Raised with every change of policy; cached verdicts of another generation are asked again.
    pub policy_generation: u64,
    pub node_v4: Addr,
    pub node_v6: Addr,
}

/// Indexes of `STATS`.
pub mod stat {
    pub const EVENTS_LOST: u32 = 0;
    pub const CONNECT_TRANSLATED: u32 = 1;
    pub const CONNECT_STEERED: u32 = 2;
    pub const CONNECT_DIRECT: u32 = 3;
    pub const CONNECT_DENIED: u32 = 4;
    pub const PACKETS_FORWARDED: u32 = 5;
    pub const PACKETS_DROPPED: u32 = 6;
    pub const BYTES_FORWARDED: u32 = 7;
    /// Drops by reason start here: `DROPS + DropReason`.
    pub const DROPS: u32 = 16;
    pub const COUNT: u32 = 48;
}

/// Where the proxy answers DNS queries inside a pod, on loopback; as Istio's.
pub const DNS_CAPTURE_PORT: u16 = 15053;

/// Marks used inside a pod's network namespace (`research/capture-spike.md` E1d, E3).
pub mod mark {
    /// Set by the connect hook on a captured socket: leads the SYN to lo, into the proxy.
    pub const CAPTURE: u32 = 0x2539;
    /// Set by the proxy on its hop to the application.
    pub const TO_APP: u32 = 0x539;
}

pod! {
    Addr = 16,
    PodRecord = 56,
    Identity = 8,
    ServiceKey = 20,
    Service = 16,
    BackendKey = 8,
    Backend = 20,
    PolicyKey = 12,
    PolicyEntry = 8,
    ListenerKey = 8,
    GrantKey = 36,
    Grant = 8,
    ProxyPlace = 16,
    NodeConfig = 112,
    FlowKey = 40,
    FlowState = 8,
    Translation = 36,
    UdpPeerKey = 32,
    VipRecord = 20,
    AffinityKey = 32,
    AffinityEntry = 32,
    FragmentKey = 40,
}
