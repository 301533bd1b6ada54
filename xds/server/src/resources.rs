//! Sets of named resources, each of which knows what it changed of the one before.
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use xds_proto::envoy::google::protobuf::Any;

/// One resource and the version it is sent with (a hash of its content, by [`Resource::new`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    pub version: String,
    pub body: Any,
}

impl Resource {
    /// Versioned by content, so that an equal resource is never sent twice.
    pub fn new(body: Any) -> Self {
        Self { version: format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&body.value)), body }
    }
}

/// Resources of one type, by name; cheap to clone. What changed is found once, by [`Resources::next`], and not by
/// every client's stream again.
#[derive(Debug, Clone, Default)]
pub struct Resources(Arc<Set>);

#[derive(Debug, Default)]
struct Set {
    by_name: BTreeMap<String, Resource>,
    before: Weak<Set>,
    changes: Changes,
}

/// Names that differ from those of another set.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// New ones, and those with another version.
    pub(crate) changed: Vec<String>,
    pub(crate) removed: Vec<String>,
}

/// Tells a set from every other without keeping it.
#[derive(Debug, Clone, Default)]
pub(crate) struct SetId(Weak<Set>);

/// How a set differs from one that somebody holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News<'r> {
    Nothing,
    /// It came from the one held.
    Since(&'r Changes),
    /// Not known: all of it is to be looked at.
    Unknown,
}

impl Resources {
    /// The set that comes after this one: this one itself if nothing differs.
    #[must_use]
    pub fn next(&self, resources: impl IntoIterator<Item = (String, Any)>) -> Self {
        let by_name: BTreeMap<String, Resource> =
            resources.into_iter().map(|(name, body)| (name, Resource::new(body))).collect();
        let before = &self.0.by_name;
        let is_new = |(name, resource): &(&String, &Resource)| {
            before.get(*name).is_none_or(|held| held.version != resource.version)
        };
        let changes = Changes {
            changed: by_name.iter().filter(is_new).map(|(name, _)| name.clone()).collect(),
            removed: before.keys().filter(|name| !by_name.contains_key(*name)).cloned().collect(),
        };
        if changes.changed.is_empty() && changes.removed.is_empty() {
            return self.clone();
        }
        Self(Arc::new(Set { by_name, before: Arc::downgrade(&self.0), changes }))
    }

    pub fn get(&self, name: &str) -> Option<&Resource> {
        self.0.by_name.get(name)
    }

    /// By name.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Resource)> {
        self.0.by_name.iter()
    }

    pub(crate) fn id(&self) -> SetId {
        SetId(Arc::downgrade(&self.0))
    }

    pub(crate) fn since(&self, held: &SetId) -> News<'_> {
        // A set's place in memory is not given to another while somebody has its id.
        if self.id().0.ptr_eq(&held.0) {
            News::Nothing
        } else if self.0.before.ptr_eq(&held.0) && !held.is_none() {
            News::Since(&self.0.changes)
        } else {
            News::Unknown
        }
    }
}

impl SetId {
    /// The id of no set.
    fn is_none(&self) -> bool {
        self.0.ptr_eq(&Weak::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(before: &Resources, names: &[(&str, &str)]) -> Resources {
        let any = |text: &str| Any { type_url: "t".into(), value: text.as_bytes().to_vec() };
        before.next(names.iter().map(|(name, text)| ((*name).to_owned(), any(text))))
    }

    #[test]
    fn a_set_knows_what_it_changed_of_the_one_before_and_only_of_that() {
        let first = next(&Resources::default(), &[("a", "1"), ("b", "1"), ("c", "1")]);
        let second = next(&first, &[("a", "1"), ("b", "2"), ("d", "1")]);
        let expected = Changes { changed: vec!["b".into(), "d".into()], removed: vec!["c".into()] };
        assert_eq!(second.since(&first.id()), News::Since(&expected));
        assert_eq!(second.since(&second.id()), News::Nothing);
        assert_eq!(second.since(&SetId::default()), News::Unknown);
        let third = next(&second, &[("a", "1")]);
        assert_eq!(third.since(&first.id()), News::Unknown);
    }

    #[test]
    fn equal_resources_are_the_same_set() {
        let first = next(&Resources::default(), &[("a", "1")]);
        let same = next(&first, &[("a", "1")]);
        assert_eq!(same.since(&first.id()), News::Nothing);
        // Nor is a set that is gone mistaken for one made after it.
        let gone = first.id();
        drop((first, same));
        for _ in 0..64 {
            assert_eq!(next(&Resources::default(), &[("z", "1")]).since(&gone), News::Unknown);
        }
    }

    #[test]
    fn the_first_set_says_nothing_to_who_holds_none() {
        let first = next(&Resources::default(), &[("a", "1")]);
        assert_eq!(first.since(&SetId::default()), News::Unknown);
    }
}
