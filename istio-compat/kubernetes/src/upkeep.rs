//! Objects of others' kinds that Strata wants to be as it says: made, and put right again when somebody changes or
//! deletes them (server-side apply, so that fields Strata says nothing of are their owners').
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use compat_objects::core::{ConfigMap, Service, ServiceAccount};
use compat_objects::k8s_openapi::api::apps::v1::Deployment;
use compat_objects::k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use compat_objects::k8s_openapi::api::policy::v1::PodDisruptionBudget;
use futures::StreamExt as _;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event};
use serde_json::Value;
use strata_runtime::task;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::access::ApiServer;
use crate::backoff::{Backoff, at, chain, told};

/// First and longest pause after an error.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// Objects written at a time.
const AT_ONCE: usize = 8;
/// Changes seen that may wait to be looked at.
const QUEUE: usize = 1024;

/// A kind of object that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kept {
    ConfigMap,
    ServiceAccount,
    Service,
    Deployment,
    HorizontalPodAutoscaler,
    PodDisruptionBudget,
    GatewayClass,
}

impl Kept {
    fn resource(self) -> ApiResource {
        match self {
            Kept::ConfigMap => ApiResource::erase::<ConfigMap>(&()),
            Kept::ServiceAccount => ApiResource::erase::<ServiceAccount>(&()),
            Kept::Service => ApiResource::erase::<Service>(&()),
            Kept::Deployment => ApiResource::erase::<Deployment>(&()),
            Kept::HorizontalPodAutoscaler => ApiResource::erase::<HorizontalPodAutoscaler>(&()),
            Kept::PodDisruptionBudget => ApiResource::erase::<PodDisruptionBudget>(&()),
            Kept::GatewayClass => {
                let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "GatewayClass");
                ApiResource::from_gvk_with_plural(&kind, "gatewayclasses")
            }
        }
    }
}

/// Which object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeptId {
    pub kind: Kept,
    /// Empty for what lives in no namespace.
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for KeptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{:?} {}", self.kind, self.name),
            namespace => write!(f, "{:?} {namespace}/{}", self.kind, self.name),
        }
    }
}

/// What an object should be.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// Its fields; `apiVersion`, `kind` and the name are added.
    pub fields: Value,
    pub others: Others,
}

