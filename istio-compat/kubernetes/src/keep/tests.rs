use compat_objects::core::Pod;
use compat_objects::{HasMeta as _, Object, read_object};
use serde_json::json;

use super::*;
use crate::slim::{Raw, Slim};

const POD: usize = Kind::Pod as usize;
const SERVICE: usize = Kind::Service as usize;
const POLICY: usize = Kind::NetworkPolicy as usize;
const GATEWAY: usize = Kind::Gateway as usize;

fn raw<const KIND: usize>(value: Value) -> Raw {
    serde_json::from_str::<Slim<KIND>>(&value.to_string()).unwrap().into_raw(Kind::ALL[KIND])
}

/// A pod as an API server sends it.
fn pod() -> Value {
    json!({
        "metadata": {
            "name": "web-1", "namespace": "shop", "uid": "u1", "resourceVersion": "77", "generateName": "web-",
            "labels": {"app": "web"},
            "annotations": {
                "ambient.istio.io/redirection": "enabled", "kubernetes.io/config.seen": "x",
                "kubectl.kubernetes.io/last-applied-configuration": "{}", "example.com/other": "y",
            },
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "u0", "controller": true, "blockOwnerDeletion": true}],
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {
            "nodeName": "n1", "serviceAccountName": "web", "tolerations": [{"key": "a"}], "volumes": [{"name": "v"}],
            "initContainers": [
                {"name": "setup", "ports": [{"containerPort": 1}]},
                {"name": "sidecar", "restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 99}]},
            ],
            "containers": [
                {"name": "web", "image": "x", "env": [{"name": "A", "value": "secret"}], "livenessProbe": {"httpGet": {"port": 1}},
                 "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP", "hostPort": 3, "hostIP": "192.0.2.1"}]},
                {"name": "quiet", "image": "y"},
            ],
        },
        "status": {
            "phase": "Running", "podIP": "10.1.0.5", "podIPs": [{"ip": "10.1.0.5"}], "hostIP": "192.0.2.1", "qosClass": "Burstable",
            "conditions": [
                {"type": "Initialized", "status": "True"},
                {"type": "Ready", "status": "True", "lastProbeTime": null, "lastTransitionTime": "2026-01-02T03:04:06Z"},
            ],
            "containerStatuses": [{"name": "web", "ready": true, "restartCount": 0}],
        },
    })
}

fn typed(raw: &Raw) -> Pod {
    let (object, faults) = read_object(&raw.key, &raw.value);
    assert_eq!(faults, []);
    let Some(Object::Pod(pod)) = object else { panic!("no pod") };
    (*pod).clone()
}

#[test]
fn a_pod_keeps_what_is_read_and_nothing_else() {
    let raw = raw::<POD>(pod());
    assert_eq!((raw.uid.as_str(), raw.version.as_str()), ("u1", "77"));
    assert_eq!(raw.key.to_string(), "Pod shop/web-1");
    let expected = json!({
        "metadata": {
            "name": "web-1", "namespace": "shop", "uid": "u1", "labels": {"app": "web"},
            "annotations": {"ambient.istio.io/redirection": "enabled"},
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "ownerReferences": [{"kind": "ReplicaSet", "name": "web", "controller": true}],
        },
        "spec": {
            "nodeName": "n1", "serviceAccountName": "web",
            "initContainers": [{"restartPolicy": "Always", "ports": [{"name": "side", "containerPort": 99}]}],
            "containers": [{"ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP", "hostPort": 3, "hostIP": "192.0.2.1"}]}],
        },
        "status": {
            "phase": "Running", "podIP": "10.1.0.5", "podIPs": [{"ip": "10.1.0.5"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    });
    assert_eq!(raw.value, expected);
    let pod = typed(&raw);
    assert_eq!(pod.annotation("ambient.istio.io/redirection"), Some("enabled"));
    assert_eq!(pod.spec.unwrap().containers[0].ports.as_ref().unwrap()[0].name.as_deref(), Some("http"));
}

#[test]
fn heartbeats_and_probes_leave_a_pod_equal() {
    let mut later = pod();
    later["metadata"]["resourceVersion"] = json!("78");
    later["metadata"]["managedFields"][0]["time"] = json!("2026-01-02T03:05:00Z");
    later["status"]["conditions"][1]["lastTransitionTime"] = json!("2026-01-02T03:05:00Z");
    later["status"]["containerStatuses"][0]["restartCount"] = json!(4);
    assert_eq!(raw::<POD>(pod()).value, raw::<POD>(later).value);
    let mut unready = pod();
    unready["status"]["conditions"][1]["status"] = json!("False");
    assert_ne!(raw::<POD>(pod()).value, raw::<POD>(unready).value);
}

#[test]
fn a_policys_unknown_fields_stay_so_that_they_refuse_it() {
    let policy = json!({
        "metadata": {"name": "p", "namespace": "shop", "uid": "u", "resourceVersion": "1", "managedFields": []},
        "spec": {"podSelector": {}, "ingress": [{"from": [{"futureSelector": {"a": "b"}, "podSelector": {}}]}]},
    });
    let raw = raw::<POLICY>(policy);
    let (object, faults) = read_object(&raw.key, &raw.value);
    assert!(object.is_none());
    assert_eq!(faults[0].field, "spec.ingress[0].from[0].futureSelector");
    assert_eq!((faults[0].object.as_str(), &faults[0].file), ("NetworkPolicy shop/p", &None));
}

#[test]
fn services_keep_their_spec_and_the_balancers_addresses() {
    let service = json!({
        "metadata": {"name": "s", "namespace": "shop", "annotations": {"networking.istio.io/traffic-distribution": "PreferClose", "a": "b"}},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80, "nodePort": 30080}], "selector": {"a": "b"}},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}, "conditions": [{"type": "x"}]},
    });
    let raw = raw::<SERVICE>(service);
    let (object, faults) = read_object(&raw.key, &raw.value);
    assert_eq!(faults, []);
    let Some(Object::Service(service)) = object else { panic!("no service") };
    assert_eq!(service.meta().annotations.as_ref().unwrap().len(), 1);
    let status = service.status.as_ref().unwrap();
    assert_eq!(status.load_balancer.as_ref().unwrap().ingress.as_ref().unwrap()[0].ip.as_deref(), Some("192.0.2.9"));
    assert!(status.conditions.is_none());
}

#[test]
fn other_kinds_lose_only_bookkeeping() {
    let gateway = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"name": "g", "namespace": "shop", "resourceVersion": "1", "managedFields": [{}], "generation": 2,
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "strata.io/placement": "node"}},
        "spec": {"gatewayClassName": "istio-waypoint", "listeners": []},
        "status": {"addresses": [{"value": "10.0.0.1"}]},
    });
    let value = raw::<GATEWAY>(gateway).value;
    assert_eq!(
        value["metadata"],
        json!({"name": "g", "namespace": "shop", "generation": 2, "annotations": {"strata.io/placement": "node"}})
    );
    assert_eq!(value["status"]["addresses"][0]["value"], "10.0.0.1");
}

#[test]
fn nothing_makes_decoding_fail() {
    for text in ["null", "[]", "3.5", r#"{"metadata": 7}"#, r#"{"metadata": {"name": 7, "labels": [1]}, "spec": "x"}"#]
    {
        let slim: Slim<POD> = serde_json::from_str(text).unwrap();
        let raw = slim.into_raw(Kind::Pod);
        assert!(read_object(&raw.key, &raw.value).0.is_none(), "{text}");
    }
}
