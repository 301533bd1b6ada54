//! DNS queries of meshed pods: to the proxy inside the pod, which knows the mesh's names and asks the resolver for others.
//! Its own queries there find the resolver by its service, as the pod's would.
//!
//! Programs of their own, which run after those of `connect.rs` at the same hooks: those have no stack left (the kernel gives
//! 512 bytes), and have translated the resolver's service and asked policy by then. As long as nobody listens in the pod,
//! nothing is touched: names are the resolver's alone, as they are outside the mesh.
use core::mem::size_of_val;

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_sk_lookup_udp, bpf_sk_release},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use strata_abi::{Addr, DNS_CAPTURE_PORT, DropReason, Verdict, direction, hook, identity, pod_flag, proto, stat};
use strata_bpf_core::{
    DNS_PORT,
    connect::{Action, Decision, errno},
    service::{self, Target},
};

use super::{
    connect::{ALLOW, Asked, IPPROTO_UDP, REFUSE, remember, remember_peer, report},
    names::{asked_by_socket, asked_of_peer},
    sock_addr::{
        Family, V4, V6, bound_device, errno_so_far, from_proxy, netns_cookie, point, port, protocol, set_errno,
    },
};
use crate::maps::{Kernel, PODS, RESOLVERS, count};

/// `BPF_F_CURRENT_NETNS`.
const CURRENT_NETNS: u64 = u64::MAX;

#[cgroup_sock_addr(connect4)]
pub fn dns_connect4(ctx: SockAddrContext) -> i32 {
    connect::<V4>(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn dns_connect6(ctx: SockAddrContext) -> i32 {
    connect::<V6>(&ctx)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn dns_sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg::<V4>(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn dns_sendmsg6(ctx: SockAddrContext) -> i32 {
    sendmsg::<V6>(&ctx)
}

#[inline(always)]
fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    let protocol = protocol(ctx);
    let netns_cookie = netns_cookie(ctx);
    let (mut dst, mut dst_port) = (F::read(ctx), port(ctx));
    if dst_port == DNS_PORT && from_proxy(netns_cookie) {
        return ask::<F>(ctx, dst, protocol, netns_cookie);
    }
    if protocol != IPPROTO_UDP {
        return ALLOW;
    }
    (dst, dst_port) = asked_by_socket(ctx, &dst, dst_port).unwrap_or((dst, dst_port));
    if let Some((asked, decision)) = query(ctx, dst, dst_port)
        && point::<F>(ctx, &decision.dst, decision.dst_port)
    {
        remember(ctx, &asked, &decision);
        count(stat::CONNECT_STEERED, 1);
        report(ctx, &asked, &decision, hook::CONNECT);
    }
    ALLOW
}

/// The proxy asks in a pod's place. What the pod's policy says of that it says to the packets; nothing is noted, as the proxy
/// does not care who its peer is.
#[inline(always)]
fn ask<F: Family>(ctx: &SockAddrContext, resolver: Addr, protocol: u32, netns_cookie: u64) -> i32 {
    let proto = if protocol == IPPROTO_UDP { proto::UDP } else { proto::TCP };
    match service::resolve(&Kernel, &resolver, DNS_PORT, proto, netns_cookie) {
        Target::Backend(backend) | Target::Outside(backend) => {
            point::<F>(ctx, &backend.addr, backend.port);
        }
        Target::Plain => {}
        Target::NoBackend | Target::UnknownPort => {
            set_errno(errno::ECONNREFUSED);
            return REFUSE;
        }
    }
    ALLOW
}

/// Datagrams with an address of their own: only the first to a resolver is reported.
#[inline(always)]
fn sendmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    if protocol(ctx) != IPPROTO_UDP {
        return ALLOW;
    }
    let (mut dst, mut dst_port) = (F::read(ctx), port(ctx));
    (dst, dst_port) = asked_of_peer(ctx, &dst, dst_port).unwrap_or((dst, dst_port));
    if let Some((asked, decision)) = query(ctx, dst, dst_port)
        && point::<F>(ctx, &decision.dst, decision.dst_port)
    {
        remember_peer(ctx, &asked, &decision, stat::CONNECT_STEERED);
    }
    ALLOW
}

/// What is done with a datagram to `dst` (the resolver's service, where it has one), if it is a query the proxy answers.
#[inline(always)]
fn query(ctx: &SockAddrContext, dst: Addr, dst_port: u16) -> Option<(Asked<'static>, Decision)> {
    if dst_port != DNS_PORT || bound_device(ctx) != 0 {
        return None;
    }
    let netns_cookie = netns_cookie(ctx);
    // SAFETY: sparse hash elements are freed by RCU, after this program.
    let pod = unsafe { PODS.get(&netns_cookie) }?;
    // SAFETY: as above; nothing is read of it.
    if pod.flags & pod_flag::ENROLLED == 0
        || unsafe { RESOLVERS.get(&dst) }.is_none()
        || from_proxy(netns_cookie)
        || !somebody_answers(ctx, dst.as_v4().is_none())
    {
        return None;
    }
    // What policy refused stays refused. That nobody is behind the resolver's service is no matter to the mesh's names.
    match errno_so_far() {
        None => {}
        Some(errno::ECONNREFUSED) => set_errno(0),
        Some(_) => return None,
    }
    let decision = Decision {
        action: Action::Rewrite,
        verdict: Verdict::Redirected,
        reason: DropReason::None,
        dst: if dst.as_v4().is_some() { Addr::LOOPBACK_V4 } else { Addr::LOOPBACK_V6 },
        dst_port: DNS_CAPTURE_PORT,
        src_id: pod.security_id,
        dst_id: identity::HOST,
        rule: 0,
        direction: direction::EGRESS,
    };
    Some((Asked { dst, dst_port, proto: proto::UDP, pod: Some(pod), netns_cookie }, decision))
}

/// Whether a socket is bound where the proxy answers, in the caller's namespace.
#[inline(always)]
fn somebody_answers(ctx: &SockAddrContext, v6: bool) -> bool {
    // `struct bpf_sock_tuple` (include/uapi/linux/bpf.h): source and destination, then their ports, in network byte order.
    let ports = u32::from(DNS_CAPTURE_PORT).to_be();
    let mut v4_tuple = [0, u32::from_ne_bytes([127, 0, 0, 1]), ports];
    let mut v6_tuple = [0, 0, 0, 0, 0, 0, 0, 1u32.to_be(), ports];
    let (tuple, size) = if v6 {
        (v6_tuple.as_mut_ptr(), size_of_val(&v6_tuple))
    } else {
        (v4_tuple.as_mut_ptr(), size_of_val(&v4_tuple))
    };
    // SAFETY: the context of this hook, a live buffer of the length said; the socket is given back at once.
    unsafe {
        let socket = bpf_sk_lookup_udp(ctx.as_ptr(), tuple.cast(), size as u32, CURRENT_NETNS, 0);
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket.cast());
    }
    true
}
