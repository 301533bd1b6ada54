//! Which fields of an object are kept: the rest is dropped while its JSON is read, so that it never takes memory and
//! its changes are no changes.
//!
//! What is listed here is what `l4-policy`, `l4-lb`, `l4-agent`, `compat-translate` and `compat-control` read, and
//! what `compat_objects::validate` looks at. NetworkPolicies keep their whole spec: a field nobody knows must refuse
//! them.
use std::fmt;

use compat_objects::Kind;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// What of a value is kept. Lists are looked through: what is said is said of their items.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Keep {
    All,
    /// These members only, each as said.
    Only(&'static [(&'static str, Keep)]),
    /// Members whose names begin with one of these.
    Prefixed(&'static [&'static str]),
}

use Keep::{All, Only, Prefixed};

/// Annotations that mean something here; `config.mirror` and `config.hash` tell a static pod by its other uid.
const ANNOTATIONS: Keep = Prefixed(&[
    "ambient.istio.io/",
    "istio.io/",
    "networking.istio.io/",
    "strata.io/",
    "kubernetes.io/config.mirror",
    "kubernetes.io/config.hash",
]);

const METADATA: Keep = Only(&[
    ("name", All),
    ("namespace", All),
    ("uid", All),
    ("resourceVersion", All),
    ("labels", All),
    ("annotations", ANNOTATIONS),
    ("creationTimestamp", All),
    ("deletionTimestamp", All),
    ("ownerReferences", Only(&[("kind", All), ("name", All), ("controller", All)])),
]);

const PORTS: Keep =
    Only(&[("name", All), ("containerPort", All), ("protocol", All), ("hostPort", All), ("hostIP", All)]);
const CONTAINERS: Keep = Only(&[("restartPolicy", All), ("ports", PORTS)]);

const POD: Keep = Only(&[
    ("metadata", METADATA),
    (
        "spec",
        Only(&[
            ("nodeName", All),
            ("hostNetwork", All),
            ("serviceAccountName", All),
            ("containers", CONTAINERS),
            ("initContainers", CONTAINERS),
        ]),
    ),
    (
        "status",
        Only(&[
            ("phase", All),
            ("podIP", All),
            ("podIPs", All),
            ("conditions", Only(&[("type", All), ("status", All)])),
        ]),
    ),
]);

const NODE: Keep = Only(&[
    ("metadata", METADATA),
    ("spec", Only(&[("podCIDR", All), ("podCIDRs", All)])),
    ("status", Only(&[("addresses", All)])),
]);

const NAMESPACE: Keep = Only(&[("metadata", METADATA)]);
const SERVICE_ACCOUNT: Keep = NAMESPACE;

const SERVICE: Keep = Only(&[("metadata", METADATA), ("spec", All), ("status", Only(&[("loadBalancer", All)]))]);

const ENDPOINTS: Keep = Only(&[
    ("addresses", All),
    ("conditions", All),
    ("hints", All),
    ("nodeName", All),
    ("zone", All),
    ("targetRef", Only(&[("kind", All), ("namespace", All), ("name", All)])),
]);

const ENDPOINT_SLICE: Keep =
    Only(&[("metadata", METADATA), ("addressType", All), ("ports", All), ("endpoints", ENDPOINTS)]);

const NETWORK_POLICY: Keep = Only(&[("metadata", METADATA), ("spec", All)]);

/// Whole, but for what only the API server's own bookkeeping needs. Removed from `metadata` by [`finish`].
const WHOLE: Keep = All;

/// What of `metadata` only the API server and kubectl need.
const BOOKKEEPING: [&str; 2] = ["managedFields", "selfLink"];
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// What is kept of a kind.
pub(crate) fn keep(kind: Kind) -> Keep {
    match kind {
        Kind::Pod => POD,
        Kind::Node => NODE,
        Kind::Namespace => NAMESPACE,
        Kind::ServiceAccount => SERVICE_ACCOUNT,
        Kind::Service => SERVICE,
        Kind::EndpointSlice => ENDPOINT_SLICE,
        Kind::NetworkPolicy => NETWORK_POLICY,
        _ => WHOLE,
    }
}

/// What a list of names cannot say: drops by value. Done once per object, after it was read.
pub(crate) fn finish(kind: Kind, value: &mut Value) {
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        BOOKKEEPING.iter().for_each(|name| drop(metadata.remove(*name)));
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove(LAST_APPLIED);
            if annotations.is_empty() {
                metadata.remove("annotations");
            }
        }
    }
    if kind != Kind::Pod {
        return;
    }
    let field = |container: &Value, name: &str, value: &str| container.get(name).and_then(Value::as_str) == Some(value);
    let has_ports = |container: &Value| container.get("ports").and_then(Value::as_array).is_some_and(|p| !p.is_empty());
    if let Some(conditions) = value.pointer_mut("/status/conditions").and_then(Value::as_array_mut) {
        conditions.retain(|condition| field(condition, "type", "Ready"));
    }
    if let Some(containers) = value.pointer_mut("/spec/containers").and_then(Value::as_array_mut) {
        containers.retain(has_ports);
    }
    if let Some(containers) = value.pointer_mut("/spec/initContainers").and_then(Value::as_array_mut) {
        // Those that keep running are sidecars; the others are gone before anybody connects.
        containers.retain(|container| has_ports(container) && field(container, "restartPolicy", "Always"));
        if containers.is_empty()
            && let Some(spec) = value.get_mut("spec").and_then(Value::as_object_mut)
        {
            spec.remove("initContainers");
        }
    }
}

impl Keep {
    /// What is kept of a member; None: nothing.
    fn member(self, name: &str) -> Option<Keep> {
        match self {
            All => Some(All),
            Only(members) => members.iter().find(|(member, _)| *member == name).map(|(_, keep)| *keep),
            Prefixed(prefixes) => prefixes.iter().any(|prefix| name.starts_with(prefix)).then_some(All),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Keep {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Keep {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut kept = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            kept.push(item);
        }
        Ok(Value::Array(kept))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut kept = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            match self.member(&name) {
                Some(keep) => drop(kept.insert(name, members.next_value_seed(keep)?)),
                None => drop(members.next_value::<IgnoredAny>()?),
            }
        }
        Ok(Value::Object(kept))
    }
}

#[cfg(test)]
mod tests;
