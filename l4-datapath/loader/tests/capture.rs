//! Capture on real sockets: steer, the transparent listener, the guard, fail closed, and what a restart keeps.
mod support;

use std::{
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use l4_loader::Features;
use socket2::{Domain, Socket, Type};
use strata_abi::{
    Addr, Backend, BackendKey, DropReason, FlowEvent, Grant, GrantKey, ListenerKey, PolicyEntry, PolicyKey, Prefix,
    Service, ServiceKey, Verdict, direction, hook, listener, policy_verdict, proto, service_flag, stat,
};
use support::net::{World, inside};

#[test]
fn helper_process() {
    support::helper::main();
}

/// Opens the proxy's listeners inside the pod, puts them into the map, serves them; returns them to be closed.
fn listeners(world: &World, pod: usize) -> Vec<Socket> {
    let kinds = [
        (listener::OUTBOUND_V4, "127.0.0.1:15001", "outbound"),
        (listener::OUTBOUND_V6, "[::1]:15001", "outbound"),
        (listener::INBOUND_V4, "127.0.0.1:15006", "inbound"),
        (listener::INBOUND_V6, "[::1]:15006", "inbound"),
        (listener::HBONE_V4, "127.0.0.1:15008", "hbone"),
        (listener::HBONE_V6, "[::1]:15008", "hbone"),
    ];
    let pod = &world.pods[pod];
    let mut opened = Vec::new();
    for (kind, address, label) in kinds {
        let address: SocketAddr = address.parse().expect("an address");
        let socket = inside(pod.netns.as_fd(), || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("a socket");
            socket.set_reuse_address(true).expect("SO_REUSEADDR");
            if address.is_ipv4() {
                socket.set_ip_transparent_v4(true).expect("IP_TRANSPARENT");
            } else {
                transparent_v6(&socket);
            }
            socket.bind(&address.into()).expect("bind");
            socket.listen(64).expect("listen");
            socket
        });
        let key = ListenerKey { pod_index: pod.index, kind };
        world.datapath.maps().listeners.insert(key, socket.as_fd()).expect("LISTENERS");
        support::helper::serve(socket.try_clone().expect("a descriptor"), label);
        opened.push(socket);
    }
    opened
}

fn transparent_v6(socket: &Socket) {
    use std::os::fd::AsRawFd;
    let on: libc::c_int = 1;
    // SAFETY: a live value of the length said.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_TRANSPARENT,
            std::ptr::from_ref(&on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "IPV6_TRANSPARENT: {}", std::io::Error::last_os_error());
}

fn counter(world: &World, index: u32) -> u64 {
    world.datapath.maps().stats.get(index).expect("STATS")
}

fn drops(world: &World, reason: DropReason) -> u64 {
    counter(world, stat::DROPS + reason as u32)
}

