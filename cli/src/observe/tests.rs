use serde_json::json;

use super::*;

fn observe(arguments: &[&str]) -> Observe {
    use clap::Args;
    let command = Observe::augment_args(clap::Command::new("observe"));
    let matches = command.get_matches_from([&["observe"], arguments].concat());
    <Observe as clap::FromArgMatches>::from_arg_matches(&matches).unwrap()
}

fn denied() -> Record {
    Record::of(
        &json!({"time": "2026-11-23T22:54:14.569156698Z", "layer": "network", "node": "node-a", "verdict": "dropped",
            "drop_reason": "policy_denied", "proto": "TCP", "hook": "connect", "cookie": 7,
            "src": {"ip": "10.8.0.2", "port": 0, "identity": 263, "namespace": "shop", "pod": "frontend-1"},
            "dst": {"ip": "10.8.0.4", "port": 8080, "identity": 264, "namespace": "shop", "pod": "payments-v1-a"},
            "policy": {"namespace": "shop", "names": ["payments"], "text": "shop/payments ingress: no rule allows it"}}),
        "elsewhere",
    )
}

#[test]
fn a_flow_names_its_rule() {
    let record = denied();
    assert_eq!(record.node, "node-a");
    assert_eq!(record.decided_by.as_deref(), Some("shop/payments ingress: no rule allows it (policy_denied)"));
    assert!(record.refused());
    let row = record.row();
    for word in ["22:54:14.569", "shop/frontend-1 ", "shop/payments-v1-a:8080", "no rule allows it"] {
        assert!(row.contains(word), "{word} in {row}");
    }
}

#[test]
fn a_request_and_a_connection_have_the_same_shape() {
    let request = Record::of(
        &json!({"kind": "request", "layer": "request", "time": "2026-11-23T22:54:11.914Z",
            "source": {"address": "[fd00:8::3]:59026", "workload": "checkout", "namespace": "shop", "identity": "spiffe://cluster.local/ns/shop/sa/checkout"},
            "destination": {"address": "10.8.1.2:8080", "workload": "payments", "namespace": "shop", "identity": null},
            "service": "payments.shop.svc.cluster.local", "route": "canary", "cluster": "v2", "method": "GET", "path": "/",
            "protocol": "HTTP/1.1", "status": 403, "flags": [], "details": "rbac", "latency_ms": 1.5, "attempts": 2}),
        "node-b",
    );
    assert_eq!((request.source.ip.as_str(), request.source.port), ("fd00:8::3", 59026));
    assert_eq!((request.status, request.verdict.as_str()), (Some(403), "dropped"));
    assert!(request.row().contains("403 GET /") && request.row().contains("2 tries"));
    let connection = Record::of(
        &json!({"time": "2026-11-23T22:54:13.0Z", "layer": "mesh", "direction": "inbound", "verdict": "dropped",
            "source": {"address": "10.8.1.4:58596", "workload": "gateway-1", "namespace": "outside", "identity": null},
            "destination": {"address": "10.8.0.4:8080", "workload": "payments-v1-a", "namespace": "shop", "identity": null},
            "policy": "istio-system/istio_converted_static_strict", "reason": "plaintext denied by policy", "duration_ms": 0}),
        "node-a",
    );
    assert!(connection.decided_by.unwrap().contains("plaintext denied"));
}

#[test]
fn filters() {
    let record = denied();
    assert!(observe(&[]).wants(&record));
    assert!(observe(&["--layer", "network", "--refused"]).wants(&record));
    assert!(!observe(&["--layer", "mesh"]).wants(&record));
    assert!(observe(&["--pod", "shop/payments-v1-a"]).wants(&record));
    assert!(!observe(&["--pod", "shop/checkout-1"]).wants(&record));
    assert!(pod("checkout-1").is_err());
}

#[test]
fn layers_complete_each_other() {
    let mut directory = Directory::default();
    let key = of_uid("Kubernetes//Pod/shop/frontend-1").unwrap();
    directory.pods.insert("10.8.0.2".into(), key.clone());
    directory.identities.insert(key, "spiffe://cluster.local/ns/shop/sa/frontend".into());
    let mut record = denied();
    directory.complete(&mut record);
    assert_eq!(record.source.identity.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/frontend"));
}
