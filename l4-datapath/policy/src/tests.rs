use std::net::IpAddr;
use std::path::Path;

use compat_objects::{ObjectSet, read_str};
use strata_abi::{Addr, PolicyKey, direction, identity, identity_flag, policy_verdict, proto};
use strata_bpf_core::policy::{Kind as Verdict, decide};

use super::*;

mod random;

const CAPACITY: usize = 65_536;

fn objects(yaml: &str) -> ObjectSet {
    let (set, faults) = read_str(yaml, Path::new("test.yaml"));
    assert_eq!(faults, vec![], "{yaml}");
    set
}

fn compiled(objects: &ObjectSet, node: &str) -> Compiled {
    compile(objects, node, CAPACITY, &mut IdentityAllocator::default()).unwrap()
}

/// Longest-prefix match over the first `width` bits, as the kernel's trie does it.
fn masked(bytes: &mut [u8], prefix_len: u32) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        let kept = prefix_len.saturating_sub(8 * i as u32).min(8);
        *byte &= !(0xff_u16 >> kept) as u8;
    }
}

fn identity_of(tables: &Compiled, address: IpAddr) -> u32 {
    let found = (0..=128).rev().find_map(|len| {
        let mut key = Addr::from(address);
        masked(&mut key.0, len);
        tables.by_address.get(&(key, len))
    });
    found.map_or(identity::WORLD, |identity| identity.security_id)
}

fn entry(tables: &Compiled, subject: u32, peer: u32, direction: u8, proto: u8, port: u16) -> Option<(u8, u32)> {
    let found = (PolicyKey::PREFIX_ANY_PROTO..=PolicyKey::PREFIX_FULL).rev().find_map(|len| {
        let mut tail = [proto, port.to_be_bytes()[0], port.to_be_bytes()[1]];
        masked(&mut tail, len - PolicyKey::PREFIX_ANY_PROTO);
        let key = PolicyKey { subject, peer, direction, proto: tail[0], port_be: [tail[1], tail[2]] };
        tables.policy.get(&(key, len))
    });
    found.map(|entry| (entry.verdict, entry.rule))
}

/// The kernel's two lookups and its precedence (`strata_bpf_core::policy`, the very code it runs).
fn ask(tables: &Compiled, subject: u32, peer: u32, direction: u8, proto: u8, port: u16) -> (Verdict, u32) {
    let specific = if peer == identity::UNKNOWN { None } else { entry(tables, subject, peer, direction, proto, port) };
    decide(specific, entry(tables, subject, 0, direction, proto, port))
}

const CLUSTER: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: v1
kind: Namespace
metadata: {name: bank, labels: {team: b}}
---
apiVersion: v1
kind: Node
metadata: {name: node-b}
status: {addresses: [{type: InternalIP, address: 10.9.0.2}, {type: Hostname, address: node-b}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: node-a, containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {nodeName: node-b, containers: [{name: c, ports: [{name: http, containerPort: 9090}]}]}
status: {podIP: 10.0.1.1}
---
apiVersion: v1
kind: Pod
metadata: {name: pay, namespace: bank, labels: {app: pay}}
spec: {nodeName: node-a, containers: [{name: c}]}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: bank, labels: {app: agent}}
spec: {nodeName: node-a, hostNetwork: true, containers: [{name: c}]}
status: {podIP: 10.9.0.1}
"#;

fn cluster(policies: &str) -> ObjectSet {
    objects(&format!("{CLUSTER}---\n{policies}"))
}

fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}

struct Case<'a> {
    objects: &'a ObjectSet,
    tables: &'a Compiled,
}