#[test]
fn outbound_is_steered_with_its_original_destination() {
    let world = World::new("out", 2);
    let mut app = world.app(1);
    assert_eq!(app.run("serve tcp [::]:8080"), "serving");
    let mut client = world.app(0);
    let (server4, server6) = (world.pods[1].v4, world.pods[1].v6);
    let (own4, own6) = (world.pods[0].v4, world.pods[0].v6);
    // Open before enrolment: goes on undisturbed.
    assert!(client.run(&format!("hold {server4}:8080")).contains("app peer"));

    let _listeners = listeners(&world, 0);
    world.enroll(0);
    assert_eq!(client.run("say"), "hello");
    // A pod, an address nobody has, the v6 pod, a mapped socket, a socket bound to a device.
    for target in [format!("{server4}:8080"), "203.0.113.7:443".into()] {
        let said = client.run(&format!("tcp {target}"));
        assert!(said.starts_with(&format!("connected={target} outbound peer={own4}:")), "{said}");
        assert!(said.ends_with(&format!("local={target}")), "{said}");
    }
    let said = client.run(&format!("tcp [{server6}]:8080"));
    assert!(said.starts_with(&format!("connected=[{server6}]:8080 outbound peer=[{own6}]:")), "{said}");
    let said = client.run(&format!("tcp [::ffff:{server4}]:8080"));
    assert!(said.starts_with(&format!("connected=[::ffff:{server4}]:8080 outbound peer={own4}:")), "{said}");
    let said = client.run(&format!("tcp {server4}:8080 device eth0"));
    assert!(said.contains("outbound peer"), "{said}");
    assert_eq!(counter(&world, stat::CONNECT_STEERED), 5);

    // Its own addresses and loopback stay its own.
    assert_eq!(client.run(&format!("tcp {own4}:8081")), "ECONNREFUSED");
    assert_eq!(client.run("tcp 127.0.0.1:8081"), "ECONNREFUSED");

    // The proxy in the pod is not captured and passes the guard.
    let said = world.proxy(0).run(&format!("tcp {server4}:8080"));
    assert!(said.contains("app peer"), "{said}");
    // Anyone else who evades the connect hook does not.
    let before = drops(&world, DropReason::MeshBypass);
    assert_eq!(world.outsider(0).run(&format!("tcp {server4}:8080")), "TimedOut");
    assert_eq!(world.outsider(0).run(&format!("tcp [{server6}]:8080")), "TimedOut");
    assert!(drops(&world, DropReason::MeshBypass) >= before + 2);
}

/// Answers datagrams inside a pod, until it is ended.
struct Answering {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Answering {
    fn at(world: &World, pod: usize, address: &str, says: &'static str) -> Answering {
        let address: SocketAddr = address.parse().expect("an address");
        let socket = inside(world.pods[pod].netns.as_fd(), || UdpSocket::bind(address).expect("bind"));
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a time");
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while !end.load(Ordering::Relaxed) {
                if let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(says.as_bytes(), from);
                }
            }
        });
        Answering { ended, thread }
    }

    /// After this the socket is closed.
    fn end(self) {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.join().expect("the thread");
    }
}

