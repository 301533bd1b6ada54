//! Services asked over HTTP: they get the request's own first line and some of its headers, and answer 200 to let it
//! pass.

use http::StatusCode;
use http::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue};
use http::uri::PathAndQuery;
use l7_route::ext_authz::Http;
use xds_model::envoy::route::AppendAction;

use super::edits::{Edit, Edits};
use super::{Answer, Check, PARTIAL_BODY, Refused, is_framing};
use crate::call::{Question, Reached};
use crate::filters::{format_context, view};

/// Names of request headers to take away, in an allowing answer.
const TO_REMOVE: &str = "x-envoy-auth-headers-to-remove";

/// The request to the service.
///
/// # Errors
/// If prefix and path make no path.
pub(super) fn question(check: &Check<'_>, http: &Http) -> Result<Question, String> {
    let head = check.head;
    let mut headers = HeaderMap::new();
    for (name, value) in check.headers() {
        headers.append(name, value.clone());
    }
    http.headers.apply(&mut headers, &format_context(&view(head, check.client, None), check.client));
    if let Some(partial) = check.partial_body() {
        headers.insert(PARTIAL_BODY, HeaderValue::from_static(partial));
    }
    let body = check.body.as_ref().map(|body| body.bytes.clone()).unwrap_or_default();
    headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    let path = format!("{}{}", http.path_prefix, head.path);
    let path = PathAndQuery::try_from(path).map_err(|error| format!("the service's path: {error}"))?;
    Ok(Question { method: head.method.clone(), authority: head.authority.clone(), path, headers, body })
}

/// What the service said: 200 allows, a server error is no answer, everything else refuses.
///
/// # Errors
/// If it is no answer.
pub(super) fn answer(http: &Http, reached: Reached) -> Result<Answer, String> {
    let Reached { parts, body, trailers: _ } = reached;
    let headers = &parts.headers;
    match parts.status {
        StatusCode::OK => Ok(Answer::Allowed(Box::new(allowed(http, headers)))),
        status if status.is_server_error() || status.is_informational() => {
            Err(format!("the service answers with status {}", status.as_u16()))
        }
        status => {
            let sent = headers.iter().filter(|(name, _)| !is_framing(name) && http.sends_to_client(name));
            let headers = sent.map(|(name, value)| (name.clone(), value.clone())).collect();
            Ok(Answer::Denied(Refused { status: Some(status.as_u16()), headers, body }))
        }
    }
}

fn allowed(http: &Http, headers: &HeaderMap) -> Edits {
    let mut edits = Edits::default();
    for name in headers.keys() {
        for (index, value) in headers.get_all(name).iter().enumerate() {
            // The first value replaces the client's, the others join it.
            let set = if index == 0 { AppendAction::OverwriteIfExistsOrAdd } else { AppendAction::AppendIfExistsOrAdd };
            if http.sets_upstream(name) {
                edits.request.extend(Edit::of(name, value, set));
            } else if http.appends_upstream(name) {
                edits.request.extend(Edit::of(name, value, AppendAction::AppendIfExistsOrAdd));
            }
            if http.sends_to_client_on_success(name) {
                edits.response.extend(Edit::of(name, value, AppendAction::AppendIfExistsOrAdd));
            }
        }
    }
    let listed = headers.get_all(TO_REMOVE).iter().filter_map(|value| value.to_str().ok());
    let names = listed.flat_map(|list| list.split(',')).filter_map(|name| name.trim().parse::<HeaderName>().ok());
    edits.remove = names.filter(|name| !is_framing(name)).collect();
    edits
}
