//! `from_pod` and `to_pod` run by the kernel on crafted frames: the verdict and what was counted.
mod support;

use std::os::fd::AsRawFd;

use l4_loader::Datapath;
use strata_abi::{
    Addr, DropReason, Grant, GrantKey, Identity, MAX_PROXIES, NodeConfig, PodRecord, PolicyEntry, PolicyKey, Prefix,
    ProxyPlace, direction, pod_flag, policy_verdict, stat,
};
use support::Node;

const TCX_NEXT: i32 = -1;
const TCX_DROP: i32 = 2;
/// The kernel gives a test frame the loopback device.
const LOOPBACK: u32 = 1;
const POD: u32 = 256;

/// `bpf_attr` of `BPF_PROG_TEST_RUN`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
}

/// Runs the program once on the frame; its return value.
fn run(datapath: &Datapath, program: &str, frame: &[u8]) -> i32 {
    let program = datapath.program(program).expect("a program");
    let mut attr = TestRun {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        repeat: 1,
        ..TestRun::default()
    };
    // SAFETY: a fully initialised prefix of bpf_attr; the frame outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, 10, std::ptr::from_mut(&mut attr), size_of::<TestRun>()) };
    assert_eq!(result, 0, "BPF_PROG_TEST_RUN: {}", std::io::Error::last_os_error());
    attr.retval as i32
}

/// What changed of the counters while `work` ran.
struct Delta {
    forwarded: u64,
    dropped: u64,
    bytes: u64,
    reasons: Vec<(u32, u64)>,
}

fn counted(datapath: &Datapath, work: impl FnOnce()) -> Delta {
    let stats = &datapath.maps().stats;
    let before = stats.all().expect("STATS");
    work();
    let after = stats.all().expect("STATS");
    let delta = |index: u32| after[index as usize] - before[index as usize];
    Delta {
        forwarded: delta(stat::PACKETS_FORWARDED),
        dropped: delta(stat::PACKETS_DROPPED),
        bytes: delta(stat::BYTES_FORWARDED),
        reasons: (stat::DROPS..stat::COUNT).filter(|i| delta(*i) > 0).map(|i| (i - stat::DROPS, delta(i))).collect(),
    }
}

fn tcp4(src: [u8; 4], dst: [u8; 4], dst_port: u16, flags: u8) -> Vec<u8> {
    let mut frame = vec![0u8; 12];
    frame.extend(0x0800u16.to_be_bytes());
    let mut ip = [0u8; 20];
    ip[0] = 0x45;
    ip[3] = 40;
    ip[8] = 64;
    ip[9] = 6;
    ip[12..16].copy_from_slice(&src);
    ip[16..20].copy_from_slice(&dst);
    frame.extend(ip);
    let mut tcp = [0u8; 20];
    tcp[..2].copy_from_slice(&40000u16.to_be_bytes());
    tcp[2..4].copy_from_slice(&dst_port.to_be_bytes());
    tcp[12] = 0x50;
    tcp[13] = flags;
    frame.extend(tcp);
    frame
}

const SYN: u8 = 2;
const ACK: u8 = 16;
const OWN: [u8; 4] = [10, 0, 0, 1];
const PEER: [u8; 4] = [10, 0, 0, 2];

/// A proxy in a cgroup, with its home on the node.
fn proxy_in(cgroup: u64) -> [ProxyPlace; MAX_PROXIES] {
    let mut proxies = [ProxyPlace::default(); MAX_PROXIES];
    proxies[0].cgroup = cgroup;
    proxies
}

fn prepare(datapath: &Datapath, flags: u32) {
    let maps = datapath.maps();
    let pod = PodRecord { v4: Addr::v4(OWN), security_id: POD, flags, ifindex: LOOPBACK, ..PodRecord::default() };
    maps.pods_by_ifindex.insert(&LOOPBACK, &pod).expect("PODS_BY_IFINDEX");
    // A proxy cgroup no frame of ours comes from.
    let proxies = proxy_in(u64::MAX);
    let config = NodeConfig { proxies, grant_generation: 3, ..NodeConfig::default() };
    maps.config.set(&config).expect("CONFIG");
    maps.identities
        .insert(&Prefix::new(128, Addr::v4(PEER)), &Identity { security_id: 300, flags: 0 })
        .expect("IDENTITIES");
}

