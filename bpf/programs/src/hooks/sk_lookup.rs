//! New TCP connections in an enrolled pod's namespace. One instance a pod: this hook cannot ask whose namespace it runs in.
use core::ptr::addr_of;

use aya_ebpf::{
    Global,
    bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, BPF_SK_LOOKUP_F_REPLACE},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use strata_abi::{Addr, DropReason, FlowEvent, ListenerKey, Verdict, direction, hook, identity, stat};
use strata_bpf_core::{
    Maps as _,
    lookup::{Choice, Pod, Tuple, choose},
};

use crate::{
    events::emit,
    maps::{Kernel, LISTENERS, count},
};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
const AF_INET: u32 = 2;
/// Over an earlier program's choice, since capture is not optional; and this listener itself, not another of its
/// SO_REUSEPORT group: during an upgrade that could be the old proxy's (include/uapi/linux/bpf.h).
const LISTENER_ITSELF: u64 = (BPF_SK_LOOKUP_F_REPLACE | BPF_SK_LOOKUP_F_NO_REUSEPORT) as u64;

// Set by the loader. `#[used]`: LLVM could otherwise merge one with an equal constant, and overriding it would change both.
#[used]
#[unsafe(no_mangle)]
static POD_INDEX: Global<u32> = Global::new(0);
#[used]
#[unsafe(no_mangle)]
static POD_SECURITY_ID: Global<u32> = Global::new(0);
#[used]
#[unsafe(no_mangle)]
static POD_NETNS_COOKIE: Global<u64> = Global::new(0);
#[used]
#[unsafe(no_mangle)]
static POD_V4: Global<[u32; 4]> = Global::new([0; 4]);
#[used]
#[unsafe(no_mangle)]
static POD_V6: Global<[u32; 4]> = Global::new([0; 4]);

// The verifier maps each context field by offset and width: every access is one volatile word.
macro_rules! read {
    ($place:expr) => {
        // SAFETY: a field of the live context the kernel passed in.
        unsafe { addr_of!($place).read_volatile() }
    };
}

// Not called `sk_lookup`: a function with its section's name does not link.
#[sk_lookup]
pub fn pod_lookup(ctx: SkLookupContext) -> u32 {
    let pod = Pod { v4: Addr::from_words(POD_V4.load()), v6: Addr::from_words(POD_V6.load()) };
    let tuple = tuple(&ctx);
    let kind = match choose(&Kernel, &pod, &tuple) {
        Choice::App => return SK_PASS,
        Choice::Listener(kind) => kind,
    };
    let key = ListenerKey { pod_index: POD_INDEX.load(), kind };
    if LISTENERS.redirect_sk_lookup(&ctx, &key, LISTENER_ITSELF).is_ok() {
        return SK_PASS;
    }
    // 8. Capture is in force and nobody listens: closed, not around the proxy.
    count(stat::PACKETS_DROPPED, 1);
    count(stat::DROPS + DropReason::NoListener as u32, 1);
    emit(FlowEvent {
        time_ns: Kernel.now_ns(),
        cookie: 0,
        netns_cookie: POD_NETNS_COOKIE.load(),
        src: tuple.remote,
        dst: tuple.local,
        orig_dst: tuple.local,
        src_id: identity::UNKNOWN,
        dst_id: POD_SECURITY_ID.load(),
        rule: 0,
        ifindex: tuple.ingress_ifindex,
        src_port: u16::from_be(read!((*ctx.lookup).remote_port)),
        dst_port: tuple.local_port,
        orig_dst_port: tuple.local_port,
        proto: tuple.proto,
        verdict: Verdict::Dropped as u8,
        reason: DropReason::NoListener as u8,
        hook: hook::SK_LOOKUP,
        direction: direction::INGRESS,
        _pad: [0; 5],
    });
    SK_DROP
}

#[inline(always)]
fn tuple(ctx: &SkLookupContext) -> Tuple {
    let c = ctx.lookup;
    // All of them, whatever the family (the others read as 0): loads in two branches are merged by LLVM into one through a
    // computed pointer, which the verifier refuses on a context.
    let local_v4 = read!((*c).local_ip4);
    let remote_v4 = read!((*c).remote_ip4);
    let local_v6 =
        [read!((*c).local_ip6[0]), read!((*c).local_ip6[1]), read!((*c).local_ip6[2]), read!((*c).local_ip6[3])];
    let remote_v6 =
        [read!((*c).remote_ip6[0]), read!((*c).remote_ip6[1]), read!((*c).remote_ip6[2]), read!((*c).remote_ip6[3])];
    let (local, remote) = if read!((*c).family) == AF_INET {
        (Addr::v4(local_v4.to_ne_bytes()), Addr::v4(remote_v4.to_ne_bytes()))
    } else {
        (Addr::from_words(local_v6), Addr::from_words(remote_v6))
    };
    Tuple {
        proto: read!((*c).protocol) as u8,
        local,
        local_port: read!((*c).local_port) as u16,
        remote,
        ingress_ifindex: read!((*c).ingress_ifindex),
    }
}