/// What to do about an object of the name that somebody else made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// The name is ours: it becomes what it should be.
    Overwritten,
    /// Without this label it is theirs, and does as it is.
    Used(&'static str),
    /// Without this label it is theirs, and in the way.
    InTheWay(&'static str),
}

/// Which objects are watched, to see what becomes of those that are kept.
#[derive(Debug, Clone)]
pub struct Looked {
    pub kind: Kept,
    /// As in `fieldSelector` and `labelSelector`; empty: all.
    pub fields: String,
    pub labels: String,
}

type Objects = Arc<BTreeMap<KeptId, Wanted>>;
/// What does not succeed, and why.
pub type Troubles = Arc<BTreeMap<KeptId, String>>;

/// Keeps objects; see the module.
#[derive(Debug)]
pub struct Upkeep {
    wanted: watch::Sender<Objects>,
    troubles: watch::Receiver<Troubles>,
}

impl Upkeep {
    /// Starts its tasks, inside a tokio runtime; they end when it is dropped. `manager` is the field manager.
    pub fn start(api: &ApiServer, manager: &'static str, looked: Vec<Looked>) -> Upkeep {
        let (wanted, wanted_rx) = watch::channel(Objects::default());
        let (told, troubles) = watch::channel(Troubles::default());
        let (seen_tx, seen) = mpsc::channel(QUEUE);
        for looked in looked {
            task::spawn("upkeep-watch", look(api.clone(), looked, seen_tx.clone()));
        }
        let work = Work { api: api.clone(), manager, states: BTreeMap::new(), told, _seen: seen_tx };
        task::spawn("upkeep", work.run(wanted_rx, seen));
        Upkeep { wanted, troubles }
    }

    /// Says what should be. What is no longer named is left as it is: owner references tell who deletes it.
    pub fn set(&self, objects: BTreeMap<KeptId, Wanted>) {
        self.wanted.send_if_modified(|current| {
            let changed = **current != objects;
            if changed {
                *current = Arc::new(objects);
            }
            changed
        });
    }

    /// What does not succeed.
    pub fn troubles(&self) -> watch::Receiver<Troubles> {
        self.troubles.clone()
    }
}

/// Of one object.
struct State {
    /// As it was last written, and the version the API server gave that; none before.
    written: Option<(Wanted, String)>,
    /// To be written, not before this time.
    due: Option<Instant>,
    backoff: Backoff,
    trouble: Option<String>,
}

struct Work {
    api: ApiServer,
    manager: &'static str,
    states: BTreeMap<KeptId, State>,
    told: watch::Sender<Troubles>,
    /// Keeps the channel open without any watch.
    _seen: mpsc::Sender<Seen>,
}

/// An object as a watch shows it; no version: it is gone.
type Seen = (KeptId, Option<String>);

impl Work {
    async fn run(mut self, mut wanted: watch::Receiver<Objects>, mut seen: mpsc::Receiver<Seen>) {
        loop {
            let objects = wanted.borrow_and_update().clone();
            self.compare(&objects);
            self.write(&objects).await;
            self.tell();
            let next = self.states.values().filter_map(|state| state.due).min();
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return },
                Some(change) = seen.recv() => {
                    self.see(change);
                    while let Ok(change) = seen.try_recv() {
                        self.see(change);
                    }
                }
                () = at(next) => {}
            }
        }
    }

    /// What is new or said anew is due.
    fn compare(&mut self, objects: &Objects) {
        self.states.retain(|id, _| objects.contains_key(id));
        let now = Instant::now();
        for (id, object) in &**objects {
            let state = self.states.entry(id.clone()).or_insert_with(|| State {
                written: None,
                due: Some(now),
                backoff: Backoff::new(PAUSE.0, PAUSE.1),
                trouble: None,
            });
            if state.written.as_ref().is_some_and(|(written, _)| written != object) {
                state.due = state.due.or(Some(now));
            }
        }
    }

    /// A version that is not the one we made is somebody else's work.
    fn see(&mut self, (id, version): Seen) {
        let Some(state) = self.states.get_mut(&id) else { return };
        let ours = state.written.as_ref().map(|(_, version)| version);
        if ours.is_some() && ours != version.as_ref() {
            state.due = state.due.or(Some(Instant::now()));
        }
    }

    async fn write(&mut self, objects: &Objects) {
        let now = Instant::now();
        let due = self.states.iter().filter(|(_, state)| state.due.is_some_and(|due| due <= now));
        let due: Vec<_> = due.filter_map(|(id, _)| Some((id.clone(), objects.get(id)?.clone()))).collect();
        let (api, manager) = (&self.api, self.manager);
        let writes = due.into_iter().map(|(id, object)| async move {
            let result = apply(api, manager, &id, &object).await;
            (id, object, result)
        });
        let results: Vec<_> = futures::stream::iter(writes).buffer_unordered(AT_ONCE).collect().await;
        for (id, object, result) in results {
            let Some(state) = self.states.get_mut(&id) else { continue };
            match result {
                Ok(version) => {
                    tracing::debug!(object = %id, "written");
                    state.backoff.reset();
                    (state.written, state.due, state.trouble) = (Some((object, version)), None, None);
                }
                Err(error) => {
                    if state.trouble.as_ref() != Some(&error) {
                        tracing::warn!(object = %id, error, "not written; it is tried again");
                    }
                    state.due = Some(Instant::now() + state.backoff.pause());
                    state.trouble = Some(error);
                }
            }
        }
    }

    fn tell(&self) {
        let troubles = self.states.iter().filter_map(|(id, state)| Some((id.clone(), state.trouble.clone()?)));
        let troubles: BTreeMap<KeptId, String> = troubles.collect();
        self.told.send_if_modified(|told| {
            let changed = **told != troubles;
            if changed {
                *told = Arc::new(troubles);
            }
            changed
        });
    }
}

