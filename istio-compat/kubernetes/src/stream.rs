//! One stream: lists, follows, tells. It never gives up.
use std::time::Duration;

use compat_objects::Kind;
use futures::StreamExt as _;
use kube::api::Api;
use kube::runtime::watcher::{self, Event};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::access::ApiServer;
use crate::backoff::{Backoff, at, chain};
use crate::known::Change;
use crate::scope::Stream;
use crate::slim::{Served, Slim};

/// Objects a page of a list.
const PAGE: u32 = 500;
/// First and longest pause after an error.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// So long after its last error a stream that says nothing is well: another error would have come by then (longest
/// pause, connecting, and some).
const WELL_AFTER: Duration = Duration::from_secs(30);
/// How often a kind that is not installed is looked for.
const LOOK_FOR: Duration = Duration::from_secs(15);
/// How long a kind must be missing before its objects are gone: an API server that starts knows its CRDs late.
const GONE_AFTER: Duration = Duration::from_secs(60);

/// Sends with the stream's number.
pub(crate) struct Outlet {
    pub(crate) number: usize,
    pub(crate) changes: mpsc::Sender<(usize, Change)>,
}

/// The source is no longer read.
struct Closed;

impl Outlet {
    async fn send(&self, change: Change) -> Result<(), Closed> {
        self.changes.send((self.number, change)).await.map_err(|_| Closed)
    }
}

/// Runs until the source is dropped.
pub(crate) async fn run(api: ApiServer, stream: Stream, outlet: Outlet) {
    // One copy of the watcher for each set of kept fields; kinds that are kept whole share one.
    const WHOLE: usize = Kind::Gateway as usize;
    let _closed = match stream.kind {
        Kind::Pod => follow::<{ Kind::Pod as usize }>(api, stream, outlet).await,
        Kind::Node => follow::<{ Kind::Node as usize }>(api, stream, outlet).await,
        Kind::Namespace => follow::<{ Kind::Namespace as usize }>(api, stream, outlet).await,
        Kind::ServiceAccount => follow::<{ Kind::ServiceAccount as usize }>(api, stream, outlet).await,
        Kind::Service => follow::<{ Kind::Service as usize }>(api, stream, outlet).await,
        Kind::EndpointSlice => follow::<{ Kind::EndpointSlice as usize }>(api, stream, outlet).await,
        Kind::NetworkPolicy => follow::<{ Kind::NetworkPolicy as usize }>(api, stream, outlet).await,
        _ => follow::<WHOLE>(api, stream, outlet).await,
    };
}

async fn follow<const KIND: usize>(api: ApiServer, stream: Stream, outlet: Outlet) -> Result<(), Closed> {
    let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
    let mut missing: Option<Instant> = None;
    let mut listed = false;
    loop {
        match version(&api, &stream).await {
            Ok(Some(version)) => {
                if missing.take().is_some() {
                    tracing::info!(kind = %stream.kind, version, "the kind is installed now");
                }
                backoff.reset();
                watch::<KIND>(&api, &stream, version, &outlet).await?;
                listed = true;
            }
            Ok(None) => {
                let since = *missing.get_or_insert_with(|| {
                    tracing::info!(kind = %stream.kind, group = stream.kind.group(), "the kind is not installed; it is looked for again");
                    Instant::now()
                });
                if !listed || since.elapsed() >= GONE_AFTER {
                    outlet.send(Change::Missing).await?;
                    outlet.send(Change::Trouble(None)).await?;
                }
                tokio::time::sleep(Backoff::new(LOOK_FOR, LOOK_FOR).pause()).await;
            }
            Err(error) => {
                outlet.send(Change::Trouble(Some(chain(&error)))).await?;
                tokio::time::sleep(backoff.pause()).await;
            }
        }
    }
}

