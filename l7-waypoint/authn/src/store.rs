//! Key sets fetched over the network: kept fresh in the background, served stale when the issuer is down.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use crate::keys::KeySet;

/// Where a key set comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RemoteSource {
    /// `http` or `https` URI.
    pub uri: String,
    /// Cluster whose endpoints and TLS settings to use.
    pub cluster: String,
    /// Of one fetch.
    pub timeout: Duration,
    /// Age at which a set is fetched again.
    pub refresh: Duration,
}

/// Fetches the document; the error is text for the log.
pub trait Fetch: Send + Sync + 'static {
    /// The body of a 200 answer.
    fn fetch(&self, source: &RemoteSource) -> BoxFuture<'static, Result<Bytes, String>>;
}

/// Bounds of the wait after a failed fetch.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// At most one fetch in this time because of unknown key ids: anyone can send those.
const ASKED_EVERY: Duration = Duration::from_secs(10);

/// All remote key sets of a process.
#[derive(Default)]
pub struct JwksStore {
    slots: Mutex<HashMap<RemoteSource, Weak<Slot>>>,
    fetcher: Option<(Arc<dyn Fetch>, tokio::runtime::Handle)>,
}

/// One remote key set.
#[derive(Debug)]
pub(crate) struct Slot {
    keys: ArcSwapOption<KeySet>,
    asked: Notify,
}

impl JwksStore {
    /// A store that fetches with `fetcher` on `runtime`, which must outlive the workers (the control runtime).
    /// Without a fetcher (`Default`) remote key sets stay missing and their tokens are refused.
    pub fn new(fetcher: Arc<dyn Fetch>, runtime: tokio::runtime::Handle) -> Self {
        Self { slots: Mutex::default(), fetcher: Some((fetcher, runtime)) }
    }

    /// The slot of `source`. Its task ends when the last configuration that uses it is gone.
    pub(crate) fn slot(&self, source: RemoteSource) -> Arc<Slot> {
        let mut slots = self.slots.lock();
        slots.retain(|_, slot| slot.strong_count() > 0);
        if let Some(slot) = slots.get(&source).and_then(Weak::upgrade) {
            return slot;
        }
        let slot = Arc::new(Slot { keys: ArcSwapOption::empty(), asked: Notify::new() });
        slots.insert(source.clone(), Arc::downgrade(&slot));
        match &self.fetcher {
            Some((fetcher, runtime)) => {
                runtime.spawn(keep_fresh(Arc::downgrade(&slot), source, fetcher.clone()));
            }
            None => tracing::error!(uri = source.uri, "no fetcher for remote JWKS: its tokens are refused"),
        }
        slot
    }
}

impl Slot {
    pub(crate) fn current(&self) -> Option<Arc<KeySet>> {
        self.keys.load_full()
    }

    /// A token named a key that is not in the set: maybe the issuer rotated.
    pub(crate) fn ask_refresh(&self) {
        self.asked.notify_one();
    }
}

async fn keep_fresh(slot: Weak<Slot>, source: RemoteSource, fetcher: Arc<dyn Fetch>) {
    let mut wait = RETRY_FIRST;
    loop {
        let fetched = timeout(source.timeout.max(Duration::from_millis(1)), fetcher.fetch(&source)).await;
        let parsed = match fetched {
            Ok(Ok(body)) => KeySet::parse(&body).map_err(|error| error.to_string()),
            Ok(Err(reason)) => Err(reason),
            Err(_) => Err(format!("no answer within {:?}", source.timeout)),
        };
        let Some(alive) = slot.upgrade() else { return };
        let pause = match parsed {
            Ok(keys) => {
                tracing::info!(uri = source.uri, ?keys, skipped = ?keys.skipped(), "JWKS fetched");
                alive.keys.store(Some(Arc::new(keys)));
                wait = RETRY_FIRST;
                source.refresh.max(ASKED_EVERY)
            }
            Err(reason) => {
                let stale = alive.keys.load().is_some();
                tracing::warn!(uri = source.uri, reason, stale, "JWKS fetch failed");
                let pause = wait;
                wait = (wait * 2).min(RETRY_MAX);
                pause
            }
        };
        drop(alive);
        if !pause_for(&slot, pause).await {
            return;
        }
    }
}

/// Waits `pause`, shorter when a refresh is asked for; false when nobody uses the slot any more.
async fn pause_for(slot: &Weak<Slot>, pause: Duration) -> bool {
    let until = Instant::now() + pause;
    let earliest = Instant::now() + ASKED_EVERY.min(pause);
    while Instant::now() < until {
        let Some(alive) = slot.upgrade() else { return false };
        // Looking up once in ten seconds lets the task end soon after its configuration does.
        let tick = ASKED_EVERY.min(until - Instant::now());
        tokio::select! {
            () = alive.asked.notified() => {
                tokio::time::sleep_until(earliest).await;
                return true;
            }
            () = sleep(tick) => {}
        }
    }
    slot.strong_count() > 0
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    struct Flaky(Arc<AtomicUsize>);

    impl Fetch for Flaky {
        fn fetch(&self, _: &RemoteSource) -> BoxFuture<'static, Result<Bytes, String>> {
            let call = self.0.fetch_add(1, SeqCst);
            let good = Bytes::from_static(include_bytes!("../../../integration/testdata/istiod/keys/jwks.json"));
            Box::pin(async move { if call == 1 { Ok(good) } else { Err("down".into()) } })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn retries_then_serves_stale_and_ends_with_its_last_user() {
        let calls = Arc::new(AtomicUsize::new(0));
        let store = JwksStore::new(Arc::new(Flaky(calls.clone())), tokio::runtime::Handle::current());
        let second = Duration::from_secs(1);
        let source = RemoteSource { uri: "u".into(), cluster: "c".into(), timeout: second, refresh: second * 600 };
        let slot = store.slot(source.clone());
        assert!(Arc::ptr_eq(&slot, &store.slot(source)), "one slot for one source");
        sleep(second / 2).await;
        assert!(slot.current().is_none());
        sleep(second).await;
        let keys = slot.current().expect("fetched by the retry");
        sleep(second * 700).await;
        assert!(calls.load(SeqCst) > 2, "refreshed");
        assert_eq!(slot.current().unwrap().generation, keys.generation, "stale keys stay");
        drop(slot);
        sleep(second * 120).await;
        let ended_at = calls.load(SeqCst);
        sleep(second * 1200).await;
        assert_eq!(calls.load(SeqCst), ended_at);
    }

    #[tokio::test(start_paused = true)]
    async fn unknown_keys_cause_few_fetches() {
        let calls = Arc::new(AtomicUsize::new(1));
        let store = JwksStore::new(Arc::new(Flaky(calls.clone())), tokio::runtime::Handle::current());
        let second = Duration::from_secs(1);
        let source = RemoteSource { uri: "u".into(), cluster: "c".into(), timeout: second, refresh: second * 600 };
        let slot = store.slot(source);
        sleep(second).await;
        for _ in 0..100 {
            slot.ask_refresh();
            sleep(second / 10).await;
        }
        assert!(calls.load(SeqCst) <= 4, "{}", calls.load(SeqCst));
    }
}
