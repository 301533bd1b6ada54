use strata_abi::{
    DropReason, PolicyKey, ServiceKey, Verdict, direction, pod_flag, policy_verdict, proto, service_flag,
};

use super::*;
use crate::testing::{Tables, addr, pod};

const CLIENT: u32 = 256;
const SERVER: u32 = 257;

fn tables() -> Tables {
    let mut tables = Tables::default();
    tables.config.grant_generation = 5;
    tables.identify("10.0.0.1", CLIENT, identity_flag::LOCAL_POD);
    tables.identify("10.0.0.2", SERVER, identity_flag::LOCAL_POD);
    tables.identify("fd00::2", SERVER, identity_flag::LOCAL_POD);
    tables.add_service("10.96.0.1", 80, proto::TCP, 1, &[("10.0.0.2", 8080)]);
    tables.add_service("10.96.0.1", 53, proto::UDP, 2, &[("10.0.0.2", 5353)]);
    tables.add_service("10.96.0.9", 80, proto::TCP, 3, &[]);
    tables.add_service("10.96.0.8", 80, proto::TCP, 4, &[("10.0.0.1", 8080)]);
    tables
}

fn isolate(tables: &mut Tables, subject: u32, direction: u8) {
    let key = PolicyKey { subject, peer: 0, direction, proto: 0, port_be: [0; 2] };
    tables.add_policy(PolicyKey::PREFIX_ANY_PROTO, key, policy_verdict::DENY_DEFAULT, 40 + u32::from(direction));
}

fn allow(tables: &mut Tables, subject: u32, peer: u32, direction: u8, port: u16) {
    let key = PolicyKey { subject, peer, direction, proto: proto::TCP, port_be: port.to_be_bytes() };
    tables.add_policy(PolicyKey::PREFIX_FULL, key, policy_verdict::ALLOW, 50);
}

struct Ask {
    flags: Option<u32>,
    proto: u8,
    from_proxy: bool,
}

const PLAIN: Ask = Ask { flags: Some(0), proto: proto::TCP, from_proxy: false };
const MESHED: Ask = Ask { flags: Some(pod_flag::ENROLLED), ..PLAIN };

fn ask(tables: &Tables, ask: &Ask, dst: &str, port: u16) -> Decision {
    let record = ask.flags.map(|flags| pod("10.0.0.1", "fd00::1", CLIENT, flags));
    let call = Call {
        pod: record.as_ref(),
        netns_cookie: 9,
        dst: addr(dst),
        dst_port: port,
        proto: ask.proto,
        from_proxy: ask.from_proxy,
    };
    decide(tables, &call)
}

#[test]
fn a_nodes_ports_are_at_its_loopback_for_its_own_processes() {
    let mut tables = tables();
    tables.add_service("127.0.0.1", 30080, proto::TCP, 5, &[("10.0.0.2", 8080)]);
    let node = Ask { flags: None, ..PLAIN };
    let d = ask(&tables, &node, "127.0.0.1", 30080);
    assert_eq!((d.action, d.dst, d.dst_port), (Action::Rewrite, addr("10.0.0.2"), 8080));
    // Whoever listens there himself.
    assert_eq!(ask(&tables, &node, "::1", 30080).action, Action::Pass);
    for pod in [PLAIN, MESHED] {
        assert_eq!(ask(&tables, &pod, "127.0.0.1", 30080).action, Action::Ignore);
    }
}

#[test]
fn unmeshed_calls() {
    let tables = tables();
    let d = ask(&tables, &PLAIN, "10.96.0.1", 80);
    assert_eq!((d.action, d.verdict), (Action::Rewrite, Verdict::Translated));
    assert_eq!((d.dst, d.dst_port, d.src_id, d.dst_id), (addr("10.0.0.2"), 8080, CLIENT, SERVER));
    let d = ask(&tables, &PLAIN, "10.0.0.2", 8080);
    assert_eq!((d.action, d.verdict, d.dst_id), (Action::Pass, Verdict::Forwarded, SERVER));
    let d = ask(&tables, &PLAIN, "192.0.2.1", 443);
    assert_eq!((d.action, d.dst_id), (Action::Pass, identity::WORLD));
    let d = ask(&tables, &PLAIN, "10.96.0.9", 80);
    assert_eq!((d.action, d.reason), (Action::Refuse(errno::ECONNREFUSED), DropReason::NoBackend));
    let d = ask(&tables, &PLAIN, "10.96.0.1", 81);
    assert_eq!((d.action, d.reason), (Action::Refuse(errno::ECONNREFUSED), DropReason::UnknownServicePort));
    let d = ask(&tables, &Ask { proto: proto::UDP, ..PLAIN }, "10.96.0.1", 53);
    assert_eq!((d.action, d.dst_port), (Action::Rewrite, 5353));
}

