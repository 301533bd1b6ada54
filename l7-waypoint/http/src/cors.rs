//! Cross-origin requests (the Fetch standard, "CORS protocol"), as Envoy's filter answers them.

use http::Method;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD,
    HeaderMap, HeaderName, HeaderValue, ORIGIN,
};
use l7_route::filter::Cors;
use l7_telemetry::Flags;

use crate::head::Head;
use crate::reply::Reply;

/// What the filter does with a request.
pub(crate) enum Verdict {
    /// Nothing; the response is left alone.
    Pass,
    /// The response gets these headers.
    Allow(HeaderMap),
    /// A preflight, answered here.
    Answer(Reply),
}

pub(crate) fn judge(cors: &Cors, head: &Head, seed: u64) -> Verdict {
    let Some(origin) = head.headers.get(ORIGIN).filter(|_| cors.enabled(seed)) else { return Verdict::Pass };
    let allowed = cors.allows(origin.as_bytes());
    let preflight = head.method == Method::OPTIONS
        && head.headers.get(ACCESS_CONTROL_REQUEST_METHOD).is_some_and(|method| !method.is_empty());
    match (allowed, preflight) {
        (false, true) if !cors.policy.forward_not_matching_preflights => {
            Verdict::Answer(Reply::new(200, "", Flags::default(), "cors_response"))
        }
        (false, _) => Verdict::Pass,
        (true, true) => {
            let mut reply = Reply::new(200, "", Flags::default(), "cors_response");
            let mut headers = allow(cors, origin);
            add(&mut headers, ACCESS_CONTROL_ALLOW_METHODS, &cors.policy.allow_methods);
            add(&mut headers, ACCESS_CONTROL_ALLOW_HEADERS, &cors.policy.allow_headers);
            add(&mut headers, ACCESS_CONTROL_MAX_AGE, &cors.policy.max_age);
            let private =
                head.headers.get("access-control-request-private-network").is_some_and(|value| value == "true");
            if private && cors.policy.allow_private_network_access {
                let name = HeaderName::from_static("access-control-allow-private-network");
                headers.insert(name, HeaderValue::from_static("true"));
            }
            reply.headers = headers.into_iter().filter_map(|(name, value)| Some((name?, value))).collect();
            Verdict::Answer(reply)
        }
        (true, false) => {
            let mut headers = allow(cors, origin);
            add(&mut headers, ACCESS_CONTROL_EXPOSE_HEADERS, &cors.policy.expose_headers);
            Verdict::Allow(headers)
        }
    }
}

fn allow(cors: &Cors, origin: &HeaderValue) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    if cors.policy.allow_credentials {
        headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    headers
}

fn add(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Some(value) = HeaderValue::from_str(value).ok().filter(|value| !value.is_empty()) {
        headers.insert(name, value);
    }
}
