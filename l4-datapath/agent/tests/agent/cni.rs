//! The plugin's commands and the agent's restarts.
use std::os::fd::AsFd;

use l4_netns::{Netlink, run_in};
use serde_json::json;

use crate::node::{Node, Pod, Sandbox, eventually, exchange};

fn started() -> Node {
    let mut node = Node::new();
    node.start();
    node
}

fn previous(pod: &Pod) -> String {
    format!(r#","prevResult":{}"#, pod.result)
}

#[test]
fn two_pods_reach_each_other_over_both_families() {
    let node = started();
    let (a, b) = (node.pod("a"), node.pod("b"));
    assert_ne!((a.v4, a.v6), (b.v4, b.v6));
    b.serve(8080);
    assert!(a.connects(b.v4, 8080), "IPv4: {}", node.status());
    assert!(a.connects(b.v6, 8080), "IPv6: {}", node.status());
    for pod in [&a, &b] {
        let check = pod.sandbox.call(&node, "CHECK", &previous(pod));
        assert!(check.success, "{}", check.json);
    }
    assert!(node.cni("STATUS", &[], "").success);
}

#[test]
fn check_fails_when_a_device_is_gone() {
    let node = started();
    let pod = node.pod("a");
    let device = pod.result["interfaces"][0]["name"].as_str().unwrap().to_owned();
    let netns = node.netns();
    run_in(netns.as_fd(), || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let netlink = Netlink::open().unwrap();
            let link = netlink.link(&device).await.unwrap();
            netlink.delete_link(link.index).await.unwrap();
        });
    })
    .unwrap();
    let check = pod.sandbox.call(&node, "CHECK", &previous(&pod));
    assert_eq!(check.code(), Some(104), "{}", check.json);
    assert!(check.json["details"].as_str().unwrap().contains("eth0 is missing"), "{}", check.json);
    // An unknown attachment and an address of somebody else are mistakes, too.
    let unknown = Sandbox::new("x");
    assert_eq!(unknown.call(&node, "CHECK", &previous(&pod)).code(), Some(3));
}

#[test]
fn del_is_idempotent_and_gives_the_address_back() {
    let node = started();
    let a = node.pod("a");
    for _ in 0..2 {
        assert!(a.sandbox.call(&node, "DEL", "").success);
    }
    assert!(a.sandbox.inside(|| !std::path::Path::new("/proc/thread-self/net/dev").exists() || {
        let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        !devices.contains("eth0")
    }));
    assert_eq!(node.status()["pods"], json!([]));
    assert_eq!(node.status()["maps"]["pods"], json!(0));
    // The same sandbox can be added again, with another address.
    let again = a.sandbox.add(&node);
    assert!(again.success, "{}", again.json);
    assert_ne!(again.json["ips"][0]["address"], a.result["ips"][0]["address"]);
}

#[test]
fn gc_removes_what_the_runtime_does_not_know() {
    let node = started();
    let (kept, stale) = (node.pod("kept"), node.pod("stale"));
    let container = &kept.sandbox.container;
    let valid = format!(r#","cni.dev/valid-attachments":[{{"containerID":"{container}","ifname":"eth0"}}]"#);
    let gc = node.cni("GC", &[], &valid);
    assert!(gc.success, "{}", gc.json);
    let pods = node.status()["pods"].clone();
    assert_eq!(pods.as_array().unwrap().len(), 1);
    assert_eq!(pods[0]["name"], "kept");
    assert_eq!(stale.sandbox.call(&node, "CHECK", &previous(&stale)).code(), Some(3));
    assert!(kept.sandbox.call(&node, "CHECK", &previous(&kept)).success);
}

#[test]
fn contradictions_are_refused_with_a_reason() {
    let node = started();
    let a = node.pod("a");
    let mut other = Sandbox::new("a");
    // The same pod in another sandbox, while the first lives.
    let rival = other.add(&node);
    assert_eq!(rival.code(), Some(101), "{}", rival.json);
    assert!(rival.json["details"].as_str().unwrap().contains("shop/a"), "{}", rival.json);
    // The same attachment with another namespace.
    other.container.clone_from(&a.sandbox.container);
    let moved = other.add(&node);
    assert_eq!(moved.code(), Some(101), "{}", moved.json);
    assert!(moved.json["details"].as_str().unwrap().contains(&a.sandbox.path()), "{}", moved.json);
    // Asked again for what is there: the same answer.
    assert_eq!(a.sandbox.add(&node).json, a.result);
    // A namespace that is gone, and the node's own.
    let environment = |netns: &'static str| {
        [
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=z"),
        ]
    };
    let gone = node.cni("ADD", &environment("/run/netns/bt-none"), "");
    assert_eq!(gone.code(), Some(3), "{}", gone.json);
    let file = node.cni("ADD", &environment("/etc/hostname"), "");
    assert_eq!(file.code(), Some(3), "{}", file.json);
    assert!(file.json["details"].as_str().unwrap().contains("not a network namespace"));
    assert_eq!(node.status()["pods"].as_array().unwrap().len(), 1);
}