#[test]
fn what_stays_at_home_is_ignored() {
    let tables = tables();
    for ask_as in [PLAIN, MESHED] {
        for dst in ["127.0.0.1", "127.1.2.3", "::1", "0.0.0.0", "::", "10.0.0.1", "fd00::1", "224.0.0.251", "ff02::fb"]
        {
            assert_eq!(ask(&tables, &ask_as, dst, 80).action, Action::Ignore, "{dst}");
        }
    }
    assert_eq!(ask(&tables, &Ask { from_proxy: true, ..MESHED }, "10.0.0.2", 80).action, Action::Ignore);
}

#[test]
fn processes_of_the_node_get_services_and_no_policy() {
    let mut tables = tables();
    isolate(&mut tables, SERVER, direction::INGRESS);
    for from_proxy in [false, true] {
        let node = Ask { flags: None, from_proxy, ..PLAIN };
        let d = ask(&tables, &node, "10.96.0.1", 80);
        assert_eq!((d.action, d.src_id), (Action::Rewrite, identity::HOST));
        assert_eq!(ask(&tables, &node, "10.96.0.9", 80).action, Action::Refuse(errno::ECONNREFUSED));
    }
}

#[test]
fn policy_of_both_sides_is_asked_on_the_backend() {
    let mut tables = tables();
    isolate(&mut tables, SERVER, direction::INGRESS);
    for ask_as in [PLAIN, MESHED] {
        let d = ask(&tables, &ask_as, "10.96.0.1", 80);
        assert_eq!((d.action, d.reason), (Action::Refuse(errno::EPERM), DropReason::PolicyDenied));
        assert_eq!((d.rule, d.direction, d.dst_port), (40, direction::INGRESS, 8080));
    }
    allow(&mut tables, SERVER, CLIENT, direction::INGRESS, 8080);
    assert_eq!(ask(&tables, &PLAIN, "10.96.0.1", 80).action, Action::Rewrite);
    assert_eq!(ask(&tables, &PLAIN, "10.96.0.1", 80).rule, 50);
    assert_eq!(ask(&tables, &MESHED, "10.96.0.1", 80).action, Action::Steer);
    isolate(&mut tables, CLIENT, direction::EGRESS);
    let d = ask(&tables, &PLAIN, "10.96.0.1", 80);
    assert_eq!((d.action, d.rule, d.direction), (Action::Refuse(errno::EPERM), 41, direction::EGRESS));
    // The VIP of a service that has no backend here is judged as what it is: no pod.
    assert_eq!(ask(&tables, &MESHED, "10.96.0.9", 80).action, Action::Refuse(errno::EPERM));
    // A pod may always reach itself, through a service too.
    assert_eq!(ask(&tables, &PLAIN, "10.96.0.8", 80).action, Action::Rewrite);
}

#[test]
fn audit_lets_pass_and_says_so() {
    let mut tables = tables();
    let key = PolicyKey { subject: SERVER, peer: 0, direction: direction::INGRESS, proto: 0, port_be: [0; 2] };
    tables.add_policy(PolicyKey::PREFIX_ANY_PROTO, key, policy_verdict::AUDIT, 6);
    let d = ask(&tables, &PLAIN, "10.96.0.1", 80);
    assert_eq!((d.action, d.verdict, d.rule), (Action::Rewrite, Verdict::Audited, 6));
}

