//! `connect()` and UDP `sendto()`: service translation, policy with an errno, and capture.
use core::ptr;

use aya_ebpf::{
    EbpfContext as _, Global, helpers::generated::bpf_setsockopt, macros::cgroup_sock_addr, programs::SockAddrContext,
};
use strata_abi::{Addr, FlowEvent, PodRecord, Translation, UdpPeerKey, Verdict, VipRecord, hook, mark, proto, stat};
use strata_bpf_core::{
    Maps as _,
    connect::{Action, Call, Decision, decide, errno, own_address},
};

use super::sock_addr::{
    Family, V4, V6, bound_device, from_proxy, netns_cookie, point, port, protocol, set_errno, socket_cookie,
};
use crate::{
    events::emit,
    maps::{Kernel, PODS, TRANSLATIONS, UDP_PEERS, count},
};

pub(super) const ALLOW: i32 = 1;
pub(super) const REFUSE: i32 = 0;
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const SO_MARK: i32 = 36;
const IPPROTO_TCP: u32 = 6;
pub(super) const IPPROTO_UDP: u32 = 17;
const IPPROTO_MPTCP: u32 = 262;
/// `BPF_NOEXIST`: only if it is new.
const NO_EXIST: u64 = 1;

/// Set by the loader. `#[used]`: as in `sk_lookup`.
#[used]
#[unsafe(no_mangle)]
static NODE_NETNS_COOKIE: Global<u64> = Global::new(0);

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::<V4>(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::<V6>(&ctx)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg::<V4>(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    sendmsg::<V6>(&ctx)
}

/// What was asked, kept for the record.
pub(super) struct Asked<'a> {
    pub(super) dst: Addr,
    pub(super) dst_port: u16,
    pub(super) proto: u8,
    pub(super) pod: Option<&'a PodRecord>,
    pub(super) netns_cookie: u64,
}

#[inline(always)]
fn asked<F: Family>(ctx: &SockAddrContext) -> Option<Asked<'static>> {
    let proto = match protocol(ctx) {
        IPPROTO_TCP | IPPROTO_MPTCP => proto::TCP,
        IPPROTO_UDP => proto::UDP,
        _ => return None,
    };
    let cookie = netns_cookie(ctx);
    let dst = F::read(ctx);
    // Everybody's loopback is his own; the node's has its ports.
    if dst.is_loopback() && cookie != NODE_NETNS_COOKIE.load() {
        return None;
    }
    // SAFETY: sparse hash elements are freed by RCU, after this program.
    let pod = unsafe { PODS.get(&cookie) };
    Some(Asked { dst, dst_port: port(ctx), proto, pod, netns_cookie: cookie })
}

#[inline(always)]
fn ask(asked: &Asked<'_>) -> Decision {
    let call = Call {
        pod: asked.pod,
        netns_cookie: asked.netns_cookie,
        dst: asked.dst,
        dst_port: asked.dst_port,
        proto: asked.proto,
        from_proxy: from_proxy(asked.netns_cookie),
    };
    decide(&Kernel, &call)
}

#[inline(always)]
fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    // A socket may be connected again, elsewhere: what was noted of the first time must go.
    forget(ctx);
    // Protocols without ports we know (ping sockets, UDP-Lite, SCTP) are judged by their packets.
    let Some(asked) = asked::<F>(ctx) else { return ALLOW };
    let decision = ask(&asked);
    match decision.action {
        Action::Ignore => ALLOW,
        Action::Pass => {
            if decision.verdict as u8 == Verdict::Direct as u8 {
                count(stat::CONNECT_DIRECT, 1);
            }
            // Processes of the node are no pod's flow unless something was done to them.
            if asked.pod.is_some() {
                report(ctx, &asked, &decision, hook::CONNECT);
            }
            ALLOW
        }
        Action::Rewrite => {
            if !point::<F>(ctx, &decision.dst, decision.dst_port) {
                return refuse(ctx, &asked, &decision, errno::ECONNREFUSED, hook::CONNECT);
            }
            remember(ctx, &asked, &decision);
            let direct = decision.verdict as u8 == Verdict::Direct as u8;
            count(if direct { stat::CONNECT_DIRECT } else { stat::CONNECT_TRANSLATED }, 1);
            report(ctx, &asked, &decision, hook::CONNECT);
            ALLOW
        }
        Action::Steer | Action::Lead => {
            if matches!(decision.action, Action::Lead) {
                if !point::<F>(ctx, &decision.dst, decision.dst_port) {
                    return refuse(ctx, &asked, &decision, errno::ECONNREFUSED, hook::CONNECT);
                }
                remember(ctx, &asked, &decision);
            }
            if !steer(ctx) {
                return refuse(ctx, &asked, &decision, errno::EPERM, hook::CONNECT);
            }
            count(stat::CONNECT_STEERED, 1);
            report(ctx, &asked, &decision, hook::CONNECT);
            ALLOW
        }
        Action::Refuse(errno) => refuse(ctx, &asked, &decision, errno, hook::CONNECT),
    }
}

