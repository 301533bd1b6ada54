//! Random small clusters: the tables, looked up as the kernel does, say what the objects say.
use proptest::prelude::*;

use super::*;

const LABELS: [&str; 4] = ["{}", "{app: a}", "{app: b}", "{app: a, tier: x}"];
const NAMESPACES: [&str; 2] = ["one", "two"];
const SELECTORS: [&str; 7] = [
    "{}",
    "{matchLabels: {app: a}}",
    "{matchLabels: {app: b}}",
    "{matchExpressions: [{key: app, operator: In, values: [a, b]}]}",
    "{matchExpressions: [{key: app, operator: NotIn, values: [a]}]}",
    "{matchExpressions: [{key: tier, operator: Exists}]}",
    "{matchLabels: {app: a}, matchExpressions: [{key: tier, operator: DoesNotExist}]}",
];
const NAMESPACE_SELECTORS: [&str; 4] = [
    "{}",
    "{matchLabels: {kubernetes.io/metadata.name: one}}",
    "{matchLabels: {env: prod}}",
    "{matchExpressions: [{key: env, operator: NotIn, values: [prod]}]}",
];
const BLOCKS: [&str; 10] = [
    "{cidr: 0.0.0.0/0}",
    "{cidr: 192.0.2.0/24, except: [192.0.2.128/25]}",
    "{cidr: 192.0.2.128/26}",
    "{cidr: 10.9.0.0/16}",
    "{cidr: 0.0.0.0/0, except: [192.0.2.0/24, 10.9.0.2/32]}",
    "{cidr: '::/0'}",
    "{cidr: 'fd00::/8', except: ['fd00:1::/32']}",
    "{cidr: 10.0.0.0/8}",
    "{cidr: 10.0.0.0/30, except: [10.0.0.1/32]}",
    "{cidr: 10.0.0.2/31}",
];
const PORTS: [&str; 7] = [
    "{port: 80}",
    "{port: 80, endPort: 1000}",
    "{protocol: UDP}",
    "{port: web}",
    "{port: 443, protocol: UDP}",
    "{port: 81, endPort: 8080, protocol: TCP}",
    "{port: web, protocol: UDP}",
];
const CONTAINER_PORTS: [&str; 4] = [
    "[]",
    "[{name: web, containerPort: 80}]",
    "[{name: web, containerPort: 8080}, {name: dns, containerPort: 443, protocol: UDP}]",
    "[{name: web, containerPort: 443, protocol: UDP}]",
];

fn pick(list: &'static [&'static str]) -> impl Strategy<Value = String> {
    proptest::sample::select(list).prop_map(str::to_owned)
}

fn peer() -> impl Strategy<Value = String> {
    prop_oneof![
        pick(&SELECTORS).prop_map(|s| format!("{{podSelector: {s}}}")),
        pick(&NAMESPACE_SELECTORS).prop_map(|s| format!("{{namespaceSelector: {s}}}")),
        (pick(&NAMESPACE_SELECTORS), pick(&SELECTORS))
            .prop_map(|(n, p)| format!("{{namespaceSelector: {n}, podSelector: {p}}}")),
        pick(&BLOCKS).prop_map(|s| format!("{{ipBlock: {s}}}")),
    ]
}

fn rules(peers: &'static str) -> impl Strategy<Value = String> {
    let rule = (proptest::collection::vec(peer(), 0..3), proptest::collection::vec(pick(&PORTS), 0..3));
    let rule =
        rule.prop_map(move |(who, what)| format!("{{{peers}: [{}], ports: [{}]}}", who.join(", "), what.join(", ")));
    proptest::collection::vec(rule, 0..3).prop_map(|rules| format!("[{}]", rules.join(", ")))
}