#[test]
fn queries_to_a_resolver_are_answered_inside_the_pod() {
    let world = World::new("dns", 2);
    let resolver = &world.pods[1];
    let mut app = world.app(1);
    for ip in [resolver.v4.to_string(), format!("[{}]", resolver.v6)] {
        assert_eq!(app.run(&format!("serve udp {ip}:53")), "serving");
        assert_eq!(app.run(&format!("serve udp {ip}:54")), "serving");
    }
    let vip = "10.201.200.53";
    let maps = world.datapath.maps();
    maps.backends
        .insert(
            &BackendKey { backend_set: 1, slot: 0 },
            &Backend { addr: std::net::IpAddr::from(resolver.v4).into(), port: 53, flags: 1 },
        )
        .expect("BACKENDS");
    let service = Service { backend_set: 1, backend_count: 1, affinity_seconds: 0, flags: 0 };
    let vip_addr: Addr = vip.parse::<std::net::IpAddr>().expect("an address").into();
    let vip_key = ServiceKey { addr: vip_addr, port: 53, proto: proto::UDP, _pad: 0 };
    maps.services.insert(&vip_key, &service).expect("SERVICES");
    let mut client = world.app(0);
    let servers = [vip.to_owned(), resolver.v4.to_string(), format!("[{}]", resolver.v6), format!("[::ffff:{vip}]")];
    let ask_all = |client: &mut support::helper::Helper, said: &str| {
        for server in &servers {
            assert_eq!(client.run(&format!("udp sendto {server}:53")), format!("from={server}:53 said={said}"));
            let connected = client.run(&format!("udp connect {server}:53"));
            assert_eq!(connected, format!("connected={server}:53 from={server}:53 said={said}"));
        }
    };
    // The proxy listens, and the pod is not meshed; then it is, and the proxy answers for no resolver.
    let here = ["127.0.0.1:15053", "[::1]:15053"].map(|address| Answering::at(&world, 0, address, "here"));
    ask_all(&mut client, "hello");
    world.enroll(0);
    ask_all(&mut client, "hello");
    for address in [vip_addr, std::net::IpAddr::from(resolver.v4).into(), std::net::IpAddr::from(resolver.v6).into()] {
        maps.resolvers.insert(&address, &1).expect("RESOLVERS");
    }
    ask_all(&mut client, "here");
    let server = &servers[1];
    // Another port is another service; the proxy itself gets through, by the service too.
    assert_eq!(client.run(&format!("udp sendto {server}:54")), format!("from={server}:54 said=hello"));
    let asked = world.proxy(0).run(&format!("udp connect {vip}:53"));
    assert_eq!(asked, format!("connected={server}:53 from={server}:53 said=hello"));
    // A pod that may not ask the resolver gets no answer from the proxy either.
    let key =
        PolicyKey { subject: resolver.security_id, peer: 0, direction: direction::INGRESS, proto: 0, port_be: [0; 2] };
    let prefix = Prefix::new(PolicyKey::PREFIX_ANY_PROTO, key);
    let entry = PolicyEntry { verdict: policy_verdict::DENY_DEFAULT, _pad: [0; 3], rule: 3 };
    maps.policy.insert(&prefix, &entry).expect("POLICY");
    assert_eq!(client.run(&format!("udp connect {vip}:53")), "EPERM");
    assert!(maps.policy.remove(&prefix).expect("POLICY"));
    // The mesh's names outlive the resolver's pods; the proxy is told at once that there are none.
    let empty = Service { backend_count: 0, ..service };
    maps.services.insert(&vip_key, &empty).expect("SERVICES");
    assert_eq!(client.run(&format!("udp connect {vip}:53")), format!("connected={vip}:53 from={vip}:53 said=here"));
    assert_eq!(client.run(&format!("udp sendto {vip}:53")), format!("from={vip}:53 said=here"));
    assert_eq!(world.proxy(0).run(&format!("udp connect {vip}:53")), "ECONNREFUSED");
    maps.services.insert(&vip_key, &service).expect("SERVICES");
    // Without the proxy names are the resolver's.
    here.into_iter().for_each(Answering::end);
    ask_all(&mut client, "hello");
}

#[test]
fn a_nodes_port_is_steered_as_the_backend_it_leads_to() {
    let world = World::new("nodeport", 2);
    let maps = world.datapath.maps();
    let (server4, server6) = (world.pods[1].v4, world.pods[1].v6);
    let node: [(std::net::IpAddr, std::net::IpAddr); 2] =
        [("192.0.2.11".parse().unwrap(), server4.into()), ("2001:db8::11".parse().unwrap(), server6.into())];
    for (backend_set, (node, server)) in (1..).zip(node) {
        let backend = Backend { addr: server.into(), port: 8080, flags: 1 };
        maps.backends.insert(&BackendKey { backend_set, slot: 0 }, &backend).expect("BACKENDS");
        let key = ServiceKey { addr: node.into(), port: 30080, proto: proto::TCP, _pad: 0 };
        let service = Service { backend_set, backend_count: 1, affinity_seconds: 0, flags: service_flag::OUTSIDE };
        maps.services.insert(&key, &service).expect("SERVICES");
    }
    let _listeners = listeners(&world, 0);
    world.enroll(0);
    let mut client = world.app(0);
    // The proxy sees the backend, the application whom it called.
    for (called, server) in [
        ("192.0.2.11:30080", format!("{server4}:8080")),
        ("[2001:db8::11]:30080", format!("[{server6}]:8080")),
        ("[::ffff:192.0.2.11]:30080", format!("{server4}:8080")),
    ] {
        let said = client.run(&format!("tcp {called}"));
        assert!(said.starts_with(&format!("connected={called} outbound ")), "{said}");
        assert!(said.ends_with(&format!("local={server}")), "{said}");
    }
}

