//! What an allowing answer changes in the request and adds to the response.

use std::fmt::Write as _;

use http::Method;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery};
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use xds_model::envoy::route::AppendAction;

use super::is_framing;
use crate::head::Head;

/// A change of one header.
pub(crate) struct Edit {
    target: Target,
    value: HeaderValue,
    action: AppendAction,
}

enum Target {
    Header(HeaderName),
    Method(Method),
    Path(PathAndQuery),
    Authority(Authority),
}

/// See the module head.
#[derive(Default)]
pub(super) struct Edits {
    pub(super) request: Vec<Edit>,
    /// After the changes.
    pub(super) remove: Vec<HeaderName>,
    pub(super) set_query: Vec<(String, String)>,
    pub(super) remove_query: Vec<String>,
    pub(super) response: Vec<Edit>,
}

impl Edit {
    /// From what the service wrote; `Ok(None)`: a header that is not the service's to change.
    ///
    /// # Errors
    /// If name or value can't be sent.
    pub(super) fn new(name: &str, value: &[u8], action: AppendAction) -> Result<Option<Self>, String> {
        let wrong = || format!("the service sets {name:?} to what can't be sent");
        let value = HeaderValue::from_bytes(value).map_err(|_| wrong())?;
        let target = match name.to_ascii_lowercase().as_str() {
            ":method" => Target::Method(Method::from_bytes(value.as_bytes()).map_err(|_| wrong())?),
            ":path" => {
                let path = PathAndQuery::try_from(value.as_bytes()).map_err(|_| wrong())?;
                Target::Path(Some(path).filter(|path| path.as_str().starts_with('/')).ok_or_else(wrong)?)
            }
            ":authority" | "host" => {
                let authority = Authority::try_from(value.as_bytes()).map_err(|_| wrong())?;
                Target::Authority(Some(authority).filter(|host| !host.as_str().contains('@')).ok_or_else(wrong)?)
            }
            pseudo if pseudo.starts_with(':') => return Ok(None),
            name => {
                let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong())?;
                if is_framing(&name) {
                    return Ok(None);
                }
                Target::Header(name)
            }
        };
        Ok(Some(Self { target, value, action }))
    }

    /// Of a header the service answered with.
    pub(super) fn of(name: &HeaderName, value: &HeaderValue, action: AppendAction) -> Option<Self> {
        (!is_framing(name)).then(|| Self { target: Target::Header(name.clone()), value: value.clone(), action })
    }
}

impl Edits {
    /// Applies all of them to the request, or none; true if there were any.
    ///
    /// # Errors
    /// If the changed path is none.
    pub(super) fn apply(&self, head: &mut Head) -> Result<bool, String> {
        let query = !self.set_query.is_empty() || !self.remove_query.is_empty();
        if self.request.is_empty() && self.remove.is_empty() && !query {
            return Ok(false);
        }
        let mut path = head.path.clone();
        for edit in &self.request {
            if let Target::Path(new) = &edit.target {
                path = new.clone();
            }
        }
        if query {
            path = self.edit_query(&path)?;
        }
        head.path = path;
        for edit in &self.request {
            match &edit.target {
                Target::Header(_) | Target::Path(_) => {}
                Target::Method(method) => head.method = method.clone(),
                Target::Authority(authority) => (head.authority, head.host) = (authority.clone(), None),
            }
        }
        apply_to_headers(&self.request, &mut head.headers);
        self.remove.iter().for_each(|name| drop(head.headers.remove(name)));
        Ok(true)
    }

    fn edit_query(&self, path: &PathAndQuery) -> Result<PathAndQuery, String> {
        let named = |pair: &str, name: &str| {
            let key = pair.split_once('=').map_or(pair, |(key, _)| key);
            percent_decode_str(key).eq(name.bytes())
        };
        let kept = path.query().into_iter().flat_map(|query| query.split('&')).filter(|pair| {
            let mut names = self.remove_query.iter().chain(self.set_query.iter().map(|(name, _)| name));
            !names.any(|name| named(pair, name))
        });
        let set = self.set_query.iter().map(|(name, value)| {
            let encode = |text| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
            format!("{}={}", encode(name.as_str()), encode(value.as_str()))
        });
        let mut text = path.path().to_owned();
        for (index, pair) in kept.map(str::to_owned).chain(set).enumerate() {
            // Writing to a String cannot fail.
            let _ = write!(text, "{}{pair}", if index == 0 { '?' } else { '&' });
        }
        PathAndQuery::try_from(text).map_err(|error| format!("the service makes a path of the query: {error}"))
    }
}

/// Applies the changes that concern headers.
pub(crate) fn apply_to_headers(edits: &[Edit], headers: &mut HeaderMap) {
    for Edit { target, value, action } in edits {
        let Target::Header(name) = target else { continue };
        match action {
            AppendAction::AppendIfExistsOrAdd => drop(headers.append(name, value.clone())),
            AppendAction::AddIfAbsent if headers.contains_key(name) => {}
            AppendAction::OverwriteIfExists if !headers.contains_key(name) => {}
            AppendAction::AddIfAbsent | AppendAction::OverwriteIfExists | AppendAction::OverwriteIfExistsOrAdd => {
                drop(headers.insert(name, value.clone()));
            }
        }
    }
}
