//! Documents -> merged values -> typed objects, each with its last good version.
use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::files::Files;
use crate::fault::{Fault, Location};
use crate::kind::Kind;
use crate::object::{Object, ObjectKey, ObjectSet};
use crate::read::{self, Document};

#[derive(Debug)]
struct Entry {
    documents: Vec<Arc<Document>>,
    value: Value,
    good: Option<(Object, Location)>,
    faults: Vec<Fault>,
}

/// Every object by key, as of the last update.
#[derive(Debug, Default)]
pub(super) struct Objects {
    entries: BTreeMap<ObjectKey, Entry>,
    set: ObjectSet,
    duplicates: Vec<Fault>,
}

impl Objects {
    pub(super) fn set(&self) -> ObjectSet {
        self.set.clone()
    }

    pub(super) fn faults(&self) -> impl Iterator<Item = Fault> {
        self.duplicates.iter().chain(self.entries.values().flat_map(|entry| &entry.faults)).cloned()
    }

    /// Takes in the documents; tells whether the set of objects changed.
    pub(super) fn update(&mut self, files: &Files) -> bool {
        let wanted = self.group(files);
        let gone: Vec<ObjectKey> = self.entries.keys().filter(|key| !wanted.contains_key(*key)).cloned().collect();
        let mut changed = false;
        for key in gone {
            self.entries.remove(&key);
            changed |= self.set.remove(&key).is_some();
        }
        for (key, documents) in wanted {
            if self.entries.get(&key).is_some_and(|old| identical(&old.documents, &documents)) {
                continue;
            }
            let entry = renew(&key, documents, self.entries.remove(&key));
            changed |= self.publish(&key, &entry);
            self.entries.insert(key, entry);
        }
        changed
    }

    fn publish(&mut self, key: &ObjectKey, entry: &Entry) -> bool {
        let before = self.set.get(key);
        match &entry.good {
            Some((object, location)) => {
                let same = before.is_some_and(|before| before.same(object)) && self.set.location(key) == Some(location);
                if !same {
                    self.set.insert(object.clone(), Some(location.clone()));
                }
                !same
            }
            None => before.is_some() && self.set.remove(key).is_some(),
        }
    }

    /// The documents of every object in the order of overlaying. Within one source a later document replaces.
    fn group(&mut self, files: &Files) -> BTreeMap<ObjectKey, Vec<Arc<Document>>> {
        self.duplicates.clear();
        let mut grouped: BTreeMap<ObjectKey, Vec<(usize, Arc<Document>)>> = BTreeMap::new();
        for (source, document) in files.documents() {
            let layers = grouped.entry(document.key.clone()).or_default();
            if let Some((_, earlier)) = layers.pop_if(|(last, _)| *last == source) {
                let reason = format!("defined again at {}; the later one counts", document.location());
                let fault = Fault::warning(document.key.to_string(), "", reason);
                self.duplicates.push(fault.at(&earlier.location()));
            }
            layers.push((source, document.clone()));
        }
        grouped.retain(|_, layers| layers.first().is_some_and(|(source, d)| *source == 0 || !describes_nothing(d)));
        grouped.into_iter().map(|(key, layers)| (key, layers.into_iter().map(|(_, d)| d).collect())).collect()
    }
}

/// What a later source says about an object whose description is gone: a status or an annotation, no object.
fn describes_nothing(document: &Document) -> bool {
    let needs_spec = match document.key.kind {
        Kind::Namespace | Kind::Node | Kind::ServiceAccount | Kind::ConfigMap | Kind::Secret | Kind::EndpointSlice => {
            false
        }
        Kind::Pod | Kind::Service | Kind::Gateway => true,
        // An empty spec has a meaning here (an AuthorizationPolicy that allows nothing): only a status gives it away.
        _ => document.root.get("status").is_some(),
    };
    needs_spec && document.root.get("spec").is_none()
}

fn identical(a: &[Arc<Document>], b: &[Arc<Document>]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| Arc::ptr_eq(a, b))
}

fn renew(key: &ObjectKey, documents: Vec<Arc<Document>>, old: Option<Entry>) -> Entry {
    let mut value = Value::Null;
    for document in &documents {
        merge(&mut value, document.to_value());
    }
    let location = documents.first().map(|document| document.location());
    let (unchanged, last_good) = match old {
        Some(old) => (old.value == value && old.faults.is_empty(), old.good),
        None => (false, None),
    };
    if unchanged {
        let good = last_good.zip(location).map(|((object, _), location)| (object, location));
        return Entry { documents, value, good, faults: Vec::new() };
    }
    let (object, mistakes) = read::type_value(key.kind, &value);
    let mut faults: Vec<Fault> = mistakes.into_iter().map(|mistake| read::place(mistake, key, &documents)).collect();
    let good = super::in_force(object.zip(location), last_good, &mut faults);
    Entry { documents, value, good, faults }
}

/// Deep merge: maps member by member, everything else replaced.
fn merge(base: &mut Value, overlay: Value) {
    match (base, overlay) {
        (Value::Object(base), Value::Object(overlay)) => {
            for (key, value) in overlay {
                match base.get_mut(&key) {
                    Some(member) => merge(member, value),
                    None => drop(base.insert(key, value)),
                }
            }
        }
        (base, overlay) => *base = overlay,
    }
}
