use std::time::{Duration, Instant};

use compat_objects::core::{
    Container, ContainerPort, Endpoint, EndpointPort, EndpointSlice, Namespace, Node, ObjectMeta, Pod, PodIP, PodSpec,
    PodStatus, Service, ServicePort, ServiceSpec,
};
use compat_objects::{HasMeta as _, Object, ObjectKey};

use super::*;

const CAPACITY: usize = 65_536;

fn meta(namespace: &str, name: &str, labels: &[(&str, &str)]) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(namespace.to_owned()).filter(|namespace| !namespace.is_empty()),
        labels: Some(labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()),
        ..ObjectMeta::default()
    }
}

fn pod(number: usize, node: &str, app: &str) -> Pod {
    let ip = format!("10.{}.{}.{}", 64 + number / 62_500, number / 250 % 250, number % 250 + 1);
    let port = ContainerPort { container_port: 8080, name: Some("http".to_owned()), ..ContainerPort::default() };
    let container = Container { ports: Some(vec![port]), ..Container::default() };
    Pod {
        metadata: meta(&format!("ns-{}", number % 50), &format!("pod-{number}"), &[("app", app), ("tier", "web")]),
        spec: Some(PodSpec { node_name: Some(node.to_owned()), containers: vec![container], ..PodSpec::default() }),
        status: Some(PodStatus { pod_ip: Some(ip.clone()), pod_ips: Some(vec![PodIP { ip }]), ..PodStatus::default() }),
    }
}

fn service(number: usize) -> [Object; 2] {
    let (namespace, name) = (format!("ns-{}", number % 50), format!("svc-{number}"));
    let port = ServicePort { port: 80, name: Some("http".to_owned()), ..ServicePort::default() };
    let ip = format!("10.200.{}.{}", number / 250, number % 250 + 1);
    let spec = ServiceSpec { cluster_ip: Some(ip), ports: Some(vec![port]), ..ServiceSpec::default() };
    let endpoint = |ip: usize| Endpoint {
        addresses: vec![format!("10.64.{}.{}", ip / 250 % 250, ip % 250 + 1)],
        node_name: Some("n7".to_owned()),
        ..Endpoint::default()
    };
    let slice = EndpointSlice {
        metadata: meta(&namespace, &format!("{name}-1"), &[("kubernetes.io/service-name", &name)]),
        address_type: "IPv4".to_owned(),
        endpoints: Some(vec![endpoint(number * 2), endpoint(number * 2 + 1)]),
        ports: Some(vec![EndpointPort { port: Some(8080), name: Some("http".to_owned()), ..EndpointPort::default() }]),
    };
    let service = Service { metadata: meta(&namespace, &name, &[]), spec: Some(spec), ..Service::default() };
    [Object::from(service), Object::from(slice)]
}

/// Pods spread over 100 nodes and `apps` applications, in 50 namespaces.
fn cluster(pods: usize, services: usize, apps: usize) -> ObjectSet {
    let namespaces = (0..50)
        .map(|n| Object::from(Namespace { metadata: meta("", &format!("ns-{n}"), &[]), ..Namespace::default() }));
    let nodes = (0..100).map(|n| Object::from(Node { metadata: meta("", &format!("n{n}"), &[]), ..Node::default() }));
    let pods = (0..pods).map(|n| Object::from(pod(n, &format!("n{}", n % 100), &format!("app-{}", n % apps))));
    namespaces.chain(nodes).chain(pods).chain((0..services).flat_map(service)).collect()
}

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = run();
    println!("{what}: {:?}", start.elapsed());
    (result, start.elapsed())
}

