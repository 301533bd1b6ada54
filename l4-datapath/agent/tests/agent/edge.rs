//! Between the cluster and the outside: a host that knows no way to pods.
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use l4_netns::{Netlink, PersistentNetns, run_in};

use crate::node::{Node, Pod, eventually, unique};

const FLAGS: [&str; 2] = ["--masquerade", "--node-ports"];
const NODE_V4: [u8; 4] = [203, 0, 113, 1];
const HOST_V4: [u8; 4] = [203, 0, 113, 9];
const NODE_V6: &str = "2001:db8:9::1";
const HOST_V6: &str = "2001:db8:9::9";

/// A host outside, on a link with a node.
struct Outside(PersistentNetns);

impl Outside {
    fn beside(node: &Node) -> Outside {
        let host = PersistentNetns::create(&Path::new("/run/netns").join(unique("out"))).unwrap();
        let (there, here) = (l4_netns::open(host.path()).unwrap(), node.netns());
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let (inside, outside) = (Netlink::open_in(here.as_fd()).unwrap(), Netlink::open_in(there.as_fd()).unwrap());
            let (mac, peer) = (l4_netns::mac_of("in"), l4_netns::mac_of("out"));
            inside.add_veth(("out0", mac), ("out0", peer), there.as_fd(), 1500).await.unwrap();
            for (netlink, v4, v6) in [(&inside, NODE_V4, NODE_V6), (&outside, HOST_V4, HOST_V6)] {
                let link = netlink.link("out0").await.unwrap();
                netlink.set_up(link.index).await.unwrap();
                netlink.add_address(link.index, v4.into(), 24).await.unwrap();
                netlink.add_address(link.index, v6.parse().unwrap(), 64).await.unwrap();
            }
        });
        Outside(host)
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        run_in(l4_netns::open(self.0.path()).unwrap().as_fd(), work).unwrap()
    }

    /// A server that tells its callers the address they came from.
    fn serve(&self, port: u16) {
        tell(self.inside(|| TcpListener::bind(("::", port)).unwrap()));
    }

    fn call(&self, to: SocketAddr) -> Option<IpAddr> {
        self.inside(|| told(to))
    }
}

fn tell(listener: TcpListener) {
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().unwrap().ip().to_canonical();
            let _sent = stream.write_all(peer.to_string().as_bytes());
        }
    });
}

/// The address the other side saw.
fn told(to: SocketAddr) -> Option<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_millis(700)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.parse().ok()
}

/// A pod that tells its callers where they come from.
fn telling(node: &Node, name: &str) -> Pod {
    let pod = node.pod(name);
    tell(pod.sandbox.inside(|| TcpListener::bind(("::", 8080)).unwrap()));
    pod
}

fn service(policy: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {{type: NodePort, clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10, \"fd00:96::10\"], externalTrafficPolicy: {policy}, selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080, nodePort: 30080}}]{more}}}\n"
    )
}

fn slices(pods: &[(&Pod, &Node)]) -> String {
    let of = |family: &str, ip: &dyn Fn(&Pod) -> IpAddr| {
        let endpoints: Vec<String> = pods
            .iter()
            .map(|(pod, node)| format!("{{addresses: [\"{}\"], nodeName: {}}}", ip(pod), node.name))
            .collect();
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: web-{}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\naddressType: {family}\nports: [{{port: 8080, protocol: TCP}}]\nendpoints: [{}]\n",
            family.to_lowercase(),
            endpoints.join(", ")
        )
    };
    format!("{}---\n{}", of("IPv4", &|pod| pod.v4), of("IPv6", &|pod| pod.v6))
}

