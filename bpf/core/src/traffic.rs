//! Verdicts on packets at the host side of a pod's device.
//!
//! Everything is judged now: no verdict is remembered, so a policy change reaches open connections at once. What
//! `CONNTRACK` remembers is who opened a connection, and it is asked only when the two possible openers would
//! get different verdicts.
use strata_abi::{DropReason, FlowKey, FragmentKey, PodRecord, Verdict, pod_flag, proto};

use crate::{
    HBONE_PORT, Maps, Who, granted,
    packet::{Fragment, Packet},
    policy::{self, Judgement, Kind},
    who,
};

/// How long an idle UDP flow's opener is remembered (as Linux' own conntrack for streams).
pub const UDP_IDLE_NS: u64 = 120_000_000_000;
/// How long later fragments may follow the first (Linux' `ipfrag_time`).
pub const FRAGMENT_NS: u64 = 30_000_000_000;

/// Which way the packet goes.
#[derive(Clone, Copy, Debug)]
pub enum Way<P> {
    /// The pod sent it. `by_proxy`: whether from a socket of a proxy's cgroup; asked for only where it counts.
    FromPod {
        by_proxy: P,
    },
    ToPod,
}

/// The verdict, with what the flow event says of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    pub verdict: Verdict,
    pub reason: DropReason,
    pub rule: u32,
    pub direction: u8,
    /// Identity of the other side; 0 where it was not looked up.
    pub peer_id: u32,
    /// Whether the packet opens a connection: worth an event though forwarded.
    pub opens: bool,
}

impl Outcome {
    #[inline(always)]
    pub fn forwards(&self) -> bool {
        !matches!(self.verdict, Verdict::Dropped)
    }
}

const FORWARD: Outcome =
    Outcome { verdict: Verdict::Forwarded, reason: DropReason::None, rule: 0, direction: 0, peer_id: 0, opens: false };

#[inline(always)]
fn dropped(reason: DropReason, peer: Who) -> Outcome {
    Outcome { verdict: Verdict::Dropped, reason, peer_id: peer.id, ..FORWARD }
}

/// A packet as the pod sees it.
struct Seen<'a> {
    pod: &'a PodRecord,
    packet: &'a Packet,
    peer: Who,
    /// Port on the pod's side and on the other's.
    local_port: u16,
    remote_port: u16,
    from_pod: bool,
}

/// Judges a packet of `pod`.
#[inline(always)]
pub fn judge<M: Maps, P: Fn() -> bool>(maps: &M, pod: &PodRecord, packet: &Packet, way: Way<P>) -> Outcome {
    let from_pod = matches!(way, Way::FromPod { .. });
    // 1. Neighbour and multicast-listener discovery (RFC 4861, 2710, 3810) carry the link itself.
    if is_discovery(packet, from_pod) {
        return FORWARD;
    }
    // 2. A pod speaks with its own addresses.
    if from_pod && !speaks_for_itself(pod, packet) {
        let none = Who { id: 0, flags: 0 };
        return dropped(DropReason::SpoofedSource, none);
    }
    let remote = if from_pod { packet.dst } else { packet.src };
    let (local_port, remote_port) =
        if from_pod { (packet.src_port, packet.dst_port) } else { (packet.dst_port, packet.src_port) };
    let seen = Seen { pod, packet, peer: who(maps, &remote), local_port, remote_port, from_pod };
    if let Fragment::Later(id) = packet.fragment {
        return later_fragment(maps, &seen, id);
    }
    let outcome = match packet.proto {
        proto::TCP if packet.is_syn() => syn(maps, &seen, way),
        proto::TCP => established(maps, &seen),
        proto::UDP => udp(maps, &seen),
        proto::ICMP | proto::ICMPV6 => icmp(maps, &seen),
        _ => either(maps, &seen),
    };
    if let (Fragment::First(id), true) = (packet.fragment, outcome.forwards()) {
        remember_fragment(maps, packet, id);
    }
    outcome
}

/// Discovery as the RFCs send it: ICMPv6 over IPv6, and never beyond the link. Anything else that looks like it is a
/// packet like others, or a pod could carry data past policy in it.
#[inline(always)]
fn is_discovery(packet: &Packet, from_pod: bool) -> bool {
    let on_link = |addr: &strata_abi::Addr| addr.is_v6_link_local() || addr.is_multicast();
    packet.proto == proto::ICMPV6
        && matches!(packet.icmp_type, 130..=137 | 143)
        && packet.src.as_v4().is_none()
        && packet.dst.as_v4().is_none()
        && (on_link(&packet.dst) || (!from_pod && on_link(&packet.src)))
}

#[inline(always)]
fn speaks_for_itself(pod: &PodRecord, packet: &Packet) -> bool {
    let own = packet.src == pod.v4 || packet.src == pod.v6;
    own && !packet.src.is_unspecified()
}

