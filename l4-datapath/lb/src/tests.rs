use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use compat_objects::{ObjectSet, read_str};
use proptest::prelude::*;
use strata_abi::{Addr, BackendKey, Service, ServiceKey, backend_flag, proto, service_flag};

use super::*;

fn objects(yaml: &str) -> ObjectSet {
    let (set, faults) = read_str(yaml, Path::new("test.yaml"));
    assert_eq!(faults, vec![]);
    set
}

fn key(address: &str, port: u16, proto: u8) -> ServiceKey {
    ServiceKey { addr: address.parse::<IpAddr>().unwrap().into(), port, proto, _pad: 0 }
}

/// `address:port`, with a `*` for local ones.
fn backends(compiled: &Compiled, key: &ServiceKey) -> Vec<String> {
    let service = compiled.services[key];
    let slots = (0..service.backend_count).map(|slot| BackendKey { backend_set: service.backend_set, slot });
    let shown = slots.map(|slot| {
        let backend = compiled.backends[&slot];
        let mark = if backend.flags & backend_flag::LOCAL != 0 { "*" } else { "" };
        format!("{}:{}{mark}", IpAddr::from(backend.addr), backend.port)
    });
    shown.collect()
}

const SHOP: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, "fd00:96::1"]
  externalIPs: [192.0.2.1]
  sessionAffinity: ClientIP
  ports: [{name: http, port: 80, targetPort: 8080}, {name: dns, port: 53, protocol: UDP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-4, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: dns, port: 5353, protocol: UDP}]
endpoints:
- {addresses: [10.0.0.2], nodeName: node-b}
- {addresses: [10.0.0.1], nodeName: node-a, conditions: {ready: true}}
- {addresses: [10.0.0.3], nodeName: node-b, conditions: {ready: false, serving: true, terminating: true}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-6, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: http, port: 8080}]
endpoints: [{addresses: ["fd00::1"], nodeName: node-a}]
"#;

#[test]
fn both_families_and_external_addresses() {
    let mut sets = BackendSets::default();
    let compiled = compile(&objects(SHOP), "node-a", &mut sets);
    assert_eq!(backends(&compiled, &key("10.96.0.1", 80, proto::TCP)), ["10.0.0.1:8080*", "10.0.0.2:8080"]);
    assert_eq!(backends(&compiled, &key("10.96.0.1", 53, proto::UDP)), ["10.0.0.1:5353*", "10.0.0.2:5353"]);
    assert_eq!(backends(&compiled, &key("192.0.2.1", 80, proto::TCP)), ["10.0.0.1:8080*", "10.0.0.2:8080"]);
    assert_eq!(backends(&compiled, &key("fd00:96::1", 80, proto::TCP)), ["fd00::1:8080*"]);
    assert_eq!(backends(&compiled, &key("fd00:96::1", 53, proto::UDP)), Vec::<String>::new());
    assert_eq!(compiled.services[&key("10.96.0.1", 80, proto::TCP)].affinity_seconds, 10_800);
    assert_eq!(compiled.names[&key("10.96.0.1", 80, proto::TCP)], "shop/web:http");
    // Markers for cluster addresses, so that undefined ports are refused; none for external ones.
    assert_eq!(compiled.services[&key("10.96.0.1", 0, 0)], Service::default());
    assert_eq!(compiled.names[&key("fd00:96::1", 0, 0)], "shop/web");
    assert!(!compiled.services.contains_key(&key("192.0.2.1", 0, 0)));
    assert_eq!(compiled.services.len(), 8);
    assert_eq!(compiled.faults, vec![]);
}

#[test]
fn draining_endpoints_serve_when_nobody_else_does() {
    let yaml = SHOP.replace("nodeName: node-b}", "nodeName: node-b, conditions: {ready: false}}");
    let yaml = yaml.replace("{ready: true}", "{ready: false, serving: false, terminating: true}");
    let compiled = compile(&objects(&yaml), "node-a", &mut BackendSets::default());
    assert_eq!(backends(&compiled, &key("10.96.0.1", 80, proto::TCP)), ["10.0.0.3:8080"]);
}

