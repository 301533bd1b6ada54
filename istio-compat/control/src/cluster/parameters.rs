//! What ConfigMaps add to the objects of a waypoint, as istiod takes them: the one of defaults for its class, and above that the
//! one it names (`infrastructure.parametersRef`). Under the name of an object stands a strategic merge patch for it.
use std::collections::BTreeMap;

use compat_kubernetes::Kept;
use compat_objects::core::ConfigMap;
use compat_objects::gateway::{Gateway, ObjectReference};
use compat_objects::{HasMeta as _, Kind, ObjectKey, ObjectSet};
use serde_json::Value;

/// Keys of the ConfigMap, with the objects they are for. The last two are made only if they are there.
const KEYS: [(&str, Kept); 5] = [
    ("serviceAccount", Kept::ServiceAccount),
    ("service", Kept::Service),
    ("deployment", Kept::Deployment),
    ("horizontalPodAutoscaler", Kept::HorizontalPodAutoscaler),
    ("podDisruptionBudget", Kept::PodDisruptionBudget),
];
/// On a ConfigMap in the control plane's namespace: the class whose waypoints it is for (Istio).
pub(super) const DEFAULTS_FOR_CLASS: &str = "gateway.istio.io/defaults-for-class";
/// Lists whose items are merged, by the member that tells them apart (Kubernetes' `patchMergeKey`); others are replaced.
const MERGED: [(&str, &[&str]); 9] = [
    ("containers", &["name"]),
    ("initContainers", &["name"]),
    ("volumes", &["name"]),
    ("env", &["name"]),
    ("imagePullSecrets", &["name"]),
    ("volumeMounts", &["mountPath"]),
    ("topologySpreadConstraints", &["topologyKey"]),
    ("hostAliases", &["ip"]),
    ("ports", &["containerPort", "port"]),
];

/// What a waypoint may consist of.
pub(super) fn kinds() -> [Kept; KEYS.len()] {
    KEYS.map(|(_, kind)| kind)
}

/// What is added, the general before the specific.
pub(crate) type Parameters = Vec<Patches>;
/// Of one ConfigMap, by object.
pub(crate) type Patches = BTreeMap<Kept, Value>;

/// The ConfigMap a Gateway names.
pub(crate) fn reference(gateway: &Gateway) -> Option<ObjectKey> {
    let reference = given(gateway)?;
    Some(ObjectKey::new(Kind::ConfigMap, gateway.namespace(), reference.name.as_str()))
}

fn given(gateway: &Gateway) -> Option<&ObjectReference> {
    gateway.spec.infrastructure.as_ref()?.parameters_ref.as_ref()
}

/// What is in both. `system` is the control plane's namespace.
///
/// # Errors
/// Why it cannot be used. Then the objects are to stay as they are.
pub(crate) fn read(gateway: &Gateway, objects: &ObjectSet, system: &str) -> Result<Parameters, String> {
    let maps = [defaults(gateway, objects, system), named(gateway, objects)?];
    maps.into_iter().flatten().map(patches).collect()
}

/// The oldest of those for the Gateway's class.
fn defaults<'o>(gateway: &Gateway, objects: &'o ObjectSet, system: &'o str) -> Option<&'o ConfigMap> {
    let class = Some(gateway.spec.gateway_class_name.as_str());
    let found = objects.config_maps_in(system).filter(|map| map.label(DEFAULTS_FOR_CLASS) == class);
    found.map(|map| &**map).min_by_key(|map| (map.created(), map.name()))
}

fn named<'o>(gateway: &Gateway, objects: &'o ObjectSet) -> Result<Option<&'o ConfigMap>, String> {
    let (Some(reference), Some(key)) = (given(gateway), reference(gateway)) else { return Ok(None) };
    let (group, kind) = (reference.group.as_deref().unwrap_or_default(), reference.kind.as_deref().unwrap_or_default());
    if (group, kind) != ("", "ConfigMap") {
        return Err(format!("parametersRef: {group}/{kind} is no ConfigMap"));
    }
    let map = objects.config_map(&key.namespace, &key.name);
    map.map(|map| Some(&**map)).ok_or_else(|| format!("parametersRef: {key} is not known"))
}

fn patches(map: &ConfigMap) -> Result<Patches, String> {
    let key = ObjectKey::new(Kind::ConfigMap, map.namespace(), map.name());
    let mut found = Patches::new();
    for (name, text) in map.data.iter().flatten() {
        let place = KEYS.iter().find(|(known, _)| known == name);
        let (_, kept) = place.ok_or_else(|| format!("{key}: {name} is no object of a waypoint"))?;
        let patch: Value = serde_saphyr::from_str(text).map_err(|error| format!("{key}: {name}: {error}"))?;
        if !patch.is_object() {
            return Err(format!("{key}: {name}: is no object"));
        }
        found.insert(*kept, patch);
    }
    Ok(found)
}

