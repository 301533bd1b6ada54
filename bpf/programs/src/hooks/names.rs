//! What a translated socket is told of its peer: the service's address, not the backend's.
//!
//! `getpeername` also runs inside `accept()`: only sockets that `connect()` translated have a note, so an accepted socket is
//! never touched.
use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use strata_abi::{Addr, UdpPeerKey};

use super::sock_addr::{Family, V4, V6, point, port, socket_cookie};
use crate::maps::{TRANSLATIONS, UDP_PEERS};

/// The only value these hooks may return.
const ALLOW: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    connected::<V4>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    connected::<V6>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    received::<V4>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    received::<V6>(&ctx);
    ALLOW
}

/// True if the socket is connected through a service and the address is its backend's.
#[inline(always)]
fn connected<F: Family>(ctx: &SockAddrContext) -> bool {
    let Some((vip, vip_port)) = asked_by_socket(ctx, &F::read(ctx), port(ctx)) else { return false };
    point::<F>(ctx, &vip, vip_port);
    true
}

#[inline(always)]
fn received<F: Family>(ctx: &SockAddrContext) {
    if connected::<F>(ctx) {
        return;
    }
    if let Some((vip, vip_port)) = asked_of_peer(ctx, &F::read(ctx), port(ctx)) {
        point::<F>(ctx, &vip, vip_port);
    }
}

/// What the socket's `connect()` asked for, if it is connected through a service and `addr` is what it got.
#[inline(always)]
pub(super) fn asked_by_socket(ctx: &SockAddrContext, addr: &Addr, port: u16) -> Option<(Addr, u16)> {
    // SAFETY: the context's socket is live.
    let noted = unsafe { TRANSLATIONS.get_ptr_mut(ctx) };
    if noted.is_null() {
        return None;
    }
    // SAFETY: the socket's own storage, not null.
    let noted = unsafe { &*noted };
    let got = noted.backend_port != 0 && noted.backend_port == port && noted.backend == *addr;
    got.then_some((noted.vip, noted.vip_port))
}

/// What an unconnected socket asked for when it was sent to `addr`.
#[inline(always)]
pub(super) fn asked_of_peer(ctx: &SockAddrContext, addr: &Addr, port: u16) -> Option<(Addr, u16)> {
    let key = UdpPeerKey { cookie: socket_cookie(ctx), backend: *addr, backend_port: port, _pad: [0; 6] };
    // SAFETY: an LRU element may be reused under us: then the datagram shows another service's address, as after eviction.
    unsafe { UDP_PEERS.get(&key) }.map(|record| (record.vip, record.vip_port))
}