#[test]
fn policy_is_asked_before_steering() {
    let world = World::new("polst", 2);
    let _listeners = listeners(&world, 0);
    world.enroll(0);
    let pod = &world.pods[1];
    let key = PolicyKey { subject: pod.security_id, peer: 0, direction: direction::INGRESS, proto: 0, port_be: [0; 2] };
    let entry = PolicyEntry { verdict: policy_verdict::DENY_DEFAULT, _pad: [0; 3], rule: 3 };
    let prefix = Prefix::new(PolicyKey::PREFIX_ANY_PROTO, key);
    world.datapath.maps().policy.insert(&prefix, &entry).expect("POLICY");
    let mut client = world.app(0);
    assert_eq!(client.run(&format!("tcp {}:8080", pod.v4)), "EPERM");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let events = runtime.block_on(async {
        let mut events = Vec::new();
        world.datapath.events().expect("EVENTS").read(&mut events, 100).await.expect("an event");
        events
    });
    let denied: Vec<&FlowEvent> = events.iter().filter(|e| e.verdict == Verdict::Dropped as u8).collect();
    let [event] = denied.as_slice() else { panic!("{events:?}") };
    assert_eq!((event.hook, event.reason, event.rule), (hook::CONNECT, DropReason::PolicyDenied as u8, 3));
    assert_eq!((event.src_id, event.dst_id, event.dst_port), (256, 257, 8080));
    assert_eq!((event.proto, event.direction), (proto::TCP, direction::INGRESS));
    assert_eq!(event.netns_cookie, world.pods[0].cookie);
}

#[test]
fn inbound_is_captured_and_fails_closed() {
    let world = World::new("in", 2);
    let mut app = world.app(1);
    assert_eq!(app.run("serve tcp [::]:8080"), "serving");
    let opened = listeners(&world, 1);
    world.enroll(1);
    let pod = &world.pods[1];
    let (own4, own6) = (pod.v4, pod.v6);
    let client4 = world.pods[0].v4;
    let mut client = world.app(0);
    // Any port, open or not, v4 and v6; 15008 has its own listener.
    for (target, label) in [
        (format!("{own4}:8080"), "inbound"),
        (format!("{own4}:1"), "inbound"),
        (format!("[{own6}]:8080"), "inbound"),
        (format!("{own4}:15008"), "hbone"),
        (format!("[{own6}]:15008"), "hbone"),
    ] {
        let said = client.run(&format!("tcp {target}"));
        assert!(said.starts_with(&format!("connected={target} {label} peer=")), "{said}");
        assert!(said.ends_with(&format!("local={target}")), "{said}");
    }
    // The app is reached from inside, and by the node (probes).
    assert!(app.run(&format!("tcp {own4}:8080")).contains(" app peer"));
    assert!(app.run("tcp 127.0.0.1:8080").contains(" app peer"));
    assert!(world.host().run(&format!("tcp {own4}:8080")).contains(" app peer"));
    // A meshed pod's tunnel to itself ends at its proxy.
    assert!(world.proxy(1).run(&format!("tcp {own4}:15008")).contains(" hbone peer"));

    // A grant lets this client through to the app, and only to this port.
    let grant = GrantKey {
        src: std::net::IpAddr::from(client4).into(),
        dst: std::net::IpAddr::from(own4).into(),
        port: 8080,
        _pad: 0,
    };
    world.datapath.maps().grants.insert(&grant, &Grant { generation: 1 }).expect("GRANTS");
    assert!(client.run(&format!("tcp {own4}:8080")).contains(" app peer"));
    assert!(client.run(&format!("tcp {own4}:8081")).contains(" inbound peer"));
    // Raising the generation revokes all at once.
    world.datapath.maps().config.update(|config| config.grant_generation += 1).expect("CONFIG");
    assert!(client.run(&format!("tcp {own4}:8080")).contains(" inbound peer"));

    // Listeners gone: nobody answers, not even the app on that very port.
    for socket in &opened {
        socket.shutdown(std::net::Shutdown::Both).expect("close the listener");
    }
    drop(opened);
    let answer = client.run(&format!("tcp {own4}:8080"));
    assert!(!answer.contains("peer"), "{answer}");
    assert!(drops(&world, DropReason::NoListener) > 0);
    // Un-enrolled, the app is reached again.
    let pod_index = world.pods[1].index;
    assert!(world.datapath.detach_sk_lookup(pod_index).expect("detach"));
    assert!(!world.datapath.detach_sk_lookup(pod_index).expect("detach again"));
    assert!(client.run(&format!("tcp {own4}:8080")).contains(" app peer"));
}