#[test]
fn without_a_range_or_an_agent_the_runtime_is_told_to_wait() {
    let mut node = Node::new();
    node.write("node.yaml", "apiVersion: v1\nkind: Node\nmetadata: {name: another}\n");
    node.start();
    let sandbox = Sandbox::new("a");
    let refused = sandbox.add(&node);
    assert_eq!(refused.code(), Some(11), "{}", refused.json);
    let status = node.cni("STATUS", &[], "");
    assert_eq!(status.code(), Some(50), "{}", status.json);
    node.terminate();
    assert_eq!(sandbox.add(&node).code(), Some(11));
    assert_eq!(node.cni("STATUS", &[], "").code(), Some(50));
}

#[test]
fn a_killed_agent_disturbs_nobody_and_its_successor_adopts_the_pods() {
    let mut node = started();
    let (a, b) = (node.pod("a"), node.pod("b"));
    b.serve(8080);
    let mut open = a.connect(b.v4, 8080).expect("connection");
    assert!(exchange(&mut open));
    node.kill();
    assert!(exchange(&mut open), "an open connection broke");
    assert!(a.connects(b.v4, 8080) && a.connects(b.v6, 8080), "new connections fail without the agent");
    // What the runtime takes away meanwhile is found gone.
    let c = Sandbox::new("c");
    node.start();
    assert!(exchange(&mut open), "an open connection broke at the restart");
    assert!(a.connects(b.v4, 8080));
    let status = node.status();
    assert_eq!(status["pods"].as_array().unwrap().len(), 2, "{status}");
    for pod in [&a, &b] {
        let check = pod.sandbox.call(&node, "CHECK", &previous(pod));
        assert!(check.success, "{}", check.json);
    }
    let added = c.add(&node);
    assert!(added.success, "{}", added.json);
    let c = Pod::from_result(c, &added.json);
    assert!(![a.v4, b.v4].contains(&c.v4), "an address was given twice");
    assert!(c.connects(b.v4, 8080));
}

#[test]
fn an_agent_installed_anew_takes_over_the_pods_that_ran_on() {
    let mut node = started();
    let (a, b) = (node.pod("a"), node.pod("b"));
    b.serve(8080);
    node.forget();
    let mut open = a.connect(b.v4, 8080).expect("without Strata packets pass");
    node.describe("b", "app: b");
    node.start();
    assert!(exchange(&mut open), "an open connection broke");
    // The one whose object is there is known again; the other's address is held back until its object comes.
    let status = node.status();
    assert_eq!((status["pods"][0]["name"].as_str(), status["orphans"][0]["uid"].as_str()), (Some("b"), Some("uid-a")));
    let check = b.sandbox.call(&node, "CHECK", &previous(&b));
    assert!(check.success, "{}", check.json);
    let c = node.pod("c");
    assert!(![a.v4, b.v4].contains(&c.v4) && ![a.v6, b.v6].contains(&c.v6), "an address was given twice");
    assert!(c.connects(b.v4, 8080) && a.connects(b.v6, 8080));
    // What policy isolates is isolated.
    node.write("policy.yaml", "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed, namespace: shop}\nspec: {podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress]}\n");
    assert!(eventually(|| !c.connects(b.v4, 8080)), "{}", node.status());
    node.describe("a", "app: a");
    assert!(eventually(|| node.status()["orphans"] == json!([])), "{}", node.status());
    assert_eq!(node.status()["pods"].as_array().unwrap().len(), 3);
    // Taken away by the runtime while the agent is away a second time, and before its object is known.
    node.forget();
    node.remove("pod-b.yaml");
    node.start();
    let held = node.status()["orphans"].clone();
    assert!(held.as_array().unwrap().iter().any(|pod| pod["uid"] == "uid-b"), "{held}");
    assert!(b.sandbox.call(&node, "DEL", "").success);
    assert!(!node.status()["orphans"].as_array().unwrap().iter().any(|pod| pod["uid"] == "uid-b"));
    assert!(b.sandbox.inside(|| !std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains("eth0")));
}

#[test]
fn a_pod_whose_namespace_vanishes_is_removed() {
    let node = started();
    let (a, b) = (node.pod("a"), node.pod("b"));
    drop(b);
    assert!(eventually(|| node.status()["pods"].as_array().unwrap().len() == 1), "{}", node.status());
    assert!(a.sandbox.call(&node, "CHECK", &previous(&a)).success);
}

