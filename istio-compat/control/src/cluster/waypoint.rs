//! What a Gateway of class `istio-waypoint` asks for: an account, a Service and a Deployment of our proxy, named and
//! labelled as istiod does it.
use std::collections::BTreeMap;

use compat_kubernetes::{Kept, KeptId, Others, Wanted};
use compat_objects::HasMeta as _;
use compat_objects::gateway::Gateway;
use serde_json::{Map, Value, json};

use super::parameters::{self, Patches};
use super::{MANAGED, WAYPOINT_CLASS};

/// Label of what belongs to a Gateway: its name.
pub(crate) const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
const GATEWAY_CLASS: &str = "gateway.networking.k8s.io/gateway-class-name";
const MANAGED_BY: &str = "istio.io-mesh-controller";
/// Lets one Gateway have another image.
const IMAGE: &str = "sidecar.istio.io/proxyImage";
/// A waypoint inside the node proxies has no pods.
const PLACEMENT: &str = "strata.io/placement";

/// How waypoints run.
#[derive(Debug, Clone)]
pub struct WaypointConfig {
    pub image: String,
    pub pull_policy: String,
    /// Secrets in the waypoint's own namespace.
    pub pull_secrets: Vec<String>,
    /// Control plane and CA, `https://HOST:PORT`.
    pub address: String,
    pub trust_domain: String,
    pub cluster_id: String,
    pub network: String,
}

/// Whether the Gateway is a waypoint.
pub(crate) fn is_served(gateway: &Gateway) -> bool {
    gateway.spec.gateway_class_name == WAYPOINT_CLASS
}

/// Whether the waypoint is annotated to live inside the node proxies.
pub(crate) fn is_placed_on_nodes(gateway: &Gateway) -> bool {
    is_served(gateway) && gateway.annotation(PLACEMENT) == Some("node")
}

/// Whether its Deployment is made here: not if it names a Service of its own, or lives in the node proxies.
pub(super) fn is_ours_to_deploy(gateway: &Gateway) -> bool {
    gateway.spec.addresses.is_empty() && !is_placed_on_nodes(gateway) && gateway.metadata.deletion_timestamp.is_none()
}

/// Everything the Gateway asks for, with what its parameters add. What it owns goes with it.
pub(super) fn objects(gateway: &Gateway, config: &WaypointConfig, parameters: &[Patches]) -> BTreeMap<KeptId, Wanted> {
    let mut kinds = vec![
        (Kept::ServiceAccount, json!({})),
        (Kept::Service, service(gateway)),
        (Kept::Deployment, deployment(gateway, config)),
    ];
    // These only where somebody asks for them.
    let more = [(Kept::HorizontalPodAutoscaler, autoscaler(gateway)), (Kept::PodDisruptionBudget, budget(gateway))];
    kinds.extend(more.into_iter().filter(|(kind, _)| parameters.iter().any(|patches| patches.contains_key(kind))));
    let object = |(kind, mut fields): (Kept, Value)| {
        fields["metadata"] = metadata(gateway);
        for patch in parameters.iter().filter_map(|patches| patches.get(&kind)) {
            parameters::merge(&mut fields, patch);
        }
        let (namespace, name) = (gateway.namespace().to_owned(), gateway.name().to_owned());
        // An account somebody made for the waypoint is as good as ours.
        let others = if kind == Kept::ServiceAccount { Others::Used(MANAGED) } else { Others::InTheWay(MANAGED) };
        (KeptId { kind, namespace, name }, Wanted { fields, others })
    };
    kinds.into_iter().map(object).collect()
}

fn autoscaler(gateway: &Gateway) -> Value {
    let target = json!({"apiVersion": "apps/v1", "kind": "Deployment", "name": gateway.name()});
    json!({"spec": {"scaleTargetRef": target}})
}

fn budget(gateway: &Gateway) -> Value {
    json!({"spec": {"selector": {"matchLabels": {GATEWAY_NAME: gateway.name()}}}})
}

fn metadata(gateway: &Gateway) -> Value {
    let owner = json!({
        "apiVersion": gateway.api_version, "kind": "Gateway",
        "name": gateway.name(), "uid": gateway.metadata.uid,
    });
    json!({"labels": labels(gateway), "annotations": annotations(gateway), "ownerReferences": [owner]})
}

