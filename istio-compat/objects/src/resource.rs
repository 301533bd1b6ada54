//! The frame every Kubernetes object has.
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;

/// An object of a custom resource: metadata and a typed spec. `apiVersion` and `kind` were checked before.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resource<S> {
    pub api_version: String,
    pub kind: String,
    pub metadata: ObjectMeta,
    pub spec: S,
    /// As read; nobody here interprets it.
    pub status: Option<serde_json::Value>,
}

/// What all typed objects have in common.
pub trait HasMeta {
    fn meta(&self) -> &ObjectMeta;

    /// The object's name; empty only for objects built by hand without one.
    fn name(&self) -> &str {
        self.meta().name.as_deref().unwrap_or_default()
    }

    /// The object's namespace; empty for cluster-scoped objects.
    fn namespace(&self) -> &str {
        self.meta().namespace.as_deref().unwrap_or_default()
    }

    /// When it was created; nothing for what only a file knows. Of objects that contradict each other the oldest counts.
    fn created(&self) -> Option<Timestamp> {
        self.meta().creation_timestamp.as_ref().map(|time| time.0)
    }

    fn label(&self, key: &str) -> Option<&str> {
        self.meta().labels.as_ref()?.get(key).map(String::as_str)
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        self.meta().annotations.as_ref()?.get(key).map(String::as_str)
    }
}

impl<S> HasMeta for Resource<S> {
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
}

macro_rules! native {
    ($($t:ty),* $(,)?) => {$(
        impl HasMeta for $t {
            fn meta(&self) -> &ObjectMeta { &self.metadata }
        }
    )*};
}

native!(
    k8s_openapi::api::core::v1::ConfigMap,
    k8s_openapi::api::core::v1::Namespace,
    k8s_openapi::api::core::v1::Node,
    k8s_openapi::api::core::v1::Pod,
    k8s_openapi::api::core::v1::Secret,
    k8s_openapi::api::core::v1::Service,
    k8s_openapi::api::core::v1::ServiceAccount,
    k8s_openapi::api::discovery::v1::EndpointSlice,
    k8s_openapi::api::networking::v1::NetworkPolicy,
);

/// Whether a pod has run to its end: it has no address any more, whatever its status lists.
pub fn has_ended(pod: &k8s_openapi::api::core::v1::Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// A node's own addresses in the cluster (`InternalIP`), as they are written.
pub fn internal_addresses(node: &k8s_openapi::api::core::v1::Node) -> impl Iterator<Item = &str> {
    let all = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    all.filter(|address| address.type_ == "InternalIP").map(|address| address.address.as_str())
}

/// Whether a pod's condition `Ready` is true.
pub fn is_ready(status: &k8s_openapi::api::core::v1::PodStatus) -> bool {
    status.conditions.iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
