//! The decisions of the kernel programs, free of aya and of the kernel, so that host tests run them too.
//!
//! Everything is a function of its arguments and of [`Maps`]; the programs in `bpf/programs` only turn a kernel
//! context into arguments and a decision into an action. Nearly all of it is `#[inline(always)]`; the few functions
//! that are not exist for the kernel's 512 bytes of stack, and take and return numbers.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod connect;
pub mod lookup;
pub mod packet;
pub mod policy;
pub mod service;
pub mod traffic;

use strata_abi::{
    Addr, AffinityEntry, AffinityKey, Backend, BackendKey, FlowKey, FragmentKey, Grant, GrantKey, Identity, NodeConfig,
    PolicyEntry, PolicyKey, Prefix, Service, ServiceKey, identity,
};

/// Port of HBONE (HTTP-based overlay network environment) tunnels, as Istio's.
pub const HBONE_PORT: u16 = 15008;

/// Port of DNS (RFC 1035 section 4.2).
pub const DNS_PORT: u16 = 53;

/// What a decision may read and remember. In the kernel: map lookups and helpers; in tests: tables.
pub trait Maps {
    fn config(&self) -> Option<&NodeConfig>;
    fn identity(&self, address: &Prefix<Addr>) -> Option<&Identity>;
    fn service(&self, key: &ServiceKey) -> Option<&Service>;
    fn backend(&self, key: &BackendKey) -> Option<&Backend>;
    fn policy(&self, key: &Prefix<PolicyKey>) -> Option<&PolicyEntry>;
    fn grant(&self, key: &GrantKey) -> Option<&Grant>;
    fn affinity(&self, key: &AffinityKey) -> Option<&AffinityEntry>;
    fn set_affinity(&self, key: &AffinityKey, entry: &AffinityEntry);
    /// When the flow was last seen, nanoseconds since boot.
    fn flow_seen(&self, key: &FlowKey) -> Option<u64>;
    fn set_flow_seen(&self, key: &FlowKey, now_ns: u64);
    /// When the datagram's first fragment passed, nanoseconds since boot.
    fn fragment_seen(&self, key: &FragmentKey) -> Option<u64>;
    fn set_fragment_seen(&self, key: &FragmentKey, now_ns: u64);
    /// Nanoseconds since boot.
    fn now_ns(&self) -> u64;
    fn random(&self) -> u32;
}

/// An address' identity and whether it is a pod of this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Who {
    pub id: u32,
    pub flags: u32,
}

/// Who an address is: this node, what `IDENTITIES` says, or the world.
#[inline(always)]
pub fn who<M: Maps>(maps: &M, addr: &Addr) -> Who {
    let packed = find(maps, addr);
    Who { id: packed as u32, flags: (packed >> 32) as u32 }
}

/// A function of its own to keep its key off the callers' stack. Identity in the low half, flags in the high.
#[inline(never)]
fn find<M: Maps>(maps: &M, addr: &Addr) -> u64 {
    if is_node(maps, addr) {
        return u64::from(identity::HOST);
    }
    match maps.identity(&Prefix::new(128, *addr)) {
        Some(found) => u64::from(found.security_id) | u64::from(found.flags) << 32,
        None => u64::from(identity::WORLD),
    }
}

/// Whether the address is this node's own.
#[inline(always)]
pub fn is_node<M: Maps>(maps: &M, addr: &Addr) -> bool {
    match maps.config() {
        Some(config) => !addr.is_unspecified() && (config.node_v4 == *addr || config.node_v6 == *addr),
        None => false,
    }
}

/// Whether the upper layer granted `src` the short-cut to `dst`:`port`, under the current generation.
#[inline(always)]
pub fn granted<M: Maps>(maps: &M, src: &Addr, dst: &Addr, port: u16) -> bool {
    let Some(config) = maps.config() else { return false };
    match maps.grant(&GrantKey { src: *src, dst: *dst, port, _pad: 0 }) {
        Some(grant) => grant.generation == config.grant_generation,
        None => false,
    }
}

#[cfg(test)]
mod testing;