#[test]
fn a_granted_short_cut_is_direct_through_guard_and_capture() {
    let world = World::new("dir", 2);
    let mut app = world.app(1);
    assert_eq!(app.run("serve tcp 0.0.0.0:8080"), "serving");
    let _a = listeners(&world, 0);
    let _b = listeners(&world, 1);
    world.enroll(0);
    world.enroll(1);
    let target = format!("{}:8080", world.pods[1].v4);
    let mut client = world.app(0);
    assert!(client.run(&format!("tcp {target}")).contains(" outbound peer"));
    let ip = |pod: usize| std::net::IpAddr::from(world.pods[pod].v4).into();
    let grant = GrantKey { src: ip(0), dst: ip(1), port: 8080, _pad: 0 };
    world.datapath.maps().grants.insert(&grant, &Grant { generation: 1 }).expect("GRANTS");
    assert!(client.run(&format!("tcp {target}")).contains(" app peer"));
    assert_eq!(counter(&world, stat::CONNECT_DIRECT), 1);
    world.datapath.maps().grants.remove(&grant).expect("GRANTS");
    assert!(client.run(&format!("tcp {target}")).contains(" outbound peer"));
}

#[test]
fn a_restart_keeps_maps_links_and_capture() {
    let world = World::new("again", 2);
    let _listeners = listeners(&world, 0);
    world.enroll(0);
    let mut client = world.app(0);
    let target = format!("{}:8080", world.pods[1].v4);
    assert!(client.run(&format!("tcp {target}")).contains(" outbound peer"));
    let steered = counter(&world, stat::CONNECT_STEERED);
    let before = world.datapath.attached().expect("links");

    let second = world.node.load(None);
    assert_eq!(second.attached().expect("links"), before);
    assert_eq!(second.maps().stats.get(stat::CONNECT_STEERED).expect("STATS"), steered);
    assert_eq!(second.maps().pods.dump().expect("PODS"), world.datapath.maps().pods.dump().expect("PODS"));
    for pod in &world.pods {
        let attach = l4_loader::PodAttach { pod_index: pod.index, ifindex: pod.ifindex };
        world.in_node(|| second.attach_pod(&attach)).expect("replace in place");
    }
    let pod = &world.pods[0];
    let lookup = l4_loader::PodLookup {
        pod_index: pod.index,
        v4: Some(pod.v4),
        v6: Some(pod.v6),
        netns_cookie: pod.cookie,
        security_id: pod.security_id,
    };
    second.attach_sk_lookup(&lookup, pod.netns.as_fd()).expect("replace in place");
    assert_eq!(second.attached().expect("links"), before);
    assert!(client.run(&format!("tcp {target}")).contains(" outbound peer"));
    assert!(second.detach_pod(pod.index).expect("detach"));
    assert!(!second.attached().expect("links").contains_key(&pod.index));
}

