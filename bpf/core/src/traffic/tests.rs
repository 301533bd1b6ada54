use strata_abi::{Addr, PolicyKey, direction, identity_flag, policy_verdict, proto};

use super::*;
use crate::{
    packet::tcp_flag::{ACK, SYN},
    testing::{Tables, addr, pod},
};

const POD: u32 = 256;
const PEER: u32 = 257;
const OUT: Way<fn() -> bool> = Way::FromPod { by_proxy: || false };
const BY_PROXY: Way<fn() -> bool> = Way::FromPod { by_proxy: || true };

fn tables() -> Tables {
    let mut tables = Tables::default();
    tables.config.node_v4 = addr("10.0.0.254");
    tables.identify("10.0.0.1", POD, identity_flag::LOCAL_POD);
    tables.identify("10.0.0.2", PEER, 0);
    tables
}

fn entry(tables: &mut Tables, direction: u8, peer: u32, proto: u8, port: u16, verdict: u8) {
    let prefix = if proto == 0 { PolicyKey::PREFIX_ANY_PROTO } else { PolicyKey::PREFIX_FULL };
    tables.add_policy(
        prefix,
        PolicyKey { subject: POD, peer, direction, proto, port_be: port.to_be_bytes() },
        verdict,
        1,
    );
}

fn isolate(tables: &mut Tables, direction: u8) {
    entry(tables, direction, 0, 0, 0, policy_verdict::DENY_DEFAULT);
}

/// A packet from the pod (40000 -> 80), or to it when reversed.
fn sent(proto: u8, src_port: u16, dst_port: u16) -> Packet {
    Packet {
        src: addr("10.0.0.1"),
        dst: addr("10.0.0.2"),
        src_port,
        dst_port,
        proto,
        tcp_flags: ACK,
        icmp_type: 0,
        fragment: Fragment::Whole,
    }
}

fn received(proto: u8, src_port: u16, dst_port: u16) -> Packet {
    Packet { src: addr("10.0.0.2"), dst: addr("10.0.0.1"), ..sent(proto, src_port, dst_port) }
}

fn syn(packet: Packet) -> Packet {
    Packet { tcp_flags: SYN, ..packet }
}

fn ask(tables: &Tables, flags: u32, packet: Packet, way: Way<fn() -> bool>) -> Outcome {
    judge(tables, &pod("10.0.0.1", "fd00::1", POD, flags), &packet, way)
}

fn reason(tables: &Tables, flags: u32, packet: Packet, way: Way<fn() -> bool>) -> DropReason {
    ask(tables, flags, packet, way).reason
}

#[test]
fn sources_are_checked() {
    let tables = tables();
    let mut packet = sent(proto::TCP, 1, 2);
    assert!(ask(&tables, 0, packet, OUT).forwards());
    packet.src = addr("10.0.0.3");
    assert_eq!(reason(&tables, 0, packet, OUT), DropReason::SpoofedSource);
    for source in ["10.0.0.254", "fe80::1", "::", "0.0.0.0", "fd00::2"] {
        packet.src = addr(source);
        assert_eq!(reason(&tables, 0, packet, OUT), DropReason::SpoofedSource, "{source}");
    }
    // Not of what comes to the pod; and a pod without IPv6 does not own `::`.
    packet.dst = addr("10.0.0.1");
    assert!(ask(&tables, 0, packet, Way::ToPod).forwards());
    packet.src = Addr::UNSPECIFIED;
    let v4_only = PodRecord { v6: Addr::UNSPECIFIED, ..pod("10.0.0.1", "::", POD, 0) };
    assert_eq!(judge(&tables, &v4_only, &packet, OUT).reason, DropReason::SpoofedSource);
    // Neighbour discovery has sources of its own.
    let solicited = addr("ff02::1:ff00:2");
    let discovery = Packet { proto: proto::ICMPV6, icmp_type: 135, src: addr("::"), dst: solicited, ..packet };
    assert!(ask(&tables, 0, discovery, OUT).forwards());
    // What only looks like it is not: beyond the link, or protocol 58 in IPv4.
    let routed = Packet { dst: addr("2001:db8::9"), ..discovery };
    assert_eq!(reason(&tables, 0, routed, OUT), DropReason::SpoofedSource);
    let over_v4 = Packet { src: addr("10.0.0.3"), dst: addr("10.0.0.2"), ..discovery };
    assert_eq!(reason(&tables, 0, over_v4, OUT), DropReason::SpoofedSource);
}