#[test]
fn forwarded_dropped_and_why() {
    let node = Node::new("A-packets");
    let datapath = node.load(None);
    let syn = tcp4(OWN, PEER, 80, SYN);
    // An interface nobody registered drops.
    let delta = counted(&datapath, || assert_eq!(run(&datapath, "from_pod", &syn), TCX_DROP));
    assert_eq!(delta.reasons, [(DropReason::UnknownPod as u32, 1)]);

    prepare(&datapath, 0);
    let delta = counted(&datapath, || assert_eq!(run(&datapath, "from_pod", &syn), TCX_NEXT));
    assert_eq!((delta.forwarded, delta.dropped, delta.bytes), (1, 0, syn.len() as u64));
    assert_eq!(datapath.maps().conntrack.keys().expect("CONNTRACK").len(), 1);

    let spoofed = tcp4([10, 0, 0, 9], PEER, 80, SYN);
    let delta = counted(&datapath, || assert_eq!(run(&datapath, "from_pod", &spoofed), TCX_DROP));
    assert_eq!((delta.forwarded, delta.dropped), (0, 1));
    assert_eq!(delta.reasons, [(DropReason::SpoofedSource as u32, 1)]);

    let cut = &syn[..40];
    let delta = counted(&datapath, || assert_eq!(run(&datapath, "from_pod", cut), TCX_DROP));
    assert_eq!(delta.reasons, [(DropReason::Malformed as u32, 1)]);

    let mut arp = vec![0u8; 42];
    arp[12..14].copy_from_slice(&[8, 6]);
    assert_eq!(run(&datapath, "from_pod", &arp), TCX_NEXT);
}

#[test]
fn guard_and_grant() {
    let node = Node::new("A-guard");
    let datapath = node.load(None);
    prepare(&datapath, pod_flag::ENROLLED);
    let syn = tcp4(OWN, PEER, 80, SYN);
    let delta = counted(&datapath, || assert_eq!(run(&datapath, "from_pod", &syn), TCX_DROP));
    assert_eq!(delta.reasons, [(DropReason::MeshBypass as u32, 1)]);
    assert_eq!(run(&datapath, "from_pod", &tcp4(OWN, PEER, 80, ACK)), TCX_NEXT);
    let key = GrantKey { src: Addr::v4(OWN), dst: Addr::v4(PEER), port: 80, _pad: 0 };
    datapath.maps().grants.insert(&key, &Grant { generation: 3 }).expect("GRANTS");
    assert_eq!(run(&datapath, "from_pod", &syn), TCX_NEXT);
    datapath.maps().grants.insert(&key, &Grant { generation: 2 }).expect("GRANTS");
    assert_eq!(run(&datapath, "from_pod", &syn), TCX_DROP);
    // The test frame's socket is of the root cgroup: were that the proxy's, the frame would pass.
    let root = l4_loader::cgroup_id(&support::cgroup_root()).expect("the root cgroup");
    datapath.maps().config.update(|config| config.proxies = proxy_in(root)).expect("CONFIG");
    assert_eq!(run(&datapath, "from_pod", &syn), TCX_NEXT);
}

#[test]
fn ingress_policy_by_identity_and_port() {
    let node = Node::new("A-ingress");
    let datapath = node.load(None);
    prepare(&datapath, 0);
    let any = PolicyKey { subject: POD, peer: 0, direction: direction::INGRESS, proto: 0, port_be: [0; 2] };
    let rule = PolicyKey { peer: 300, proto: 6, port_be: 80u16.to_be_bytes(), ..any };
    let insert = |prefix, key, verdict, rule| {
        let entry = PolicyEntry { verdict, _pad: [0; 3], rule };
        datapath.maps().policy.insert(&Prefix::new(prefix, key), &entry).expect("POLICY");
    };
    insert(PolicyKey::PREFIX_FULL, rule, policy_verdict::ALLOW, 1);
    insert(PolicyKey::PREFIX_ANY_PROTO, any, policy_verdict::DENY_DEFAULT, 2);
    assert_eq!(run(&datapath, "to_pod", &tcp4(PEER, OWN, 80, SYN)), TCX_NEXT);
    let delta = counted(&datapath, || assert_eq!(run(&datapath, "to_pod", &tcp4(PEER, OWN, 81, SYN)), TCX_DROP));
    assert_eq!(delta.reasons, [(DropReason::PolicyDenied as u32, 1)]);
    assert_eq!(run(&datapath, "to_pod", &tcp4([10, 0, 0, 3], OWN, 80, SYN)), TCX_DROP);
    insert(PolicyKey::PREFIX_ANY_PORT, PolicyKey { proto: 6, ..any }, policy_verdict::DENY, 3);
    let delta = counted(&datapath, || assert_eq!(run(&datapath, "to_pod", &tcp4(PEER, OWN, 80, SYN)), TCX_DROP));
    assert_eq!(delta.reasons, [(DropReason::PolicyDenyRule as u32, 1)]);
}

