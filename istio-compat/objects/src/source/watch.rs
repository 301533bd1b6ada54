//! Follows changes of the folders.
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::watch;

use super::{DirectorySource, Snapshot};

/// A burst of changes is read at the latest after this time, debounced or not.
const LONGEST_BURST: Duration = Duration::from_millis(200);
/// How often to look for a source path that does not exist (yet), or was replaced.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Notifications that wait to be read; they only say "look again", so that a full queue loses nothing.
const QUEUE: usize = 64;

/// Why a source cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("the kernel gives no file notifications (inotify): {0}")]
    Notify(#[from] notify::Error),
    #[error("no thread can be started to follow the source: {0}")]
    Thread(#[from] std::io::Error),
}

/// The watches of all source paths, renewed when a path is replaced.
struct Watches {
    watcher: RecommendedWatcher,
    /// Each with the device and inode that is watched, if it exists.
    paths: Vec<(PathBuf, Option<(u64, u64)>)>,
}

impl Watches {
    /// Watches what is there and not watched. Tells whether anything was added, and so needs reading.
    fn renew(&mut self) -> bool {
        let mut added = false;
        for (path, watched) in &mut self.paths {
            let now = fs::metadata(&*path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
            if now == *watched {
                continue;
            }
            if watched.is_some() {
                // The old folder is gone, and its watch with it: an error here says just that.
                let _ = self.watcher.unwatch(path);
            }
            *watched = None;
            added = true;
            if now.is_some() {
                match self.watcher.watch(path, RecursiveMode::Recursive) {
                    Ok(()) => *watched = now,
                    Err(error) => tracing::warn!(path = %path.display(), %error, "cannot watch; will try again"),
                }
            }
        }
        added
    }
}

pub(super) fn spawn(mut source: DirectorySource) -> Result<watch::Receiver<Arc<Snapshot>>, SourceError> {
    let (wake, woken) = sync_channel::<()>(QUEUE);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reads make access events; everything else, errors too, means: look again.
        if !matches!(&event, Ok(event) if event.kind.is_access()) {
            let _ = wake.try_send(());
        }
    })?;
    let paths = source.files.sources().iter().map(|path| (path.clone(), None)).collect();
    let mut watches = Watches { watcher, paths };
    // Watch before reading: a change in between is then seen at least once.
    watches.renew();
    let (publish, snapshots) = watch::channel(source.load());
    std::thread::Builder::new()
        .name("objects-source".to_owned())
        .spawn(move || follow(&mut source, &mut watches, &woken, &publish))?;
    Ok(snapshots)
}

fn follow(
    source: &mut DirectorySource,
    watches: &mut Watches,
    woken: &Receiver<()>,
    publish: &watch::Sender<Arc<Snapshot>>,
) {
    while !publish.is_closed() {
        let changed = match woken.recv_timeout(LOOK_AGAIN) {
            Ok(()) => {
                settle(woken);
                true
            }
            Err(RecvTimeoutError::Timeout) => false,
            // The watcher lives in `watches`, so its sender does too.
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if watches.renew() || changed {
            let snapshot = source.load();
            publish.send_if_modified(|current| {
                let news = !Arc::ptr_eq(current, &snapshot);
                *current = snapshot;
                news
            });
        }
    }
}

/// Waits until the notifications fall silent, but not for ever.
fn settle(woken: &Receiver<()>) {
    let latest = Instant::now() + LONGEST_BURST;
    while Instant::now() < latest && woken.recv_timeout(DirectorySource::DEBOUNCE).is_ok() {}
}