/// Gateway's own and `infrastructure`'s, below those that the waypoint is known by.
fn labels(gateway: &Gateway) -> Map<String, Value> {
    let own = gateway.metadata.labels.iter().flatten();
    let infrastructure = gateway.spec.infrastructure.iter().flat_map(|infrastructure| &infrastructure.labels);
    let mut labels: Map<_, _> =
        own.chain(infrastructure).map(|(key, value)| (key.clone(), value.as_str().into())).collect();
    for (key, value) in [(GATEWAY_NAME, gateway.name()), (GATEWAY_CLASS, WAYPOINT_CLASS), (MANAGED, MANAGED_BY)] {
        labels.insert(key.to_owned(), value.into());
    }
    labels
}

fn annotations(gateway: &Gateway) -> Map<String, Value> {
    let infrastructure = gateway.spec.infrastructure.iter().flat_map(|infrastructure| &infrastructure.annotations);
    infrastructure.map(|(key, value)| (key.clone(), value.as_str().into())).collect()
}

fn service(gateway: &Gateway) -> Value {
    let port = |name: &str, port: u16, protocol: &str| json!({"name": name, "port": port, "protocol": "TCP", "appProtocol": protocol});
    json!({"spec": {
        "type": "ClusterIP",
        "selector": {GATEWAY_NAME: gateway.name()},
        "ports": [port("status-port", 15021, "tcp"), port("mesh", 15008, "all")],
    }})
}

/// Replicas are not named: they are the user's, or an autoscaler's.
fn deployment(gateway: &Gateway, config: &WaypointConfig) -> Value {
    let name = gateway.name();
    let mut labels = labels(gateway);
    for (key, value) in [
        // Its own pod is outside the mesh: what it sends is the mesh.
        ("istio.io/dataplane-mode", "none"),
        ("sidecar.istio.io/inject", "false"),
        ("service.istio.io/canonical-name", name),
        ("service.istio.io/canonical-revision", "latest"),
    ] {
        labels.insert(key.to_owned(), value.into());
    }
    let mut annotations = annotations(gateway);
    for (key, value) in [("scrape", "true"), ("port", "15020"), ("path", "/stats/prometheus")] {
        annotations.insert(format!("prometheus.io/{key}"), value.into());
    }
    let pull_secrets: Vec<Value> = config.pull_secrets.iter().map(|name| json!({"name": name})).collect();
    let pod = json!({
        "serviceAccountName": name,
        // It has no business with the API server; the control plane knows it by the token below.
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 30,
        "imagePullSecrets": pull_secrets,
        "containers": [container(gateway, config)],
        "volumes": [
            {"name": "istio-token", "projected": {"sources": [
                {"serviceAccountToken": {"audience": super::AUDIENCE, "expirationSeconds": 43200, "path": "istio-token"}}]}},
            {"name": "istiod-ca-cert", "configMap": {"name": super::ROOT_CONFIG_MAP}},
            {"name": "istio-podinfo", "downwardAPI": {"items": [
                {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        ],
    });
    json!({"spec": {
        "selector": {"matchLabels": {GATEWAY_NAME: name}},
        "strategy": {"rollingUpdate": {"maxSurge": "100%", "maxUnavailable": 0}},
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
    }})
}

fn container(gateway: &Gateway, config: &WaypointConfig) -> Value {
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let value = |name: &str, value: &str| json!({"name": name, "value": value});
    let mut env = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("INSTANCE_IP", "status.podIP"),
        field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        value("XDS_ADDRESS", &config.address),
        value("CA_ADDRESS", &config.address),
        value("TRUST_DOMAIN", &config.trust_domain),
        value("CLUSTER_ID", &config.cluster_id),
    ];
    if !config.network.is_empty() {
        env.push(value("NETWORK", &config.network));
    }
    json!({
        "name": "istio-proxy",
        "image": gateway.annotation(IMAGE).unwrap_or(&config.image),
        "imagePullPolicy": config.pull_policy,
        "args": ["proxy", "waypoint", "--domain", "$(POD_NAMESPACE).svc.cluster.local", format!("--gateway={}", gateway.name())],
        "env": env,
        "ports": [
            {"name": "metrics", "containerPort": 15020, "protocol": "TCP"},
            {"name": "status-port", "containerPort": 15021, "protocol": "TCP"},
        ],
        "readinessProbe": {
            "httpGet": {"path": "/healthz/ready", "port": 15021},
            "periodSeconds": 2, "timeoutSeconds": 2, "failureThreshold": 4,
        },
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
        "securityContext": {
            "runAsUser": 1337, "runAsGroup": 1337, "runAsNonRoot": true,
            "privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "istio-token", "mountPath": "/var/run/secrets/tokens"},
            {"name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio"},
            {"name": "istio-podinfo", "mountPath": "/etc/istio/pod"},
        ],
    })
}
