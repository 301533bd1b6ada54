//! Where tokens are looked for, in Envoy's order: headers, then query parameters, then cookies.

use http::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderName};
use percent_encoding::percent_decode_str;
use smallvec::SmallVec;
use xds_model::envoy::jwt::JwtProvider;

use crate::requirement::{CompileError, Request};

/// One place a provider's tokens may be in.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Place {
    Header { name: HeaderName, prefix: String },
    Param(String),
    Cookie(String),
}

/// A token found, with the place it was in.
#[derive(Debug, PartialEq)]
pub(crate) struct Found<'a> {
    pub(crate) token: std::borrow::Cow<'a, str>,
    pub(crate) place: usize,
}

/// Few requests carry more than one token.
pub(crate) type Tokens<'a> = SmallVec<[Found<'a>; 2]>;

/// The places of one provider. Without any configured: `Authorization: Bearer` and `access_token`, as Envoy.
pub(crate) fn places(name: &str, provider: &JwtProvider) -> Result<Vec<Place>, CompileError> {
    let none = provider.from_headers.is_empty() && provider.from_params.is_empty() && provider.from_cookies.is_empty();
    if none {
        let bearer = Place::Header { name: AUTHORIZATION, prefix: "Bearer ".into() };
        return Ok(vec![bearer, Place::Param("access_token".into())]);
    }
    let header = |header: &xds_model::envoy::jwt::JwtHeader| {
        let parsed = HeaderName::from_bytes(header.name.as_bytes());
        let parsed = parsed.map_err(|_| CompileError::new(name, "from_headers", &header.name, "is no header name"))?;
        Ok(Place::Header { name: parsed, prefix: header.value_prefix.clone() })
    };
    let mut places = provider.from_headers.iter().map(header).collect::<Result<Vec<_>, _>>()?;
    places.extend(provider.from_params.iter().cloned().map(Place::Param));
    places.extend(provider.from_cookies.iter().cloned().map(Place::Cookie));
    Ok(places)
}

/// Every token of the request in one of `places`.
pub(crate) fn tokens<'a>(request: &Request<'a>, places: &[Place]) -> Tokens<'a> {
    let mut found = Tokens::new();
    for (index, place) in places.iter().enumerate() {
        match place {
            Place::Header { name, prefix } => from_header(request.headers, name, prefix, index, &mut found),
            Place::Param(name) => from_query(request.path_and_query, name, index, &mut found),
            Place::Cookie(name) => from_cookies(request.headers, name, index, &mut found),
        }
    }
    found
}

fn from_header<'a>(headers: &'a HeaderMap, name: &HeaderName, prefix: &str, place: usize, found: &mut Tokens<'a>) {
    for value in headers.get_all(name) {
        let Ok(text) = value.to_str() else { continue };
        let token = if prefix.is_empty() {
            text.trim()
        } else {
            // The prefix may stand anywhere; the token is the run of token characters after it, as in Envoy.
            let Some(start) = text.find(prefix) else { continue };
            let rest = &text[start + prefix.len()..];
            let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '=' | '/' | '+');
            let rest = rest.trim_start_matches(|c: char| !is_part(c));
            &rest[..rest.find(|c: char| !is_part(c)).unwrap_or(rest.len())]
        };
        if !token.is_empty() {
            found.push(Found { token: token.into(), place });
        }
    }
}

fn from_query<'a>(path_and_query: &'a str, name: &str, place: usize, found: &mut Tokens<'a>) {
    let Some((_, query)) = path_and_query.split_once('?') else { return };
    for pair in query.split('&') {
        if let Some((key, value)) = pair.split_once('=')
            && key == name
            && !value.is_empty()
        {
            let token = percent_decode_str(value).decode_utf8_lossy();
            found.push(Found { token, place });
        }
    }
}

fn from_cookies<'a>(headers: &'a HeaderMap, name: &str, place: usize, found: &mut Tokens<'a>) {
    for value in headers.get_all(COOKIE) {
        let Ok(text) = value.to_str() else { continue };
        for pair in text.split(';') {
            if let Some((key, value)) = pair.trim().split_once('=')
                && key == name
                && !value.is_empty()
            {
                found.push(Found { token: value.trim_matches('"').into(), place });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn every_place_is_looked_at_in_order() {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_static("Bearer aaa.b-b.c_c, more"));
        headers.append(COOKIE, HeaderValue::from_static("x=1; session=ddd"));
        let request =
            Request { method: &http::Method::GET, path_and_query: "/p?x=1&access_token=e%2Ee", headers: &headers };
        let places = [
            Place::Header { name: AUTHORIZATION, prefix: "Bearer ".into() },
            Place::Param("access_token".into()),
            Place::Cookie("session".into()),
        ];
        let found: Vec<_> = tokens(&request, &places).into_iter().map(|found| found.token.into_owned()).collect();
        assert_eq!(found, ["aaa.b-b.c_c", "e.e", "ddd"]);
        headers.insert(AUTHORIZATION, HeaderValue::from_static("Basic abc"));
        let request = Request { method: &http::Method::GET, path_and_query: "/p", headers: &headers };
        assert!(tokens(&request, &places[..2]).is_empty());
    }
}
