//! A node and its pods as network namespaces: routed, no bridge, as the CNI plugin wires them.
use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd},
    process::Command,
};

use l4_loader::{Datapath, Features, PodAttach, PodLookup};
use nix::sched::{CloneFlags, setns};
use strata_abi::{Addr, Identity, MAX_PROXIES, NodeConfig, PodRecord, Prefix, ProxyPlace, identity_flag, pod_flag};

use super::{Node, helper::Helper};

/// Runs `ip ARGUMENTS`; the arguments are split at spaces.
pub fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("run ip");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn try_ip(arguments: &str) {
    let _ = Command::new("ip").args(arguments.split(' ')).output();
}

/// Runs `work` on a thread inside the namespace.
pub fn inside<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                setns(netns, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                work()
            })
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Writes a sysctl of the calling thread's namespace.
pub fn sysctl(name: &str, value: &str) {
    let path = format!("/proc/sys/{name}");
    std::fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// A pod: namespace, addresses, host-side interface.
pub struct Pod {
    pub name: String,
    pub index: u32,
    pub security_id: u32,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub netns: File,
    pub ifindex: u32,
    pub cookie: u64,
}

impl Pod {
    pub fn record(&self, flags: u32) -> PodRecord {
        PodRecord {
            v4: IpAddr::from(self.v4).into(),
            v6: IpAddr::from(self.v6).into(),
            security_id: self.security_id,
            flags,
            ifindex: self.ifindex,
            pod_index: self.index,
            netns_cookie: self.cookie,
        }
    }
}

/// A node with its datapath loaded and pods wired.
pub struct World {
    pub datapath: Datapath,
    pub pods: Vec<Pod>,
    prefix: String,
    pub node_netns: File,
    pub node: Node,
}

pub const NODE_V4: Ipv4Addr = Ipv4Addr::new(10, 201, 0, 1);

impl World {
    /// `name` must differ between tests that run at the same time; at most 6 characters (interface names).
    pub fn new(name: &str, pods: usize) -> World {
        World::with(name, pods, None)
    }

    /// On a kernel of which no more than `features` is used.
    pub fn with(name: &str, pods: usize, features: Option<Features>) -> World {
        let node = Node::new(&format!("A-{name}"));
        let prefix = format!("stA-{name}");
        remove_namespaces(&prefix, 8);
        ip(&format!("netns add {prefix}-h"));
        let node_netns = open_netns(&format!("{prefix}-h"));
        inside(node_netns.as_fd(), || {
            sysctl("net/ipv4/ip_forward", "1");
            sysctl("net/ipv6/conf/all/forwarding", "1");
        });
        ip(&format!("-n {prefix}-h link set lo up"));
        ip(&format!("-n {prefix}-h addr add {NODE_V4}/32 dev lo"));
        let datapath = inside(node_netns.as_fd(), || node.load(features));
        let proxy_cgroup = l4_loader::cgroup_id(&node.proxy_cgroup).expect("cgroup id");
        // The lab's proxies live on the node, whose namespace is no pod's.
        let mut proxies = [ProxyPlace::default(); MAX_PROXIES];
        proxies[0].cgroup = proxy_cgroup;
        let config =
            NodeConfig { proxies, grant_generation: 1, node_v4: IpAddr::from(NODE_V4).into(), ..NodeConfig::default() };
        datapath.maps().config.set(&config).expect("set CONFIG");
        let mut world = World { datapath, pods: Vec::new(), prefix, node_netns, node };
        for number in 0..pods {
            world.add_pod(number);
        }
        world
    }

    fn add_pod(&mut self, number: usize) {
        let (prefix, host) = (&self.prefix, format!("{}-h", self.prefix));
        let name = format!("{prefix}-{number}");
        let (v4, v6) = (format!("10.201.1.{}", 10 + number), format!("fd01::{:x}", 16 + number));
        ip(&format!("netns add {name}"));
        ip(&format!("-n {host} link add p{number} type veth peer name eth0 netns {name}"));
        ip(&format!("-n {host} link set p{number} up"));
        ip(&format!("-n {name} link set lo up"));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {host} addr add 169.254.1.1/32 dev p{number}"));
        ip(&format!("-n {host} addr add fe80::1/64 dev p{number} nodad"));
        ip(&format!("-n {name} addr add {v4}/32 dev eth0"));
        ip(&format!("-n {name} addr add {v6}/128 dev eth0 nodad"));
        ip(&format!("-n {name} route add default via 169.254.1.1 dev eth0 onlink"));
        ip(&format!("-6 -n {name} route add default via fe80::1 dev eth0"));
        ip(&format!("-n {host} route add {v4}/32 dev p{number} src {NODE_V4}"));
        ip(&format!("-6 -n {host} route add {v6}/128 dev p{number}"));
        let netns = open_netns(&name);
        let ifindex = inside(self.node_netns.as_fd(), || {
            nix::net::if_::if_nametoindex(format!("p{number}").as_str()).expect("the interface")
        });
        let cookie = inside(netns.as_fd(), || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
            l4_loader::netns_cookie(socket.as_fd()).expect("SO_NETNS_COOKIE")
        });
        let pod = Pod {
            name,
            index: number as u32 + 1,
            security_id: 256 + number as u32,
            v4: v4.parse().expect("an address"),
            v6: v6.parse().expect("an address"),
            netns,
            ifindex,
            cookie,
        };
        let maps = self.datapath.maps();
        for ip in [IpAddr::from(pod.v4), IpAddr::from(pod.v6)] {
            let identity = Identity { security_id: pod.security_id, flags: identity_flag::LOCAL_POD };
            maps.identities.insert(&Prefix::new(128, Addr::from(ip)), &identity).expect("IDENTITIES");
        }
        maps.pods.insert(&pod.cookie, &pod.record(0)).expect("PODS");
        maps.pods_by_ifindex.insert(&pod.ifindex, &pod.record(0)).expect("PODS_BY_IFINDEX");
        let attach = PodAttach { pod_index: pod.index, ifindex: pod.ifindex };
        self.in_node(|| self.datapath.attach_pod(&attach)).expect("attach the pod's programs");
        self.pods.push(pod);
    }

    /// Runs on a thread inside the node's namespace.
    pub fn in_node<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        inside(self.node_netns.as_fd(), work)
    }

    /// A process of the pod: in its namespace and in the node's cgroup subtree.
    pub fn app(&self, pod: usize) -> Helper {
        Helper::start(&self.pods[pod].netns, Some(&self.node.cgroup.join("pods")))
    }

    /// A process of the proxy, in the pod's namespace.
    pub fn proxy(&self, pod: usize) -> Helper {
        Helper::start(&self.pods[pod].netns, Some(&self.node.proxy_cgroup))
    }

    /// A process in the pod's namespace that no connect hook sees.
    pub fn outsider(&self, pod: usize) -> Helper {
        Helper::start(&self.pods[pod].netns, None)
    }

    /// A process of the node itself.
    pub fn host(&self) -> Helper {
        Helper::start(&self.node_netns, Some(&self.node.cgroup.join("pods")))
    }

    /// What the agent does at the end of enrolment; listeners must be in the map.
    pub fn enroll(&self, pod: usize) {
        let pod = &self.pods[pod];
        ip(&format!("-n {} rule add fwmark 0x2539 pref 101 lookup 101", pod.name));
        ip(&format!("-n {} route add local default dev lo src {} table 101", pod.name, pod.v4));
        ip(&format!("-6 -n {} rule add fwmark 0x2539 pref 101 lookup 101", pod.name));
        ip(&format!("-6 -n {} route add local default dev lo src {} table 101", pod.name, pod.v6));
        let lookup = PodLookup {
            pod_index: pod.index,
            v4: Some(pod.v4),
            v6: Some(pod.v6),
            netns_cookie: pod.cookie,
            security_id: pod.security_id,
        };
        self.datapath.attach_sk_lookup(&lookup, pod.netns.as_fd()).expect("attach sk_lookup");
        self.set_flags(pod, pod_flag::ENROLLED);
    }

    pub fn set_flags(&self, pod: &Pod, flags: u32) {
        let maps = self.datapath.maps();
        maps.pods.insert(&pod.cookie, &pod.record(flags)).expect("PODS");
        maps.pods_by_ifindex.insert(&pod.ifindex, &pod.record(flags)).expect("PODS_BY_IFINDEX");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        remove_namespaces(&self.prefix, self.pods.len());
    }
}

fn remove_namespaces(prefix: &str, pods: usize) {
    try_ip(&format!("netns del {prefix}-h"));
    (0..pods).for_each(|number| try_ip(&format!("netns del {prefix}-{number}")));
}

fn open_netns(name: &str) -> File {
    File::open(format!("/run/netns/{name}")).expect("the namespace")
}