#[test]
fn what_a_vanished_pod_left_behind_can_be_removed() {
    let world = World::new("gone", 1);
    world.enroll(0);
    let pod = &world.pods[0];
    let links = world.datapath.attached().expect("links")[&pod.index];
    assert_eq!((links.from_pod, links.to_pod, links.sk_lookup, links.ifindex), (true, true, true, pod.ifindex));
    let (index, name) = (pod.index, pod.name.clone());
    // The device goes with its peer; the pins stay.
    support::net::ip(&format!("-n {name} link del eth0"));
    let links = world.datapath.attached().expect("links")[&index];
    assert_eq!((links.from_pod, links.ifindex), (true, 0));
    assert!(world.datapath.detach_pod(index).expect("detach"));
    assert!(world.datapath.attached().expect("links").is_empty());
    assert!(!world.datapath.detach_pod(index).expect("detach again"));
}

#[test]
fn an_older_kernels_filters_do_the_same() {
    let world = World::with("old", 2, Some(Features::OLDEST));
    assert_eq!(world.datapath.features(), Features::OLDEST);
    let filters = || {
        let mut tc = std::process::Command::new("tc");
        let output = tc.args(["-n", "stA-old-h", "filter", "show", "dev", "p0", "ingress"]).output().expect("tc");
        String::from_utf8(output.stdout).expect("text")
    };
    assert!(filters().contains("direct-action"), "{}", filters());
    let mut app = world.app(1);
    assert_eq!(app.run("serve tcp [::]:8080"), "serving");
    let pod = &world.pods[1];
    let target = format!("{}:8080", pod.v4);
    let mut client = world.app(0);
    assert!(client.run(&format!("hold {target}")).contains("app peer"));
    let _listeners = listeners(&world, 0);
    world.enroll(0);
    // Capture, and the guard against whoever evades it.
    assert!(client.run(&format!("tcp {target}")).contains(" outbound peer"));
    assert_eq!(world.outsider(0).run(&format!("tcp {target}")), "TimedOut");
    assert!(drops(&world, DropReason::MeshBypass) > 0);
    // A restart replaces in place: what is open goes on, and there is one filter, not two.
    let before = world.datapath.attached().expect("pins");
    assert_eq!((before[&pod.index].from_pod, before[&pod.index].ifindex), (true, pod.ifindex));
    let second = world.node.load(Some(Features::OLDEST));
    for pod in &world.pods {
        let attach = l4_loader::PodAttach { pod_index: pod.index, ifindex: pod.ifindex };
        world.in_node(|| second.attach_pod(&attach)).expect("replace in place");
    }
    assert_eq!(second.attached().expect("pins"), before);
    assert_eq!(filters().matches("direct-action").count(), 1, "{}", filters());
    assert_eq!(client.run("say"), "hello");
    // A refusal has the kernel's own errno.
    let key = PolicyKey { subject: pod.security_id, peer: 0, direction: direction::INGRESS, proto: 0, port_be: [0; 2] };
    let entry = PolicyEntry { verdict: policy_verdict::DENY_DEFAULT, _pad: [0; 3], rule: 3 };
    second.maps().policy.insert(&Prefix::new(PolicyKey::PREFIX_ANY_PROTO, key), &entry).expect("POLICY");
    assert_eq!(client.run(&format!("tcp {target}")), "EPERM");
    // Packets of an open connection meet the policy too.
    assert_eq!(client.run("say"), "EAGAIN");
    // Let go, nothing filters.
    let first = &world.pods[1];
    assert!(world.in_node(|| second.detach_pod(first.index)).expect("detach"));
    assert!(!world.in_node(|| second.detach_pod(first.index)).expect("detach again"));
    assert_eq!(filters().matches("direct-action").count(), 1, "{}", filters());
    world.in_node(|| l4_loader::unload(&world.node.bpffs)).expect("unload");
    assert_eq!(filters(), "");
    // The pod's capture has gone with the pins.
    assert_eq!(world.outsider(1).run(&format!("tcp {}:1", world.pods[0].v4)), "ECONNREFUSED");
}