#[test]
fn policies_of_the_service_are_kept() {
    let local = SHOP.replace("sessionAffinity: ClientIP", "internalTrafficPolicy: Local");
    let compiled = compile(&objects(&local), "node-b", &mut BackendSets::default());
    assert_eq!(backends(&compiled, &key("10.96.0.1", 80, proto::TCP)), ["10.0.0.2:8080*"]);
    assert_eq!(backends(&compiled, &key("192.0.2.1", 80, proto::TCP)), ["10.0.0.1:8080", "10.0.0.2:8080*"]);
    let nowhere = compile(&objects(&local), "node-c", &mut BackendSets::default());
    assert_eq!(nowhere.services[&key("10.96.0.1", 80, proto::TCP)], Service::default());

    let all = SHOP.replace("sessionAffinity: ClientIP", "publishNotReadyAddresses: true");
    let compiled = compile(&objects(&all), "node-c", &mut BackendSets::default());
    assert_eq!(backends(&compiled, &key("10.96.0.1", 80, proto::TCP)).len(), 3);
}

#[test]
fn hints_keep_traffic_close() {
    let yaml = SHOP
        .replace("nodeName: node-b}", "nodeName: node-b, hints: {forZones: [{name: z2}]}}")
        .replace("conditions: {ready: true}", "hints: {forZones: [{name: z1}]}");
    let yaml = format!(
        "{yaml}---\napiVersion: v1\nkind: Node\nmetadata: {{name: node-d, labels: {{topology.kubernetes.io/zone: z2}}}}\n"
    );
    let at = |node| {
        let compiled = compile(&objects(&yaml), node, &mut BackendSets::default());
        backends(&compiled, &key("10.96.0.1", 80, proto::TCP))
    };
    assert_eq!(at("node-d"), ["10.0.0.2:8080"]);
    assert_eq!(at("node-x"), ["10.0.0.1:8080", "10.0.0.2:8080"], "no zone known: hints do not apply");
}

#[test]
fn a_changed_set_gets_another_number_and_an_unchanged_one_keeps_its() {
    let mut sets = BackendSets::after(41);
    let web = key("10.96.0.1", 80, proto::TCP);
    let v6 = key("fd00:96::1", 80, proto::TCP);
    let first = compile(&objects(SHOP), "node-a", &mut sets);
    assert!(first.services[&web].backend_set > 41);
    assert_eq!(compile(&objects(SHOP), "node-a", &mut sets), first);
    let second = compile(&objects(&SHOP.replace("10.0.0.2", "10.0.0.9")), "node-a", &mut sets);
    assert_ne!(second.services[&web].backend_set, first.services[&web].backend_set);
    assert_eq!(second.services[&v6].backend_set, first.services[&v6].backend_set);
    let third = compile(&objects(SHOP), "node-a", &mut sets);
    assert!(third.services[&web].backend_set > second.services[&web].backend_set, "numbers do not come back");
}

#[test]
fn what_cannot_be_served_is_told() {
    let yaml = r#"
apiVersion: v1
kind: Service
metadata: {name: a, namespace: n}
spec: {clusterIP: 10.96.0.1, ports: [{name: x, port: 80}, {name: y, port: 81, protocol: SCTP}]}
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: n}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: c, namespace: n}
spec: {ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: n}
spec: {clusterIP: None, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere, namespace: n}
spec: {type: ExternalName, externalName: example.com}
"#;
    let compiled = compile(&objects(yaml), "node-a", &mut BackendSets::default());
    assert_eq!(compiled.names[&key("10.96.0.1", 80, proto::TCP)], "n/a:x");
    assert_eq!(compiled.services.len(), 2);
    let shown: Vec<String> = compiled.faults.iter().map(ToString::to_string).collect();
    assert_eq!(shown.len(), 4, "{shown:#?}");
    assert!(shown[0].contains("Service n/a: spec.ports[1].protocol: SCTP is not balanced"), "{shown:#?}");
    assert!(shown[2].contains("Service n/b: spec.ports[0]: n/a:x has this address"), "{shown:#?}");
    assert!(shown[3].starts_with("test.yaml:12: warning: Service n/c: spec.clusterIP: missing"), "{shown:#?}");
}

#[test]
fn the_recorded_cluster_compiles() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/testdata/istiod/base/04-services.yaml");
    let (set, faults) = read_str(&std::fs::read_to_string(&base).unwrap(), &base);
    assert_eq!(faults, vec![]);
    let compiled = compile(&set, "node-a", &mut BackendSets::default());
    assert_eq!(compiled.faults, vec![]);
    assert_eq!(compiled.names[&key("10.96.1.13", 80, proto::TCP)], "shop/reviews:http");
}

