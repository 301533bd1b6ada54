//! What could not be honoured, by name.
use std::fmt::Debug;

use prost::Message;

/// A resource that could not be accepted as it is; its reasons belong into the NACK.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Rejection {
    pub type_url: String,
    pub name: String,
    /// Names the field and why.
    pub reason: String,
    /// `true`: the configuration holds the resource all the same, with the parts that were not understood
    /// failing closed. `false`: it is absent; the caller keeps the last good one by keeping the last good
    /// message of that name in its [`super::Resources`].
    pub partial: bool,
}

/// A field without the effect its author may expect.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Notice {
    /// Listener, cluster or endpoint name.
    pub resource: String,
    /// Where: chain, route, filter, field.
    pub field: String,
    pub reason: String,
    pub effect: Effect,
}

/// What a [`Notice`] means for traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub enum Effect {
    /// The field has no effect.
    Ignored,
    /// The named part answers with an error.
    FailsClosed,
}

/// Why a part was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) String);

impl Refusal {
    pub(super) fn new(field: impl AsRef<str>, reason: impl AsRef<str>) -> Self {
        Self(format!("{}: {}", field.as_ref(), reason.as_ref()))
    }

    /// Puts an outer place in front.
    pub(super) fn at(self, place: impl AsRef<str>) -> Self {
        Self(format!("{}.{}", place.as_ref(), self.0))
    }
}

pub(super) type Refusable<T> = Result<T, Refusal>;

/// Puts a place in front of a refusal.
pub(super) trait At<T> {
    fn at(self, place: impl AsRef<str>) -> Refusable<T>;
}

impl<T> At<T> for Refusable<T> {
    fn at(self, place: impl AsRef<str>) -> Refusable<T> {
        self.map_err(|refusal| refusal.at(place))
    }
}

/// Collects notices while one resource is read.
pub(super) struct Report {
    pub(super) resource: String,
    pub(super) place: String,
    pub(super) notices: Vec<Notice>,
}

impl Report {
    pub(super) fn new(resource: &str) -> Self {
        Self { resource: resource.to_owned(), place: String::new(), notices: Vec::new() }
    }

    fn push(&mut self, field: &str, reason: impl Into<String>, effect: Effect) {
        let field = match (self.place.is_empty(), field.is_empty()) {
            (true, _) => field.to_owned(),
            (false, true) => self.place.clone(),
            (false, false) => format!("{}.{field}", self.place),
        };
        let notice = Notice { resource: self.resource.clone(), field, reason: reason.into(), effect };
        if !self.notices.contains(&notice) {
            self.notices.push(notice);
        }
    }

    pub(super) fn ignored(&mut self, field: impl AsRef<str>, reason: impl Into<String>) {
        self.push(field.as_ref(), reason, Effect::Ignored);
    }

    pub(super) fn fails_closed(&mut self, field: impl AsRef<str>, reason: impl Into<String>) {
        self.push(field.as_ref(), reason, Effect::FailsClosed);
    }

    /// Runs `f` with `place` appended to where notices are.
    pub(super) fn within<T>(&mut self, place: impl AsRef<str>, f: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.place.len();
        if !self.place.is_empty() {
            self.place.push('.');
        }
        self.place.push_str(place.as_ref());
        let result = f(self);
        self.place.truncate(before);
        result
    }

    /// Notices every field of `message` that is still set after the honoured ones were taken out.
    pub(super) fn ignore_rest<M: Message + Default + PartialEq + Debug>(&mut self, place: &str, message: &M) {
        for field in set_fields(message) {
            let field = if place.is_empty() { field } else { format!("{place}.{field}") };
            self.ignored(field, "has no effect in Strata");
        }
    }
}

/// Refuses if any field of `message` is still set after the honoured ones were taken out.
pub(super) fn refuse_rest<M: Message + Default + PartialEq + Debug>(message: &M) -> Refusable<()> {
    let fields = set_fields(message);
    if fields.is_empty() { Ok(()) } else { Err(Refusal::new(fields.join(", "), "not supported")) }
}

/// Names of the fields whose value is not the default. The honoured fields are taken out of a message before,
/// so what is left is what would otherwise be lost in silence; a field a later release adds is found as well.
/// The names come from the derived `Debug` text, which is only made when something is left.
fn set_fields<M: Message + Default + PartialEq + Debug>(message: &M) -> Vec<String> {
    let default = M::default();
    if *message == default {
        return Vec::new();
    }
    let (set, unset) = (top_level(&format!("{message:#?}")), top_level(&format!("{default:#?}")));
    set.into_iter().filter(|field| !unset.contains(field)).map(|(name, _)| name).collect()
}

/// (field, text) of each top-level field of an alternate `Debug` text.
fn top_level(text: &str) -> Vec<(String, String)> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("    ") else { continue };
        match rest.split_once(": ") {
            Some((name, value)) if !rest.starts_with([' ', ')', '}', ']']) => {
                fields.push((name.trim_start_matches("r#").to_owned(), value.to_owned()));
            }
            _ => {
                if let Some((_, value)) = fields.last_mut() {
                    value.push_str(rest);
                }
            }
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use xds_proto::envoy::envoy::config::route::v3::{RetryPolicy, Route};

    use super::*;

    #[test]
    fn a_field_left_over_is_named() {
        let route = Route { name: "a: b".to_owned(), stat_prefix: "x".to_owned(), ..Route::default() };
        assert_eq!(set_fields(&route), ["name", "stat_prefix"]);
        assert_eq!(refuse_rest(&Route::default()), Ok(()));
        let policy = RetryPolicy { host_selection_retry_max_attempts: 5, ..RetryPolicy::default() };
        assert_eq!(refuse_rest(&policy), Err(Refusal("host_selection_retry_max_attempts: not supported".to_owned())));
    }
}
