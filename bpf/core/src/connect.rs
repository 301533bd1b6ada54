//! What happens to a `connect()` (or a UDP `sendto()`), decided before a packet exists.
use strata_abi::{Addr, DropReason, PodRecord, Verdict, backend_flag, identity, identity_flag, pod_flag, proto};

use crate::{
    HBONE_PORT, Maps, granted,
    policy::{self, Judgement, Kind},
    service::{self, Target},
    who,
};

/// `errno` values of Linux, as returned to the caller.
pub mod errno {
    pub const EPERM: i32 = 1;
    pub const ECONNREFUSED: i32 = 111;
}

/// The call.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The caller's pod; None for a process of the node itself.
    pub pod: Option<&'a PodRecord>,
    pub netns_cookie: u64,
    /// Mapped IPv4 is IPv4: the caller unwraps what `connect6` shows.
    pub dst: Addr,
    pub dst_port: u16,
    pub proto: u8,
    /// The caller is in the proxy's cgroup.
    pub from_proxy: bool,
}

/// What the hook does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Nothing, and nothing to report: loopback, own address, the proxy itself.
    Ignore,
    /// Leave the address alone.
    Pass,
    /// Write `dst` and `dst_port` into the call.
    Rewrite,
    /// Leave the address, set the capture mark.
    Steer,
    /// Both: write `dst` and `dst_port` into the call, set the capture mark.
    Lead,
    /// Return this errno.
    Refuse(i32),
}

/// The decision, with what the flow event says of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    pub action: Action,
    pub verdict: Verdict,
    pub reason: DropReason,
    /// The backend, if one was chosen; else what was asked for.
    pub dst: Addr,
    pub dst_port: u16,
    pub src_id: u32,
    pub dst_id: u32,
    pub rule: u32,
    pub direction: u8,
}

/// Decides, in the order of `docs/architecture.md`, "The way of a connection" 1.
#[inline(always)]
pub fn decide<M: Maps>(maps: &M, call: &Call<'_>) -> Decision {
    let mut decision = Decision {
        action: Action::Ignore,
        verdict: Verdict::Forwarded,
        reason: DropReason::None,
        dst: call.dst,
        dst_port: call.dst_port,
        src_id: call.pod.map_or(identity::HOST, |pod| pod.security_id),
        dst_id: identity::UNKNOWN,
        rule: 0,
        direction: strata_abi::direction::EGRESS,
    };
    // 1. The proxy's sockets in a pod are its own business; on the node itself it uses services as any process does.
    if call.from_proxy && call.pod.is_some() {
        return decision;
    }
    // 2. Nothing that stays in the caller's own namespace, nothing that has no single receiver. The node's ports are at its
    //    own loopback too; a namespace that is neither the node's nor a pod's does not get here.
    let own_loopback = call.dst.is_loopback() && call.pod.is_some();
    if own_loopback || call.dst.is_unspecified() || call.dst.is_multicast() || is_own(call.pod, &call.dst) {
        return decision;
    }
    let meshed = call.proto == proto::TCP && call.pod.is_some_and(|pod| pod.flags & pod_flag::ENROLLED != 0);
    // 3. Service -> backend. A meshed call to a service nobody here can serve is the proxy's to answer: a route may lead elsewhere.
    let mut backend_is_local = false;
    let target = service::resolve(maps, &call.dst, call.dst_port, call.proto, call.netns_cookie);
    let translated = match target {
        Target::Plain => false,
        Target::Backend(backend) | Target::Outside(backend) => {
            decision.dst = backend.addr;
            decision.dst_port = backend.port;
            backend_is_local = backend.flags & backend_flag::LOCAL != 0;
            true
        }
        Target::NoBackend if !meshed => return refuse(decision, errno::ECONNREFUSED, DropReason::NoBackend),
        Target::UnknownPort if !meshed => return refuse(decision, errno::ECONNREFUSED, DropReason::UnknownServicePort),
        Target::NoBackend | Target::UnknownPort => false,
    };
    let dst = who(maps, &decision.dst);
    decision.dst_id = dst.id;
    // 4. Policy of both sides, on the backend's address and port: denied is known before a packet is sent.
    let mut audited = false;
    if let Some(pod) = call.pod {
        // A pod may always reach itself, through a service too.
        if !is_own(call.pod, &decision.dst) {
            let judged = both_sides(maps, pod, dst.id, call.proto, decision.dst_port);
            decision.rule = judged.rule;
            decision.direction = judged.direction;
            if !judged.allows() {
                return refuse(decision, errno::EPERM, judged.reason());
            }
            audited = judged.kind == Kind::Audited;
        }
    }
    // 5. Meshed: the short-cut if it was granted and the other side is on this node, else the proxy.
    if meshed {
        let local = backend_is_local || dst.flags & identity_flag::LOCAL_POD != 0;
        let direct = match call.pod {
            Some(pod) if local => granted(maps, own_address(pod, &decision.dst), &decision.dst, decision.dst_port),
            _ => false,
        };
        if direct {
            decision.verdict = Verdict::Direct;
            decision.action = if translated { Action::Rewrite } else { Action::Pass };
        } else {
            decision.verdict = Verdict::Redirected;
            // The proxy knows the backend, and not a node's port or a load balancer's address.
            decision.action = if matches!(target, Target::Outside(_)) { Action::Lead } else { Action::Steer };
        }
        return decision;
    }
    // 6. Not meshed: straight to the backend.
    decision.action = if translated { Action::Rewrite } else { Action::Pass };
    decision.verdict = match (audited, translated) {
        (true, _) => Verdict::Audited,
        (false, true) => Verdict::Translated,
        (false, false) => Verdict::Forwarded,
    };
    decision
}

/// The caller's egress, then the destination's ingress; the first refusal, else the more telling of the two.
///
/// Port 15008 is not asked about: policy means a tunnel's inner port. Who may use that port is for the packet programs,
/// which know whether the pods are meshed (`traffic::syn`): here only a waypoint, a pod as any other, would come by.
#[inline(always)]
fn both_sides<M: Maps>(maps: &M, src: &PodRecord, dst: u32, proto: u8, port: u16) -> Judgement {
    let tunnel = proto == proto::TCP && port == HBONE_PORT;
    if tunnel && src.flags & pod_flag::WAYPOINT != 0 {
        return Judgement { kind: Kind::NoPolicy, rule: 0, direction: strata_abi::direction::EGRESS };
    }
    let src = src.security_id;
    let egress = policy::egress(maps, src, dst, proto, port);
    if tunnel || !egress.allows() {
        return egress;
    }
    let ingress = policy::ingress(maps, dst, src, proto, port);
    let says_more = !ingress.allows()
        || ingress.kind == Kind::Audited
        || (ingress.kind == Kind::Allowed && egress.kind != Kind::Audited);
    if says_more { ingress } else { egress }
}

#[inline(always)]
fn refuse(mut decision: Decision, errno: i32, reason: DropReason) -> Decision {
    decision.action = Action::Refuse(errno);
    decision.verdict = Verdict::Dropped;
    decision.reason = reason;
    decision
}

#[inline(always)]
fn is_own(pod: Option<&PodRecord>, addr: &Addr) -> bool {
    match pod {
        Some(pod) => pod.v4 == *addr || pod.v6 == *addr,
        None => false,
    }
}

/// The pod's address of the same family as `other`.
#[inline(always)]
pub fn own_address<'a>(pod: &'a PodRecord, other: &Addr) -> &'a Addr {
    if other.as_v4().is_some() { &pod.v4 } else { &pod.v6 }
}

#[cfg(test)]
mod tests;
