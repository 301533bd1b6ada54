//! The endpoint controller: Services with selectors and ready pods -> EndpointSlices, as kube-controller-manager does.
use std::collections::BTreeMap;
use std::net::IpAddr;

use compat_objects::core::{IntOrString, Pod, Service};
use compat_objects::{HasMeta, ObjectSet};
use serde_json::{Value, json};

/// What the kubelet knows of a running pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodStatus {
    pub ips: Vec<IpAddr>,
    pub ready: bool,
}

/// All running pods by namespace and name.
pub(crate) type Pods = BTreeMap<(String, String), PodStatus>;

/// The file's content: one document per slice.
pub(crate) fn render(objects: &ObjectSet, pods: &Pods) -> String {
    let mut text = String::from("# Written by the lab's endpoint controller; changes are overwritten.\n");
    for service in objects.services() {
        for slice in slices(objects, service, pods) {
            text.push_str("---\n");
            text.push_str(&slice.to_string());
            text.push('\n');
        }
    }
    text
}

fn slices(objects: &ObjectSet, service: &Service, pods: &Pods) -> Vec<Value> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let Some(selector) = spec.selector.as_ref().filter(|selector| !selector.is_empty()) else { return Vec::new() };
    let families = spec.ip_families.clone().unwrap_or_else(|| vec!["IPv4".into()]);
    let mut out = Vec::new();
    for family in families {
        // Pods whose named ports differ need slices of their own.
        let mut by_ports: BTreeMap<String, (Value, Vec<Value>)> = BTreeMap::new();
        for pod in objects.pods_in(service.namespace()).filter(|pod| selects(selector, pod)) {
            let Some(status) = pods.get(&(pod.namespace().to_owned(), pod.name().to_owned())) else { continue };
            let Some(ip) = status.ips.iter().find(|ip| ip.is_ipv4() == (family == "IPv4")) else { continue };
            let ports = ports(service, pod);
            by_ports
                .entry(ports.to_string())
                .or_insert((ports, Vec::new()))
                .1
                .push(endpoint(objects, pod, *ip, status));
        }
        for (number, (ports, endpoints)) in by_ports.into_values().enumerate() {
            let suffix = if number == 0 { String::new() } else { format!("-{number}") };
            out.push(json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{}-{}{suffix}", service.name(), family.to_lowercase()),
                    "namespace": service.namespace(),
                    "labels": {
                        "kubernetes.io/service-name": service.name(),
                        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    },
                },
                "addressType": family,
                "endpoints": endpoints,
                "ports": ports,
            }));
        }
    }
    out
}

fn selects(selector: &BTreeMap<String, String>, pod: &Pod) -> bool {
    selector.iter().all(|(key, value)| pod.label(key) == Some(value))
}

fn endpoint(objects: &ObjectSet, pod: &Pod, ip: IpAddr, status: &PodStatus) -> Value {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
    let zone = objects.node("", &node).and_then(|node| node.label("topology.kubernetes.io/zone"));
    let mut endpoint = json!({
        "addresses": [ip],
        "conditions": {"ready": status.ready, "serving": status.ready, "terminating": false},
        "nodeName": node,
        "targetRef": {"kind": "Pod", "namespace": pod.namespace(), "name": pod.name()},
    });
    if let Some(zone) = zone {
        endpoint["zone"] = json!(zone);
    }
    endpoint
}

fn ports(service: &Service, pod: &Pod) -> Value {
    let mut out = Vec::new();
    for port in service.spec.iter().flat_map(|spec| spec.ports.iter().flatten()) {
        let number = match &port.target_port {
            None => Some(port.port),
            Some(IntOrString::Int(number)) => Some(*number),
            Some(IntOrString::String(name)) => named(pod, name),
        };
        let Some(number) = number else { continue };
        let mut entry = json!({"port": number, "protocol": port.protocol.as_deref().unwrap_or("TCP")});
        if let Some(name) = &port.name {
            entry["name"] = json!(name);
        }
        if let Some(protocol) = &port.app_protocol {
            entry["appProtocol"] = json!(protocol);
        }
        out.push(entry);
    }
    Value::Array(out)
}

fn named(pod: &Pod, name: &str) -> Option<i32> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports.find(|port| port.name.as_deref() == Some(name)).map(|port| port.container_port)
}

#[cfg(test)]
mod tests {
    use compat_objects::source::DirectorySource;

    use super::*;

    const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: pay, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  ipFamilies: [IPv4, IPv6]
  selector: {app: pay}
  ports: [{name: http, port: 80, targetPort: web}]
---
apiVersion: v1
kind: Pod
metadata: {name: one, namespace: shop, labels: {app: pay}}
spec: {nodeName: n, containers: [{name: c, ports: [{name: web, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: two, namespace: shop, labels: {app: other}}
spec: {nodeName: n, containers: [{name: c}]}
";

    #[test]
    fn one_slice_per_family_with_the_selected_pods() {
        let folder = std::env::temp_dir().join(format!("strata-lab-endpoints-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("objects.yaml"), OBJECTS).unwrap();
        let objects = DirectorySource::new(vec![folder.clone()]).load().objects.clone();
        let key = |name: &str| ("shop".to_owned(), name.to_owned());
        let status = PodStatus { ips: vec!["10.8.0.2".parse().unwrap(), "fd00::2".parse().unwrap()], ready: true };
        let pods = Pods::from([(key("one"), status.clone()), (key("two"), status)]);
        std::fs::write(folder.join("slices.yaml"), render(&objects, &pods)).unwrap();
        let snapshot = DirectorySource::new(vec![folder.clone()]).load();
        std::fs::remove_dir_all(folder).unwrap();
        assert_eq!(snapshot.faults, []);
        let slices: Vec<_> = snapshot.objects.endpoint_slices().collect();
        assert_eq!(slices.len(), 2);
        let endpoints = slices[0].endpoints.as_ref().unwrap();
        assert_eq!(endpoints.len(), 1);
        assert_eq!(endpoints[0].addresses, ["10.8.0.2"]);
        assert_eq!(slices[0].ports.as_ref().unwrap()[0].port, Some(8080));
        assert_eq!(slices[1].address_type, "IPv6");
    }
}
