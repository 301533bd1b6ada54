use std::time::{Duration, SystemTime};

use strata_abi::{Addr, direction};

use super::*;

struct Names;

impl Resolver for Names {
    fn endpoint(&self, ip: IpAddr, port: u16, identity: u32) -> Endpoint {
        let unknown = Endpoint::unknown(ip, port, identity);
        if ip == IpAddr::from([10, 1, 0, 5]) {
            let labels = BTreeMap::from([("app".to_owned(), "checkout".to_owned())]);
            let (namespace, pod, workload) = ("shop".into(), "checkout-1".into(), "checkout".into());
            return Endpoint { namespace, pod, workload, labels, ..unknown };
        }
        Endpoint { kind: "world".into(), ..unknown }
    }

    fn service(&self, ip: IpAddr, port: u16, _: u8) -> Option<String> {
        (ip == IpAddr::from([10, 96, 0, 1]) && port == 80).then(|| "shop/payments:80".to_owned())
    }

    fn rule(&self, rule: u32) -> Option<PolicyName> {
        (rule == 0).then(|| PolicyName {
            namespace: "shop".into(),
            names: vec!["payments".into()],
            direction: "egress".into(),
            rule: None,
            text: "isolated".into(),
        })
    }
}

fn event() -> FlowEvent {
    FlowEvent {
        time_ns: 2_000_000_500,
        cookie: 77,
        netns_cookie: 9,
        src: Addr::v4([10, 1, 0, 5]),
        dst: Addr::v4([192, 0, 2, 9]),
        orig_dst: Addr::v4([10, 96, 0, 1]),
        src_id: 300,
        dst_id: 2,
        rule: 0,
        ifindex: 0,
        src_port: 0,
        dst_port: 8080,
        orig_dst_port: 80,
        proto: proto::TCP,
        verdict: Verdict::Dropped as u8,
        reason: DropReason::PolicyDenied as u8,
        hook: hook::CONNECT,
        direction: direction::EGRESS,
        _pad: [0; 5],
    }
}

#[test]
fn a_denied_connect_names_both_sides_the_service_and_the_policy() {
    let clock = BootClock::at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_010), Duration::from_secs(10));
    let flow = resolve(&event(), &"n1".into(), &clock, &Names);
    let golden = r#"{"time":"2023-11-14T22:13:22.0000005Z","layer":"network","node":"n1","verdict":"dropped","drop_reason":"policy_denied","proto":"TCP","src":{"ip":"10.1.0.5","port":0,"identity":300,"namespace":"shop","pod":"checkout-1","workload":"checkout","labels":{"app":"checkout"}},"dst":{"ip":"192.0.2.9","port":8080,"identity":2,"kind":"world"},"service":"shop/payments:80","original_dst":{"ip":"10.96.0.1","port":80,"identity":0},"policy":{"namespace":"shop","names":["payments"],"direction":"egress","text":"isolated"},"hook":"connect","cookie":77}"#;
    assert_eq!(serde_json::to_string(&flow).unwrap(), golden);
    assert_eq!(serde_json::from_str::<Flow>(golden).unwrap(), flow);
}

#[test]
fn an_undecided_flow_names_no_policy() {
    let forwarded = FlowEvent {
        verdict: Verdict::Forwarded as u8,
        reason: 0,
        orig_dst: event().dst,
        orig_dst_port: 8080,
        ..event()
    };
    let flow = resolve(&forwarded, &"n1".into(), &BootClock::now(), &Names);
    assert_eq!((flow.policy, flow.original_dst, flow.service), (None, None, None));
    assert_eq!(flow.drop_reason, "");
}

#[test]
fn a_refusal_of_the_mesh_becomes_a_flow() {
    let refusal = Refusal {
        src: ([10, 1, 0, 5].into(), 40000),
        dst: ([10, 96, 0, 1].into(), 80),
        policy: "shop/deny-all",
        reason: "denied by policy",
    };
    let flow = resolve_refusal(&refusal, &"n1".into(), &Names);
    assert_eq!((flow.layer, &*flow.verdict, &*flow.drop_reason), (Layer::Mesh, "dropped", "unauthorized"));
    assert_eq!(flow.policy.unwrap().names, ["deny-all"]);
    let plaintext = Refusal { policy: "", reason: "plaintext to a STRICT workload", ..refusal };
    assert_eq!(resolve_refusal(&plaintext, &"n1".into(), &Names).drop_reason, "plaintext_refused");
}