#[test]
fn a_pinned_map_of_another_shape_is_refused_by_name() {
    let node = Node::new("A-shape");
    drop(node.load(None));
    // The place of STATS is taken by another map.
    let dir = l4_loader::version_dir(&node.bpffs);
    std::fs::remove_file(dir.join("STATS")).expect("unpin");
    std::fs::rename(dir.join("CONFIG"), dir.join("STATS")).expect("rename the pin");
    let options = l4_loader::LoadOptions { bpffs: node.bpffs.clone(), cgroup: node.cgroup.clone(), features: None };
    let error = l4_loader::Datapath::load(&options).expect_err("must be refused");
    assert!(matches!(error, l4_loader::Error::MapShape { map: "STATS", .. }), "{error}");
    assert!(error.to_string().contains("value 112"), "{error}");
}

#[test]
fn sync_makes_a_map_equal_to_what_is_wanted() {
    let node = Node::new("A-sync");
    let datapath = node.load(None);
    let pods = &datapath.maps().pods;
    let record = |security_id| PodRecord { security_id, ..PodRecord::default() };
    let mut wanted = std::collections::BTreeMap::from([(1u64, record(1)), (2, record(2)), (3, record(3))]);
    let changes = pods.sync(&wanted).expect("sync");
    assert_eq!((changes.added, changes.changed, changes.removed), (3, 0, 0));
    assert!(pods.sync(&wanted).expect("sync").is_empty());
    wanted.remove(&1);
    wanted.insert(2, record(22));
    wanted.insert(4, record(4));
    let changes = pods.sync(&wanted).expect("sync");
    assert_eq!((changes.added, changes.changed, changes.removed), (1, 1, 1));
    assert_eq!(pods.dump().expect("dump"), wanted);
    // A map without room says which.
    let full = (0..u64::from(pods.max_entries()) + 1).try_for_each(|key| pods.insert(&key, &record(0)));
    assert!(matches!(full, Err(l4_loader::Error::MapFull { map: "PODS", max_entries: 1024 })), "{full:?}");
}

fn udp6(to_pod: bool, pod_port: u16, peer_port: u16) -> Vec<u8> {
    let (own, peer) = ("fd00::1", "fd00::2");
    let (src, dst) = if to_pod { (peer, own) } else { (own, peer) };
    let (src_port, dst_port) = if to_pod { (peer_port, pod_port) } else { (pod_port, peer_port) };
    let mut frame = vec![0u8; 12];
    frame.extend(0x86ddu16.to_be_bytes());
    frame.extend([0x60, 0, 0, 0, 0, 16, 60, 64]);
    for address in [src, dst] {
        frame.extend(address.parse::<std::net::Ipv6Addr>().expect("an address").octets());
    }
    // A destination-options header before UDP.
    frame.extend([17, 0, 1, 4, 0, 0, 0, 0]);
    frame.extend(src_port.to_be_bytes());
    frame.extend(dst_port.to_be_bytes());
    frame.extend([0, 8, 0, 0]);
    frame
}

#[test]
fn udp_replies_pass_an_isolated_pod_and_strangers_do_not() {
    let node = Node::new("A-udp");
    let datapath = node.load(None);
    let v6 = "fd00::1".parse::<std::net::IpAddr>().expect("an address").into();
    let pod = PodRecord { v6, security_id: POD, ifindex: LOOPBACK, ..PodRecord::default() };
    datapath.maps().pods_by_ifindex.insert(&LOOPBACK, &pod).expect("PODS_BY_IFINDEX");
    let any = PolicyKey { subject: POD, peer: 0, direction: direction::INGRESS, proto: 0, port_be: [0; 2] };
    let entry = PolicyEntry { verdict: policy_verdict::DENY_DEFAULT, _pad: [0; 3], rule: 1 };
    let prefix = Prefix::new(PolicyKey::PREFIX_ANY_PROTO, any);
    assert_eq!(run(&datapath, "to_pod", &udp6(true, 40000, 53)), TCX_NEXT);
    assert!(datapath.maps().conntrack.keys().expect("CONNTRACK").is_empty(), "nothing isolates, nothing is remembered");
    datapath.maps().policy.insert(&prefix, &entry).expect("POLICY");
    assert_eq!(run(&datapath, "to_pod", &udp6(true, 40000, 53)), TCX_DROP);
    assert_eq!(run(&datapath, "from_pod", &udp6(false, 40000, 53)), TCX_NEXT);
    assert_eq!(run(&datapath, "to_pod", &udp6(true, 40000, 53)), TCX_NEXT);
    assert_eq!(run(&datapath, "to_pod", &udp6(true, 40000, 54)), TCX_DROP);
    let flows = datapath.maps().conntrack.keys().expect("CONNTRACK");
    assert_eq!(flows.iter().map(|f| (f.src_port, f.dst_port)).collect::<Vec<_>>(), [(40000, 53)]);
}
