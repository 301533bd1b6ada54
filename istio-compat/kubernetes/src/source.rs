//! All streams of a scope as one watch channel of snapshots.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use compat_objects::ObjectKey;
use compat_objects::source::{DirectorySource, Snapshot};
use strata_runtime::task;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use crate::access::ApiServer;
use crate::known::{Change, Known};
use crate::scope::{Scope, Stream};
use crate::stream::{self, Outlet};

/// Changes that wait to be taken in; streams wait when it is full.
const QUEUE: usize = 1024;
/// A burst of changes is published at the latest after this time.
const LONGEST_BURST: Duration = Duration::from_millis(200);

/// What a source did so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Lists that were completed, all streams.
    pub lists: AtomicU64,
    /// Objects received, in lists and afterwards.
    pub objects: AtomicU64,
    /// Objects received that said nothing new.
    pub unchanged: AtomicU64,
    /// Snapshots published.
    pub snapshots: AtomicU64,
}

/// Objects of the API server; see the crate.
#[derive(Debug)]
pub struct KubernetesSource {
    api: ApiServer,
    scope: Scope,
    named: Named,
    counters: Arc<Counters>,
}

/// Objects that are read one by one, by name, besides those of the scope: what is there of them is in the snapshots, and
/// nothing waits for them.
#[derive(Debug, Clone, Default)]
pub struct Named(watch::Sender<BTreeSet<ObjectKey>>);

impl Named {
    /// Reads these from now on, and no others.
    pub fn set(&self, keys: &BTreeSet<ObjectKey>) {
        self.0.send_if_modified(|held| {
            let news = held != keys;
            if news {
                held.clone_from(keys);
            }
            news
        });
    }
}

impl KubernetesSource {
    /// A source over `scope`. Nothing is asked yet.
    pub fn new(api: ApiServer, scope: Scope) -> KubernetesSource {
        KubernetesSource { api, scope, named: Named::default(), counters: Arc::default() }
    }

    /// What to name single objects by.
    pub fn named(&self) -> Named {
        self.named.clone()
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Follows the API server, inside a tokio runtime, until every receiver is dropped. The channel begins with a
    /// snapshot that is not `synced`; as long as one is not, its faults say what is waited for and why.
    pub fn watch(self) -> watch::Receiver<Arc<Snapshot>> {
        let mut known = Known::new(&self.scope.streams);
        let (publish, snapshots) = watch::channel(known.snapshot());
        let (urgent, urgent_queue) = mpsc::channel(QUEUE);
        let (rest, rest_queue) = mpsc::channel(QUEUE);
        let mut streams = Streams { api: self.api, tasks: JoinSet::new(), urgent, rest, named: BTreeMap::new() };
        for (number, stream) in self.scope.streams.into_iter().enumerate() {
            streams.start(number, stream);
        }
        let (named, counters) = (self.named.0.subscribe(), self.counters);
        // Or the channel would be closed where nobody ever names an object.
        let open = self.named;
        task::spawn("kubernetes-source", async move {
            let mut intake = Intake { known, streams, urgent: urgent_queue, rest: rest_queue, counters };
            intake.run(&publish, named).await;
            drop(open);
        });
        snapshots
    }
}

/// The streams that run, until this is dropped.
struct Streams {
    api: ApiServer,
    tasks: JoinSet<()>,
    urgent: mpsc::Sender<(usize, Change)>,
    rest: mpsc::Sender<(usize, Change)>,
    /// Numbers of those that show one object.
    named: BTreeMap<ObjectKey, (usize, AbortHandle)>,
}

impl Streams {
    fn start(&mut self, number: usize, stream: Stream) -> AbortHandle {
        let changes = if stream.urgent { self.urgent.clone() } else { self.rest.clone() };
        self.tasks.spawn(stream::run(self.api.clone(), stream, Outlet { number, changes }))
    }
}

/// The one reader of all streams.
struct Intake {
    known: Known,
    streams: Streams,
    urgent: mpsc::Receiver<(usize, Change)>,
    rest: mpsc::Receiver<(usize, Change)>,
    counters: Arc<Counters>,
}

impl Intake {
    async fn run(&mut self, publish: &watch::Sender<Arc<Snapshot>>, mut named: watch::Receiver<BTreeSet<ObjectKey>>) {
        loop {
            tokio::select! {
                biased;
                () = publish.closed() => return,
                Ok(()) = named.changed() => {
                    let wanted = named.borrow_and_update().clone();
                    self.name(wanted);
                }
                next = self.next() => {
                    let urgent = next.urgent;
                    self.take(next);
                    if self.known.is_dirty() {
                        self.settle(urgent).await;
                    }
                }
            }
            if !self.known.is_dirty() {
                continue;
            }
            let snapshot = self.known.snapshot();
            publish.send_if_modified(|current| {
                // While lists are under way only the reasons to wait are news.
                let news = snapshot.synced || snapshot.faults != current.faults;
                if news {
                    // Who sees the snapshot sees it counted.
                    self.counters.snapshots.fetch_add(1, Ordering::Relaxed);
                    *current = snapshot;
                }
                news
            });
        }
    }

    /// Follows the objects named now.
    fn name(&mut self, wanted: BTreeSet<ObjectKey>) {
        let unnamed: Vec<ObjectKey> = self.streams.named.keys().filter(|key| !wanted.contains(*key)).cloned().collect();
        for key in unnamed {
            if let Some((number, task)) = self.streams.named.remove(&key) {
                task.abort();
                self.known.remove(number);
            }
        }
        for key in wanted {
            if !self.streams.named.contains_key(&key) {
                let number = self.known.add(&key);
                let task = self.streams.start(number, Stream::of(&key));
                self.streams.named.insert(key, (number, task));
            }
        }
        // What has ended was aborted here.
        while self.streams.tasks.try_join_next().is_some() {}
    }

    /// Takes in what comes until it falls silent, but not for ever; an urgent change shortens the wait.
    async fn settle(&mut self, urgent: bool) {
        let quiet = DirectorySource::DEBOUNCE;
        let mut latest = Instant::now() + if urgent { quiet } else { LONGEST_BURST };
        let mut silent = Instant::now() + quiet;
        while Instant::now() < latest {
            let next = tokio::time::timeout_at(silent.min(latest), self.next()).await;
            let Ok(next) = next else { return };
            let now = Instant::now();
            let urgent = next.urgent;
            // What says nothing new prolongs nothing.
            if self.take(next) {
                silent = now + quiet;
                if urgent {
                    latest = latest.min(now + quiet);
                }
            }
        }
    }

    async fn next(&mut self) -> Next {
        let (urgent, found) = tokio::select! {
            biased;
            found = self.urgent.recv() => (true, found),
            found = self.rest.recv() => (false, found),
        };
        match found {
            Some((stream, change)) => Next { stream, change, urgent },
            // The senders live as long as this.
            None => std::future::pending().await,
        }
    }

    /// True if it may have changed something.
    fn take(&mut self, next: Next) -> bool {
        let is_object = matches!(next.change, Change::Seen(_));
        let is_list = matches!(next.change, Change::Listed);
        let unchanged = self.known.take(next.stream, next.change);
        self.counters.objects.fetch_add(is_object.into(), Ordering::Relaxed);
        self.counters.lists.fetch_add(is_list.into(), Ordering::Relaxed);
        self.counters.unchanged.fetch_add(unchanged.into(), Ordering::Relaxed);
        !unchanged
    }
}

struct Next {
    stream: usize,
    change: Change,
    urgent: bool,
}