#[test]
fn the_guard_lets_only_the_proxy_and_grants_out() {
    let mut tables = tables();
    let packet = syn(sent(proto::TCP, 40000, 80));
    assert_eq!(reason(&tables, pod_flag::ENROLLED, packet, OUT), DropReason::MeshBypass);
    assert!(ask(&tables, pod_flag::ENROLLED, packet, BY_PROXY).forwards());
    assert!(ask(&tables, 0, packet, OUT).forwards());
    // Connections open before enrolment go on.
    assert!(ask(&tables, pod_flag::ENROLLED, sent(proto::TCP, 40000, 80), OUT).forwards());
    tables.add_grant("10.0.0.1", "10.0.0.2", 80);
    assert!(ask(&tables, pod_flag::ENROLLED, packet, OUT).forwards());
    tables.config.grant_generation += 1;
    assert_eq!(reason(&tables, pod_flag::ENROLLED, packet, OUT), DropReason::MeshBypass);
    // A tunnel's port is no way around it.
    assert_eq!(reason(&tables, pod_flag::ENROLLED, syn(sent(proto::TCP, 40000, 15008)), OUT), DropReason::MeshBypass);
}

#[test]
fn tunnels_are_not_policys_business() {
    let mut tables = tables();
    isolate(&mut tables, direction::EGRESS);
    isolate(&mut tables, direction::INGRESS);
    let out = syn(sent(proto::TCP, 40000, 15008));
    let inn = syn(received(proto::TCP, 40000, 15008));
    for flags in [pod_flag::ENROLLED, pod_flag::WAYPOINT] {
        assert!(ask(&tables, flags, out, BY_PROXY).forwards());
        assert!(ask(&tables, flags, inn, Way::ToPod).forwards());
        assert!(ask(&tables, flags, received(proto::TCP, 15008, 40000), Way::ToPod).forwards());
        assert!(ask(&tables, flags, sent(proto::TCP, 15008, 40000), OUT).forwards());
        // Other ports are.
        assert!(!ask(&tables, flags, syn(received(proto::TCP, 40000, 8080)), Way::ToPod).forwards());
    }
    assert!(ask(&tables, pod_flag::WAYPOINT, out, OUT).forwards());
    // To and from pods without a tunnel end it is a port as any other.
    assert!(!ask(&tables, 0, out, OUT).forwards());
    assert!(!ask(&tables, 0, inn, Way::ToPod).forwards());
    assert!(!ask(&tables, 0, sent(proto::TCP, 15008, 40000), OUT).forwards());
}

#[test]
fn a_policy_change_reaches_open_connections() {
    let mut tables = tables();
    // The peer opened one to the pod's 8080, the pod one to the peer's 80.
    assert!(ask(&tables, 0, syn(received(proto::TCP, 40000, 8080)), Way::ToPod).opens);
    assert!(ask(&tables, 0, syn(sent(proto::TCP, 40001, 80)), OUT).opens);
    isolate(&mut tables, direction::INGRESS);
    // The first is cut in both directions, the second lives in both.
    assert!(!ask(&tables, 0, received(proto::TCP, 40000, 8080), Way::ToPod).forwards());
    assert!(!ask(&tables, 0, sent(proto::TCP, 8080, 40000), OUT).forwards());
    assert!(ask(&tables, 0, sent(proto::TCP, 40001, 80), OUT).forwards());
    assert!(ask(&tables, 0, received(proto::TCP, 80, 40001), Way::ToPod).forwards());
    // One nobody saw opening is allowed as long as one direction is.
    assert!(ask(&tables, 0, received(proto::TCP, 7, 7), Way::ToPod).forwards());
    isolate(&mut tables, direction::EGRESS);
    assert!(!ask(&tables, 0, received(proto::TCP, 7, 7), Way::ToPod).forwards());
    entry(&mut tables, direction::INGRESS, PEER, proto::TCP, 8080, policy_verdict::ALLOW);
    assert!(ask(&tables, 0, received(proto::TCP, 40000, 8080), Way::ToPod).forwards());
    assert!(ask(&tables, 0, sent(proto::TCP, 8080, 40000), OUT).forwards());
    // A SYN is judged strictly by its own direction.
    assert!(!ask(&tables, 0, syn(sent(proto::TCP, 8080, 40000)), OUT).forwards());
}