/// Writes one object; returns its version.
async fn apply(api: &ApiServer, manager: &str, id: &KeptId, object: &Wanted) -> Result<String, String> {
    let resource = id.kind.resource();
    let objects: Api<DynamicObject> = match id.namespace.as_str() {
        "" => Api::all_with(api.client.clone(), &resource),
        namespace => Api::namespaced_with(api.client.clone(), namespace, &resource),
    };
    let shown = |error: kube::Error| told(&error);
    if let Others::Used(label) | Others::InTheWay(label) = object.others {
        let found = objects.get_metadata_opt(&id.name).await.map_err(shown)?;
        let theirs =
            found.filter(|found| found.metadata.labels.as_ref().is_none_or(|labels| !labels.contains_key(label)));
        match (theirs, object.others) {
            (None, _) => {}
            (Some(found), Others::Used(_)) => return Ok(found.metadata.resource_version.unwrap_or_default()),
            (Some(_), _) => {
                return Err(format!(
                    "an object of this name is there that is somebody else's: it has no label {label}"
                ));
            }
        }
    }
    let mut fields = object.fields.clone();
    fields["apiVersion"] = resource.api_version.clone().into();
    fields["kind"] = resource.kind.clone().into();
    fields["metadata"]["name"] = id.name.clone().into();
    let params = PatchParams::apply(manager).force();
    let written = objects.patch(&id.name, &params, &Patch::Apply(&fields)).await.map_err(shown)?;
    Ok(written.metadata.resource_version.unwrap_or_default())
}

async fn look(api: ApiServer, looked: Looked, seen: mpsc::Sender<Seen>) {
    let resource = looked.kind.resource();
    let objects: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(api.client.clone(), &resource);
    let config = watcher::Config {
        field_selector: Some(looked.fields).filter(|fields| !fields.is_empty()),
        label_selector: Some(looked.labels).filter(|labels| !labels.is_empty()),
        ..watcher::Config::default()
    };
    let mut events = std::pin::pin!(watcher::watcher(objects, config));
    let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
    let (mut known, mut listed) = (BTreeSet::new(), BTreeSet::new());
    while let Some(event) = events.next().await {
        let changes: Vec<Seen> = match event {
            Ok(Event::Init) => {
                listed.clear();
                Vec::new()
            }
            Ok(Event::InitApply(object)) => {
                let seen = seen_of(looked.kind, &object);
                listed.insert(seen.0.clone());
                vec![seen]
            }
            // What went while nobody watched.
            Ok(Event::InitDone) => {
                backoff.reset();
                let gone = std::mem::replace(&mut known, std::mem::take(&mut listed));
                gone.into_iter().filter(|id| !known.contains(id)).map(|id| (id, None)).collect()
            }
            Ok(Event::Apply(object)) => {
                let seen = seen_of(looked.kind, &object);
                known.insert(seen.0.clone());
                vec![seen]
            }
            Ok(Event::Delete(object)) => {
                let (id, _) = seen_of(looked.kind, &object);
                known.remove(&id);
                vec![(id, None)]
            }
            Err(error) => {
                tracing::debug!(kind = ?looked.kind, error = chain(&error), "API server");
                tokio::time::sleep(backoff.pause()).await;
                Vec::new()
            }
        };
        for change in changes {
            if seen.send(change).await.is_err() {
                return;
            }
        }
    }
}

fn seen_of(kind: Kept, object: &PartialObjectMeta<DynamicObject>) -> Seen {
    let meta = &object.metadata;
    let (namespace, name) = (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default());
    (KeptId { kind, namespace, name }, Some(meta.resource_version.clone().unwrap_or_default()))
}