/// Datagrams with an address of their own: as connect(), but only the first to a backend is reported.
#[inline(always)]
fn sendmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    let Some(asked) = asked::<F>(ctx) else { return ALLOW };
    let decision = ask(&asked);
    match decision.action {
        Action::Ignore | Action::Pass | Action::Steer | Action::Lead => ALLOW,
        Action::Rewrite => {
            if !point::<F>(ctx, &decision.dst, decision.dst_port) {
                return refuse(ctx, &asked, &decision, errno::ECONNREFUSED, hook::SENDMSG);
            }
            remember_peer(ctx, &asked, &decision, stat::CONNECT_TRANSLATED);
            ALLOW
        }
        // A datagram to a plain address may answer one that was let in: only the packet programs know who opened.
        Action::Refuse(errno) if errno == errno::EPERM && decision.dst == asked.dst => ALLOW,
        Action::Refuse(errno) => refuse(ctx, &asked, &decision, errno, hook::SENDMSG),
    }
}

/// Leads the SYN to lo: the mark selects the capture rule in the pod, a device would keep it from being asked.
#[inline(always)]
fn steer(ctx: &SockAddrContext) -> bool {
    let mut no_device = [0u8; 4];
    let mut capture = mark::CAPTURE;
    if bound_device(ctx) != 0 {
        // SAFETY: the context of this hook, a live buffer of the length said.
        let cleared = unsafe {
            bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTODEVICE, ptr::from_mut(&mut no_device).cast(), 4)
        };
        if cleared != 0 {
            return false;
        }
    }
    // SAFETY: as above.
    let marked = unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_MARK, ptr::from_mut(&mut capture).cast(), 4) };
    marked == 0
}

#[inline(always)]
fn refuse(ctx: &SockAddrContext, asked: &Asked<'_>, decision: &Decision, errno: i32, at: u8) -> i32 {
    set_errno(errno);
    count(stat::CONNECT_DENIED, 1);
    count(stat::DROPS + decision.reason as u32, 1);
    report(ctx, asked, &Decision { verdict: Verdict::Dropped, ..*decision }, at);
    REFUSE
}

#[inline(always)]
pub(super) fn remember(ctx: &SockAddrContext, asked: &Asked<'_>, decision: &Decision) {
    let mut translation = Translation {
        vip: asked.dst,
        backend: decision.dst,
        vip_port: asked.dst_port,
        backend_port: decision.dst_port,
    };
    // SAFETY: the context's socket is live; the value is copied.
    let stored = unsafe { TRANSLATIONS.get_or_insert_ptr_mut(ctx, Some(&mut translation)) };
    if !stored.is_null() {
        // SAFETY: the socket's own storage, and the socket is locked or not yet shared. Needed where an entry was there before.
        unsafe { *stored = translation };
    }
}

/// As [`remember`] for unconnected UDP; the first datagram to a backend is counted and reported.
#[inline(always)]
pub(super) fn remember_peer(ctx: &SockAddrContext, asked: &Asked<'_>, decision: &Decision, counter: u32) {
    let key =
        UdpPeerKey { cookie: socket_cookie(ctx), backend: decision.dst, backend_port: decision.dst_port, _pad: [0; 6] };
    let vip = VipRecord { vip: asked.dst, vip_port: asked.dst_port, _pad: 0 };
    if UDP_PEERS.insert(&key, &vip, NO_EXIST).is_ok() {
        count(counter, 1);
        report(ctx, asked, decision, hook::SENDMSG);
    } else {
        let _ = UDP_PEERS.insert(&key, &vip, 0);
    }
}

#[inline(always)]
fn forget(ctx: &SockAddrContext) {
    // SAFETY: the context's socket is live.
    let stored = unsafe { TRANSLATIONS.get_ptr_mut(ctx) };
    if !stored.is_null() {
        // SAFETY: the socket's own storage. Port 0 translates nothing.
        unsafe { (*stored).backend_port = 0 };
    }
}

#[inline(always)]
pub(super) fn report(ctx: &SockAddrContext, asked: &Asked<'_>, decision: &Decision, at: u8) {
    let src = match asked.pod {
        Some(pod) => *own_address(pod, &decision.dst),
        None => Addr::UNSPECIFIED,
    };
    emit(FlowEvent {
        time_ns: Kernel.now_ns(),
        cookie: socket_cookie(ctx),
        netns_cookie: asked.netns_cookie,
        src,
        dst: decision.dst,
        orig_dst: asked.dst,
        src_id: decision.src_id,
        dst_id: decision.dst_id,
        rule: decision.rule,
        ifindex: asked.pod.map_or(0, |pod| pod.ifindex),
        src_port: 0,
        dst_port: decision.dst_port,
        orig_dst_port: asked.dst_port,
        proto: asked.proto,
        verdict: decision.verdict as u8,
        reason: decision.reason as u8,
        hook: at,
        direction: decision.direction,
        _pad: [0; 5],
    });
}