fn at(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

#[test]
fn pods_reach_hosts_that_know_no_way_back_by_the_nodes_address() {
    let mut node = Node::new();
    let outside = Outside::beside(&node);
    outside.serve(7000);
    node.describe("a", "app: a");
    node.start();
    let a = node.pod("a");
    let reach = |ip: IpAddr| a.sandbox.inside(|| told(at(ip, 7000)));
    let (v4, v6) = (IpAddr::from(HOST_V4), HOST_V6.parse::<IpAddr>().unwrap());
    assert_eq!(reach(v4), None, "without masquerade no answer can come back");
    node.terminate();
    node.flags(&FLAGS);
    node.start();
    assert!(eventually(|| reach(v4) == Some(NODE_V4.into())), "{}", node.log());
    assert!(eventually(|| reach(v6) == Some(NODE_V6.parse().unwrap())), "{}", node.log());
    assert_eq!(node.status()["edge"]["problem"], serde_json::Value::Null);
    // A destination that knows the way sees the pod itself.
    node.terminate();
    node.flags(&["--masquerade", "--masquerade-except=203.0.113.0/24"]);
    node.start();
    assert!(eventually(|| reach(v4).is_none() && reach(v6).is_some()), "{}", node.log());
    // An agent that is told nothing takes away what the one before was told.
    node.terminate();
    node.flags(&[]);
    node.start();
    assert!(eventually(|| reach(v6).is_none()), "{}", node.log());
}

#[test]
fn without_nft_the_rest_works_and_the_status_says_what_is_missing() {
    let mut node = Node::new();
    node.flags(&FLAGS);
    node.without_programs();
    node.start();
    let (a, b) = (node.pod("a"), node.pod("b"));
    b.serve(8080);
    assert!(a.connects(b.v4, 8080));
    let problem = || node.status()["edge"]["problem"].clone();
    let named = || problem().as_str().is_some_and(|text| text.contains("the program nft (Debian: nftables)"));
    assert!(eventually(named), "{}", problem());
}

#[test]
fn while_nft_hangs_pods_start_and_policy_is_followed() {
    let mut node = Node::new();
    node.flags(&FLAGS);
    node.describe("b", "app: b");
    let programs = node.only_program("nft", "echo $* >> ${0%nft}calls; exec /bin/sleep 60");
    node.start();
    let (a, b) = (node.pod("a"), node.pod("b"));
    b.serve(8080);
    assert!(eventually(|| a.connects(b.v4, 8080)));
    node.write("policy.yaml", "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: b, namespace: shop}\nspec: {podSelector: {matchLabels: {app: b}}, policyTypes: [Ingress]}\n");
    assert!(eventually(|| !a.connects(b.v4, 8080)), "{}", node.log());
    let calls = std::fs::read_to_string(programs.join("calls")).unwrap();
    assert_eq!(calls, "-f -\n", "it was called, and is still at work");
}

#[test]
fn callers_outside_reach_node_ports_with_their_own_address() {
    let mut node = Node::new();
    node.flags(&FLAGS);
    let outside = Outside::beside(&node);
    node.write("service.yaml", &service("Cluster", ""));
    node.describe("web", "app: web");
    node.start();
    let web = telling(&node, "web");
    node.write("slices.yaml", &slices(&[(&web, &node)]));
    let (node_v4, node_v6) = (at(NODE_V4, 30080), at(NODE_V6.parse::<IpAddr>().unwrap(), 30080));
    assert!(eventually(|| outside.call(node_v4) == Some(HOST_V4.into())), "{}\n{}", node.status(), node.log());
    assert!(eventually(|| outside.call(node_v6) == Some(HOST_V6.parse().unwrap())), "{}", node.log());
    // NetworkPolicy means the caller's own address.
    let policy = |cidr: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: web, namespace: shop}}\nspec: {{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{from: [{{ipBlock: {{cidr: {cidr}}}}}]}}]}}\n"
        )
    };
    node.write("policy.yaml", &policy("198.51.100.0/24"));
    assert!(eventually(|| outside.call(node_v4).is_none()));
    node.write("policy.yaml", &policy("203.0.113.0/24"));
    assert!(eventually(|| outside.call(node_v4).is_some()));
    node.remove("policy.yaml");
    // The agent goes: what is in force stays. It comes back without the service: nobody answers there.
    node.kill();
    assert_eq!(outside.call(node_v4), Some(HOST_V4.into()));
    node.remove("service.yaml");
    node.start();
    assert!(eventually(|| outside.call(node_v4).is_none()), "{}", node.log());
}