/// A random service: its ports and endpoints.
#[derive(Clone, Debug)]
struct Model {
    v6_too: bool,
    local: bool,
    publish: bool,
    ports: BTreeSet<(u8, bool)>,
    /// Last byte of the address, node, readiness, in which of two slices.
    endpoints: Vec<(u8, u8, u8, bool)>,
}

fn model() -> impl Strategy<Value = Model> {
    let ports = proptest::collection::btree_set((0u8..3, any::<bool>()), 0..4);
    let endpoints = proptest::collection::vec((1u8..6, 0u8..3, 0u8..5, any::<bool>()), 0..8);
    (any::<bool>(), any::<bool>(), any::<bool>(), ports, endpoints)
        .prop_map(|(v6_too, local, publish, ports, endpoints)| Model { v6_too, local, publish, ports, endpoints })
}

/// `conditions:` by number: absent, ready, not ready, draining, gone.
const CONDITIONS: [&str; 5] = [
    "",
    ", conditions: {ready: true}",
    ", conditions: {ready: false}",
    ", conditions: {ready: false, serving: true, terminating: true}",
    ", conditions: {ready: false, serving: false, terminating: true}",
];

fn render(models: &[Model]) -> String {
    let mut yaml = String::new();
    for (i, model) in models.iter().enumerate() {
        let ports: Vec<String> = model
            .ports
            .iter()
            .map(|(n, udp)| {
                let protocol = if *udp { "UDP" } else { "TCP" };
                format!("{{name: p{n}{protocol}, port: {}, protocol: {protocol}}}", 80 + u16::from(*n))
            })
            .collect();
        let addresses = if model.v6_too { format!("10.96.0.{i}, 'fd00:96::{i}'") } else { format!("10.96.0.{i}") };
        yaml.push_str(&format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: n}}\nspec: {{clusterIPs: [{addresses}], \
             internalTrafficPolicy: {}, publishNotReadyAddresses: {}, ports: [{}]}}\n",
            if model.local { "Local" } else { "Cluster" },
            model.publish,
            ports.join(", ")
        ));
        for slice in [false, true] {
            for (family, prefix) in [("IPv4", "10.0.0."), ("IPv6", "fd00::")] {
                let endpoints = model.endpoints.iter().filter(|e| e.3 == slice).map(|(last, node, state, _)| {
                    let conditions = CONDITIONS[usize::from(*state)];
                    format!("{{addresses: ['{prefix}{last}'], nodeName: node-{node}{conditions}}}")
                });
                let slice_ports = ports.iter().map(|port| port.replace("port: 8", "port: 808"));
                yaml.push_str(&format!(
                    "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s{i}-{family}-{slice}, \
                     namespace: n, labels: {{kubernetes.io/service-name: s{i}}}}}\naddressType: {family}\n\
                     ports: [{}]\nendpoints: [{}]\n",
                    slice_ports.collect::<Vec<_>>().join(", "),
                    endpoints.collect::<Vec<_>>().join(", ")
                ));
            }
        }
    }
    yaml
}

