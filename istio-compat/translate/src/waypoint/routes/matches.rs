//! Conditions of a VirtualService rule.
use compat_objects::istio::{HttpMatchRequest, StringMatch};

use crate::pb::{boolv, exact, matcher, prefix, regex, regex_match, route};
use matcher::metadata_matcher::{PathSegment, path_segment};
use matcher::value_matcher::MatchPattern as ValuePattern;
use route::header_matcher::HeaderMatchSpecifier;
use route::route_match::PathSpecifier;

/// Field (relative to the match) and reason.
type Unreadable = (String, String);

/// Headers with a meaning of their own: claims of the request's token.
const CLAIMS: &str = "@request.auth.claims";

/// Every request.
pub(crate) fn everything() -> route::RouteMatch {
    route::RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".into())), ..Default::default() }
}

pub(crate) fn is_catch_all(found: &route::RouteMatch) -> bool {
    let all = match &found.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) => prefix == "/",
        _ => false,
    };
    all && found.headers.is_empty() && found.query_parameters.is_empty() && found.dynamic_metadata.is_empty()
}

/// Whether a text is a regular expression the data plane will take.
pub(crate) fn valid_regex(text: &str) -> Result<(), String> {
    match regex::Regex::new(text) {
        Ok(_) => Ok(()),
        // The first line of its message is a drawing.
        Err(error) => Err(format!("is no regular expression: {}", error.to_string().replace('\n', " "))),
    }
}

/// One alternative.
pub(crate) fn convert(found: &HttpMatchRequest) -> Result<route::RouteMatch, Unreadable> {
    let mut headers = Vec::new();
    let mut claims = Vec::new();
    let groups = [("headers", &found.headers, false), ("withoutHeaders", &found.without_headers, true)];
    for (group, values, invert) in groups {
        for (name, value) in values {
            let at = |reason| (format!("{group}[{name}]"), reason);
            if name.get(..CLAIMS.len()).is_some_and(|head| head.eq_ignore_ascii_case(CLAIMS)) {
                claims.push(claim(name, value, invert).map_err(at)?);
            } else {
                headers.push(header(name, value, invert).map_err(at)?);
            }
        }
    }
    headers.sort_by(|a, b| a.name.cmp(&b.name));
    for (name, field, value) in [
        (":method", "method", &found.method),
        (":authority", "authority", &found.authority),
        (":scheme", "scheme", &found.scheme),
    ] {
        if let Some(value) = value {
            headers.push(header(name, value, false).map_err(|reason| (field.to_owned(), reason))?);
        }
    }
    let mut query_parameters = Vec::new();
    for (name, value) in &found.query_params {
        query_parameters.push(query(name, value).map_err(|reason| (format!("queryParams[{name}]"), reason))?);
    }
    let path = match &found.uri {
        Some(uri) => path(uri).map_err(|reason| ("uri".to_owned(), reason))?,
        None => PathSpecifier::Prefix("/".into()),
    };
    Ok(route::RouteMatch {
        path_specifier: Some(path),
        case_sensitive: boolv(!found.ignore_uri_case),
        headers,
        query_parameters,
        dynamic_metadata: claims,
        ..Default::default()
    })
}

fn path(uri: &StringMatch) -> Result<PathSpecifier, String> {
    match (&uri.exact, &uri.prefix, &uri.regex) {
        (Some(exact), _, _) => Ok(PathSpecifier::Path(exact.clone())),
        (_, Some(prefix), _) => Ok(PathSpecifier::Prefix(prefix.clone())),
        (_, _, Some(pattern)) => {
            valid_regex(pattern)?;
            Ok(PathSpecifier::SafeRegex(regex(pattern)))
        }
        _ => Err("needs exact, prefix or regex".to_owned()),
    }
}