/// What policy says if the pod opened the connection.
#[inline(always)]
fn if_pod_opened<M: Maps>(maps: &M, seen: &Seen<'_>) -> Judgement {
    policy::egress(maps, seen.pod.security_id, seen.peer.id, seen.packet.proto, seen.remote_port)
}

/// What policy says if the other side opened it.
#[inline(always)]
fn if_peer_opened<M: Maps>(maps: &M, seen: &Seen<'_>) -> Judgement {
    policy::ingress(maps, seen.pod.security_id, seen.peer.id, seen.packet.proto, seen.local_port)
}

/// What policy says if the sender of this packet opened the connection.
#[inline(always)]
fn if_sender_opened<M: Maps>(maps: &M, seen: &Seen<'_>) -> Judgement {
    if seen.from_pod { if_pod_opened(maps, seen) } else { if_peer_opened(maps, seen) }
}

#[inline(always)]
fn flow_key(packet: &Packet) -> FlowKey {
    FlowKey {
        src: packet.src,
        dst: packet.dst,
        src_port: packet.src_port,
        dst_port: packet.dst_port,
        proto: packet.proto,
        _pad: [0; 3],
    }
}

#[inline(always)]
fn outcome(judged: Judgement, peer: Who) -> Outcome {
    let verdict = match judged.kind {
        Kind::DeniedByRule | Kind::DeniedByDefault => Verdict::Dropped,
        Kind::Audited => Verdict::Audited,
        Kind::NoPolicy | Kind::Allowed => Verdict::Forwarded,
    };
    Outcome {
        verdict,
        reason: judged.reason(),
        rule: judged.rule,
        direction: judged.direction,
        peer_id: peer.id,
        opens: false,
    }
}

/// Whether the pod ends mutual-TLS tunnels on port 15008 itself or through its proxy.
#[inline(always)]
fn tunnels(pod: &PodRecord) -> bool {
    pod.flags & (pod_flag::ENROLLED | pod_flag::WAYPOINT) != 0
}

/// The first packet of a TCP connection: strict.
#[inline(always)]
fn syn<M: Maps, P: Fn() -> bool>(maps: &M, seen: &Seen<'_>, way: Way<P>) -> Outcome {
    let packet = seen.packet;
    if let Way::FromPod { by_proxy } = way {
        let enrolled = seen.pod.flags & pod_flag::ENROLLED != 0;
        let by_proxy = enrolled && by_proxy();
        // 1. The guard: a meshed pod's TCP leaves by the proxy or under a grant.
        if enrolled && !by_proxy && !granted(maps, &packet.src, &packet.dst, packet.dst_port) {
            return dropped(DropReason::MeshBypass, seen.peer);
        }
        // 2. A tunnel's inner port is what policy means, and connect() has judged it (docs/limits.md says how far).
        //    Past the guard only the proxy (or a waypoint) can have sent this.
        if packet.dst_port == HBONE_PORT && tunnels(seen.pod) && (by_proxy || !enrolled) {
            return Outcome { peer_id: seen.peer.id, opens: true, ..FORWARD };
        }
    } else if packet.dst_port == HBONE_PORT && tunnels(seen.pod) {
        // 3. Nobody gets past the proxy's handshake without a certificate; authorization judges the inner port.
        return Outcome { peer_id: seen.peer.id, opens: true, ..FORWARD };
    }
    let mut result = outcome(if_sender_opened(maps, seen), seen.peer);
    if result.forwards() {
        remember_flow(maps, packet);
        result.opens = true;
    }
    result
}

/// Any other TCP packet.
#[inline(always)]
fn established<M: Maps>(maps: &M, seen: &Seen<'_>) -> Outcome {
    // Tunnels, either direction: their SYN was let through as one.
    if tunnels(seen.pod) && (seen.local_port == HBONE_PORT || seen.remote_port == HBONE_PORT) {
        return FORWARD;
    }
    let out = if_pod_opened(maps, seen);
    let inn = if_peer_opened(maps, seen);
    match (out.allows(), inn.allows()) {
        (true, true) => FORWARD,
        // Not known which of the two it would have been; the lower port is the service's.
        (false, false) => outcome(if seen.local_port < seen.remote_port { inn } else { out }, seen.peer),
        _ => match opened_by_sender(maps, seen, u64::MAX) {
            Some(true) => outcome(if seen.from_pod { out } else { inn }, seen.peer),
            Some(false) => outcome(if seen.from_pod { inn } else { out }, seen.peer),
            // Opened before these programs saw it, or forgotten. What the pod sends must be allowed as its own, or a
            // pod could send without ever having opened; what comes in is its sender's node's to judge.
            None if seen.from_pod => outcome(out, seen.peer),
            None => FORWARD,
        },
    }
}

