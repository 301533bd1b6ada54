//! The host side of a pod's device: what the pod sends (ingress there) and what is sent to it (egress there).
use core::ptr::addr_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::__sk_buff,
    helpers::generated::{bpf_get_socket_cookie, bpf_skb_cgroup_id},
    macros::classifier,
    programs::TcContext,
};
use strata_abi::{Addr, DropReason, FlowEvent, PodRecord, Verdict, hook, stat};
use strata_bpf_core::{
    Maps as _,
    packet::{Bytes, Packet, Parsed, parse},
    traffic::{Outcome, Way, judge},
};

use crate::{
    events::emit,
    maps::{CONFIG, Kernel, PODS_BY_IFINDEX, count},
};

/// tcx: go on with the next program, at the end pass.
const TCX_NEXT: i32 = -1;
const TCX_DROP: i32 = 2;

#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    run(&ctx, Way::FromPod { by_proxy: || by_proxy(skb) }, hook::FROM_POD)
}

#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    run::<fn() -> bool>(&ctx, Way::ToPod, hook::TO_POD)
}

struct Frame<'a>(&'a TcContext);

impl Bytes for Frame<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.load::<[u8; N]>(offset).ok()
    }
}

/// Whether the packet's socket is of a proxy's cgroup. The socket stays on the packet across the veth pair, up to the
/// host's own IP layer, which comes after this hook. A function of its own: the hook's frame has no room left.
#[inline(never)]
fn by_proxy(skb: *mut __sk_buff) -> bool {
    let Some(config) = CONFIG.get(0) else { return false };
    // SAFETY: the context of this hook, which the helper accepts.
    let cgroup = unsafe { bpf_skb_cgroup_id(skb) };
    // One value and no branches: each would double what the verifier has to walk through afterwards. 0: no socket.
    let found = config.proxies.iter().fold(false, |found, proxy| found | (proxy.cgroup == cgroup));
    found & (cgroup != 0)
}

#[inline(always)]
fn run<P: Fn() -> bool>(ctx: &TcContext, way: Way<P>, at: u8) -> i32 {
    // SAFETY: a field of the live context, read as the one word the verifier knows.
    let ifindex = unsafe { addr_of!((*ctx.skb.skb).ifindex).read_volatile() };
    // SAFETY: sparse hash elements are freed by RCU, after this program.
    let Some(pod) = (unsafe { PODS_BY_IFINDEX.get(&ifindex) }) else {
        return drop_unparsed(DropReason::UnknownPod);
    };
    let packet = match parse(&Frame(ctx)) {
        Parsed::Ip(packet) => packet,
        Parsed::Arp => return TCX_NEXT,
        Parsed::Other | Parsed::Malformed => return drop_unparsed(DropReason::Malformed),
    };
    let outcome = judge(&Kernel, pod, &packet, way);
    if outcome.forwards() {
        count(stat::PACKETS_FORWARDED, 1);
        count(stat::BYTES_FORWARDED, u64::from(ctx.len()));
        // What a pod sends was reported when it connected; what comes to it was not, by this node.
        if (outcome.opens && at == hook::TO_POD) || outcome.verdict as u8 == Verdict::Audited as u8 {
            report(ctx, pod, &packet, &outcome, at);
        }
        return TCX_NEXT;
    }
    count(stat::PACKETS_DROPPED, 1);
    count(stat::DROPS + outcome.reason as u32, 1);
    report(ctx, pod, &packet, &outcome, at);
    TCX_DROP
}

#[inline(always)]
fn drop_unparsed(reason: DropReason) -> i32 {
    count(stat::PACKETS_DROPPED, 1);
    count(stat::DROPS + reason as u32, 1);
    TCX_DROP
}

#[inline(always)]
fn report(ctx: &TcContext, pod: &PodRecord, packet: &Packet, outcome: &Outcome, at: u8) {
    let sent = at == hook::FROM_POD;
    let dst: Addr = packet.dst;
    emit(FlowEvent {
        time_ns: Kernel.now_ns(),
        // SAFETY: the context of this hook, which the helper accepts.
        cookie: unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
        netns_cookie: pod.netns_cookie,
        src: packet.src,
        dst,
        orig_dst: dst,
        src_id: if sent { pod.security_id } else { outcome.peer_id },
        dst_id: if sent { outcome.peer_id } else { pod.security_id },
        rule: outcome.rule,
        ifindex: pod.ifindex,
        src_port: packet.src_port,
        dst_port: packet.dst_port,
        orig_dst_port: packet.dst_port,
        proto: packet.proto,
        verdict: outcome.verdict as u8,
        reason: outcome.reason as u8,
        hook: at,
        direction: outcome.direction,
        _pad: [0; 5],
    });
}