impl Model {
    /// Whom a connection may reach, asked directly: ready ones of the allowed nodes, else draining ones of them.
    fn reach(&self, node: u8, v6: bool, port: u16) -> BTreeSet<(Addr, u16, bool)> {
        let eligible = |wanted: &dyn Fn(u8) -> bool| {
            let chosen = self.endpoints.iter().filter(|(_, n, state, _)| (!self.local || *n == node) && wanted(*state));
            let named = chosen.map(|(last, n, ..)| {
                let text = if v6 { format!("fd00::{last}") } else { format!("10.0.0.{last}") };
                (Addr::from(text.parse::<IpAddr>().unwrap()), port, *n == node)
            });
            named.collect::<BTreeSet<_>>()
        };
        let ready = eligible(&|state| state <= 1 || self.publish);
        if ready.is_empty() { eligible(&|state| state == 3) } else { ready }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_tables_say_what_the_model_says(
        steps in proptest::collection::vec(proptest::collection::vec(model(), 0..4), 1..4),
    ) {
        let mut sets = BackendSets::default();
        let mut contents: std::collections::BTreeMap<u32, BTreeSet<_>> = Default::default();
        for models in &steps {
            let compiled = compile(&objects(&render(models)), "node-0", &mut sets);
            let mut expected = 0;
            for (i, model) in models.iter().enumerate() {
                for v6 in [false, true].into_iter().filter(|v6| !v6 || model.v6_too) {
                    let address = if v6 { format!("fd00:96::{i}") } else { format!("10.96.0.{i}") };
                    prop_assert_eq!(compiled.services[&key(&address, 0, 0)], Service::default());
                    expected += 1 + model.ports.len();
                    for (n, udp) in &model.ports {
                        let number = 80 + u16::from(*n);
                        let found = compiled.services[&key(&address, number, if *udp { proto::UDP } else { proto::TCP })];
                        let slots = (0..found.backend_count).map(|slot| BackendKey { backend_set: found.backend_set, slot });
                        let members: BTreeSet<_> = slots.map(|slot| {
                            let backend = compiled.backends[&slot];
                            (backend.addr, backend.port, backend.flags & backend_flag::LOCAL != 0)
                        }).collect();
                        prop_assert_eq!(members.len(), found.backend_count as usize);
                        prop_assert_eq!(&members, &model.reach(0, v6, 8000 + number));
                        // A number means the same set for ever.
                        if found.backend_set != 0 {
                            prop_assert_eq!(contents.entry(found.backend_set).or_insert_with(|| members.clone()), &members);
                        }
                    }
                }
            }
            prop_assert_eq!(compiled.services.len(), expected);
            let used: BTreeSet<u32> = compiled.services.values().map(|service| service.backend_set).collect();
            prop_assert!(compiled.backends.keys().all(|key| used.contains(&key.backend_set)), "no left-overs");
        }
    }
}

const NODES: &str = r#"---
apiVersion: v1
kind: Node
metadata: {name: node-a}
status: {addresses: [{type: InternalIP, address: 192.0.2.11}, {type: InternalIP, address: "2001:db8::11"}, {type: Hostname, address: node-a}]}
---
apiVersion: v1
kind: Node
metadata: {name: node-b}
status: {addresses: [{type: InternalIP, address: 192.0.2.12}]}
"#;

/// The shop with a node port, and something else changed.
fn published(from: &str, to: &str, more: &str) -> Compiled {
    let yaml = SHOP.replace("targetPort: 8080}", "targetPort: 8080, nodePort: 30080}");
    let yaml = yaml.replace("  sessionAffinity", "  type: LoadBalancer\n  sessionAffinity");
    assert!(yaml.contains(from), "{from}");
    compile(&objects(&format!("{}{NODES}{more}", yaml.replace(from, to))), "node-a", &mut BackendSets::default())
}

/// `address:port -> backends`, with what restricts it.
fn shown(compiled: &Compiled) -> Vec<String> {
    let line = |(at, outside): (&Published, &Outside)| {
        let place = at.address.map_or(if at.v6 { "[*]".to_owned() } else { "*".to_owned() }, |ip| ip.to_string());
        let backends: Vec<_> = outside.backends.iter().map(ToString::to_string).collect();
        let sources: Vec<_> = outside.sources.iter().map(|range| format!(" from {range}")).collect();
        format!("{place}:{}/{} -> {}{}", at.port, at.proto, backends.join(","), sources.join(""))
    };
    compiled.outside.iter().map(line).collect()
}

#[test]
fn a_node_port_is_served_on_every_node_for_callers_inside() {
    let compiled = published("kind", "kind", "");
    for (node, wanted) in
        [("192.0.2.11", "10.0.0.1:8080*"), ("192.0.2.12", "10.0.0.1:8080*"), ("2001:db8::11", "fd00::1:8080*")]
    {
        assert_eq!(backends(&compiled, &key(node, 30080, proto::TCP))[0], wanted);
        assert_eq!(compiled.names[&key(node, 30080, proto::TCP)], "shop/web:http");
        assert_eq!(compiled.services[&key(node, 30080, proto::TCP)].flags, service_flag::OUTSIDE);
    }
    // The mesh knows the cluster's own addresses and no others.
    assert_eq!(compiled.services[&key("10.96.0.1", 80, proto::TCP)].flags, 0);
    assert_eq!(compiled.services[&key("192.0.2.1", 80, proto::TCP)].flags, service_flag::OUTSIDE);
    // Other ports of the node are nobody's but the node's.
    assert!(!compiled.services.contains_key(&key("192.0.2.11", 0, 0)));
    assert_eq!(compiled.faults, vec![]);
}

#[test]
fn callers_outside_reach_what_is_published_and_has_somebody_to_answer() {
    let compiled = published("kind", "kind", "");
    let everywhere = [
        "*:30080/6 -> 10.0.0.1:8080,10.0.0.2:8080",
        "[*]:30080/6 -> [fd00::1]:8080",
        "192.0.2.1:80/6 -> 10.0.0.1:8080,10.0.0.2:8080",
        "192.0.2.1:53/17 -> 10.0.0.1:5353,10.0.0.2:5353",
    ];
    assert_eq!(shown(&compiled), everywhere);
    assert!(compiled.outside.values().all(|outside| outside.sticky && outside.name.starts_with("shop/web:")));
    let local = published("spec:\n", "spec:\n  externalTrafficPolicy: Local\n", "");
    assert_eq!(shown(&local)[0], "*:30080/6 -> 10.0.0.1:8080");
    // Nobody of this node: nobody listens.
    let elsewhere = published("nodeName: node-a, conditions", "nodeName: node-b, conditions", "");
    assert_eq!(shown(&elsewhere).len(), 4);
    let local = published("spec:\n", "spec:\n  externalTrafficPolicy: Local\n", "").outside.len();
    assert_eq!(local, 4);
}

#[test]
fn a_load_balancers_address_lets_in_whom_its_ranges_name() {
    let with = |ranges: &str| {
        let spec = format!(
            "status: {{loadBalancer: {{ingress: [{{ip: 198.51.100.7}}]}}}}\nspec:\n  loadBalancerSourceRanges: {ranges}\n"
        );
        let compiled = published("spec:\n", &spec, "");
        let line = shown(&compiled).into_iter().find(|line| line.starts_with("198.51.100.7:80"));
        (line, compiled.faults.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let (line, faults) = with("[203.0.113.0/24, \"2001:db8::/32\"]");
    assert_eq!(line.unwrap(), "198.51.100.7:80/6 -> 10.0.0.1:8080,10.0.0.2:8080 from 203.0.113.0/24");
    assert_eq!(faults, Vec::<String>::new());
    // Ranges of the other family alone, and ranges that are none, let nobody in.
    assert_eq!(with("[\"2001:db8::/32\"]").0, None);
    let (line, faults) = with("[everywhere]");
    assert_eq!(line, None);
    assert!(
        faults[0].contains("Service shop/web: spec.loadBalancerSourceRanges") && faults[0].contains("nobody"),
        "{faults:?}"
    );
}

#[test]
fn a_load_balancer_is_told_of_ready_pods_alone() {
    let local = |ready: bool| {
        let spec = "spec:\n  externalTrafficPolicy: Local\n  healthCheckNodePort: 32000\n";
        let yaml =
            SHOP.replace("  sessionAffinity", "  type: LoadBalancer\n  sessionAffinity").replace("spec:\n", spec);
        let leaving = "conditions: {ready: false, serving: true, terminating: true}}\n- {addresses: [10.0.0.3]";
        let yaml =
            if ready { yaml } else { yaml.replace("conditions: {ready: true}}\n- {addresses: [10.0.0.3]", leaving) };
        // The IPv6 address is the same pod's.
        let yaml = if ready {
            yaml
        } else {
            yaml.replace("nodeName: node-a}]", "nodeName: node-a, conditions: {ready: false}}]")
        };
        compile(&objects(&yaml), "node-a", &mut BackendSets::default()).health[&32000].local
    };
    assert_eq!(local(true), 1);
    assert_eq!(local(false), 0, "it answers to its end, and gets no new connections from outside");
}

fn with_host_port(name: &str, node: &str, spec: &str, status: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{nodeName: {node}, {spec}}}\nstatus: {{podIPs: [{{ip: 10.0.0.9}}, {{ip: \"fd00::9\"}}]{status}}}\n"
    )
}

#[test]
fn pods_come_to_host_ports_of_every_node() {
    let nodes = ["11", "12"].map(|last| {
        format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: node-{last}}}\nstatus: {{addresses: [{{type: InternalIP, address: 192.0.2.{last}}}, {{type: InternalIP, address: \"2001:db8::{last}\"}}]}}\n"
        )
    });
    let at = |more: &str| {
        format!("containers: [{{name: c, ports: [{{containerPort: 8126, hostPort: 8125, protocol: UDP{more}}}]}}]")
    };
    let with = |more: &str| format!("{}{}", nodes.concat(), with_host_port("a", "node-11", &at(more), ""));
    let yaml = with("");
    let seen = |node: &str| {
        let compiled = compile(&objects(yaml.trim_start_matches("---\n")), node, &mut BackendSets::default());
        assert!(compiled.services.values().all(|service| service.flags == service_flag::OUTSIDE));
        let own: &[&str] = if node == "node-11" { &["127.0.0.1", "::1"] } else { &[] };
        let wanted = own.iter().chain(&["192.0.2.11", "2001:db8::11"]).map(|ip| key(ip, 8125, proto::UDP));
        assert_eq!(compiled.services.keys().copied().collect::<BTreeSet<_>>(), wanted.collect());
        let keys = ["192.0.2.11", "2001:db8::11"].map(|ip| key(ip, 8125, proto::UDP));
        keys.map(|key| backends(&compiled, &key).join(" "))
    };
    assert_eq!(seen("node-11"), ["10.0.0.9:8126*", "fd00::9:8126*"]);
    assert_eq!(seen("node-12"), ["10.0.0.9:8126", "fd00::9:8126"]);
    let keys = |more: &str, node: &str| {
        let compiled = compile(&objects(with(more).trim_start_matches("---\n")), node, &mut BackendSets::default());
        compiled.services.into_keys().collect::<Vec<_>>()
    };
    for node in ["node-11", "node-12"] {
        assert_eq!(keys(", hostIP: 192.0.2.11", node), [key("192.0.2.11", 8125, proto::UDP)]);
        // Nobody takes what is another's.
        for others in ["192.0.2.12", "10.96.0.1", "198.51.100.7"] {
            assert_eq!(keys(&format!(", hostIP: {others}"), node), [], "{others}");
        }
    }
    assert_eq!(keys(", hostIP: 127.0.0.1", "node-11"), [key("127.0.0.1", 8125, proto::UDP)]);
    assert_eq!(keys(", hostIP: 127.0.0.1", "node-12"), []);
}

#[test]
fn host_ports_lead_to_this_nodes_pods_and_the_first_to_claim_one_keeps_it() {
    let pod = with_host_port;
    let ports = |port: &str| format!("containers: [{{name: c, ports: [{{containerPort: 53, {port}}}]}}]");
    let compiled =
        |pods: &str| compile(&objects(pods.trim_start_matches("---\n")), "node-a", &mut BackendSets::default());
    let one = compiled(&pod("a", "node-a", &ports("hostPort: 53, protocol: UDP"), ""));
    assert_eq!(shown(&one), ["*:53/17 -> 10.0.0.9:53", "[*]:53/17 -> [fd00::9]:53"]);
    let bound = compiled(&pod("a", "node-a", &ports("hostPort: 53, hostIP: 192.0.2.11"), ""));
    assert_eq!(shown(&bound), ["192.0.2.11:53/6 -> 10.0.0.9:53"]);
    for other in [
        pod("a", "node-b", &ports("hostPort: 53"), ""),
        pod("a", "node-a", &ports("name: dns"), ""),
        pod("a", "node-a", &format!("hostNetwork: true, {}", ports("hostPort: 53")), ""),
        pod("a", "node-a", &ports("hostPort: 53"), ", phase: Succeeded"),
    ] {
        assert_eq!(shown(&compiled(&other)), Vec::<String>::new(), "{other}");
    }
    let two =
        format!("{}{}", pod("a", "node-a", &ports("hostPort: 53"), ""), pod("b", "node-a", &ports("hostPort: 53"), ""));
    let faults: Vec<String> = compiled(&two).faults.iter().map(ToString::to_string).collect();
    assert!(
        faults.iter().any(|fault| fault.contains("Pod shop/b") && fault.contains("shop/a has port 53 already")),
        "{faults:?}"
    );
}