impl Case<'_> {
    /// Ingress of `to` from `from` by tables and by explanation, which must agree.
    fn ingress(&self, from: &str, to: &str, port: u16) -> bool {
        let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
        let (subject, peer) = (identity_of(self.tables, to), identity_of(self.tables, from));
        let (verdict, rule) = ask(self.tables, subject, peer, direction::INGRESS, proto::TCP, port);
        let explained = explain(self.objects, &Party::Address(from), &Party::Address(to), proto::TCP, port).ingress;
        assert_eq!(matches!(verdict, Verdict::Allowed | Verdict::NoPolicy), explained.allows(), "{from} {to} {port}");
        if let Side::Denied(expected) | Side::Allowed(expected) = explained {
            assert_eq!(self.tables.rules[rule as usize], expected);
        }
        matches!(verdict, Verdict::Allowed | Verdict::NoPolicy)
    }

    fn egress(&self, from: &str, to: &str, port: u16) -> bool {
        let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
        let (subject, peer) = (identity_of(self.tables, from), identity_of(self.tables, to));
        let (verdict, _) = ask(self.tables, subject, peer, direction::EGRESS, proto::TCP, port);
        let explained = explain(self.objects, &Party::Address(from), &Party::Address(to), proto::TCP, port).egress;
        assert_eq!(matches!(verdict, Verdict::Allowed | Verdict::NoPolicy), explained.allows(), "{from} {to} {port}");
        explained.allows()
    }
}

