use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::testing::addr;

struct Frame(Vec<u8>);

impl Bytes for Frame {
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }
}

fn ethernet(kind: u16, payload: &[u8]) -> Frame {
    let mut frame = vec![0; 12];
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    Frame(frame)
}

/// An IPv4 packet with `options` words of options.
fn v4(proto: u8, flags_offset: u16, options: usize, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0u8; 20 + 4 * options];
    packet[0] = 0x45 + options as u8;
    packet[4..6].copy_from_slice(&77u16.to_be_bytes());
    packet[6..8].copy_from_slice(&flags_offset.to_be_bytes());
    packet[9] = proto;
    packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
    packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
    packet.extend(payload);
    packet
}

fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0u8; 40];
    packet[0] = 0x60;
    packet[6] = next;
    packet[8..24].copy_from_slice(&addr("fd00::1").0);
    packet[24..40].copy_from_slice(&addr("fd00::2").0);
    packet.extend(payload);
    packet
}

fn tcp(flags: u8) -> Vec<u8> {
    let mut header = vec![0u8; 20];
    header[..4].copy_from_slice(&[0x9c, 0x40, 0x1f, 0x90]);
    header[13] = flags;
    header
}

fn ip(frame: &Frame) -> Packet {
    match parse(frame) {
        Parsed::Ip(packet) => packet,
        other => panic!("{other:?}"),
    }
}

#[test]
fn tcp_over_both_families() {
    for frame in [
        ethernet(ethertype::IPV4, &v4(6, 0x4000, 0, &tcp(tcp_flag::SYN))),
        ethernet(ethertype::IPV4, &v4(6, 0x4000, 10, &tcp(tcp_flag::SYN))),
        ethernet(ethertype::IPV6, &v6(6, &tcp(tcp_flag::SYN))),
    ] {
        let packet = ip(&frame);
        assert!(packet.is_syn());
        assert_eq!((packet.src_port, packet.dst_port, packet.fragment), (40000, 8080, Fragment::Whole));
    }
    assert_eq!(ip(&ethernet(ethertype::IPV4, &v4(6, 0, 0, &tcp(0)))).src, addr("10.0.0.1"));
    assert!(!ip(&ethernet(ethertype::IPV4, &v4(6, 0, 0, &tcp(tcp_flag::SYN | tcp_flag::ACK)))).is_syn());
}

#[test]
fn extension_headers_are_walked() {
    let hop = |next: u8| [vec![next, 0], vec![0; 6]].concat();
    let long = [vec![6u8, 1], vec![0; 14]].concat();
    let payload = [hop(60), long, tcp(tcp_flag::SYN)].concat();
    assert!(ip(&ethernet(ethertype::IPV6, &v6(0, &payload))).is_syn());
    // Authentication header: length in words, less two.
    let payload = [vec![6u8, 4], vec![0; 22], tcp(tcp_flag::SYN)].concat();
    assert!(ip(&ethernet(ethertype::IPV6, &v6(51, &payload))).is_syn());
    // More than the bound is malformed.
    let payload = [(0..7).flat_map(|_| hop(60)).collect::<Vec<u8>>(), tcp(0)].concat();
    assert_eq!(parse(&ethernet(ethertype::IPV6, &v6(60, &payload))), Parsed::Malformed);
}

#[test]
fn fragments() {
    let udp = [0x9c, 0x40, 0, 53, 0, 0, 0, 0];
    let first = ip(&ethernet(ethertype::IPV4, &v4(17, 0x2000, 0, &udp)));
    assert_eq!((first.fragment, first.dst_port), (Fragment::First(77), 53));
    // A later fragment's payload is not taken for ports, however short.
    let later = ip(&ethernet(ethertype::IPV4, &v4(17, 0x00b9, 0, &[1])));
    assert_eq!((later.fragment, later.dst_port), (Fragment::Later(77), 0));
    let header = |word: u16| [&[17u8, 0][..], &word.to_be_bytes(), &9u32.to_be_bytes()].concat();
    let first = ip(&ethernet(ethertype::IPV6, &v6(44, &[header(1), udp.to_vec()].concat())));
    assert_eq!((first.fragment, first.proto, first.dst_port), (Fragment::First(9), 17, 53));
    let later = ip(&ethernet(ethertype::IPV6, &v6(44, &[header(8), vec![1]].concat())));
    assert_eq!((later.fragment, later.proto, later.dst_port), (Fragment::Later(9), 17, 0));
    let atomic = ip(&ethernet(ethertype::IPV6, &v6(44, &[header(0), udp.to_vec()].concat())));
    assert_eq!((atomic.fragment, atomic.dst_port), (Fragment::Whole, 53));
}

#[test]
fn odd_frames() {
    assert_eq!(parse(&ethernet(ethertype::ARP, &[0; 28])), Parsed::Arp);
    assert_eq!(parse(&ethernet(0x88cc, &[])), Parsed::Other);
    assert_eq!(parse(&ethernet(0x8100, &v4(6, 0, 0, &tcp(0)))), Parsed::Other);
    assert_eq!(parse(&Frame(vec![0; 13])), Parsed::Malformed);
    // Truncated TCP, wrong version, header length below the minimum, mapped addresses on the wire.
    assert_eq!(parse(&ethernet(ethertype::IPV4, &v4(6, 0, 0, &[0; 13]))), Parsed::Malformed);
    assert_eq!(parse(&ethernet(ethertype::IPV6, &v4(6, 0, 0, &tcp(0)))), Parsed::Malformed);
    let mut short = v4(6, 0, 0, &tcp(0));
    short[0] = 0x44;
    assert_eq!(parse(&ethernet(ethertype::IPV4, &short)), Parsed::Malformed);
    let mut mapped = v6(6, &tcp(0));
    mapped[8..24].copy_from_slice(&addr("10.0.0.1").0);
    assert_eq!(parse(&ethernet(ethertype::IPV6, &mapped)), Parsed::Malformed);
}

proptest! {
    /// No input panics, and what is parsed lies within the frame.
    #[test]
    fn anything_parses_or_not(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in prop::sample::select(vec![ethertype::IPV4, ethertype::IPV6])) {
        let _ = parse(&ethernet(kind, &bytes));
        let mut v6 = bytes.clone();
        if let Some(first) = v6.first_mut() { *first = 0x60 }
        let _ = parse(&ethernet(ethertype::IPV6, &v6));
        let mut v4 = bytes;
        if let Some(first) = v4.first_mut() { *first = 0x45 }
        let _ = parse(&ethernet(ethertype::IPV4, &v4));
    }
}
