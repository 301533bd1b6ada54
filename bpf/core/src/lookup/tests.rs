use strata_abi::{listener::*, proto};

use super::*;
use crate::testing::{Tables, addr};

const ETH0: u32 = 2;

fn ask(tables: &Tables, local: &str, port: u16, remote: &str, ifindex: u32) -> Choice {
    let pod = Pod { v4: addr("10.0.0.2"), v6: addr("fd00::2") };
    let tuple = Tuple {
        proto: proto::TCP,
        local: addr(local),
        local_port: port,
        remote: addr(remote),
        ingress_ifindex: ifindex,
    };
    choose(tables, &pod, &tuple)
}

#[test]
fn who_gets_a_connection() {
    let mut tables = Tables::default();
    tables.config.node_v4 = addr("10.0.0.254");
    tables.config.node_v6 = addr("fd00::fe");
    tables.add_grant("10.0.0.7", "10.0.0.2", 8080);
    let cases = [
        // Outbound, steered: looped back to whatever address, with the pod's own as source.
        ("192.0.2.1", 443, "10.0.0.2", LOOPBACK, Choice::Listener(OUTBOUND_V4)),
        ("10.0.0.7", 15008, "10.0.0.2", LOOPBACK, Choice::Listener(OUTBOUND_V4)),
        ("2001:db8::1", 443, "fd00::2", LOOPBACK, Choice::Listener(OUTBOUND_V6)),
        // Inbound.
        ("10.0.0.2", 8080, "10.0.0.9", ETH0, Choice::Listener(INBOUND_V4)),
        ("fd00::2", 8080, "fd00::9", ETH0, Choice::Listener(INBOUND_V6)),
        ("10.0.0.2", 15008, "10.0.0.9", ETH0, Choice::Listener(HBONE_V4)),
        ("fd00::2", 15008, "fd00::9", ETH0, Choice::Listener(HBONE_V6)),
        ("fe80::1234", 80, "fe80::1", ETH0, Choice::Listener(INBOUND_V6)),
        // The pod to itself: the kernel shows eth0 for its own address.
        ("10.0.0.2", 8080, "10.0.0.2", ETH0, Choice::App),
        ("127.0.0.1", 8080, "127.0.0.1", LOOPBACK, Choice::App),
        ("::1", 8080, "::1", LOOPBACK, Choice::App),
        ("10.0.0.2", 8080, "127.0.0.1", ETH0, Choice::App),
        // A tunnel to itself.
        ("10.0.0.2", 15008, "10.0.0.2", ETH0, Choice::Listener(HBONE_V4)),
        // The proxy's hop: another's source, by lo.
        ("10.0.0.2", 8080, "10.0.0.9", LOOPBACK, Choice::App),
        ("fd00::2", 8080, "fd00::9", LOOPBACK, Choice::App),
        // The node: probes, but not tunnels.
        ("10.0.0.2", 8080, "10.0.0.254", ETH0, Choice::App),
        ("fd00::2", 8080, "fd00::fe", ETH0, Choice::App),
        ("10.0.0.2", 15008, "10.0.0.254", ETH0, Choice::Listener(HBONE_V4)),
        // The grant, this port only.
        ("10.0.0.2", 8080, "10.0.0.7", ETH0, Choice::App),
        ("10.0.0.2", 8081, "10.0.0.7", ETH0, Choice::Listener(INBOUND_V4)),
    ];
    for (local, port, remote, ifindex, expected) in cases {
        assert_eq!(ask(&tables, local, port, remote, ifindex), expected, "{remote} -> {local}:{port} by {ifindex}");
    }
    tables.config.grant_generation = 1;
    assert_eq!(ask(&tables, "10.0.0.2", 8080, "10.0.0.7", ETH0), Choice::Listener(INBOUND_V4));
}

#[test]
fn udp_is_not_captured() {
    let pod = Pod { v4: addr("10.0.0.2"), v6: Addr::UNSPECIFIED };
    let tuple = Tuple {
        proto: proto::UDP,
        local: addr("10.0.0.2"),
        local_port: 53,
        remote: addr("10.0.0.9"),
        ingress_ifindex: 2,
    };
    assert_eq!(choose(&Tables::default(), &pod, &tuple), Choice::App);
}
