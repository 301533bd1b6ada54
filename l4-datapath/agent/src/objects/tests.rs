use std::net::Ipv4Addr;

use super::*;

fn set(yaml: &str) -> ObjectSet {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("all.yaml"), yaml).unwrap();
    let snapshot = compat_objects::source::DirectorySource::new(vec![folder.path().to_owned()]).load();
    assert_eq!(snapshot.errors().count(), 0, "{:?}", snapshot.faults);
    snapshot.objects.clone()
}

const CLUSTER: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.1.0.0/24, "fd01::/64"]}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: "2001:db8::1"}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
spec: {podCIDRs: [10.2.0.0/24, "fd02::/64"]}
status: {addresses: [{type: InternalIP, address: 192.0.2.2}, {type: Hostname, address: n2}]}
---
apiVersion: v1
kind: Pod
metadata: {name: wired, namespace: shop, labels: {app: a}}
spec: {nodeName: n1, containers: [{name: c}]}
status: {podIP: 10.1.0.77, podIPs: [{ip: 10.1.0.77}]}
---
apiVersion: v1
kind: Pod
metadata: {name: gone, namespace: shop, labels: {istio.io/dataplane-mode: none}}
spec: {nodeName: n1, containers: [{name: c}]}
status: {podIP: 10.1.0.78, podIPs: [{ip: 10.1.0.78}]}
---
apiVersion: v1
kind: Pod
metadata: {name: remote, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: w}}
spec: {nodeName: n2, containers: [{name: c}]}
status: {podIP: 10.2.0.5, podIPs: [{ip: 10.2.0.5}]}
"#;

#[test]
fn a_range_belongs_to_who_had_it_first_and_to_this_node() {
    let node = |name: &str, day: u8, range: &str| {
        format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}, creationTimestamp: 2026-01-0{day}T00:00:00Z}}\nspec: {{podCIDRs: [{range}]}}\nstatus: {{addresses: [{{type: InternalIP, address: 192.0.2.{day}}}]}}\n"
        )
    };
    let text = [
        node("a", 3, "10.2.0.128/25"),
        node("n1", 2, "10.1.0.0/24"),
        node("n2", 1, "10.2.0.0/24"),
        node("z", 1, "10.1.0.0/16"),
    ];
    let facts = node_facts(&set(&text.concat()), "n1", None);
    let via = NodeRoute::Via { pods: "10.2.0.0/24".parse().unwrap(), node: "192.0.2.1".parse().unwrap(), device: None };
    assert_eq!(facts.routes, [NodeRoute::Own { pods: "10.1.0.0/24".parse().unwrap() }, via]);
    assert_eq!(facts.problems.len(), 2);
    assert!(facts.problems[0].contains("Node z: spec.podCIDRs: 10.1.0.0/16 overlaps 10.1.0.0/24 of Node n1"));
    assert!(facts.problems[1].contains("Node a: spec.podCIDRs: 10.2.0.128/25 overlaps 10.2.0.0/24 of Node n2"));
}

#[test]
fn nodes_become_ranges_addresses_and_routes() {
    let facts = node_facts(&set(CLUSTER), "n1", Some(4));
    assert_eq!(facts.pod_ranges.len(), 2);
    assert_eq!(facts.addresses.len(), 2);
    let via =
        NodeRoute::Via { pods: "10.2.0.0/24".parse().unwrap(), node: "192.0.2.2".parse().unwrap(), device: Some(4) };
    assert!(facts.routes.contains(&via));
    assert_eq!(facts.routes.len(), 3);
    assert!(facts.problems[0].contains("Node n2: no IPv6 InternalIP"), "{:?}", facts.problems);
}

#[test]
fn this_nodes_pods_have_the_addresses_they_were_given() {
    let lease = Lease { v4: Some(Ipv4Addr::new(10, 1, 0, 5)), v6: None };
    let objects = effective(&set(CLUSTER), "n1", &[("shop", "wired", &lease), ("shop", "unknown", &lease)]);
    let ips = |name: &str| pod_ips(objects.pod("shop", name).unwrap());
    assert_eq!(ips("wired"), [IpAddr::from([10, 1, 0, 5])]);
    assert_eq!(ips("gone"), [] as [IpAddr; 0]);
    assert_eq!(ips("remote"), [IpAddr::from([10, 2, 0, 5])]);
    assert!(objects.pod("shop", "unknown").is_none());
}

#[test]
fn labels_decide_about_the_mesh() {
    let objects = set(CLUSTER);
    let wants = |name: &str| wants_mesh(&objects, objects.pod("shop", name).unwrap());
    assert!(wants("wired") && !wants("gone") && !wants("remote"));
    assert!(described(&objects, "n1", "shop", "remote").is_none());
    assert_eq!(workload(objects.pod("shop", "wired").unwrap()), "a");
}
