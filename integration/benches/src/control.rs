//! What the control plane pays for a mesh of a given size: all of it translated, and translated again after one pod changed.
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use comfy_table::Table;
use compat_objects::{Kind, ObjectKey, ObjectSet, read_value};
use compat_translate::{MeshOptions, MeshOutput, translate};
use serde_json::{Value, json};

const NAMESPACES: usize = 50;
const NODES: usize = 100;

/// `sizes`: pods; half as many services.
pub(crate) fn run(sizes: &[usize], runs: u32) -> Result<()> {
    let mut table = Table::new();
    table.set_header(["pods", "services", "waypoints", "objects", "resources", "translation ms", "us / object"]);
    for pods in sizes {
        let mut objects = ObjectSet::default();
        for value in mesh(*pods, pods / 2) {
            let (object, _) = read_value(value).map_err(|faults| anyhow!("{faults:?}"))?;
            objects.insert(object, None);
        }
        let mut took = Vec::new();
        let mut output = MeshOutput::default();
        for run in 0..runs {
            change(&mut objects, run)?;
            let started = Instant::now();
            output = translate(&objects, &MeshOptions::default());
            took.push(started.elapsed());
        }
        took.sort();
        let median = took.get(took.len() / 2).copied().unwrap_or_default();
        table.add_row(row(*pods, &objects, &output, median));
    }
    println!("{table}");
    Ok(())
}

fn row(pods: usize, objects: &ObjectSet, output: &MeshOutput, median: Duration) -> [String; 7] {
    let waypoints = output.waypoints.values();
    let governed: usize =
        waypoints.map(|waypoint| waypoint.listeners.len() + waypoint.clusters.len() + waypoint.endpoints.len()).sum();
    [
        pods.to_string(),
        (pods / 2).to_string(),
        output.waypoints.len().to_string(),
        objects.len().to_string(),
        (output.addresses.len() + output.authorizations.len() + governed).to_string(),
        format!("{:.1}", median.as_secs_f64() * 1e3),
        format!("{:.1}", median.as_secs_f64() * 1e6 / objects.len().max(1) as f64),
    ]
}

/// One pod is no longer, or again, Ready.
fn change(objects: &mut ObjectSet, run: u32) -> Result<()> {
    objects.remove(&ObjectKey::new(Kind::Pod, "ns-0", "pod-0"));
    let (object, _) = read_value(pod(0, run.is_multiple_of(2))).map_err(|faults| anyhow!("{faults:?}"))?;
    objects.insert(object, None);
    Ok(())
}

fn mesh(pods: usize, services: usize) -> Vec<Value> {
    let namespace = |index: usize| {
        let (name, waypoint) = (format!("ns-{index}"), "waypoint");
        let labels = json!({"istio.io/dataplane-mode": "ambient", "istio.io/use-waypoint": waypoint});
        let listeners = json!([{"name": "mesh", "port": 15008, "protocol": "HBONE"}]);
        let from = json!([{"source": {"namespaces": [name]}}]);
        [
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
            json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
                "metadata": {"name": waypoint, "namespace": name},
                "spec": {"gatewayClassName": "istio-waypoint", "listeners": listeners},
            }),
            json!({
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "own", "namespace": name},
                "spec": {"selector": {"matchLabels": {"app": "app-0"}}, "rules": [{"from": from}]},
            }),
        ]
    };
    let node = |index: usize| {
        let labels = json!({"topology.kubernetes.io/zone": format!("zone-{}", index % 3)});
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("node-{index}"), "labels": labels}})
    };
    let mut all: Vec<Value> = (0..NAMESPACES).flat_map(namespace).collect();
    all.extend((0..NODES).map(node));
    all.extend((0..services).flat_map(service));
    all.extend((0..pods).map(|index| pod(index, true)));
    all
}

/// Each tenth has subsets and a canary.
fn service(index: usize) -> Vec<Value> {
    let (name, namespace) = (format!("app-{index}"), format!("ns-{}", index % NAMESPACES));
    let metadata = json!({"name": name, "namespace": namespace});
    let mut all = vec![json!({
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            "clusterIP": format!("10.{}.{}.{}", 96 + index / 65_536, index / 256 % 256, index % 256),
            "selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
        },
    })];
    if index.is_multiple_of(10) {
        let subset = |version: &str| json!({"name": version, "labels": {"version": version}});
        let to = |subset: &str, weight: u32| json!({"destination": {"host": name, "subset": subset}, "weight": weight});
        all.push(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": metadata,
            "spec": {"host": name, "subsets": [subset("v1"), subset("v2")]},
        }));
        all.push(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": metadata,
            "spec": {"hosts": [name], "http": [{"route": [to("v1", 90), to("v2", 10)]}]},
        }));
    }
    all
}

/// Two of each service.
fn pod(index: usize, ready: bool) -> Value {
    let service = index / 2;
    let labels = json!({
        "app": format!("app-{service}"), "version": format!("v{}", index % 2 + 1), "pod-template-hash": "75d9bfc8f",
    });
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("pod-{index}"), "namespace": format!("ns-{}", service % NAMESPACES), "labels": labels,
            "annotations": {"ambient.istio.io/redirection": "enabled"},
        },
        "spec": {
            "nodeName": format!("node-{}", index % NODES), "serviceAccountName": format!("app-{service}"),
            "containers": [{"name": "app", "image": "app"}],
        },
        "status": {
            "phase": "Running", "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}],
            "podIPs": [{"ip": format!("10.{}.{}.{}", 128 + index / 65_536, index / 256 % 256, index % 256)}],
        },
    })
}
