//! The record the kernel writes into the `EVENTS` ring buffer.
use crate::Addr;

/// One decision of the lower layer about a connection (or, for non-TCP, a first packet).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowEvent {
    /// Nanoseconds since boot (`bpf_ktime_get_boot_ns`).
    pub time_ns: u64,
    /// Socket cookie, the id both layers report a connection under; 0 at hooks without a socket.
    pub cookie: u64,
    /// Network namespace of the caller; 0 if unknown.
    pub netns_cookie: u64,
    pub src: Addr,
    /// Where the packet goes: the chosen backend, if one was chosen.
    pub dst: Addr,
    /// What the caller asked for (the service's address), if different; else equal to `dst`.
    pub orig_dst: Addr,
    pub src_id: u32,
    pub dst_id: u32,
    /// Rule that decided; see `PolicyEntry::rule`.
    pub rule: u32,
    pub ifindex: u32,
    /// 0 at connect(): not yet chosen.
    pub src_port: u16,
    pub dst_port: u16,
    pub orig_dst_port: u16,
    pub proto: u8,
    /// [`crate::Verdict`].
    pub verdict: u8,
    /// [`crate::DropReason`].
    pub reason: u8,
    /// [`hook`].
    pub hook: u8,
    /// [`crate::direction`] of the policy that decided.
    pub direction: u8,
    pub _pad: [u8; 5],
}

const _: () = assert!(core::mem::size_of::<FlowEvent>() == 104);

/// Where the decision was made.
pub mod hook {
    pub const CONNECT: u8 = 1;
    pub const SENDMSG: u8 = 2;
    /// tc, packets a pod sends.
    pub const FROM_POD: u8 = 3;
    /// tc, packets to a pod.
    pub const TO_POD: u8 = 4;
    pub const SK_LOOKUP: u8 = 5;
    /// Reported by the proxy through the handoff.
    pub const PROXY: u8 = 6;
}
