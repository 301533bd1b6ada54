//! Whether one object is still wanted, for a process that ends differently when its own DaemonSet is deleted.
use std::time::Duration;

use compat_objects::k8s_openapi::api::apps::v1::DaemonSet;
use futures::StreamExt as _;
use kube::api::Api;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, Event};
use strata_runtime::task;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::access::ApiServer;
use crate::backoff::Backoff;

/// What is known of the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// It was never there, as far as is known.
    Never,
    Present,
    /// It was there, and is gone or being deleted.
    Deleted,
}

/// Follows one object; a handle costs nothing to ask.
#[derive(Debug)]
pub struct Presence {
    objects: Api<PartialObjectMeta<DaemonSet>>,
    name: String,
    seen: watch::Receiver<Seen>,
    task: AbortHandle,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Presence {
    /// Follows a DaemonSet, inside a tokio runtime, until the handle is dropped.
    pub fn of_daemon_set(api: &ApiServer, namespace: &str, name: &str) -> Presence {
        let objects: Api<PartialObjectMeta<DaemonSet>> = Api::namespaced(api.client.clone(), namespace);
        let (tell, seen) = watch::channel(Seen::Never);
        let task = task::spawn("presence", follow(objects.clone(), name.to_owned(), tell)).abort_handle();
        Presence { objects, name: name.to_owned(), seen, task }
    }

    /// It was seen, and not seen deleted since.
    pub fn is_present(&self) -> bool {
        *self.seen.borrow() == Seen::Present
    }

    /// It was seen, and then it was seen deleted (or being deleted). An object that never was is not.
    pub fn is_deleted(&self) -> bool {
        *self.seen.borrow() == Seen::Deleted
    }

    /// As [`Presence::is_deleted`], but asks the API server if the watch has not told yet. What cannot be found out
    /// `within` that time counts as not deleted.
    pub async fn confirm_deleted(&self, within: Duration) -> bool {
        match *self.seen.borrow() {
            Seen::Deleted => return true,
            Seen::Never => return false,
            Seen::Present => {}
        }
        let mut seen = self.seen.clone();
        let told = async { seen.wait_for(|seen| *seen == Seen::Deleted).await.is_ok() };
        let asked = async {
            match self.objects.get_opt(&self.name).await {
                Ok(found) => found.is_none_or(|object| object.metadata.deletion_timestamp.is_some()),
                Err(error) => {
                    tracing::warn!(daemon_set = self.name, %error, "it cannot be asked for");
                    // The permission to ask may be gone with the object: the watch may still tell.
                    std::future::pending().await
                }
            }
        };
        let either = async {
            tokio::select! {
                told = told => told,
                asked = asked => asked,
            }
        };
        tokio::time::timeout(within, either).await.unwrap_or(false)
    }
}

async fn follow(objects: Api<PartialObjectMeta<DaemonSet>>, name: String, tell: watch::Sender<Seen>) {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut events = std::pin::pin!(watcher::watcher(objects, config));
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(15));
    let mut listed = false;
    while let Some(event) = events.next().await {
        let object = match event {
            Ok(Event::Init) => {
                listed = false;
                continue;
            }
            Ok(Event::InitApply(object) | Event::Apply(object)) => {
                listed = true;
                Some(object)
            }
            Ok(Event::InitDone) if listed => continue,
            Ok(Event::InitDone | Event::Delete(_)) => None,
            Err(error) => {
                tracing::debug!(daemon_set = name, %error, "API server");
                tokio::time::sleep(backoff.pause()).await;
                continue;
            }
        };
        backoff.reset();
        let present = object.is_some_and(|object| object.metadata.deletion_timestamp.is_none());
        tell.send_if_modified(|seen| {
            let now = match (present, *seen) {
                (true, _) => Seen::Present,
                (false, Seen::Never) => Seen::Never,
                (false, _) => Seen::Deleted,
            };
            std::mem::replace(seen, now) != now
        });
    }
}