#[test]
fn meshed_calls_are_steered() {
    let tables = tables();
    for dst in ["10.96.0.1", "10.0.0.2", "192.0.2.1", "fd00::2", "2001:db8::1"] {
        let d = ask(&tables, &MESHED, dst, 80);
        assert_eq!((d.action, d.verdict), (Action::Steer, Verdict::Redirected), "{dst}");
    }
    // A route may lead elsewhere: the proxy answers for services without backends and for undefined ports.
    assert_eq!(ask(&tables, &MESHED, "10.96.0.9", 80).action, Action::Steer);
    assert_eq!(ask(&tables, &MESHED, "10.96.0.1", 81).action, Action::Steer);
    // UDP is as if unmeshed.
    let d = ask(&tables, &Ask { proto: proto::UDP, ..MESHED }, "10.96.0.1", 53);
    assert_eq!(d.action, Action::Rewrite);
}

#[test]
fn meshed_calls_to_addresses_the_mesh_does_not_know_are_led_to_the_backend() {
    let mut tables = tables();
    tables.add_service("192.0.2.11", 30080, proto::TCP, 5, &[("10.0.0.2", 8080)]);
    let key = ServiceKey { addr: addr("192.0.2.11"), port: 30080, proto: proto::TCP, _pad: 0 };
    tables.services.get_mut(&key).unwrap().flags = service_flag::OUTSIDE;
    let d = ask(&tables, &MESHED, "192.0.2.11", 30080);
    assert_eq!((d.action, d.verdict), (Action::Lead, Verdict::Redirected));
    assert_eq!((d.dst, d.dst_port), (addr("10.0.0.2"), 8080));
    assert_eq!(ask(&tables, &PLAIN, "192.0.2.11", 30080).action, Action::Rewrite);
    tables.add_grant("10.0.0.1", "10.0.0.2", 8080);
    assert_eq!(ask(&tables, &MESHED, "192.0.2.11", 30080).action, Action::Rewrite);
    isolate(&mut tables, SERVER, direction::INGRESS);
    assert_eq!(ask(&tables, &MESHED, "192.0.2.11", 30080).action, Action::Refuse(errno::EPERM));
}

#[test]
fn a_valid_grant_is_direct() {
    let mut tables = tables();
    tables.add_grant("10.0.0.1", "10.0.0.2", 8080);
    let d = ask(&tables, &MESHED, "10.96.0.1", 80);
    assert_eq!((d.action, d.verdict, d.dst), (Action::Rewrite, Verdict::Direct, addr("10.0.0.2")));
    let d = ask(&tables, &MESHED, "10.0.0.2", 8080);
    assert_eq!((d.action, d.verdict), (Action::Pass, Verdict::Direct));
    assert_eq!(ask(&tables, &MESHED, "10.0.0.2", 8081).action, Action::Steer);
    // Policy stands above the grant.
    isolate(&mut tables, SERVER, direction::INGRESS);
    assert_eq!(ask(&tables, &MESHED, "10.0.0.2", 8080).action, Action::Refuse(errno::EPERM));
    // A raised generation revokes.
    tables.policy.clear();
    tables.config.grant_generation += 1;
    assert_eq!(ask(&tables, &MESHED, "10.0.0.2", 8080).action, Action::Steer);
    // Not on this node.
    tables.config.grant_generation -= 1;
    tables.identities.clear();
    assert_eq!(ask(&tables, &MESHED, "10.0.0.2", 8080).action, Action::Steer);
}

#[test]
fn a_waypoint_opens_tunnels_whatever_policy_says_of_their_port() {
    let mut tables = tables();
    isolate(&mut tables, SERVER, direction::INGRESS);
    assert_eq!(ask(&tables, &PLAIN, "10.0.0.2", 15008).action, Action::Pass);
    isolate(&mut tables, CLIENT, direction::EGRESS);
    assert_eq!(ask(&tables, &PLAIN, "10.0.0.2", 15008).action, Action::Refuse(errno::EPERM));
    let waypoint = Ask { flags: Some(pod_flag::WAYPOINT), ..PLAIN };
    assert_eq!(ask(&tables, &waypoint, "10.0.0.2", 15008).action, Action::Pass);
    assert_eq!(ask(&tables, &waypoint, "10.0.0.2", 8080).action, Action::Refuse(errno::EPERM));
}