fn with<R>(policies: &str, check: impl FnOnce(Case<'_>) -> R) -> R {
    let objects = cluster(policies);
    let tables = compiled(&objects, "node-a");
    assert_eq!(tables.faults, vec![]);
    check(Case { objects: &objects, tables: &tables })
}

#[test]
fn without_policies_nobody_is_isolated() {
    with("", |case| {
        assert!(case.tables.policy.is_empty());
        assert!(case.ingress("10.0.0.2", "10.0.0.1", 80) && case.egress("10.0.0.1", "192.0.2.1", 443));
        let tables = case.tables;
        assert_eq!(tables.pod_identity.len(), 3, "host network pods have none");
        let web = identity_of(tables, "10.0.0.1".parse().unwrap());
        assert_eq!(web, tables.pod_identity["Kubernetes//Pod/shop/web"]);
        assert_eq!(web, identity_of(tables, "fd00::1".parse().unwrap()));
        assert!(web >= identity::FIRST_POD);
        let local = |ip: &str| {
            tables.by_address[&(Addr::from(ip.parse::<IpAddr>().unwrap()), 128)].flags & identity_flag::LOCAL_POD
        };
        assert_ne!(local("10.0.0.1"), 0);
        assert_eq!(local("10.0.1.1"), 0);
        assert_eq!(identity_of(tables, "10.9.0.2".parse().unwrap()), identity::REMOTE_NODE);
        assert_eq!(identity_of(tables, "192.0.2.1".parse().unwrap()), identity::WORLD);
        let info = tables.identities.iter().find(|info| info.id == web).unwrap();
        assert_eq!((info.namespace.as_str(), info.labels["app"].as_str()), ("shop", "web"));
        assert_eq!(info.namespace_labels["team"], "a");
    });
}

#[test]
fn default_deny_names_the_policy() {
    with(&policy("shop", "deny", "{podSelector: {}, policyTypes: [Ingress, Egress]}"), |case| {
        assert!(!case.ingress("10.0.0.2", "10.0.0.1", 80));
        assert!(!case.egress("10.0.0.1", "10.0.1.1", 80));
        assert!(case.ingress("10.0.0.1", "10.0.0.2", 80), "another namespace");
        let web = identity_of(case.tables, "10.0.0.1".parse().unwrap());
        let (verdict, rule) = ask(case.tables, web, identity::WORLD, direction::INGRESS, proto::ICMP, 0);
        assert_eq!(verdict, Verdict::DeniedByDefault);
        assert_eq!(
            case.tables.rules[rule as usize].to_string(),
            "NetworkPolicy shop/deny (isolates ingress, no rule allows)"
        );
        let key = (
            PolicyKey { subject: web, peer: 0, direction: direction::INGRESS, proto: 0, port_be: [0, 0] },
            PolicyKey::PREFIX_ANY_PROTO,
        );
        assert_eq!(case.tables.policy[&key].verdict, policy_verdict::DENY_DEFAULT);
        // Egress of a pod elsewhere is that node's business; its ingress is everybody's.
        let api = identity_of(case.tables, "10.0.1.1".parse().unwrap());
        assert!(entry(case.tables, api, 0, direction::EGRESS, proto::TCP, 80).is_none());
        assert!(entry(case.tables, api, 0, direction::INGRESS, proto::TCP, 80).is_some());
    });
}

#[test]
fn peers_by_pod_namespace_both_and_everybody() {
    let allow = |from: &str| {
        policy("shop", "p", &format!("{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{from: [{from}]}}]}}"))
    };
    let (api, pay, world) = ("10.0.1.1", "10.0.0.2", "192.0.2.1");
    let reach =
        |from: &str| with(&allow(from), |case| [api, pay, world].map(|source| case.ingress(source, "10.0.0.1", 80)));
    assert_eq!(reach("{podSelector: {}}"), [true, false, false]);
    assert_eq!(reach("{podSelector: {matchLabels: {app: web}}}"), [false, false, false]);
    assert_eq!(reach("{namespaceSelector: {}}"), [true, true, false]);
    assert_eq!(reach("{namespaceSelector: {matchLabels: {team: b}}}"), [false, true, false]);
    assert_eq!(
        reach(
            "{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: bank}}, podSelector: {matchLabels: {app: pay}}}"
        ),
        [false, true, false]
    );
    assert_eq!(
        reach("{namespaceSelector: {}, podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [pay]}]}}"),
        [true, false, false]
    );
    assert_eq!(
        reach(
            "{namespaceSelector: {matchExpressions: [{key: team, operator: Exists}, {key: x, operator: DoesNotExist}]}}"
        ),
        [true, true, false]
    );
    assert_eq!(reach(""), [true, true, true], "an empty list is everybody");
}

#[test]
fn blocks_and_their_exceptions_mean_addresses_of_pods_too() {
    let spec = "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0, except: [192.0.2.0/24, 10.9.0.2/32, 10.0.0.2/32]}}]}]}";
    let inner = "{podSelector: {matchLabels: {app: web}}, egress: [{to: [{ipBlock: {cidr: 192.0.2.128/25}}], ports: [{port: 443}]}]}";
    with(&format!("{}{}", policy("shop", "out", spec), policy("shop", "partner", inner)), |case| {
        let out = |to: &str, port| case.egress("10.0.0.1", to, port);
        assert!(out("198.51.100.1", 80));
        assert!(!out("192.0.2.1", 443));
        assert!(out("192.0.2.129", 443) && !out("192.0.2.129", 80));
        assert!(out("10.0.1.1", 80) && !out("10.0.0.2", 80), "a pod, and one that is excepted");
        assert!(!out("10.9.0.2", 80), "the excepted node");
        assert!(!out("2001:db8::1", 80));
    });
}

#[test]
fn a_block_of_all_ipv6_is_not_ipv4() {
    with(
        &policy("shop", "v6", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: '::/0'}}]}]}"),
        |case| {
            assert!(case.egress("10.0.0.1", "2001:db8::1", 80));
            assert!(!case.egress("10.0.0.1", "192.0.2.1", 80));
            assert_eq!(identity_of(case.tables, "192.0.2.1".parse().unwrap()), identity::WORLD);
        },
    );
}

#[test]
fn named_ports_are_the_destinations() {
    let inbound = policy("shop", "in", "{podSelector: {}, ingress: [{ports: [{port: http}]}]}");
    with(&inbound, |case| {
        assert!(case.ingress("10.0.0.2", "10.0.0.1", 8080) && !case.ingress("10.0.0.2", "10.0.0.1", 9090));
        assert!(case.ingress("10.0.0.2", "10.0.1.1", 9090) && !case.ingress("10.0.0.2", "10.0.1.1", 8080));
    });
    let outbound = policy("bank", "out", "{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: http}]}]}");
    with(&outbound, |case| {
        assert!(case.egress("10.0.0.2", "10.0.0.1", 8080) && !case.egress("10.0.0.2", "10.0.0.1", 9090));
        assert!(case.egress("10.0.0.2", "10.0.1.1", 9090) && !case.egress("10.0.0.2", "192.0.2.1", 8080));
    });
}

