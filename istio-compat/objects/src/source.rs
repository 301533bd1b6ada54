//! Where objects come from: folders of YAML, later ones overlaying earlier ones. (The API server is another crate's
//! source of the same snapshots.)
//!
//! A folder is read recursively, files in the order of their paths; hidden files and folders are left out.
//! Documents of the same kind, namespace and name in later folders are merged deeply into earlier ones (maps
//! member by member, lists and scalars replaced) before they are typed. What was good stays in force: a file
//! that no longer parses keeps its last good documents, an object that is no longer valid its last good version.
//!
//! A change costs one directory listing with a `stat` per file, and parsing of the changed files only; objects
//! whose merged text did not change keep their identity ([`crate::Object::same`]).
mod files;
mod merge;
mod watch;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::fault::{Fault, Severity};
use crate::object::{ObjectKey, ObjectSet};

pub use watch::SourceError;

/// All objects and all mistakes of one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Raised by every change of objects or faults; the first read has 1.
    pub generation: u64,
    /// Everything was read at least once. Until then no object means nothing: it may be there and not be known.
    pub synced: bool,
    pub objects: ObjectSet,
    /// In the order of files, then objects.
    pub faults: Vec<Fault>,
    /// Where single objects are read by name: those of which it is known whether they are there.
    pub looked_up: BTreeSet<ObjectKey>,
}

impl Snapshot {
    /// The faults that keep something out of force.
    pub fn errors(&self) -> impl Iterator<Item = &Fault> {
        self.faults.iter().filter(|fault| fault.severity == Severity::Error)
    }
}

/// Which version of an object is in force: the new one, or the last good one if the new one is refused (`None`). Its
/// errors then say so.
pub fn in_force<T>(new: Option<T>, last_good: Option<T>, faults: &mut [Fault]) -> Option<T> {
    if new.is_some() {
        return new;
    }
    let kept = if last_good.is_some() { "the last good version stays in force" } else { "it is not in force" };
    for fault in faults.iter_mut().filter(|fault| fault.severity == Severity::Error) {
        fault.reason.push_str("; ");
        fault.reason.push_str(kept);
    }
    last_good
}

/// Reads folders (or single files) of YAML and JSON, once or continuously.
#[derive(Debug)]
pub struct DirectorySource {
    files: files::Files,
    objects: merge::Objects,
    snapshot: Arc<Snapshot>,
}

impl DirectorySource {
    /// How long to wait for silence after a change, so that a batch of writes is read once.
    pub const DEBOUNCE: Duration = Duration::from_millis(15);

    /// A source over `paths`, earliest first. Nothing is read yet; a path that does not exist counts as empty.
    pub fn new(paths: Vec<PathBuf>) -> DirectorySource {
        DirectorySource {
            files: files::Files::new(paths),
            objects: merge::Objects::default(),
            snapshot: Arc::default(),
        }
    }

    /// Reads what changed since the last call. The result is the same `Arc` if nothing did.
    pub fn load(&mut self) -> Arc<Snapshot> {
        self.files.refresh();
        let changed = self.objects.update(&self.files);
        let mut faults = self.files.faults();
        faults.extend(self.objects.faults());
        if changed || self.snapshot.generation == 0 || faults != self.snapshot.faults {
            let generation = self.snapshot.generation + 1;
            self.snapshot = Arc::new(Snapshot {
                generation,
                synced: true,
                objects: self.objects.set(),
                faults,
                looked_up: BTreeSet::new(),
            });
        }
        self.snapshot.clone()
    }

    /// Reads everything once, then follows changes on a thread of its own until every receiver is dropped.
    ///
    /// # Errors
    /// The kernel refuses file notifications, or no thread can be started.
    pub fn watch(self) -> Result<tokio::sync::watch::Receiver<Arc<Snapshot>>, SourceError> {
        watch::spawn(self)
    }
}

#[cfg(test)]
mod tests;