/// The best version of the kind that the server has; None: it has none.
async fn version(api: &ApiServer, stream: &Stream) -> Result<Option<&'static str>, kube::Error> {
    let versions = stream.kind.versions();
    if !stream.optional {
        return Ok(versions.first().copied());
    }
    let plural = stream.kind.plural();
    for version in versions {
        match api.client.list_api_group_resources(&format!("{}/{version}", stream.kind.group())).await {
            Ok(found) if found.resources.iter().any(|resource| resource.name == plural) => return Ok(Some(version)),
            Ok(_) => {}
            // A group nobody knows is answered by a page, not by a Status: only the code says what it is.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Lists and follows until the kind is not there any more.
async fn watch<const KIND: usize>(
    api: &ApiServer,
    stream: &Stream,
    version: &'static str,
    outlet: &Outlet,
) -> Result<(), Closed> {
    let served = Served { kind: stream.kind, version };
    let objects: Api<Slim<KIND>> = match &stream.namespace {
        Some(namespace) => Api::namespaced_with(api.client.clone(), namespace, &served),
        None => Api::all_with(api.client.clone(), &served),
    };
    let mut config = watcher::Config::default().page_size(PAGE);
    config.field_selector = Some(stream.fields.clone()).filter(|fields| !fields.is_empty());
    config.label_selector = Some(stream.labels.clone()).filter(|labels| !labels.is_empty());
    let mut events = std::pin::pin!(watcher::watcher(objects, config));
    let mut health = Health::new();
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = health.well_again() => {
                outlet.send(Change::Trouble(None)).await?;
                continue;
            }
        };
        match event {
            // The stream of kube's watcher has no end.
            None => return Ok(()),
            Some(Ok(event)) => {
                if health.progress(&event) {
                    outlet.send(Change::Trouble(None)).await?;
                }
                outlet.send(change(event, stream.kind)).await?;
            }
            // The server forgot the version that was seen last: kube's watcher lists anew at once.
            Some(Err(watcher::Error::WatchError(status))) if status.code == 410 => {
                tracing::debug!(kind = %stream.kind, "listing anew");
            }
            Some(Err(error)) => {
                if stream.optional && is_missing(&error) {
                    return Ok(());
                }
                tracing::debug!(kind = %stream.kind, error = chain(&error), "API server");
                let (pause, serious) = health.failed();
                if serious {
                    outlet.send(Change::Trouble(Some(chain(&error)))).await?;
                }
                tokio::time::sleep(pause).await;
            }
        }
    }
}

fn change<const KIND: usize>(event: Event<Slim<KIND>>, kind: Kind) -> Change {
    match event {
        Event::Init => Change::Listing,
        Event::InitApply(object) | Event::Apply(object) => Change::Seen(object.into_raw(kind)),
        Event::InitDone => Change::Listed,
        Event::Delete(object) => {
            let raw = object.into_raw(kind);
            Change::Deleted { key: raw.key, uid: raw.uid }
        }
    }
}

fn is_missing(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        _ => false,
    }
}

/// Errors of one watcher: how long to wait, and when they are over.
struct Health {
    backoff: Backoff,
    listed: bool,
    /// Errors since the last progress.
    errors: u32,
    last_error: Option<Instant>,
}

impl Health {
    fn new() -> Health {
        Health { backoff: Backoff::new(PAUSE.0, PAUSE.1), listed: false, errors: 0, last_error: None }
    }

    /// A pause, and whether the error is worth telling: a connection that ends once, as when an API server restarts,
    /// is not.
    fn failed(&mut self) -> (Duration, bool) {
        self.errors += 1;
        self.last_error = Some(Instant::now());
        (self.backoff.pause(), self.errors > 1 || !self.listed)
    }

    /// True if trouble is over. That a list begins is no progress: kube's watcher says so before it asks.
    fn progress<K>(&mut self, event: &Event<K>) -> bool {
        if matches!(event, Event::Init) {
            return false;
        }
        self.listed |= matches!(event, Event::InitDone);
        self.errors = 0;
        self.backoff.reset();
        self.last_error.take().is_some()
    }

    /// Resolves when the last error lies so long ago that it is over; never without one.
    async fn well_again(&mut self) {
        at(self.last_error.map(|last| last + WELL_AFTER)).await;
        self.errors = 0;
        self.last_error = None;
        self.backoff.reset();
    }
}