/// Who opened the flow this packet belongs to, if known. Entries older than `max_age_ns` are forgotten.
#[inline(always)]
fn opened_by_sender<M: Maps>(maps: &M, seen: &Seen<'_>, max_age_ns: u64) -> Option<bool> {
    match find_opener(maps, seen.packet, max_age_ns) {
        OPENED_BY_SENDER => Some(true),
        OPENED_BY_RECEIVER => Some(false),
        _ => None,
    }
}

const OPENED_BY_SENDER: u32 = 1;
const OPENED_BY_RECEIVER: u32 = 2;

// The functions below are not inlined, to keep their keys off the hook's stack; they return numbers.

#[inline(never)]
fn find_opener<M: Maps>(maps: &M, packet: &Packet, max_age_ns: u64) -> u32 {
    let mut key = flow_key(packet);
    if alive(maps, &key, max_age_ns) {
        return OPENED_BY_SENDER;
    }
    key = key.reversed();
    if alive(maps, &key, max_age_ns) {
        return OPENED_BY_RECEIVER;
    }
    0
}

/// Whether the flow is remembered; keeps a UDP one alive.
#[inline(always)]
fn alive<M: Maps>(maps: &M, key: &FlowKey, max_age_ns: u64) -> bool {
    let Some(seen_ns) = maps.flow_seen(key) else { return false };
    if max_age_ns == u64::MAX {
        return true;
    }
    let now = maps.now_ns();
    if now.saturating_sub(seen_ns) > max_age_ns {
        return false;
    }
    maps.set_flow_seen(key, now);
    true
}

#[inline(never)]
fn remember_flow<M: Maps>(maps: &M, packet: &Packet) -> u32 {
    maps.set_flow_seen(&flow_key(packet), maps.now_ns());
    0
}

#[inline(never)]
fn remember_fragment<M: Maps>(maps: &M, packet: &Packet, id: u32) -> u32 {
    maps.set_fragment_seen(&fragment_key(packet, id), maps.now_ns());
    0
}

#[inline(never)]
fn fragment_passed<M: Maps>(maps: &M, packet: &Packet, id: u32) -> u32 {
    match maps.fragment_seen(&fragment_key(packet, id)) {
        Some(seen_ns) => u32::from(maps.now_ns().saturating_sub(seen_ns) <= FRAGMENT_NS),
        None => 0,
    }
}

/// UDP: remembered only where a policy isolates the pod in either direction.
#[inline(always)]
fn udp<M: Maps>(maps: &M, seen: &Seen<'_>) -> Outcome {
    let out = if_pod_opened(maps, seen);
    let inn = if_peer_opened(maps, seen);
    if out.kind == Kind::NoPolicy && inn.kind == Kind::NoPolicy {
        return FORWARD;
    }
    let (forward, backward) = if seen.from_pod { (out, inn) } else { (inn, out) };
    match opened_by_sender(maps, seen, UDP_IDLE_NS) {
        Some(true) => outcome(forward, seen.peer),
        Some(false) => outcome(backward, seen.peer),
        None => {
            let mut result = outcome(forward, seen.peer);
            if result.forwards() {
                remember_flow(maps, seen.packet);
                result.opens = true;
            }
            result
        }
    }
}

/// ICMP and ICMPv6: errors always (path MTU needs them), echo requests by their direction, the rest by either.
#[inline(always)]
fn icmp<M: Maps>(maps: &M, seen: &Seen<'_>) -> Outcome {
    let v6 = seen.packet.proto == proto::ICMPV6;
    match (v6, seen.packet.icmp_type) {
        (false, 3 | 11 | 12) | (true, 1..=4) => FORWARD,
        (false, 8) | (true, 128) => outcome(if_sender_opened(maps, seen), seen.peer),
        _ => either(maps, seen),
    }
}

/// Protocols without a notion of an opener: allowed if either direction is.
#[inline(always)]
fn either<M: Maps>(maps: &M, seen: &Seen<'_>) -> Outcome {
    let forward = if_sender_opened(maps, seen);
    if forward.allows() {
        return outcome(forward, seen.peer);
    }
    let backward = if seen.from_pod { if_peer_opened(maps, seen) } else { if_pod_opened(maps, seen) };
    outcome(if backward.allows() { backward } else { forward }, seen.peer)
}

#[inline(always)]
fn fragment_key(packet: &Packet, id: u32) -> FragmentKey {
    FragmentKey { src: packet.src, dst: packet.dst, id, proto: packet.proto, _pad: [0; 3] }
}

/// A fragment without ports: passes if its first did, or if nothing isolates the pod anyway.
#[inline(always)]
fn later_fragment<M: Maps>(maps: &M, seen: &Seen<'_>, id: u32) -> Outcome {
    if fragment_passed(maps, seen.packet, id) != 0 {
        return FORWARD;
    }
    let judged = if_sender_opened(maps, seen);
    if judged.kind == Kind::NoPolicy { FORWARD } else { dropped(DropReason::PolicyDenied, seen.peer) }
}

#[cfg(test)]
mod tests;