#[test]
fn a_node_port_leads_to_other_nodes_unless_it_is_to_stay() {
    let mut nodes = Node::pair();
    let outside = Outside::beside(&nodes[0]);
    for node in &mut nodes {
        node.flags(&FLAGS);
        node.write("service.yaml", &service("Cluster", ""));
        node.start();
    }
    let web = telling(&nodes[1], "web");
    let objects = slices(&[(&web, &nodes[1])]);
    nodes.iter().for_each(|node| node.write("slices.yaml", &objects));
    let port = at(NODE_V4, 30080);
    // By the node's address, or the answer would take another way.
    assert!(eventually(|| outside.call(port) == Some([192, 0, 2, 1].into())), "{}", nodes[0].log());
    nodes[0].write("service.yaml", &service("Local", ""));
    assert!(eventually(|| outside.call(port).is_none()), "{}", nodes[0].log());
    // Pods use any node's port and come with their own address.
    let caller = nodes[0].pod("caller");
    let script = format!(
        "echo $$ > {} && exec cat < /dev/tcp/192.0.2.2/30080",
        nodes[0].cgroup().join("cgroup.procs").display()
    );
    let mut command = std::process::Command::new("bash");
    command.args(["-c", &script]);
    let mut seen = String::new();
    assert!(
        eventually(|| {
            let output = caller.sandbox.inside(|| command.output().unwrap());
            seen = String::from_utf8_lossy(&output.stdout).into_owned();
            seen == caller.v4.to_string()
        }),
        "{seen:?}\n{}",
        nodes[0].log()
    );
}

#[test]
fn load_balancers_addresses_let_in_whom_they_name_and_host_ports_lead_to_their_pod() {
    let mut node = Node::new();
    node.flags(&FLAGS);
    let outside = Outside::beside(&node);
    let balanced = |ranges: &str| {
        service("Cluster", &format!(", loadBalancerSourceRanges: {ranges}")).replace("NodePort", "LoadBalancer")
            + "status: {loadBalancer: {ingress: [{ip: 203.0.113.77}]}}\n"
    };
    node.write("service.yaml", &balanced("[198.51.100.0/24]"));
    let name = node.name.clone();
    node.write(
        "pod-web.yaml",
        &format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop, uid: uid-web, labels: {{app: web}}}}\nspec: {{nodeName: {name}, containers: [{{name: c, ports: [{{containerPort: 8080, hostPort: 8088}}]}}]}}\n"
        ),
    );
    node.start();
    let web = telling(&node, "web");
    node.write("slices.yaml", &slices(&[(&web, &node)]));
    assert!(eventually(|| outside.call(at(NODE_V4, 8088)) == Some(HOST_V4.into())), "{}", node.log());
    // The address is the node's to answer for; how packets to it get here is the load balancer's business.
    outside.inside(|| {
        let added =
            std::process::Command::new("ip").args(["route", "add", "203.0.113.77/32", "via", "203.0.113.1"]).status();
        assert!(added.unwrap().success());
    });
    let balancer = at([203, 0, 113, 77], 80);
    assert_eq!(outside.call(balancer), None, "an address outside the ranges is let in");
    node.write("service.yaml", &balanced("[203.0.113.0/24]"));
    assert!(eventually(|| outside.call(balancer) == Some(HOST_V4.into())), "{}", node.log());
}

/// What a load balancer is told at a port of the node.
fn health(outside: &Outside, port: u16) -> Option<String> {
    outside.inside(|| {
        let mut stream = TcpStream::connect_timeout(&at(NODE_V4, port), Duration::from_millis(700)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    })
}

#[test]
fn load_balancers_are_told_whether_a_node_has_pods_of_a_service() {
    let mut node = Node::new();
    node.flags(&FLAGS);
    let outside = Outside::beside(&node);
    let local = service("Local", ", healthCheckNodePort: 32100").replace("type: NodePort", "type: LoadBalancer");
    node.write("service.yaml", &local);
    node.describe("web", "app: web");
    node.start();
    let web = telling(&node, "web");
    let says = |status: &str, pods: usize| {
        let text = health(&outside, 32100).unwrap_or_default();
        text.starts_with(&format!("HTTP/1.1 {status}"))
            && text.contains(&format!("X-Load-Balancing-Endpoint-Weight: {pods}\r\n"))
            && text
                .contains(&format!("\"service\":{{\"namespace\":\"shop\",\"name\":\"web\"}},\"localEndpoints\":{pods}"))
    };
    assert!(eventually(|| says("503 Service Unavailable", 0)), "{:?}\n{}", health(&outside, 32100), node.log());
    node.write("slices.yaml", &slices(&[(&web, &node)]));
    assert!(eventually(|| says("200 OK", 1)), "{:?}\n{}", health(&outside, 32100), node.log());
    assert_eq!(node.status()["edge"]["health_checks"], 1);
    // A service that leads everywhere has no such port.
    node.write("service.yaml", &service("Cluster", ""));
    assert!(eventually(|| health(&outside, 32100).is_none()), "{:?}", health(&outside, 32100));
}
