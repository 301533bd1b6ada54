//! Rules of delegates under the conditions of the rule that delegates.
use std::collections::BTreeMap;

use compat_objects::istio::{HttpMatchRequest, HttpRoute, StringMatch};

/// A delegate's rule under the conditions of the rule that delegates. `None`: the two never match together.
pub(crate) fn merge_delegate(outer: &HttpRoute, inner: &HttpRoute) -> Result<Option<HttpRoute>, String> {
    let mut merged = inner.clone();
    merged.matches = match (outer.matches.as_slice(), inner.matches.as_slice()) {
        (_, []) => outer.matches.clone(),
        ([], inner) => inner.to_vec(),
        (outer, inner) => {
            let mut both = Vec::new();
            for a in outer {
                for b in inner {
                    both.push(merge_match(a, b)?);
                }
            }
            both
        }
    };
    merged.rewrite = inner.rewrite.clone().or_else(|| outer.rewrite.clone());
    merged.timeout = inner.timeout.or(outer.timeout);
    merged.retries = inner.retries.clone().or_else(|| outer.retries.clone());
    merged.fault = inner.fault.clone().or_else(|| outer.fault.clone());
    merged.cors_policy = inner.cors_policy.clone().or_else(|| outer.cors_policy.clone());
    merged.headers = inner.headers.clone().or_else(|| outer.headers.clone());
    if inner.mirror.is_none() {
        // The share belongs to the mirror.
        merged.mirror.clone_from(&outer.mirror);
        merged.mirror_percentage.clone_from(&outer.mirror_percentage);
        merged.mirror_percent.clone_from(&outer.mirror_percent);
    }
    if inner.mirrors.is_empty() {
        merged.mirrors.clone_from(&outer.mirrors);
    }
    Ok(Some(merged))
}

fn merge_match(outer: &HttpMatchRequest, inner: &HttpMatchRequest) -> Result<HttpMatchRequest, String> {
    let mut merged = inner.clone();
    merged.uri = match (&outer.uri, &inner.uri) {
        (Some(a), Some(b)) => {
            // Narrower inside wider; anything else would need both conditions at once, which a route cannot say.
            let within = match (&a.prefix, b.prefix.as_ref().or(b.exact.as_ref())) {
                (Some(prefix), Some(path)) => path.starts_with(prefix.as_str()),
                _ => a == b,
            };
            if !within {
                return Err("the delegate's uri is not within the uri that delegates to it".to_owned());
            }
            Some(b.clone())
        }
        (a, b) => b.clone().or_else(|| a.clone()),
    };
    both(&outer.headers, &mut merged.headers)?;
    both(&outer.without_headers, &mut merged.without_headers)?;
    both(&outer.query_params, &mut merged.query_params)?;
    merged.method = either("method", &outer.method, &inner.method)?;
    merged.authority = either("authority", &outer.authority, &inner.authority)?;
    merged.scheme = either("scheme", &outer.scheme, &inner.scheme)?;
    merged.port = inner.port.or(outer.port);
    merged.ignore_uri_case = inner.ignore_uri_case || outer.ignore_uri_case;
    Ok(merged)
}

/// Conditions of both; two different ones on the same name cannot be said in one route.
fn both(outer: &BTreeMap<String, StringMatch>, merged: &mut BTreeMap<String, StringMatch>) -> Result<(), String> {
    for (name, value) in outer {
        match merged.get(name) {
            Some(inner) if inner != value => return Err(format!("both rules ask something else of {name}")),
            Some(_) => {}
            None => {
                merged.insert(name.clone(), value.clone());
            }
        }
    }
    Ok(())
}

fn either(name: &str, outer: &Option<StringMatch>, inner: &Option<StringMatch>) -> Result<Option<StringMatch>, String> {
    match (outer, inner) {
        (Some(a), Some(b)) if a != b => Err(format!("both rules ask something else of the {name}")),
        (a, b) => Ok(b.clone().or_else(|| a.clone())),
    }
}
