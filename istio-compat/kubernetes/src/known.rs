//! What the streams have shown: raw objects in, one set of typed objects and faults out. Pure.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use compat_objects::k8s_openapi::jiff::Timestamp;
use compat_objects::source::{Snapshot, in_force};
use compat_objects::{Fault, HasMeta as _, Kind, Object, ObjectKey, ObjectSet, read_object};

use crate::scope::Stream;
use crate::slim::Raw;

/// What happened in a stream.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// A list begins; until [`Change::Listed`] every object of it comes as [`Change::Seen`].
    Listing,
    Seen(Raw),
    /// The list is complete: what was not seen is gone.
    Listed,
    Deleted {
        key: ObjectKey,
        uid: String,
    },
    /// The API server does not know the kind, and has not for so long that its objects are gone.
    Missing,
    /// Why the stream does not advance, or that it does again.
    Trouble(Option<String>),
}

/// One object as a stream shows it.
#[derive(Debug)]
struct Item {
    uid: Box<str>,
    version: Box<str>,
    /// The last good version; None: there is none.
    object: Option<Object>,
}

#[derive(Debug)]
struct State {
    kind: Kind,
    /// The one object that is shown; `None`: it is a stream of the scope, and nothing is known before it is.
    named: Option<ObjectKey>,
    items: BTreeMap<ObjectKey, Item>,
    faults: BTreeMap<ObjectKey, Vec<Fault>>,
    /// Seen since the list began; None: no list is under way.
    seen: Option<BTreeSet<ObjectKey>>,
    /// It was listed once, or its kind is missing and may be.
    known: bool,
    trouble: Option<String>,
}

/// Everything known of a scope.
#[derive(Debug)]
pub(crate) struct Known {
    /// By number.
    streams: BTreeMap<usize, State>,
    next: usize,
    set: ObjectSet,
    dirty: bool,
    generation: u64,
}

impl Known {
    /// Knows nothing yet. The streams of the scope have numbers from 0 on.
    pub(crate) fn new(streams: &[Stream]) -> Known {
        let (streams, next) = (streams.iter().map(State::of_scope).enumerate().collect(), streams.len());
        Known { streams, next, set: ObjectSet::default(), dirty: true, generation: 0 }
    }

    /// One object more, which nobody waits for. Returns its stream's number.
    pub(crate) fn add(&mut self, key: &ObjectKey) -> usize {
        let number = self.next;
        self.next += 1;
        self.streams.insert(number, State::new(key.kind, Some(key.clone())));
        number
    }

    /// What only this stream showed is gone; changes of it that are still under way say nothing.
    pub(crate) fn remove(&mut self, stream: usize) {
        let Some(state) = self.streams.remove(&stream) else { return };
        self.dirty |= !state.faults.is_empty() || state.trouble.is_some();
        state.items.keys().for_each(|key| self.settle(key));
    }

    /// Whether the next snapshot differs from the last.
    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// Takes in a change of stream number `stream`. True if it was an object that said nothing new.
    pub(crate) fn take(&mut self, stream: usize, change: Change) -> bool {
        let Some(state) = self.streams.get_mut(&stream) else { return false };
        match change {
            Change::Listing => state.seen = Some(BTreeSet::new()),
            Change::Seen(raw) => return self.see(stream, raw),
            Change::Listed => {
                let seen = state.seen.take().unwrap_or_default();
                let gone: Vec<ObjectKey> = state.items.keys().filter(|key| !seen.contains(*key)).cloned().collect();
                self.dirty |= !std::mem::replace(&mut state.known, true);
                gone.iter().for_each(|key| self.forget(stream, key));
            }
            Change::Deleted { key, uid } => {
                // A successor of the same name may have been seen already.
                if state.items.get(&key).is_some_and(|item| *item.uid == *uid) {
                    self.forget(stream, &key);
                }
            }
            Change::Missing => {
                let gone: Vec<ObjectKey> = state.items.keys().cloned().collect();
                self.dirty |= !std::mem::replace(&mut state.known, true);
                gone.iter().for_each(|key| self.forget(stream, key));
            }
            Change::Trouble(trouble) => {
                if state.trouble != trouble {
                    state.trouble = trouble;
                    self.dirty = true;
                }
            }
        }
        false
    }

