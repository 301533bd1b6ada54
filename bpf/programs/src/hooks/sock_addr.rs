//! Reading and writing the address of a `cgroup/sock_addr` context, and what all these hooks know of their caller.
use core::ptr::{addr_of, addr_of_mut};

use aya_ebpf::{
    EbpfContext as _, Global,
    bindings::bpf_sock_addr,
    helpers::generated::{
        bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_get_retval, bpf_get_socket_cookie, bpf_set_retval,
    },
    programs::SockAddrContext,
};
use strata_abi::{Addr, ProxyPlace};

use crate::maps::CONFIG;

/// Whether the kernel has `bpf_set_retval` (Linux 5.18), set by the loader: where it is 0 the verifier never looks at the
/// calls. `#[used]`: LLVM could otherwise merge it with an equal constant.
#[used]
#[unsafe(no_mangle)]
static HAS_ERRNO: Global<u32> = Global::new(0);

/// What the call fails with if a program refuses it, 0 for what the kernel says by itself (EPERM).
#[inline(always)]
pub fn set_errno(errno: i32) {
    if HAS_ERRNO.load() != 0 {
        // SAFETY: a negative errno or 0, as the helper wants.
        unsafe { bpf_set_retval(-errno) };
    }
}

/// The errno by which an earlier program at this hook refused the call; `None` if none did, as far as the kernel says.
#[inline(always)]
pub fn errno_so_far() -> Option<i32> {
    if HAS_ERRNO.load() == 0 {
        return None;
    }
    // SAFETY: no argument, no precondition.
    match unsafe { bpf_get_retval() } {
        0 => None,
        negative => Some(-negative),
    }
}

/// A hook's family.
pub trait Family {
    fn read(ctx: &SockAddrContext) -> Addr;
    /// False if the address is not of the family.
    fn write(ctx: &SockAddrContext, addr: &Addr) -> bool;
}

pub struct V4;
pub struct V6;

// The verifier maps each context field to a kernel field by offset and width: every access is one volatile word.
macro_rules! read {
    ($place:expr) => {
        // SAFETY: a field of the live context the kernel passed in.
        unsafe { addr_of!($place).read_volatile() }
    };
}
macro_rules! write {
    ($place:expr, $value:expr) => {
        // SAFETY: a field of the live context the kernel passed in, writable at these hooks.
        unsafe { addr_of_mut!($place).write_volatile($value) }
    };
}

impl Family for V4 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> Addr {
        Addr::v4(read!((*ctx.sock_addr).user_ip4).to_ne_bytes())
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, addr: &Addr) -> bool {
        let Some(v4) = addr.as_v4() else { return false };
        write!((*ctx.sock_addr).user_ip4, u32::from_ne_bytes(v4));
        true
    }
}

impl Family for V6 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> Addr {
        let sa: *mut bpf_sock_addr = ctx.sock_addr;
        Addr::from_words([
            read!((*sa).user_ip6[0]),
            read!((*sa).user_ip6[1]),
            read!((*sa).user_ip6[2]),
            read!((*sa).user_ip6[3]),
        ])
    }

    /// Any address: IPv4 is written mapped, which is what was asked for in that case.
    #[inline(always)]
    fn write(ctx: &SockAddrContext, addr: &Addr) -> bool {
        let sa: *mut bpf_sock_addr = ctx.sock_addr;
        let [a, b, c, d] = addr.words();
        write!((*sa).user_ip6[0], a);
        write!((*sa).user_ip6[1], b);
        write!((*sa).user_ip6[2], c);
        write!((*sa).user_ip6[3], d);
        true
    }
}

#[inline(always)]
pub fn port(ctx: &SockAddrContext) -> u16 {
    u16::from_be(read!((*ctx.sock_addr).user_port) as u16)
}

/// Points the call at `addr` and `port`; false, and nothing done, if the address is not of the family.
#[inline(always)]
pub fn point<F: Family>(ctx: &SockAddrContext, addr: &Addr, port: u16) -> bool {
    let written = F::write(ctx, addr);
    if written {
        set_port(ctx, port);
    }
    written
}

#[inline(always)]
fn set_port(ctx: &SockAddrContext, port: u16) {
    write!((*ctx.sock_addr).user_port, u32::from(port.to_be()));
}

/// `IPPROTO_*` of the socket.
#[inline(always)]
pub fn protocol(ctx: &SockAddrContext) -> u32 {
    read!((*ctx.sock_addr).protocol)
}

/// Device the socket is bound to, 0 for none.
#[inline(always)]
pub fn bound_device(ctx: &SockAddrContext) -> u32 {
    let sk = read!((*ctx.sock_addr).__bindgen_anon_1.sk);
    if sk.is_null() {
        return 0;
    }
    read!((*sk).bound_dev_if)
}

#[inline(always)]
pub fn netns_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context of this hook, which the helper accepts.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

#[inline(always)]
pub fn socket_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context of this hook, which the helper accepts.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// Whether a proxy calls, from inside another pod's namespace. Told by its cgroup, which a pod cannot forge (it could
/// forge a mark). In its own pod it is a pod like any other: it reaches the control plane through services.
#[inline(always)]
pub fn from_proxy(netns_cookie: u64) -> bool {
    let Some(config) = CONFIG.get(0) else { return false };
    // SAFETY: no argument, no precondition.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    let away = |proxy: &ProxyPlace| (proxy.cgroup == cgroup) & (proxy.home != netns_cookie);
    // No branches: each would double what the verifier has to walk through afterwards.
    config.proxies.iter().fold(false, |found, proxy| found | away(proxy))
}