#[test]
fn ranges_and_protocols() {
    let spec = "{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 8000, endPort: 8999}, {port: 53, protocol: UDP}, {protocol: SCTP}]}]}";
    with(&policy("shop", "ports", spec), |case| {
        for (port, open) in [(7999, false), (8000, true), (8499, true), (8999, true), (9000, false), (53, false)] {
            assert_eq!(case.ingress("10.0.0.2", "10.0.0.1", port), open, "{port}");
        }
        let web = identity_of(case.tables, "10.0.0.1".parse().unwrap());
        let ask = |proto, port| ask(case.tables, web, 999, direction::INGRESS, proto, port).0;
        assert_eq!(ask(proto::UDP, 53), Verdict::Allowed);
        assert_eq!(ask(proto::SCTP, 7), Verdict::Allowed);
        assert_eq!(ask(proto::ICMP, 0), Verdict::DeniedByDefault);
    });
}

#[test]
fn an_allow_of_everything_replaces_the_default() {
    let deny = policy("shop", "a-deny", "{podSelector: {}, policyTypes: [Ingress]}");
    let allow = policy("shop", "b-allow", "{podSelector: {}, ingress: [{}]}");
    with(&format!("{deny}{allow}"), |case| {
        assert!(case.ingress("192.0.2.1", "10.0.0.1", 80));
        let rule = |r: &&RuleRef| r.policies == ["b-allow"];
        assert_eq!(case.tables.rules.iter().find(rule).unwrap().to_string(), "NetworkPolicy shop/b-allow ingress[0]");
    });
}

#[test]
fn numbers_are_stable_also_over_a_restart() {
    let mut allocator = IdentityAllocator::default();
    let spec = "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 192.0.2.0/24}}]}]}";
    let first = compile(&cluster(&policy("shop", "p", spec)), "node-a", CAPACITY, &mut allocator).unwrap();
    let saved = serde_json::to_string(&allocator).unwrap();
    let mut allocator: IdentityAllocator = serde_json::from_str(&saved).unwrap();

    // A policy and a pod that sort before the others must not push them.
    let earlier = policy(
        "bank",
        "a",
        "{podSelector: {}, policyTypes: [Ingress], ingress: [{from: [{ipBlock: {cidr: 172.16.0.0/12}}]}]}",
    );
    let pod = "---\napiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: bank}\nspec: {nodeName: node-a, containers: [{name: c}]}\nstatus: {podIP: 10.0.0.77}\n";
    let more = cluster(&format!("{earlier}{pod}{}", policy("shop", "p", spec)));
    let second = compile(&more, "node-a", CAPACITY, &mut allocator).unwrap();
    for (key, entry) in &first.policy {
        assert_eq!(second.policy.get(key), Some(entry));
    }
    for (key, identity) in &first.by_address {
        assert_eq!(second.by_address.get(key), Some(identity));
    }
    assert_eq!(second.rules[..first.rules.len()], first.rules[..]);

    // A freed number rests: an event in flight must not be told as somebody else's.
    let third = compile(&cluster(&earlier), "node-a", CAPACITY, &mut allocator).unwrap();
    let freed = first.rules.iter().position(|rule| rule.policies == ["p"]).unwrap();
    assert_eq!(third.rules[freed], RuleRef::default());
    let other = compile(&cluster(&policy("shop", "q", spec)), "node-a", CAPACITY, &mut allocator).unwrap();
    assert_eq!(other.rules[freed], RuleRef::default());
    let gone = first.by_address[&(Addr::v4([192, 0, 2, 0]), 120)];
    assert_ne!(other.by_address[&(Addr::v4([192, 0, 2, 0]), 120)], gone, "the number of a forgotten block rests too");
}