#[test]
fn only_what_changed_is_compiled_again() {
    let mut compiler = Compiler::new("n1", BackendSets::after(0));
    let mut objects = cluster(300, 40, 20);
    let none = IdentityAllocator::default();
    let first = compiler.compile(&objects, CAPACITY, &none).unwrap();
    let again = compiler.compile(&objects.clone(), CAPACITY, &first.allocator).unwrap();
    assert!(Arc::ptr_eq(&first.policy, &again.policy) && Arc::ptr_eq(&first.services, &again.services));

    // A pod elsewhere: policy alone.
    objects.insert(Object::from(pod(1000, "n2", "new")), None);
    let other_pod = compiler.compile(&objects, CAPACITY, &first.allocator).unwrap();
    assert!(!Arc::ptr_eq(&first.policy, &other_pod.policy) && Arc::ptr_eq(&first.services, &other_pod.services));
    assert!(other_pod.policy.pod_identity.len() == first.policy.pod_identity.len() + 1);

    // A pod here may be a service's local endpoint: both.
    objects.insert(Object::from(pod(1001, "n1", "new")), None);
    let own_pod = compiler.compile(&objects, CAPACITY, &other_pod.allocator).unwrap();
    assert!(!Arc::ptr_eq(&other_pod.policy, &own_pod.policy) && !Arc::ptr_eq(&other_pod.services, &own_pod.services));

    // A service: services alone.
    objects.remove(&ObjectKey::new(Kind::Service, "ns-0", "svc-0"));
    let service = compiler.compile(&objects, CAPACITY, &own_pod.allocator).unwrap();
    assert!(Arc::ptr_eq(&own_pod.policy, &service.policy) && !Arc::ptr_eq(&own_pod.services, &service.services));
    assert!(service.services.services.len() < own_pod.services.services.len());

    // A host port elsewhere: its callers here are led there.
    let mut elsewhere = pod(1002, "n2", "new");
    let port = ContainerPort { container_port: 8080, host_port: Some(8126), ..ContainerPort::default() };
    let container = Container { ports: Some(vec![port]), ..Container::default() };
    elsewhere.spec.as_mut().unwrap().containers = vec![container];
    objects.insert(Object::from(elsewhere), None);
    let host_port = compiler.compile(&objects, CAPACITY, &service.allocator).unwrap();
    assert!(!Arc::ptr_eq(&service.services, &host_port.services));
    let service = host_port;

    // This node's zone is a hint's; another node's is not.
    for (name, differs) in [("n2", false), ("n1", true)] {
        let zone = [("topology.kubernetes.io/zone", "z")];
        objects.insert(Object::from(Node { metadata: meta("", name, &zone), ..Node::default() }), None);
        let node = compiler.compile(&objects, CAPACITY, &service.allocator).unwrap();
        assert_eq!(!Arc::ptr_eq(&service.services, &node.services), differs, "{name}");
    }
    assert!(objects.nodes().all(|node| !node.name().is_empty()));
}

/// Prints what a change costs in a big cluster: `cargo test -p l4-agent compile -- --nocapture`.
#[test]
fn numbers_of_a_big_cluster() {
    let (mut objects, _) = timed("10,000 pods, 5,000 services made", || cluster(10_000, 5_000, 500));
    let mut compiler = Compiler::new("n1", BackendSets::after(0));
    let none = IdentityAllocator::default();
    let (first, whole) = timed("everything", || compiler.compile(&objects, CAPACITY, &none).unwrap());
    let (_, nothing) = timed("nothing changed", || compiler.compile(&objects, CAPACITY, &first.allocator).unwrap());
    let (_, copied) = timed("one pod put into the set", || {
        let before = objects.clone();
        objects.insert(Object::from(pod(20_000, "n2", "app-1")), None);
        before.len()
    });
    let (pod_changed, _) = timed("a pod elsewhere", || compiler.compile(&objects, CAPACITY, &first.allocator).unwrap());
    objects.remove(&ObjectKey::new(Kind::Service, "ns-0", "svc-0"));
    let (_, _) = timed("a service", || compiler.compile(&objects, CAPACITY, &pod_changed.allocator).unwrap());
    assert!(nothing * 10 < whole, "{nothing:?} for nothing, {whole:?} for everything");
    assert!(copied < whole);
}