/// `None`: nothing is asked of the value.
pub(crate) fn string(value: &StringMatch) -> Result<Option<matcher::StringMatcher>, String> {
    match (&value.exact, &value.prefix, &value.regex) {
        (Some(value), _, _) => Ok(Some(exact(value))),
        (_, Some(value), _) if value.is_empty() => Ok(None),
        (_, Some(value), _) => Ok(Some(prefix(value))),
        // Istio reads a bare star as "present".
        (_, _, Some(value)) if value == "*" => Ok(None),
        (_, _, Some(value)) => {
            valid_regex(value)?;
            Ok(Some(regex_match(value)))
        }
        (None, None, None) => Ok(None),
    }
}

fn header(name: &str, value: &StringMatch, invert: bool) -> Result<route::HeaderMatcher, String> {
    let matched = string(value)?;
    Ok(route::HeaderMatcher {
        name: name.to_owned(),
        invert_match: invert,
        // An absent header is one that does not have the value.
        treat_missing_header_as_empty: invert && matched.is_some(),
        header_match_specifier: Some(match matched {
            Some(matched) => HeaderMatchSpecifier::StringMatch(matched),
            None => HeaderMatchSpecifier::PresentMatch(true),
        }),
    })
}

fn query(name: &str, value: &StringMatch) -> Result<route::QueryParameterMatcher, String> {
    use route::query_parameter_matcher::QueryParameterMatchSpecifier;
    Ok(route::QueryParameterMatcher {
        name: name.to_owned(),
        query_parameter_match_specifier: Some(match string(value)? {
            Some(matched) => QueryParameterMatchSpecifier::StringMatch(matched),
            None => QueryParameterMatchSpecifier::PresentMatch(true),
        }),
    })
}

/// `@request.auth.claims.a.b` or `@request.auth.claims[a][b]`.
fn claim(name: &str, value: &StringMatch, invert: bool) -> Result<matcher::MetadataMatcher, String> {
    let rest = &name[CLAIMS.len()..];
    let path: Vec<&str> = if let Some(dotted) = rest.strip_prefix('.') {
        dotted.split('.').collect()
    } else {
        let inner = rest.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        inner.ok_or_else(|| format!("{name} is neither {CLAIMS}.NAME nor {CLAIMS}[NAME]"))?.split("][").collect()
    };
    if path.iter().any(|part| part.is_empty()) {
        return Err(format!("{name} names no claim"));
    }
    let value = match string(value)? {
        Some(matched) => in_list_or_alone(matched),
        None => matcher::ValueMatcher { match_pattern: Some(ValuePattern::PresentMatch(true)) },
    };
    Ok(matcher::MetadataMatcher { invert, ..payload(&path, value) })
}

/// A condition on a claim of the token the JWT filter accepted.
pub(crate) fn payload(path: &[&str], value: matcher::ValueMatcher) -> matcher::MetadataMatcher {
    let segment = |key: &str| PathSegment { segment: Some(path_segment::Segment::Key(key.to_owned())) };
    matcher::MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: std::iter::once("payload").chain(path.iter().copied()).map(segment).collect(),
        value: Some(value),
        invert: false,
    }
}

/// A claim may be a text or a list of texts.
pub(crate) fn in_list_or_alone(matched: matcher::StringMatcher) -> matcher::ValueMatcher {
    let alone = matcher::ValueMatcher { match_pattern: Some(ValuePattern::StringMatch(matched)) };
    either_list_or(alone)
}

/// The value itself or any member of a list.
pub(crate) fn either_list_or(alone: matcher::ValueMatcher) -> matcher::ValueMatcher {
    let list = matcher::ListMatcher {
        match_pattern: Some(matcher::list_matcher::MatchPattern::OneOf(Box::new(alone.clone()))),
    };
    let list = matcher::ValueMatcher { match_pattern: Some(ValuePattern::ListMatch(Box::new(list))) };
    any_value(vec![list, alone])
}

/// Any of several; one alone needs no frame.
pub(crate) fn any_value(value_matchers: Vec<matcher::ValueMatcher>) -> matcher::ValueMatcher {
    matcher::ValueMatcher { match_pattern: Some(ValuePattern::OrMatch(matcher::OrMatcher { value_matchers })) }
}
