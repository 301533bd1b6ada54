//! The status of objects others wrote: what became of them, for `kubectl get` and for whoever wrote them.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use compat_objects::core::ObjectMeta;
use compat_objects::k8s_openapi::jiff::Timestamp;
use compat_objects::{HasMeta as _, ObjectKey};
use futures::StreamExt as _;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use serde_json::{Map, Value, json};
use strata_runtime::task;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::access::ApiServer;
use crate::backoff::{Backoff, at, told};

/// First and longest pause after an error.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// Objects written at a time.
const AT_ONCE: usize = 8;

/// What is said of an object. Conditions are `{type, status, reason, message}`; times and generations are added.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    /// Conditions of the object itself, and other members of its status as they should be. Conditions of other types
    /// stay.
    Conditions { conditions: Vec<Value>, members: Map<String, Value> },
    /// Conditions towards each parent (Gateway API's routes), under our controller's name. Other controllers' stay.
    Parents { controller: &'static str, parents: Vec<(Value, Vec<Value>)> },
}

/// What is said, and of which version of the object.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    pub said: Said,
    /// The object as it was when this was found out.
    pub meta: ObjectMeta,
    /// Its `apiVersion`.
    pub api_version: String,
    /// Its status, as the watch shows it.
    pub present: Option<Value>,
}

type Statuses = Arc<BTreeMap<ObjectKey, Status>>;

/// Keeps statuses as said.
#[derive(Debug)]
pub struct StatusWriter {
    wanted: watch::Sender<Statuses>,
}

impl StatusWriter {
    /// Starts its task, inside a tokio runtime; it ends when the writer is dropped.
    pub fn start(api: &ApiServer) -> StatusWriter {
        let (wanted, wanted_rx) = watch::channel(Statuses::default());
        task::spawn("status-writer", run(api.clone(), wanted_rx));
        StatusWriter { wanted }
    }

    /// Says what should be. What is equal to what is there costs nothing.
    pub fn set(&self, statuses: BTreeMap<ObjectKey, Status>) {
        self.wanted.send_replace(Arc::new(statuses));
    }
}

async fn run(api: ApiServer, mut wanted: watch::Receiver<Statuses>) {
    let mut failed: BTreeMap<ObjectKey, (Instant, Backoff)> = BTreeMap::new();
    loop {
        let statuses = wanted.borrow_and_update().clone();
        failed.retain(|key, _| statuses.contains_key(key));
        let now = Instant::now();
        let due = |key: &ObjectKey| failed.get(key).is_none_or(|(until, _)| *until <= now);
        let differing = statuses.iter().filter(|(key, status)| due(key) && status.differs());
        let differing: Vec<ObjectKey> = differing.map(|(key, _)| key.clone()).collect();
        let writes = differing.into_iter().map(|key| {
            let (api, statuses) = (api.clone(), statuses.clone());
            async move {
                let result = match statuses.get(&key) {
                    Some(status) => write(&api, &key, status).await,
                    None => Ok(()),
                };
                (key, result)
            }
        });
        let results: Vec<_> = futures::stream::iter(writes).buffer_unordered(AT_ONCE).collect().await;
        for (key, result) in results {
            match result {
                Ok(()) => drop(failed.remove(&key)),
                Err(error) => {
                    let entry = failed.entry(key).or_insert_with(|| (now, Backoff::new(PAUSE.0, PAUSE.1)));
                    entry.0 = Instant::now() + entry.1.pause();
                    let object = error.0;
                    tracing::warn!(object, error = error.1, "status not written; it is tried again");
                }
            }
        }
        let next = failed.values().map(|(until, _)| *until).min();
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = at(next) => {}
        }
    }
}

/// Reads the object as it is now, since others write its status too, and writes if anything is missing.
async fn write(api: &ApiServer, key: &ObjectKey, status: &Status) -> Result<(), (String, String)> {
    let shown = |error: kube::Error| (key.to_string(), told(&error));
    let (group, version) = status.api_version.rsplit_once('/').unwrap_or(("", &status.api_version));
    let kind = GroupVersionKind::gvk(group, version, key.kind.name());
    let resource = ApiResource::from_gvk_with_plural(&kind, &key.kind.plural());
    let objects: Api<DynamicObject> = if key.kind.namespaced() {
        Api::namespaced_with(api.client.clone(), &key.namespace, &resource)
    } else {
        Api::all_with(api.client.clone(), &resource)
    };
    let Some(found) = objects.get_opt(&key.name).await.map_err(shown)? else { return Ok(()) };
    // Another object, or another version of it: what is said of that one comes soon.
    if found.metadata.uid != status.meta.uid || found.metadata.generation != status.meta.generation {
        return Ok(());
    }
    let Some(merged) = status.merged(found.data.get("status"), &Timestamp::now().to_string()) else { return Ok(()) };
    let body = json!({"metadata": {"resourceVersion": found.metadata.resource_version}, "status": merged});
    objects.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(body)).await.map(drop).map_err(shown)
}

impl Status {
    fn differs(&self) -> bool {
        self.merged(self.present.as_ref(), "").is_some()
    }