/// What another plugin would have made of a pod.
fn connect_otherwise(node: &Node, sandbox: &Sandbox, address: [u8; 4]) {
    let (node_fd, pod_fd) = (node.netns(), l4_netns::open(std::path::Path::new(&sandbox.path())).unwrap());
    run_in(node_fd.as_fd(), || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let netlink = Netlink::open().unwrap();
            let wiring = l4_netns::PodWiring {
                netns: pod_fd.as_fd(),
                ifname: "eth0",
                host_device: &format!("other{}", address[3]),
                v4: Some(address.into()),
                v6: None,
                mtu: 1500,
            };
            let wired = l4_netns::wire(&netlink, &wiring).await.unwrap();
            l4_netns::activate(&netlink, pod_fd.as_fd(), &wired, &[address.into()]).await.unwrap();
        });
    })
    .unwrap();
}

#[test]
fn pods_of_another_plugin_are_taken_over_without_a_restart() {
    let mut node = Node::new();
    // One of this node's own range: it must not be given out.
    let (a, b) = (Sandbox::new("a"), Sandbox::new("b"));
    for (sandbox, last) in [(&a, 2), (&b, 3)] {
        connect_otherwise(&node, sandbox, [10, 88, 0, last]);
        let (container, netns, pod) = (&sandbox.container, sandbox.path(), &sandbox.pod);
        let result = json!({"kind": "cniCacheV1", "containerId": container, "ifName": "eth0", "networkName": "other", "netns": netns,
            "cniArgs": [["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", pod], ["K8S_POD_UID", format!("uid-{pod}")]]});
        std::fs::write(node.cni_results().join(format!("other-{container}-eth0")), result.to_string()).unwrap();
        node.describe(pod, &format!("app: {pod}"));
    }
    node.write("policy.yaml", "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed, namespace: shop}\nspec: {podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress]}\n");
    node.start();
    let status = node.status();
    let ips: Vec<_> = status["pods"].as_array().unwrap().iter().map(|pod| (&pod["name"], &pod["ips"])).collect();
    assert_eq!(ips, [(&json!("a"), &json!(["10.88.0.2"])), (&json!("b"), &json!(["10.88.0.3"]))], "{status}");
    let chained =
        r#","prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.88.0.2/24"}]}"#;
    let check = a.call(&node, "CHECK", chained);
    assert!(check.success, "{}", check.json);
    let c = node.pod("c");
    assert_eq!(c.v4.to_string(), "10.88.0.4");
    let [to_a, to_b] = [2, 3].map(|last| std::net::IpAddr::from([10, 88, 0, last]));
    a.serve(8080);
    b.serve(8080);
    assert!(c.connects(to_a, 8080));
    assert!(!c.connects(to_b, 8080), "policy is not in force: {}", node.status());
    // It goes as it came: by the runtime, and the device stays the other plugin's.
    assert!(a.call(&node, "DEL", chained).success);
    assert_eq!(node.status()["pods"].as_array().unwrap().len(), 2);
    assert!(a.inside(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains("eth0")));
}

#[test]
fn a_chained_call_takes_over_another_plugins_device() {
    let node = started();
    let sandbox = Sandbox::new("chained");
    connect_otherwise(&node, &sandbox, [10, 99, 0, 2]);
    let previous = r#","prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","vendor":1}],"ips":[{"address":"10.99.0.2/24"}]}"#;
    let added = sandbox.call(&node, "ADD", previous);
    assert!(added.success, "{}", added.json);
    assert_eq!(added.json["interfaces"][0]["vendor"], 1);
    let check = sandbox.call(&node, "CHECK", previous);
    assert!(check.success, "{}", check.json);
    assert!(sandbox.call(&node, "DEL", previous).success);
    // The other plugin's device is not ours to remove.
    let devices = sandbox.inside(|| std::fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    assert!(devices.contains("eth0"), "{devices}");
}

#[test]
fn pods_of_two_nodes_reach_each_other_and_unused_addresses_are_refused() {
    let mut nodes = Node::pair();
    for node in &mut nodes {
        node.start();
    }
    let (a, b) = (nodes[0].pod("a"), nodes[1].pod("b"));
    b.serve(8080);
    assert!(a.connects(b.v4, 8080), "{}", nodes[0].log());
    // The link's own IPv6 addresses are not usable before duplicate address detection has ended.
    assert!(eventually(|| a.connects(b.v6, 8080)), "{}", nodes[0].log());
    // Nobody has this address: the other node says so at once instead of sending the packet around in circles.
    let nobody = std::net::SocketAddr::from(([10, 89, 0, 200], 8080));
    let error = a.sandbox.inside(|| std::net::TcpStream::connect_timeout(&nobody, std::time::Duration::from_secs(5)));
    let error = error.expect_err("nobody answers");
    assert_eq!(error.kind(), std::io::ErrorKind::HostUnreachable, "{error}");
    // A node that leaves takes its routes along.
    nodes[0].remove("node1.yaml");
    assert!(eventually(|| !a.connects(b.v4, 8080)));
}
