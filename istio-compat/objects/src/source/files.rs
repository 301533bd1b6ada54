//! The files of all folders, each with its last good documents.
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::fault::{Fault, Location};
use crate::read::{self, Document};

/// A file: the number of its source path, and its own path.
type FileKey = (usize, PathBuf);

/// What tells that a file was not touched. `None`: read again in any case.
type Stamp = Option<(u64, u64, i64, i64, u64)>;

/// File timestamps advance with the kernel's tick: a file this young may change again under the same stamp.
const TOO_YOUNG: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
struct File {
    stamp: Stamp,
    documents: Vec<Arc<Document>>,
    faults: Vec<Fault>,
}

#[derive(Debug)]
pub(super) struct Files {
    sources: Vec<PathBuf>,
    files: BTreeMap<FileKey, File>,
    /// Folders that could not be listed.
    unreadable: Vec<Fault>,
}

impl Files {
    pub(super) fn new(sources: Vec<PathBuf>) -> Files {
        Files { sources, files: BTreeMap::new(), unreadable: Vec::new() }
    }

    pub(super) fn sources(&self) -> &[PathBuf] {
        &self.sources
    }

    /// Every document with the number of its source, in the order of overlaying.
    pub(super) fn documents(&self) -> impl Iterator<Item = (usize, &Arc<Document>)> {
        self.files.iter().flat_map(|((source, _), file)| file.documents.iter().map(move |d| (*source, d)))
    }

    pub(super) fn faults(&self) -> Vec<Fault> {
        self.unreadable.iter().chain(self.files.values().flat_map(|file| &file.faults)).cloned().collect()
    }

    /// Takes in what changed on disk.
    pub(super) fn refresh(&mut self) {
        self.unreadable.clear();
        let mut found = BTreeMap::new();
        for (number, source) in self.sources.iter().enumerate() {
            list(
                source,
                true,
                &mut |path, stamp| {
                    found.insert((number, path), stamp);
                },
                &mut self.unreadable,
            );
        }
        // A folder that cannot be listed just now has not lost its files.
        let hidden: Vec<PathBuf> = self.unreadable.iter().filter_map(|fault| fault.file.clone()).collect();
        self.files.retain(|key, _| found.contains_key(key) || hidden.iter().any(|dir| key.1.starts_with(dir)));
        for (key, stamp) in found {
            let file = self.files.entry(key.clone()).or_default();
            if stamp.is_none() || file.stamp != stamp {
                file.read(&key.1, stamp);
            }
        }
    }
}

impl File {
    fn read(&mut self, path: &Path, stamp: Stamp) {
        let shared: Arc<Path> = path.into();
        self.stamp = stamp;
        let parsed = fs::read_to_string(path).map_err(|error| (0, error.to_string()));
        let parsed = parsed.and_then(|text| read::parse(&text, &shared).map_err(|error| (error.line, error.reason)));
        match parsed {
            Ok((documents, faults)) => {
                // Unchanged documents keep their identity, so that their objects are not typed again.
                let before: BTreeMap<_, _> = self.documents.iter().map(|old| (&old.key, old)).collect();
                let documents = documents.into_iter().map(|new| match before.get(&new.key) {
                    Some(old) if **old == new => (*old).clone(),
                    _ => new,
                });
                self.documents = documents.collect();
                self.faults = faults;
            }
            Err((line, reason)) => {
                let kept = match self.documents.len() {
                    0 => "nothing of this file is in force".to_owned(),
                    n => format!("the last good version of this file ({n} objects) stays in force"),
                };
                let at = Location { file: shared, line };
                self.faults = vec![Fault::error("", "", format!("{reason}; {kept}")).at(&at)];
            }
        }
    }
}

fn stamp_of(metadata: &fs::Metadata) -> Stamp {
    let age = metadata.modified().ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
    age.is_some_and(|age| age > TOO_YOUNG).then(|| {
        let nanos = |seconds: i64, rest: i64| seconds.wrapping_mul(1_000_000_000).wrapping_add(rest);
        (
            metadata.dev(),
            metadata.ino(),
            nanos(metadata.mtime(), metadata.mtime_nsec()),
            nanos(metadata.ctime(), metadata.ctime_nsec()),
            metadata.len(),
        )
    })
}

/// Calls `found` for every object file at or below `path`.
fn list(path: &Path, root: bool, found: &mut dyn FnMut(PathBuf, Stamp), unreadable: &mut Vec<Fault>) {
    let mut refuse = |error: &io::Error| {
        let at = Location { file: path.into(), line: 0 };
        unreadable.push(Fault::error("", "", format!("cannot be read: {error}")).at(&at));
    };
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        // Gone between listing and looking, or a source that does not exist yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return refuse(&error),
    };
    if metadata.is_file() {
        if root || is_object_file(path) {
            found(path.to_path_buf(), stamp_of(&metadata));
        }
        return;
    }
    if !metadata.is_dir() {
        return;
    }
    match fs::read_dir(path).and_then(|entries| entries.collect::<io::Result<Vec<_>>>()) {
        Ok(entries) => {
            for entry in entries.iter().filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b".")) {
                // A symlink to a folder could lead in circles; one to a file is how ConfigMaps are mounted.
                let link_to_dir = entry.file_type().is_ok_and(|t| t.is_symlink()) && entry.path().is_dir();
                if !link_to_dir {
                    list(&entry.path(), false, found, unreadable);
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => refuse(&error),
    }
}

fn is_object_file(path: &Path) -> bool {
    path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known))
}