    fn see(&mut self, stream: usize, raw: Raw) -> bool {
        let Some(state) = self.streams.get_mut(&stream) else { return false };
        if let Some(seen) = &mut state.seen {
            seen.insert(raw.key.clone());
        }
        let before = state.items.get(&raw.key).filter(|item| *item.uid == *raw.uid);
        if before.is_some_and(|item| *item.version == *raw.version) {
            return true;
        }
        let last_good = before.and_then(|item| item.object.clone());
        let (object, mut faults) = read_object(&raw.key, &raw.value);
        let object = match (object, &last_good) {
            // Nothing that is kept has changed: the object stays the very same one.
            (Some(new), Some(old)) if new.alike(old) => Some(old.clone()),
            (new, _) => in_force(new, last_good.clone(), &mut faults),
        };
        let unchanged = object.as_ref().zip(last_good.as_ref()).is_some_and(|(new, old)| new.same(old));
        let faults_before = if faults.is_empty() {
            state.faults.remove(&raw.key).unwrap_or_default()
        } else {
            state.faults.insert(raw.key.clone(), faults.clone()).unwrap_or_default()
        };
        self.dirty |= faults_before != faults;
        let item = Item { uid: raw.uid.into(), version: raw.version.into(), object };
        state.items.insert(raw.key.clone(), item);
        self.settle(&raw.key);
        unchanged
    }

    fn forget(&mut self, stream: usize, key: &ObjectKey) {
        let Some(state) = self.streams.get_mut(&stream) else { return };
        self.dirty |= state.faults.remove(key).is_some();
        if state.items.remove(key).is_some() {
            self.settle(key);
        }
    }

    /// Puts the version of an object that counts into the set.
    fn settle(&mut self, key: &ObjectKey) {
        let shown =
            self.streams.values().filter(|state| state.kind == key.kind).filter_map(|state| state.items.get(key));
        // Two streams: the object moved from one to the other, and the other one has not told its end yet.
        let counts = shown.max_by_key(|item| item.age()).and_then(|item| item.object.as_ref());
        match (counts, self.set.get(key)) {
            (Some(new), Some(old)) if new.same(old) => {}
            (Some(new), _) => {
                let new = new.clone();
                self.set.insert(new, None);
                self.dirty = true;
            }
            (None, Some(_)) => {
                self.set.remove(key);
                self.dirty = true;
            }
            (None, None) => {}
        }
    }

    /// Every stream that has to be was listed once.
    pub(crate) fn is_synced(&self) -> bool {
        self.streams.values().all(|state| state.known || state.named.is_some())
    }

    /// The state of this moment. Before everything is known there are no objects: a part could be taken for the whole.
    pub(crate) fn snapshot(&mut self) -> Arc<Snapshot> {
        self.dirty = false;
        let synced = self.is_synced();
        let mut faults: Vec<Fault> = self.streams.values().filter_map(|state| state.outage(synced)).collect();
        faults.dedup();
        if !synced {
            return Arc::new(Snapshot { faults, ..Snapshot::default() });
        }
        self.generation += 1;
        faults.extend(self.streams.values().flat_map(|state| state.faults.values().flatten().cloned()));
        let told = self.streams.values().filter(|state| state.known || state.trouble.is_some());
        let looked_up = told.filter_map(|state| state.named.clone()).collect();
        Arc::new(Snapshot { generation: self.generation, synced, objects: self.set.clone(), faults, looked_up })
    }
}

impl Item {
    /// What tells the newer of two objects of one name.
    fn age(&self) -> (Option<Timestamp>, u64) {
        let created = self.object.as_ref().and_then(|object| object.created());
        (created, self.version.parse().unwrap_or_default())
    }
}

impl State {
    fn of_scope(stream: &Stream) -> State {
        State::new(stream.kind, None)
    }

    fn new(kind: Kind, named: Option<ObjectKey>) -> State {
        let (items, faults) = (BTreeMap::new(), BTreeMap::new());
        State { kind, named, items, faults, seen: None, known: false, trouble: None }
    }

    fn outage(&self, synced: bool) -> Option<Fault> {
        let reason = match (&self.trouble, self.known) {
            (Some(trouble), true) => format!("{trouble}; what was listed stays in force"),
            (Some(trouble), false) => format!("not listed yet: {trouble}"),
            (None, false) if !synced => "not listed yet".to_owned(),
            (None, _) => return None,
        };
        let subject = self.named.as_ref().map_or_else(|| format!("every {}", self.kind), ObjectKey::to_string);
        Some(Fault::warning(subject, "", reason))
    }
}

#[cfg(test)]
mod tests;