/// Puts a patch over an object: members are merged, `null` takes away, lists are merged or replaced as Kubernetes does.
pub(super) fn merge(into: &mut Value, patch: &Value) {
    let (Value::Object(into), Value::Object(patch)) = (&mut *into, patch) else {
        into.clone_from(patch);
        return;
    };
    for (name, patch) in patch {
        let keys = MERGED.iter().find(|(list, _)| list == name).map(|(_, keys)| *keys);
        match (into.get_mut(name), patch, keys) {
            (_, Value::Null, _) => drop(into.remove(name)),
            (Some(Value::Array(items)), Value::Array(patches), Some(keys)) => merge_items(items, patches, keys),
            (Some(present), patch, _) => merge(present, patch),
            (None, patch, _) => drop(into.insert(name.clone(), patch.clone())),
        }
    }
}

fn merge_items(items: &mut Vec<Value>, patches: &[Value], keys: &[&str]) {
    for patch in patches {
        let key = keys.iter().find(|key| patch.get(**key).is_some());
        let same = |item: &Value| key.is_some_and(|key| item.get(*key) == patch.get(*key));
        let taken_away = patch.get("$patch").is_some_and(|directive| directive == "delete");
        match items.iter().position(same) {
            Some(place) if taken_away => drop(items.remove(place)),
            Some(place) => merge(&mut items[place], patch),
            None if taken_away => {}
            None => items.push(patch.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patches_are_merged_as_kubernetes_does() {
        let mut object = json!({"spec": {"strategy": {"rollingUpdate": {"maxSurge": "100%"}}, "template": {"spec": {
            "containers": [{"name": "istio-proxy", "image": "a", "args": ["x", "y"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                "ports": [{"name": "metrics", "containerPort": 15020}]}],
            "tolerations": [{"key": "old"}],
        }}}});
        merge(
            &mut object,
            &json!({"spec": {"replicas": 2, "strategy": null, "template": {"spec": {
                "containers": [
                    {"name": "istio-proxy", "image": "b", "args": ["z"],
                     "env": [{"name": "B", "$patch": "delete"}, {"name": "C", "value": "3"}],
                     "ports": [{"containerPort": 15020, "name": "m"}], "resources": {"limits": {"cpu": "1"}}},
                    {"name": "other"},
                ],
                "tolerations": [{"key": "new"}],
            }}}}),
        );
        let pod = json!({
            "containers": [
                {"name": "istio-proxy", "image": "b", "args": ["z"],
                 "env": [{"name": "A", "value": "1"}, {"name": "C", "value": "3"}],
                 "ports": [{"name": "m", "containerPort": 15020}], "resources": {"limits": {"cpu": "1"}}},
                {"name": "other"},
            ],
            "tolerations": [{"key": "new"}],
        });
        assert_eq!(object, json!({"spec": {"replicas": 2, "template": {"spec": pod}}}));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let read = |reference: &str, data: &str| {
            let text = format!(
                "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: w, namespace: shop}}
spec:
  gatewayClassName: istio-waypoint
  infrastructure: {{parametersRef: {reference}}}
  listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: p, namespace: shop}}
data: {data}
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: d, namespace: system, labels: {{gateway.istio.io/defaults-for-class: istio-waypoint}}}}
data: {{deployment: 'spec: {{replicas: 3}}'}}
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: e, namespace: system, labels: {{gateway.istio.io/defaults-for-class: other}}}}
data: {{service: 'spec: {{}}'}}
"
            );
            std::fs::write(folder.path().join("all.yaml"), text).unwrap();
            let mut source = compat_objects::source::DirectorySource::new(vec![folder.path().to_owned()]);
            let objects = source.load().objects.clone();
            super::read(objects.gateway("shop", "w").unwrap(), &objects, "system")
        };
        let named = "{group: '', kind: ConfigMap, name: p}";
        let found = read(named, "{deployment: 'spec: {replicas: 2}', podDisruptionBudget: 'spec: {minAvailable: 1}'}");
        let [defaults, own] = found.unwrap().try_into().unwrap();
        assert_eq!(defaults, BTreeMap::from([(Kept::Deployment, json!({"spec": {"replicas": 3}}))]));
        assert_eq!(own.into_keys().collect::<Vec<_>>(), [Kept::Deployment, Kept::PodDisruptionBudget]);
        for (reference, data, expected) in [
            ("{group: '', kind: ConfigMap, name: gone}", "{}", "ConfigMap shop/gone is not known"),
            ("{group: x, kind: Thing, name: p}", "{}", "x/Thing is no ConfigMap"),
            (named, "{deploymnet: 'spec: {}'}", "deploymnet is no object of a waypoint"),
            (named, "{service: 'spec: ['}", "ConfigMap shop/p: service: "),
            (named, "{service: 'no'}", "ConfigMap shop/p: service: is no object"),
        ] {
            let error = read(reference, data).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