fn cluster() -> impl Strategy<Value = String> {
    let types = pick(&["[]", "[Ingress]", "[Egress]", "[Ingress, Egress]"]);
    let one = (pick(&NAMESPACES), pick(&SELECTORS), types, rules("from"), rules("to"));
    let pod = (pick(&NAMESPACES), pick(&LABELS), pick(&CONTAINER_PORTS), any::<bool>());
    (proptest::collection::vec(pod, 1..6), proptest::collection::vec(one, 0..4), any::<[bool; 2]>()).prop_map(
        |(pods, policies, prod)| {
            let mut yaml = String::from(
                "apiVersion: v1\nkind: Node\nmetadata: {name: node-b}\nstatus: {addresses: [{type: InternalIP, address: 10.9.0.2}]}\n",
            );
            for (namespace, prod) in NAMESPACES.iter().zip(prod) {
                let env = if prod { "prod" } else { "test" };
                yaml.push_str(&format!(
                    "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{env: {env}}}}}\n"
                ));
            }
            for (i, (namespace, labels, ports, here)) in pods.iter().enumerate() {
                let node = if *here { "node-a" } else { "node-b" };
                yaml.push_str(&format!(
                    "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{i}, namespace: {namespace}, labels: {labels}}}\n\
                     spec: {{nodeName: {node}, containers: [{{name: c, ports: {ports}}}]}}\nstatus: {{podIP: 10.0.0.{i}}}\n"
                ));
            }
            for (i, (namespace, selector, types, ingress, egress)) in policies.iter().enumerate() {
                let spec = format!("{{podSelector: {selector}, policyTypes: {types}, ingress: {ingress}, egress: {egress}}}");
                yaml.push_str(&policy(namespace, &format!("np{i}"), &spec));
            }
            yaml
        },
    )
}

fn check(verdict: (Verdict, u32), rules: &[RuleRef], explained: &Side) -> Result<(), TestCaseError> {
    let (kind, rule) = verdict;
    match explained {
        Side::NotIsolated => prop_assert_eq!(kind, Verdict::NoPolicy),
        Side::Allowed(_) => prop_assert_eq!(kind, Verdict::Allowed),
        Side::Denied(expected) => {
            prop_assert_eq!(kind, Verdict::DeniedByDefault);
            prop_assert_eq!(&rules[rule as usize], expected);
        }
        Side::Missing(what) => prop_assert!(false, "{} is missing", what),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_tables_say_what_the_objects_say(steps in proptest::collection::vec(cluster(), 1..3)) {
        let mut allocator = IdentityAllocator::default();
        for yaml in &steps {
            let objects = objects(yaml);
            let tables = compile(&objects, "node-a", CAPACITY, &mut allocator).unwrap();
            prop_assert_eq!(&tables.faults, &vec![]);
            let local: Vec<IpAddr> = objects.pods()
                .filter(|pod| pod.spec.as_ref().unwrap().node_name.as_deref() == Some("node-a"))
                .map(|pod| pod.status.as_ref().unwrap().pod_ip.as_ref().unwrap().parse().unwrap())
                .collect();
            let pods = objects.pods().count();
            let outside = ["192.0.2.1", "192.0.2.130", "192.0.2.200", "198.51.100.1", "10.9.0.2", "10.9.7.7", "10.77.0.1", "fd00:2::1", "fd00:1::1", "2001:db8::1"];
            let all: Vec<IpAddr> = (0..pods).map(|i| format!("10.0.0.{i}")).chain(outside.map(str::to_owned))
                .map(|text| text.parse().unwrap()).collect();
            for subject in &all[..pods] {
                for peer in all.iter().filter(|peer| *peer != subject) {
                    for proto in [proto::TCP, proto::UDP] {
                        for port in [80, 81, 443, 1000, 1001, 8080, 8081] {
                            let (s, p) = (identity_of(&tables, *subject), identity_of(&tables, *peer));
                            let (here, there) = (Party::Address(*subject), Party::Address(*peer));
                            let inbound = explain(&objects, &there, &here, proto, port).ingress;
                            check(ask(&tables, s, p, direction::INGRESS, proto, port), &tables.rules, &inbound)?;
                            if local.contains(subject) {
                                let outbound = explain(&objects, &here, &there, proto, port).egress;
                                check(ask(&tables, s, p, direction::EGRESS, proto, port), &tables.rules, &outbound)?;
                            }
                        }
                    }
                }
            }
        }
    }
}
