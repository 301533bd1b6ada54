//! All streams of a scope as one watch channel of snapshots.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use compat_objects::source::{DirectorySource, Snapshot};
use strata_runtime::task;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::access::ApiServer;
use crate::known::{Change, Known};
use crate::scope::Scope;
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
    counters: Arc<Counters>,
}

impl KubernetesSource {
    /// A source over `scope`. Nothing is asked yet.
    pub fn new(api: ApiServer, scope: Scope) -> KubernetesSource {
        KubernetesSource { api, scope, counters: Arc::default() }
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
        let mut streams = JoinSet::new();
        for (number, stream) in self.scope.streams.into_iter().enumerate() {
            let changes = if stream.urgent { urgent.clone() } else { rest.clone() };
            streams.spawn(stream::run(self.api.clone(), stream, Outlet { number, changes }));
        }
        // A queue without a stream stays open, or it would look closed at once.
        let open = (urgent, rest);
        let counters = self.counters;
        task::spawn("kubernetes-source", async move {
            let mut intake = Intake { known, urgent: urgent_queue, rest: rest_queue, counters };
            intake.run(&publish).await;
            // Ends the streams with it.
            drop((streams, open));
        });
        snapshots
    }
}

/// The one reader of all streams.
struct Intake {
    known: Known,
    urgent: mpsc::Receiver<(usize, Change)>,
    rest: mpsc::Receiver<(usize, Change)>,
    counters: Arc<Counters>,
}

impl Intake {
    async fn run(&mut self, publish: &watch::Sender<Arc<Snapshot>>) {
        loop {
            let next = tokio::select! {
                biased;
                () = publish.closed() => return,
                next = self.next() => next,
            };
            let urgent = next.urgent;
            self.take(next);
            if !self.known.is_dirty() {
                continue;
            }
            self.settle(urgent).await;
            let snapshot = self.known.snapshot();
            let published = publish.send_if_modified(|current| {
                // While lists are under way only the reasons to wait are news.
                let news = snapshot.synced || snapshot.faults != current.faults;
                if news {
                    *current = snapshot;
                }
                news
            });
            self.counters.snapshots.fetch_add(published.into(), Ordering::Relaxed);
        }
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
