//! What the client holds, kept over reconnects.
use std::collections::{BTreeMap, BTreeSet};

/// Versions held and names asked for, by type.
#[derive(Debug)]
pub(crate) struct State {
    types: BTreeMap<String, TypeState>,
}

#[derive(Debug, Default)]
pub(crate) struct TypeState {
    /// Accepted resources: name -> version.
    pub(crate) held: BTreeMap<String, String>,
    /// Names the current stream is subscribed to; `None` is the wildcard.
    pub(crate) subscribed: Option<BTreeSet<String>>,
    /// Whether the current stream has asked for this type at all.
    pub(crate) asked: bool,
    /// Whether any response has ever been answered.
    pub(crate) answered: bool,
    /// Whether nobody waits for that.
    late: bool,
}

/// What has to be sent so that the stream's subscription becomes the wanted one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) subscribe: Vec<String>,
    pub(crate) unsubscribe: Vec<String>,
}

impl State {
    pub(crate) fn new(types: &[String], late: &[String]) -> Self {
        let state = |url: &String| TypeState { late: late.contains(url), ..TypeState::default() };
        Self { types: types.iter().map(|url| (url.clone(), state(url))).collect() }
    }

    pub(crate) fn get_mut(&mut self, type_url: &str) -> Option<&mut TypeState> {
        self.types.get_mut(type_url)
    }

    /// A new stream starts: nothing has been asked on it.
    pub(crate) fn reset_stream(&mut self) {
        for state in self.types.values_mut() {
            state.asked = false;
            state.subscribed = None;
        }
    }

    pub(crate) fn all_answered(&self) -> bool {
        // A type asked for by name with no name wanted yet has nothing to wait for.
        let nothing = |state: &TypeState| state.subscribed.as_ref().is_some_and(BTreeSet::is_empty);
        self.types.values().all(|state| state.late || state.answered || nothing(state))
    }
}

impl TypeState {
    /// Brings the subscription to `wanted` and says what to send; `None` if nothing changes.
    pub(crate) fn subscribe(&mut self, wanted: Option<BTreeSet<String>>) -> Option<Change> {
        let first = !self.asked;
        let (Some(wanted), current) = (wanted, self.subscribed.take().unwrap_or_default()) else {
            self.asked = true;
            self.subscribed = None;
            return first.then(|| Change { subscribe: Vec::new(), unsubscribe: Vec::new() });
        };
        let change = Change {
            subscribe: wanted.difference(&current).cloned().collect(),
            unsubscribe: current.difference(&wanted).cloned().collect(),
        };
        for name in &change.unsubscribe {
            self.held.remove(name);
        }
        self.subscribed = Some(wanted);
        // An empty first request would be a wildcard (xds-contract 1.4): wait until there is a name.
        if first && change.subscribe.is_empty() {
            return None;
        }
        self.asked = true;
        (first || !change.subscribe.is_empty() || !change.unsubscribe.is_empty()).then_some(change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn wildcard_is_asked_once() {
        let mut state = TypeState::default();
        assert_eq!(state.subscribe(None), Some(Change { subscribe: vec![], unsubscribe: vec![] }));
        assert_eq!(state.subscribe(None), None);
    }

    #[test]
    fn names_are_asked_by_difference_and_forgotten_when_dropped() {
        let mut state = TypeState::default();
        assert_eq!(state.subscribe(Some(names(&[]))), None, "an empty first request would mean everything");
        let change = state.subscribe(Some(names(&["a", "b"]))).unwrap();
        assert_eq!(change.subscribe, ["a", "b"]);
        state.held.insert("a".into(), "1".into());
        let change = state.subscribe(Some(names(&["b", "c"]))).unwrap();
        assert_eq!((change.subscribe, change.unsubscribe), (vec!["c".to_owned()], vec!["a".to_owned()]));
        assert!(state.held.is_empty());
    }
}
