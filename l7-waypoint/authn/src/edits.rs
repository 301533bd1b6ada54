//! What verification changes in the request before later filters and the upstream see it.

use http::header::{HeaderMap, HeaderName, HeaderValue};

/// Changes to apply in order: removals first, then values set.
#[derive(Debug, Default, PartialEq)]
pub struct Edits {
    pub(crate) remove: Vec<HeaderName>,
    pub(crate) set: Vec<(HeaderName, HeaderValue)>,
    /// Query parameters to take out.
    pub(crate) params: Vec<String>,
}

impl Edits {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.params.is_empty()
    }

    /// Changes the headers.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
    }

    /// The path and query without the token, if it was in the query.
    pub fn rewrite(&self, path_and_query: &str) -> Option<String> {
        if self.params.is_empty() {
            return None;
        }
        let (path, query) = path_and_query.split_once('?')?;
        let is_token = |pair: &&str| {
            let name = pair.split('=').next().unwrap_or_default();
            !self.params.iter().any(|param| param == name)
        };
        let kept: Vec<&str> = query.split('&').filter(is_token).collect();
        Some(if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_leave_the_query_and_nothing_else_does() {
        let edits = Edits { params: vec!["token".into()], ..Edits::default() };
        assert_eq!(edits.rewrite("/a?x=1&token=t&y").as_deref(), Some("/a?x=1&y"));
        assert_eq!(edits.rewrite("/a?token=t").as_deref(), Some("/a"));
        assert_eq!(edits.rewrite("/a"), None);
        assert_eq!(Edits::default().rewrite("/a?token=t"), None);
    }
}
