//! Headers of a packet, as far as verdicts need them: Ethernet, IPv4, IPv6 with extension headers, and the ports of
//! TCP, UDP and SCTP. Every loop and offset is bounded; anything odd is malformed, not guessed at.
use strata_abi::{Addr, proto};

/// Bytes of a packet at an offset; None past its end.
pub trait Bytes {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
}

/// EtherTypes (IEEE 802 numbers).
pub mod ethertype {
    pub const IPV4: u16 = 0x0800;
    pub const ARP: u16 = 0x0806;
    pub const IPV6: u16 = 0x86dd;
}

/// TCP flag bits (RFC 9293 section 3.1).
pub mod tcp_flag {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
}

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Most IPv6 extension headers looked through.
const MAX_EXTENSIONS: usize = 6;

/// Where in a fragmented datagram the packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fragment {
    Whole,
    /// Carries the transport header; more follow.
    First(u32),
    /// Carries no transport header.
    Later(u32),
}

/// A parsed IP packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    pub src: Addr,
    pub dst: Addr,
    /// 0 where the protocol has none, or the fragment does not carry it.
    pub src_port: u16,
    pub dst_port: u16,
    pub proto: u8,
    /// Of TCP, else 0.
    pub tcp_flags: u8,
    /// Of ICMP and ICMPv6, else 0.
    pub icmp_type: u8,
    pub fragment: Fragment,
}

impl Packet {
    /// The first packet of a TCP connection.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.proto == proto::TCP && self.tcp_flags & (tcp_flag::SYN | tcp_flag::ACK) == tcp_flag::SYN
    }
}

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parsed {
    Ip(Packet),
    Arp,
    /// Neither IP nor ARP.
    Other,
    Malformed,
}

/// Parses a frame with an Ethernet header at offset 0.
#[inline(always)]
pub fn parse<B: Bytes>(bytes: &B) -> Parsed {
    let Some(kind) = bytes.load::<2>(12) else { return Parsed::Malformed };
    let packet = match u16::from_be_bytes(kind) {
        ethertype::IPV4 => parse_v4(bytes),
        ethertype::IPV6 => parse_v6(bytes),
        ethertype::ARP => return Parsed::Arp,
        _ => return Parsed::Other,
    };
    match packet {
        Some(packet) => Parsed::Ip(packet),
        None => Parsed::Malformed,
    }
}

#[inline(always)]
fn parse_v4<B: Bytes>(bytes: &B) -> Option<Packet> {
    let h = bytes.load::<20>(ETHERNET)?;
    let header = usize::from(h[0] & 0x0f) * 4;
    if h[0] >> 4 != 4 || header < 20 {
        return None;
    }
    let id = u32::from(u16::from_be_bytes([h[4], h[5]]));
    let fragment_word = u16::from_be_bytes([h[6], h[7]]);
    let more = fragment_word & 0x2000 != 0;
    let fragment = match (fragment_word & 0x1fff != 0, more) {
        (true, _) => Fragment::Later(id),
        (false, true) => Fragment::First(id),
        (false, false) => Fragment::Whole,
    };
    let packet = Packet {
        src: Addr::v4([h[12], h[13], h[14], h[15]]),
        dst: Addr::v4([h[16], h[17], h[18], h[19]]),
        src_port: 0,
        dst_port: 0,
        proto: h[9],
        tcp_flags: 0,
        icmp_type: 0,
        fragment,
    };
    transport(bytes, packet, ETHERNET + header)
}

#[inline(always)]
fn parse_v6<B: Bytes>(bytes: &B) -> Option<Packet> {
    let h = bytes.load::<8>(ETHERNET)?;
    if h[0] >> 4 != 6 {
        return None;
    }
    let mut packet = Packet {
        src: Addr::v6(bytes.load::<16>(ETHERNET + 8)?),
        dst: Addr::v6(bytes.load::<16>(ETHERNET + 24)?),
        src_port: 0,
        dst_port: 0,
        proto: h[6],
        tcp_flags: 0,
        icmp_type: 0,
        fragment: Fragment::Whole,
    };
    // An IPv4-mapped address has no business on a wire (RFC 4942 section 2.2), and would pass for IPv4 here.
    if packet.src.as_v4().is_some() || packet.dst.as_v4().is_some() {
        return None;
    }
    let mut offset = ETHERNET + 40;
    let mut seen = 0;
    while is_extension(packet.proto) {
        if seen == MAX_EXTENSIONS {
            return None;
        }
        seen += 1;
        let e = bytes.load::<8>(offset)?;
        let length = match packet.proto {
            EXTENSION_FRAGMENT => {
                let word = u16::from_be_bytes([e[2], e[3]]);
                let id = u32::from_be_bytes([e[4], e[5], e[6], e[7]]);
                packet.fragment = match (word & 0xfff8 != 0, word & 1 != 0) {
                    (true, _) => Fragment::Later(id),
                    (false, true) => Fragment::First(id),
                    // An "atomic fragment" (RFC 6946) is a whole packet.
                    (false, false) => Fragment::Whole,
                };
                8
            }
            EXTENSION_AUTHENTICATION => (usize::from(e[1]) + 2) * 4,
            _ => (usize::from(e[1]) + 1) * 8,
        };
        packet.proto = e[0];
        // Beyond the first fragment what follows is payload.
        if matches!(packet.fragment, Fragment::Later(_)) {
            return Some(packet);
        }
        offset += length;
    }
    transport(bytes, packet, offset)
}

const EXTENSION_HOP_BY_HOP: u8 = 0;
const EXTENSION_ROUTING: u8 = 43;
const EXTENSION_FRAGMENT: u8 = 44;
const EXTENSION_AUTHENTICATION: u8 = 51;
const EXTENSION_DESTINATION: u8 = 60;

#[inline(always)]
fn is_extension(next: u8) -> bool {
    matches!(
        next,
        EXTENSION_HOP_BY_HOP
            | EXTENSION_ROUTING
            | EXTENSION_FRAGMENT
            | EXTENSION_AUTHENTICATION
            | EXTENSION_DESTINATION
    )
}

#[inline(always)]
fn transport<B: Bytes>(bytes: &B, mut packet: Packet, offset: usize) -> Option<Packet> {
    if matches!(packet.fragment, Fragment::Later(_)) {
        return Some(packet);
    }
    match packet.proto {
        proto::TCP => {
            let h = bytes.load::<14>(offset)?;
            packet.src_port = u16::from_be_bytes([h[0], h[1]]);
            packet.dst_port = u16::from_be_bytes([h[2], h[3]]);
            packet.tcp_flags = h[13];
        }
        proto::UDP | proto::SCTP => {
            let h = bytes.load::<4>(offset)?;
            packet.src_port = u16::from_be_bytes([h[0], h[1]]);
            packet.dst_port = u16::from_be_bytes([h[2], h[3]]);
        }
        proto::ICMP | proto::ICMPV6 => packet.icmp_type = bytes.load::<1>(offset)?[0],
        _ => {}
    }
    Some(packet)
}

#[cfg(test)]
mod tests;
