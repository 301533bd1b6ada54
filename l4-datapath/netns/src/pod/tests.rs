//! On real namespaces; needs root.
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;

use super::*;
use crate::{Capture, PersistentNetns, cookie_of, disable_capture, enable_capture, open};

fn namespace(name: &str) -> PersistentNetns {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
    let path = PathBuf::from(format!("/run/netns/b-{name}-{}", std::process::id()));
    PersistentNetns::create(&path).expect("namespace")
}

/// Runs an asynchronous body with everything of the node inside its own namespace.
fn in_node<T: Send>(node: &PersistentNetns, body: impl Future<Output = T> + Send) -> T {
    let fd = open(node.path()).unwrap();
    run_in(fd.as_fd(), || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body)
    })
    .unwrap()
}

fn ping(from: &PersistentNetns, to: IpAddr) -> bool {
    // A UDP echo by hand: no tool of the system is needed.
    let fd = open(from.path()).unwrap();
    run_in(fd.as_fd(), || {
        let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = std::net::UdpSocket::bind((any, 0)).unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
        let mut buffer = [0; 8];
        socket.send_to(b"ping", (to, 7777)).is_ok() && socket.recv(&mut buffer).is_ok()
    })
    .unwrap()
}

fn answer(at: &PersistentNetns, ip: IpAddr) {
    let fd = open(at.path()).unwrap();
    let socket = run_in(fd.as_fd(), || std::net::UdpSocket::bind((ip, 7777)).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 8];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            if socket.send_to(&buffer[..length], peer).is_err() {
                return;
            }
        }
    });
}

#[test]
fn wired_pods_reach_each_other_only_when_active() {
    let (node, a, b) = (namespace("node"), namespace("a"), namespace("b"));
    let (a_fd, b_fd) = (open(a.path()).unwrap(), open(b.path()).unwrap());
    assert_ne!(cookie_of(a_fd.as_fd()).unwrap(), cookie_of(b_fd.as_fd()).unwrap());
    let ips = |last: u8| (Ipv4Addr::new(10, 77, 0, last), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, last.into()));
    let wiring = |netns, host_device, last| {
        let (v4, v6) = ips(last);
        PodWiring { netns, ifname: "eth0", host_device, v4: Some(v4), v6: Some(v6), mtu: 1400 }
    };
    let (wa, wb) = (wiring(a_fd.as_fd(), "stb-a", 10), wiring(b_fd.as_fd(), "stb-b", 11));
    let both = |w: &PodWiring<'_>| w.addresses().collect::<Vec<_>>();
    let netlink_body = async {
        crate::prepare_node().unwrap();
        let netlink = Netlink::open().unwrap();
        let first = wire(&netlink, &wa).await.unwrap();
        let second = wire(&netlink, &wb).await.unwrap();
        assert_eq!((first.pod.mtu, first.host.mtu), (1400, 1400));
        activate(&netlink, wa.netns, &first, &both(&wa)).await.unwrap();
        assert!(check(&netlink, &wb).await.unwrap_err().to_string().contains("down"));
        second
    };
    let second = in_node(&node, netlink_body);
    for ip in [IpAddr::from(ips(11).0), IpAddr::from(ips(11).1)] {
        answer(&b, ip);
        assert!(!ping(&a, ip), "{ip} answers although the pod is not active");
    }
    in_node(&node, async {
        let netlink = Netlink::open().unwrap();
        activate(&netlink, wb.netns, &second, &both(&wb)).await.unwrap();
        activate(&netlink, wb.netns, &second, &both(&wb)).await.unwrap();
        check(&netlink, &wa).await.unwrap();
        check(&netlink, &wb).await.unwrap();
    });
    for ip in [IpAddr::from(ips(11).0), IpAddr::from(ips(11).1)] {
        assert!(ping(&a, ip), "{ip} does not answer");
    }
    in_node(&node, async {
        let netlink = Netlink::open().unwrap();
        unwire(&netlink, "stb-b").await.unwrap();
        unwire(&netlink, "stb-b").await.unwrap();
        assert!(check(&netlink, &wb).await.unwrap_err().to_string().contains("eth0 is missing"));
        // A pod can be wired again after it was unwired, and over a stale device of the same name.
        wire(&netlink, &wb).await.unwrap();
        assert!(wire(&netlink, &PodWiring { host_device: "stb-c", ..wb }).await.is_err());
    });
}