#[test]
fn the_node_is_always_allowed() {
    let mut tables = tables();
    isolate(&mut tables, direction::INGRESS);
    let probe = Packet { src: addr("10.0.0.254"), ..syn(received(proto::TCP, 40000, 8080)) };
    assert!(ask(&tables, 0, probe, Way::ToPod).forwards());
    assert!(!ask(&tables, 0, syn(received(proto::TCP, 40000, 8080)), Way::ToPod).forwards());
}

#[test]
fn udp_replies_follow_their_question() {
    let mut tables = tables();
    // Nothing isolates: nothing is remembered.
    assert!(ask(&tables, 0, sent(proto::UDP, 40000, 53), OUT).forwards());
    assert!(tables.flows.borrow().is_empty());
    isolate(&mut tables, direction::INGRESS);
    assert!(!ask(&tables, 0, received(proto::UDP, 53, 40000), Way::ToPod).forwards());
    assert!(ask(&tables, 0, sent(proto::UDP, 40000, 53), OUT).opens);
    assert!(ask(&tables, 0, received(proto::UDP, 53, 40000), Way::ToPod).forwards());
    assert!(!ask(&tables, 0, received(proto::UDP, 54, 40000), Way::ToPod).forwards());
    // Each packet keeps it alive; silence ends it.
    tables.now.set(UDP_IDLE_NS);
    assert!(ask(&tables, 0, received(proto::UDP, 53, 40000), Way::ToPod).forwards());
    tables.now.set(2 * UDP_IDLE_NS);
    assert!(ask(&tables, 0, received(proto::UDP, 53, 40000), Way::ToPod).forwards());
    tables.now.set(3 * UDP_IDLE_NS + 1);
    assert!(!ask(&tables, 0, received(proto::UDP, 53, 40000), Way::ToPod).forwards());
    // A policy change reaches flows that are alive.
    assert!(ask(&tables, 0, sent(proto::UDP, 40000, 53), OUT).forwards());
    isolate(&mut tables, direction::EGRESS);
    assert!(!ask(&tables, 0, received(proto::UDP, 53, 40000), Way::ToPod).forwards());
    assert!(!ask(&tables, 0, sent(proto::UDP, 40000, 53), OUT).forwards());
}

#[test]
fn icmp_errors_pass_and_echo_is_judged() {
    let mut tables = tables();
    isolate(&mut tables, direction::INGRESS);
    let icmp = |kind| Packet { icmp_type: kind, ..received(proto::ICMP, 0, 0) };
    assert!(ask(&tables, 0, icmp(3), Way::ToPod).forwards());
    assert!(ask(&tables, 0, icmp(11), Way::ToPod).forwards());
    assert!(!ask(&tables, 0, icmp(8), Way::ToPod).forwards());
    // The reply to the pod's own echo: egress is free.
    assert!(ask(&tables, 0, icmp(0), Way::ToPod).forwards());
    isolate(&mut tables, direction::EGRESS);
    assert!(!ask(&tables, 0, icmp(0), Way::ToPod).forwards());
    entry(&mut tables, direction::INGRESS, PEER, 0, 0, policy_verdict::ALLOW);
    assert!(ask(&tables, 0, icmp(8), Way::ToPod).forwards());
}

#[test]
fn later_fragments_follow_the_first() {
    let mut tables = tables();
    let later = Packet { fragment: Fragment::Later(9), ..received(proto::UDP, 0, 0) };
    assert!(ask(&tables, 0, later, Way::ToPod).forwards());
    isolate(&mut tables, direction::INGRESS);
    entry(&mut tables, direction::INGRESS, PEER, proto::UDP, 53, policy_verdict::ALLOW);
    assert!(!ask(&tables, 0, later, Way::ToPod).forwards());
    let first = Packet { fragment: Fragment::First(9), ..received(proto::UDP, 1000, 53) };
    assert!(ask(&tables, 0, first, Way::ToPod).forwards());
    assert!(ask(&tables, 0, later, Way::ToPod).forwards());
    tables.now.set(FRAGMENT_NS + 1);
    assert!(!ask(&tables, 0, later, Way::ToPod).forwards());
    let denied = Packet { fragment: Fragment::First(10), dst_port: 54, ..first };
    assert!(!ask(&tables, 0, denied, Way::ToPod).forwards());
    assert!(!ask(&tables, 0, Packet { fragment: Fragment::Later(10), ..later }, Way::ToPod).forwards());
}