#[test]
fn what_does_not_fit_is_denied_and_named() {
    let greedy: Vec<String> =
        (0..40).map(|i| format!("{{port: {}, endPort: {}}}", i * 1000 + 1, i * 1000 + 999)).collect();
    let spec = format!("{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{ports: [{}]}}]}}", greedy.join(", "));
    let modest = policy("bank", "modest", "{podSelector: {}, ingress: [{ports: [{port: 80}]}]}");
    let set = cluster(&format!("{}{modest}", policy("shop", "greedy", &spec)));
    let tables = compile(&set, "node-a", 100, &mut IdentityAllocator::default()).unwrap();
    assert!(tables.policy.len() <= 100);
    assert_eq!(tables.faults.len(), 1);
    let shown = tables.faults[0].to_string();
    assert!(shown.contains("NetworkPolicy shop/greedy: spec.ingress: its rules expand to"), "{shown}");
    assert!(shown.starts_with("test.yaml:"), "{shown}");
    let id = |ip: &str| identity_of(&tables, ip.parse().unwrap());
    let allowed = |to, port| ask(&tables, id(to), id("192.0.2.1"), direction::INGRESS, proto::TCP, port).0;
    assert_eq!(allowed("10.0.0.1", 500), Verdict::DeniedByDefault);
    assert_eq!(allowed("10.0.0.2", 80), Verdict::Allowed);
    let error = compile(&set, "node-a", 1, &mut IdentityAllocator::default()).unwrap_err();
    assert_eq!(error, Error::TooManyIsolated { isolated: 2, capacity: 1 });
}

#[test]
fn one_address_of_two_pods_has_nobodys_rights() {
    let twin = "apiVersion: v1\nkind: Pod\nmetadata: {name: twin, namespace: bank}\nspec: {nodeName: node-b, containers: [{name: c}]}\nstatus: {podIP: 10.0.0.1}\n";
    let tables = compiled(&cluster(twin), "node-a");
    assert_eq!(identity_of(&tables, "10.0.0.1".parse().unwrap()), identity::UNMANAGED);
    assert_eq!(tables.faults.len(), 1);
    assert!(
        tables.faults[0]
            .to_string()
            .contains("Pod shop/web: status.podIPs: 10.0.0.1 is also the address of pod bank/twin")
    );
    let (verdict, _) = ask(&tables, identity::UNMANAGED, 999, direction::INGRESS, proto::TCP, 80);
    assert_eq!(verdict, Verdict::DeniedByRule);
}

#[test]
fn malformed_policies_from_elsewhere_never_open_anything() {
    // The reader refuses these; an API server's objects come without it.
    let text = r#"{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "bad", "namespace": "shop"},
        "spec": {"podSelector": {"matchExpressions": [{"key": "app", "operator": "Like", "values": ["w"]}]},
                 "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/99"}}, {}]}, {"ports": [{"port": 80, "endPort": 70}]}]}}"#;
    let bad: compat_objects::core::NetworkPolicy = serde_json::from_str(text).unwrap();
    let mut set = cluster("");
    set.insert(bad.into(), None);
    let tables = compiled(&set, "node-a");
    let fields: Vec<&str> = tables.faults.iter().map(|fault| fault.field.as_str()).collect();
    assert_eq!(fields.len(), 4, "{:#?}", tables.faults);
    assert_eq!(fields[0], "spec.podSelector.matchExpressions[0].operator");
    assert_eq!(fields[3], "spec.ingress[1].ports[0].endPort");
    let web = identity_of(&tables, "10.0.0.1".parse().unwrap());
    assert_eq!(ask(&tables, web, identity::WORLD, direction::INGRESS, proto::TCP, 80).0, Verdict::DeniedByDefault);
}