#[test]
fn node_routes_are_exactly_the_wanted() {
    use crate::{NodeRoute, sync_node_routes};
    let (node, other) = (namespace("routes"), namespace("routes-peer"));
    let fd = open(other.path()).unwrap();
    in_node(&node, async {
        let netlink = Netlink::open().unwrap();
        netlink.add_veth(("up0", mac_of("x")), ("up0", mac_of("y")), fd.as_fd(), 1500).await.unwrap();
        let up = netlink.link("up0").await.unwrap().index;
        netlink.set_up(up).await.unwrap();
        netlink.add_address(up, "192.0.2.1".parse().unwrap(), 24).await.unwrap();
        netlink.add_address(up, "2001:db8::1".parse().unwrap(), 64).await.unwrap();
        let via = |pods: &str, node: &str| NodeRoute::Via {
            pods: pods.parse().unwrap(),
            node: node.parse().unwrap(),
            device: None,
        };
        let own = NodeRoute::Own { pods: "10.1.0.0/24".parse().unwrap() };
        let first = [via("10.2.0.0/24", "192.0.2.2"), via("fd00:2::/64", "2001:db8::2"), own];
        assert_eq!(sync_node_routes(&netlink, &first).await.unwrap(), (3, 0));
        assert_eq!(sync_node_routes(&netlink, &first).await.unwrap(), (0, 0));
        let second = [via("10.2.0.0/24", "192.0.2.3"), own];
        assert_eq!(sync_node_routes(&netlink, &second).await.unwrap(), (1, 2));
        assert!(sync_node_routes(&netlink, &[via("10.3.0.0/24", "2001:db8::2")]).await.is_err());
    });
}

#[test]
fn capture_leads_marked_connections_to_loopback_and_can_be_undone() {
    let pod = namespace("capture");
    let fd = open(pod.path()).unwrap();
    let capture = Capture { v4: Some(Ipv4Addr::new(10, 77, 0, 12)), v6: Some("fd77::12".parse().unwrap()) };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let netlink = Netlink::open_in(fd.as_fd()).unwrap();
        netlink.set_up(LOOPBACK).await.unwrap();
        netlink.add_address(LOOPBACK, capture.v4.unwrap().into(), 32).await.unwrap();
        netlink.add_address(LOOPBACK, capture.v6.unwrap().into(), 128).await.unwrap();
    });
    let marked = |target: &str| {
        run_in(fd.as_fd(), || {
            let socket = std::net::UdpSocket::bind(if target.contains('[') { "[::]:0" } else { "0.0.0.0:0" }).unwrap();
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Mark, &strata_abi::mark::CAPTURE).unwrap();
            socket.connect(target).ok().map(|()| socket.local_addr().unwrap().ip().to_string())
        })
        .unwrap()
    };
    assert_eq!(marked("203.0.113.9:80"), None);
    for _ in 0..2 {
        runtime.block_on(enable_capture(fd.as_fd(), &capture)).unwrap();
        assert_eq!(marked("203.0.113.9:80").as_deref(), Some("10.77.0.12"));
        assert_eq!(marked("[2001:db8::9]:80").as_deref(), Some("fd77::12"));
    }
    let accept = || run_in(fd.as_fd(), || sysctl::get("ipv4/tcp_fwmark_accept").unwrap()).unwrap();
    assert_eq!(accept(), "1");
    for _ in 0..2 {
        runtime.block_on(disable_capture(fd.as_fd(), &capture)).unwrap();
        assert_eq!(marked("203.0.113.9:80"), None);
        assert_eq!(marked("[2001:db8::9]:80"), None);
    }
    assert_eq!(accept(), "0");
}
