//! The one thing Strata writes to pods: the annotation that says capture is in force.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use compat_objects::HasMeta as _;
use compat_objects::core::Pod;
use compat_objects::source::Snapshot;
use futures::StreamExt as _;
use kube::api::{Api, Patch, PatchParams};
use strata_runtime::task;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::access::ApiServer;
use crate::backoff::{Backoff, at, chain};

/// `enabled` exactly while capture is in force; istiod and strata-control read it.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
const ENABLED: &str = "enabled";

/// First and longest pause after an error.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// How long the watch may take to show what was written, before it is written again.
const SHOWN_AFTER: Duration = Duration::from_secs(5);
/// Patches under way at a time.
const AT_ONCE: usize = 8;

/// One pod, not merely its name: a successor of the same name is another one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodId {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// What every pod should be annotated with: true is captured. Pods that are not named are left alone.
#[derive(Debug, Clone, Default)]
struct Wanted {
    /// How often it was said anew.
    number: u64,
    pods: Arc<BTreeMap<PodId, bool>>,
}

/// Keeps the annotation of pods as it should be, compared with what the watch shows.
#[derive(Debug)]
pub struct PodWriter {
    wanted: watch::Sender<Wanted>,
    /// Number of what was said, and how many pods of it are not written yet.
    pending: watch::Receiver<(u64, usize)>,
}

impl PodWriter {
    /// Starts its task, inside a tokio runtime; it ends when the writer is dropped.
    pub fn start(api: &ApiServer, snapshots: watch::Receiver<Arc<Snapshot>>) -> PodWriter {
        let (wanted, wanted_rx) = watch::channel(Wanted::default());
        let (pending_tx, pending) = watch::channel((0, 0));
        let work = Work { api: api.clone(), snapshots, attempts: BTreeMap::new() };
        task::spawn("pod-writer", work.run(wanted_rx, pending_tx));
        PodWriter { wanted, pending }
    }

    /// Says what should be. What is equal costs nothing.
    pub fn set(&self, pods: BTreeMap<PodId, bool>) {
        self.wanted.send_if_modified(|current| {
            let changed = *current.pods != pods;
            if changed {
                *current = Wanted { number: current.number + 1, pods: Arc::new(pods) };
            }
            changed
        });
    }

    /// Waits until everything that was said is written. False if that took longer than `within`.
    pub async fn settled(&self, within: Duration) -> bool {
        let mut pending = self.pending.clone();
        let said = self.wanted.borrow().number;
        let done = pending.wait_for(|(number, pods)| *number == said && *pods == 0);
        matches!(tokio::time::timeout(within, done).await, Ok(Ok(_)))
    }
}

/// What became of the last patch of a pod.
struct Attempt {
    written: bool,
    /// Not again before.
    until: Instant,
    backoff: Backoff,
}

struct Work {
    api: ApiServer,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    attempts: BTreeMap<PodId, Attempt>,
}

impl Work {
    async fn run(mut self, mut wanted: watch::Receiver<Wanted>, pending: watch::Sender<(u64, usize)>) {
        loop {
            let now_wanted = wanted.borrow_and_update().clone();
            let differing = self.differing(&now_wanted.pods);
            self.patch(differing).await;
            let unwritten = self.attempts.values().filter(|attempt| !attempt.written).count();
            pending.send_if_modified(|current| std::mem::replace(current, (now_wanted.number, unwritten)) != *current);
            let next = self.attempts.values().map(|attempt| attempt.until).min();
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return },
                changed = self.snapshots.changed() => if changed.is_err() { return },
                () = at(next) => {}
            }
        }
    }

    /// Pods whose annotation is not what it should be and that may be tried now. Forgets all others.
    fn differing(&mut self, wanted: &BTreeMap<PodId, bool>) -> Vec<(PodId, bool)> {
        let snapshot = self.snapshots.borrow_and_update().clone();
        let differs = |(id, captured): &(&PodId, &bool)| {
            // A pod that is gone, or not shown yet, cannot be written.
            let pod = snapshot.objects.pod(&id.namespace, &id.name);
            let pod = pod.filter(|pod| pod.metadata.uid.as_deref() == Some(&id.uid));
            pod.is_some_and(|pod| pod.annotation(REDIRECTION) != captured.then_some(ENABLED))
        };
        let all: BTreeMap<&PodId, bool> = wanted.iter().filter(differs).map(|(id, captured)| (id, *captured)).collect();
        self.attempts.retain(|id, _| all.contains_key(id));
        let now = Instant::now();
        let due = all.into_iter().filter(|(id, _)| self.attempts.get(*id).is_none_or(|attempt| attempt.until <= now));
        due.map(|(id, captured)| (id.clone(), captured)).collect()
    }

    async fn patch(&mut self, pods: Vec<(PodId, bool)>) {
        let api = &self.api;
        let patches = pods.into_iter().map(|(id, captured)| async move {
            let result = patch(api, &id, captured).await;
            (id, captured, result)
        });
        let results: Vec<_> = futures::stream::iter(patches).buffer_unordered(AT_ONCE).collect().await;
        for (id, captured, result) in results {
            let attempt = self.attempts.entry(id.clone()).or_insert_with(|| Attempt {
                written: false,
                until: Instant::now(),
                backoff: Backoff::new(PAUSE.0, PAUSE.1),
            });
            let (namespace, pod) = (&id.namespace, &id.name);
            attempt.written = true;
            attempt.until = Instant::now() + SHOWN_AFTER;
            match result {
                Ok(()) => tracing::debug!(namespace, pod, captured, "annotation written"),
                // Gone, or another pod by now: the watch will say so.
                Err(kube::Error::Api(status)) if is_another_pod(&status) => {
                    tracing::debug!(namespace, pod, reason = status.message, "the pod is gone");
                }
                Err(error) => {
                    attempt.written = false;
                    attempt.until = Instant::now() + attempt.backoff.pause();
                    let error = chain(&error);
                    tracing::warn!(namespace, pod, captured, error, "annotation not written; it is tried again");
                }
            }
        }
    }
}

/// Whether the patch was refused because the pod is gone, or the name is another pod's by now.
fn is_another_pod(status: &kube::core::Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    matches!(status.code, 404 | 409) || causes.into_iter().any(|cause| cause.field == "metadata.uid")
}

/// The uid is part of the patch: the API server refuses to change it, so that a successor of the name is not touched.
async fn patch(api: &ApiServer, id: &PodId, captured: bool) -> Result<(), kube::Error> {
    let pods: Api<Pod> = Api::namespaced(api.client.clone(), &id.namespace);
    let value = captured.then_some(ENABLED);
    let body = serde_json::json!({"metadata": {"uid": id.uid, "annotations": {REDIRECTION: value}}});
    pods.patch_metadata(&id.name, &PatchParams::default(), &Patch::Merge(body)).await.map(drop)
}
