//! Keys and values of every eBPF map, verdicts, drop reasons and the flow record, shared by the kernel
//! programs and user space.
//!
//! Rules: everything is `repr(C)` with explicit padding, no `bool` and no enum is stored in a map (user
//! space could write a value the kernel side must not see), addresses are 16 bytes with IPv4 mapped into
//! `::ffff:0:0/96` (RFC 4291 section 2.5.5.2), ports are in host byte order unless the name says `_be`.
//! A change of any layout raises [`ABI_VERSION`], which is part of the pin path.
#![no_std]

mod flow;
mod maps;
mod verdict;

pub use flow::*;
pub use maps::*;
pub use verdict::*;

/// Raised with every change of a map's layout; pinned maps of another version are not reused.
pub const ABI_VERSION: u32 = 1;

/// Plain memory: no padding, no pointer, every bit pattern valid; may be copied to and from a map as bytes.
///
/// # Safety
/// The implementor is `repr(C)` (or a primitive) without implicit padding and without invalid bit patterns.
pub unsafe trait Plain: Copy + 'static {}

// SAFETY: primitives have neither padding nor invalid bit patterns.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}

/// A key of an LPM trie map: the first `prefix_len` bits of `data` count.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Prefix<K> {
    pub prefix_len: u32,
    pub data: K,
}

impl<K> Prefix<K> {
    #[inline(always)]
    pub const fn new(prefix_len: u32, data: K) -> Prefix<K> {
        Prefix { prefix_len, data }
    }
}

const _: () = assert!(core::mem::size_of::<Prefix<Addr>>() == 20 && core::mem::size_of::<Prefix<PolicyKey>>() == 16);
// SAFETY: sizes asserted above: the parts lie side by side, and each is plain.
unsafe impl Plain for Prefix<Addr> {}
// SAFETY: as above.
unsafe impl Plain for Prefix<PolicyKey> {}
// SAFETY: repr(C), padding explicit (size asserted in `flow`), integers only.
unsafe impl Plain for FlowEvent {}

/// An IPv6 address, or an IPv4 address mapped into `::ffff:0:0/96`.
///
/// Aligned to four bytes so that the kernel programs compare words; the layout is that of sixteen bytes.
#[repr(C, align(4))]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Addr(pub [u8; 16]);

impl Addr {
    pub const UNSPECIFIED: Addr = Addr([0; 16]);
    pub const LOOPBACK_V4: Addr = Addr::v4([127, 0, 0, 1]);
    pub const LOOPBACK_V6: Addr = Addr([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Addr {
        let [a, b, c, d] = octets;
        Addr([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d])
    }

    #[inline(always)]
    pub const fn v6(octets: [u8; 16]) -> Addr {
        Addr(octets)
    }

    /// The IPv4 address, if this is a mapped one.
    #[inline(always)]
    pub const fn as_v4(&self) -> Option<[u8; 4]> {
        let [a, b, c, d] = self.words();
        match a == 0 && b == 0 && c == u32::from_ne_bytes([0, 0, 0xff, 0xff]) {
            true => Some(d.to_ne_bytes()),
            false => None,
        }
    }

    /// The address as four words in memory order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        let b = &self.0;
        [
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
            u32::from_ne_bytes([b[8], b[9], b[10], b[11]]),
            u32::from_ne_bytes([b[12], b[13], b[14], b[15]]),
        ]
    }

    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Addr {
        let [a, b, c, d] =
            [words[0].to_ne_bytes(), words[1].to_ne_bytes(), words[2].to_ne_bytes(), words[3].to_ne_bytes()];
        Addr([a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]])
    }

    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        let [a, b, c, d] = self.words();
        match self.as_v4() {
            Some(v4) => u32::from_ne_bytes(v4) == 0,
            None => a | b | c | d == 0,
        }
    }

    /// `127.0.0.0/8` and `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        match self.as_v4() {
            Some(v4) => v4[0] == 127,
            None => {
                let [a, b, c, d] = self.words();
                a == 0 && b == 0 && c == 0 && d == u32::from_ne_bytes([0, 0, 0, 1])
            }
        }
    }

    /// `224.0.0.0/4`, `255.255.255.255` and `ff00::/8`.
    #[inline(always)]
    pub const fn is_multicast(&self) -> bool {
        match self.as_v4() {
            Some(v4) => v4[0] & 0xf0 == 0xe0 || u32::from_ne_bytes(v4) == u32::MAX,
            None => self.0[0] == 0xff,
        }
    }

    /// `fe80::/10`.
    #[inline(always)]
    pub const fn is_v6_link_local(&self) -> bool {
        self.0[0] == 0xfe && self.0[1] & 0xc0 == 0x80
    }
}

impl From<core::net::IpAddr> for Addr {
    fn from(ip: core::net::IpAddr) -> Addr {
        match ip {
            core::net::IpAddr::V4(v4) => Addr::v4(v4.octets()),
            core::net::IpAddr::V6(v6) => Addr::v6(v6.octets()),
        }
    }
}

impl From<Addr> for core::net::IpAddr {
    fn from(addr: Addr) -> core::net::IpAddr {
        match addr.as_v4() {
            Some(v4) => core::net::Ipv4Addr::from(v4).into(),
            None => core::net::Ipv6Addr::from(addr.0).into(),
        }
    }
}