    /// What is to be merged into `present`; None: it says all of that already.
    fn merged(&self, present: Option<&Value>, now: &str) -> Option<Value> {
        let generation = self.meta.generation;
        let empty = Value::Null;
        let present = present.unwrap_or(&empty);
        let next = match &self.said {
            Said::Conditions { conditions, members } => {
                let mut next = members.clone();
                for (name, value) in &mut next {
                    times_of_listeners(value, &present[name], generation, now);
                }
                next.insert("conditions".to_owned(), merge(&present["conditions"], conditions, generation, now));
                next
            }
            Said::Parents { controller, parents } => {
                let there = present["parents"].as_array().cloned().unwrap_or_default();
                let ours = |entry: &Value| entry["controllerName"] == *controller;
                let mut all: Vec<Value> = there.iter().filter(|entry| !ours(entry)).cloned().collect();
                for (parent, conditions) in parents {
                    let before = there.iter().find(|entry| ours(entry) && entry["parentRef"] == *parent);
                    let before = before.map_or(&empty, |entry| &entry["conditions"]);
                    let conditions = merge(before, conditions, generation, now);
                    all.push(json!({"controllerName": controller, "parentRef": parent, "conditions": conditions}));
                }
                Map::from_iter([("parents".to_owned(), Value::Array(all))])
            }
        };
        let same = next.iter().all(|(name, value)| present.get(name) == Some(value));
        (!same).then_some(Value::Object(next))
    }
}

/// Conditions within a member of a status (a Gateway's listeners have some each).
fn times_of_listeners(member: &mut Value, present: &Value, generation: Option<i64>, now: &str) {
    for entry in member.as_array_mut().into_iter().flatten() {
        let Some(conditions) = entry.get("conditions").and_then(Value::as_array).cloned() else { continue };
        let before = present.as_array().into_iter().flatten().find(|before| before["name"] == entry["name"]);
        entry["conditions"] =
            merge(before.map_or(&Value::Null, |before| &before["conditions"]), &conditions, generation, now);
    }
}

/// `said` in place of conditions of the same types. A condition whose status stays keeps its time.
fn merge(present: &Value, said: &[Value], generation: Option<i64>, now: &str) -> Value {
    let mut all = present.as_array().cloned().unwrap_or_default();
    for condition in said {
        let at = all.iter().position(|before| before["type"] == condition["type"]);
        let before = at.map(|at| &all[at]).filter(|before| before["status"] == condition["status"]);
        let time = before.map_or_else(|| now.into(), |before| before["lastTransitionTime"].clone());
        let mut next = condition.clone();
        next["lastTransitionTime"] = time;
        if let Some(generation) = generation {
            next["observedGeneration"] = generation.into();
        }
        match at {
            Some(at) => all[at] = next,
            None => all.push(next),
        }
    }
    Value::Array(all)
}

impl Status {
    /// Of an object of Gateway API's or Istio's.
    pub fn of<S>(object: &compat_objects::Resource<S>, said: Said) -> Status {
        Status {
            said,
            meta: object.meta().clone(),
            api_version: object.api_version.clone(),
            present: object.status.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(said: Said) -> Status {
        let meta = ObjectMeta { generation: Some(2), ..ObjectMeta::default() };
        Status { said, meta, api_version: "v1".to_owned(), present: None }
    }

    #[test]
    fn others_conditions_and_unchanged_times_stay() {
        let accepted = json!({"type": "Accepted", "status": "True", "reason": "Accepted", "message": ""});
        let said = status(Said::Conditions { conditions: vec![accepted.clone()], members: Map::new() });
        let present = json!({"conditions": [
            {"type": "Other", "status": "False", "lastTransitionTime": "a"},
            {"type": "Accepted", "status": "True", "reason": "Old", "lastTransitionTime": "b", "observedGeneration": 1},
        ]});
        let merged = said.merged(Some(&present), "now").unwrap();
        assert_eq!(merged["conditions"][0], present["conditions"][0]);
        assert_eq!(merged["conditions"][1]["lastTransitionTime"], "b");
        assert_eq!(
            (&merged["conditions"][1]["reason"], &merged["conditions"][1]["observedGeneration"]),
            (&json!("Accepted"), &json!(2))
        );
        assert_eq!(said.merged(Some(&merged), "later"), None);
        assert_eq!(said.merged(None, "now").unwrap()["conditions"][0]["lastTransitionTime"], "now");
    }

    #[test]
    fn of_parents_only_ours_are_replaced() {
        let parent = json!({"name": "waypoint"});
        let said = status(Said::Parents {
            controller: "ours",
            parents: vec![(parent.clone(), vec![json!({"type": "Accepted", "status": "True"})])],
        });
        let present = json!({"parents": [
            {"controllerName": "theirs", "parentRef": {"name": "edge"}, "conditions": []},
            {"controllerName": "ours", "parentRef": {"name": "gone"}, "conditions": []},
        ]});
        let merged = said.merged(Some(&present), "now").unwrap();
        let names: Vec<_> =
            merged["parents"].as_array().unwrap().iter().map(|p| p["parentRef"]["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["edge", "waypoint"]);
        assert_eq!(said.merged(Some(&merged), "later"), None);
    }
}
