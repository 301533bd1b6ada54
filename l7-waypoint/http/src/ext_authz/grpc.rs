//! Services asked over gRPC: `envoy.service.auth.v3.Authorization/Check`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::SystemTime;

use http::Version;
use http::header::{HeaderMap, HeaderName};
use l7_authz::l7::request::joined;
use l7_route::headers::HeaderOps;
use xds_model::envoy::route::AppendAction;
use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::service::auth::v3 as auth;
use xds_proto::envoy::google::protobuf::Timestamp;

use super::edits::{Edit, Edits};
use super::{Answer, Check, PARTIAL_BODY, Refused, is_framing};
use crate::call::{Question, Reached, grpc};
use crate::filters::{format_context, view};
use auth::attribute_context::{HttpRequest, Peer, Request};
use auth::check_response::HttpResponse;

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

/// The call.
///
/// # Errors
/// If the configured authority is none.
pub(super) fn question(check: &Check<'_>, authority: &str, metadata: &HeaderOps) -> Result<Question, String> {
    let request = auth::CheckRequest { attributes: Some(attributes(check)) };
    let mut headers = HeaderMap::new();
    metadata.apply(&mut headers, &format_context(&view(check.head, check.client, None), check.client));
    grpc::question(CHECK, authority, headers, check.service.timeout, &request)
}

fn attributes(check: &Check<'_>) -> auth::AttributeContext {
    let info = &check.client.info;
    let principal = |principal: &Option<std::sync::Arc<str>>| principal.as_deref().unwrap_or_default().to_owned();
    let known = |text: &str| if text == "unknown" { String::new() } else { text.to_owned() };
    auth::AttributeContext {
        source: Some(Peer {
            address: Some(address(info.peer)),
            service: known(&check.client.source.canonical_service),
            principal: principal(&info.peer_principal),
            ..Peer::default()
        }),
        destination: Some(Peer {
            address: Some(address(info.destination)),
            principal: principal(&info.local_principal),
            ..Peer::default()
        }),
        request: Some(Request { time: timestamp(check), http: Some(http_request(check)) }),
        context_extensions: check.extensions.map(|map| map.clone().into_iter().collect()).unwrap_or_default(),
        ..auth::AttributeContext::default()
    }
}

fn address(of: SocketAddr) -> core::Address {
    use core::socket_address::PortSpecifier;
    let address = core::SocketAddress {
        address: of.ip().to_canonical().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(of.port().into())),
        ..core::SocketAddress::default()
    };
    core::Address { address: Some(core::address::Address::SocketAddress(address)) }
}

/// When the request began.
fn timestamp(check: &Check<'_>) -> Option<Timestamp> {
    let began = SystemTime::now() - check.started.elapsed();
    let since = began.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let (seconds, nanos) = (i64::try_from(since.as_secs()).ok()?, i32::try_from(since.subsec_nanos()).ok()?);
    Some(Timestamp { seconds, nanos })
}

fn http_request(check: &Check<'_>) -> HttpRequest {
    let head = check.head;
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
    let length = header("content-length").and_then(|length| length.parse().ok());
    let whole = check.body.as_ref().filter(|body| !body.partial).and_then(|body| i64::try_from(body.bytes.len()).ok());
    let mut out = HttpRequest {
        id: header("x-request-id").unwrap_or_default().to_owned(),
        method: head.method.as_str().to_owned(),
        path: head.path.as_str().to_owned(),
        host: head.authority.as_str().to_owned(),
        scheme: head.scheme.to_owned(),
        // -1: not known.
        size: length.or(whole).unwrap_or(-1),
        protocol: match head.version {
            Version::HTTP_10 => "HTTP/1.0",
            Version::HTTP_2 => "HTTP/2",
            _ => "HTTP/1.1",
        }
        .to_owned(),
        ..HttpRequest::default()
    };
    if let Some(body) = &check.body {
        if check.service.config.body.is_some_and(|wanted| wanted.pack_as_bytes) {
            out.raw_body = body.bytes.to_vec();
        } else {
            out.body = String::from_utf8_lossy(&body.bytes).into_owned();
        }
    }
    if check.service.config.encode_raw_headers {
        out.header_map = Some(core::HeaderMap { headers: header_list(check) });
    } else {
        out.headers = header_map(check);
    }
    out
}

/// Pseudo-headers, which the service gets among the others.
fn pseudo<'c>(check: &'c Check<'_>) -> impl Iterator<Item = (&'static str, &'c str)> {
    let head = check.head;
    let all = [
        (":method", head.method.as_str()),
        (":authority", head.authority.as_str()),
        (":path", head.path.as_str()),
        (":scheme", head.scheme),
    ];
    all.into_iter().filter(|(name, _)| check.service.sends(name))
}

fn header_map(check: &Check<'_>) -> HashMap<String, String> {
    let mut out: HashMap<String, String> =
        pseudo(check).map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let headers = &check.head.headers;
    for name in headers.keys().filter(|name| check.service.sends(name.as_str())) {
        if let Some(value) = joined(headers, name) {
            out.insert(name.as_str().to_owned(), String::from_utf8_lossy(&value).into_owned());
        }
    }
    if let Some(partial) = check.partial_body() {
        out.insert(PARTIAL_BODY.as_str().to_owned(), partial.to_owned());
    }
    out
}

fn header_list(check: &Check<'_>) -> Vec<core::HeaderValue> {
    let one = |key: &str, value: &[u8]| core::HeaderValue {
        key: key.to_owned(),
        raw_value: value.to_vec(),
        ..core::HeaderValue::default()
    };
    let mut out: Vec<_> = pseudo(check).map(|(name, value)| one(name, value.as_bytes())).collect();
    let sent = check.head.headers.iter().filter(|(name, _)| check.service.sends(name.as_str()));
    out.extend(sent.map(|(name, value)| one(name.as_str(), value.as_bytes())));
    out.extend(check.partial_body().map(|partial| one(PARTIAL_BODY.as_str(), partial.as_bytes())));
    out
}

/// What the service said.
///
/// # Errors
/// If it is not a whole and readable answer.
pub(super) fn answer(reached: Reached) -> Result<Answer, String> {
    interpret(grpc::answer(&reached)?)
}

fn interpret(response: auth::CheckResponse) -> Result<Answer, String> {
    let code = response.status.as_ref().map_or(0, |status| status.code);
    Ok(match (code, response.http_response) {
        (0, None) => Answer::Allowed(Box::default()),
        (0, Some(HttpResponse::OkResponse(ok))) => Answer::Allowed(Box::new(allowed(ok)?)),
        (0, Some(_)) => return Err("the service says OK, and what to refuse with".to_owned()),
        (_, Some(HttpResponse::ErrorResponse(error))) => Answer::Failed(refused(error)?),
        (_, Some(HttpResponse::DeniedResponse(denied))) => Answer::Denied(refused(denied)?),
        (_, _) => Answer::Denied(Refused::default()),
    })
}

#[allow(deprecated, reason = "the field is taken apart whole")]
fn allowed(ok: auth::OkHttpResponse) -> Result<Edits, String> {
    // No filter that Strata knows reads the service's metadata.
    let auth::OkHttpResponse {
        headers,
        headers_to_remove,
        dynamic_metadata: _,
        response_headers_to_add,
        query_parameters_to_set,
        query_parameters_to_remove,
    } = ok;
    let removable = |name: &String| HeaderName::from_bytes(name.as_bytes()).ok().filter(|name| !is_framing(name));
    Ok(Edits {
        request: edits(headers, |_| AppendAction::OverwriteIfExistsOrAdd)?,
        remove: headers_to_remove.iter().filter_map(removable).collect(),
        set_query: query_parameters_to_set.into_iter().map(|one| (one.key, one.value)).collect(),
        remove_query: query_parameters_to_remove,
        response: edits(response_headers_to_add, unsaid_downstream)?,
    })
}

/// What becomes of a header for the client when the service does not say: a cookie does not replace another one.
fn unsaid_downstream(name: &str) -> AppendAction {
    if name.eq_ignore_ascii_case("set-cookie") {
        AppendAction::AppendIfExistsOrAdd
    } else {
        AppendAction::OverwriteIfExistsOrAdd
    }
}

/// `unsaid`: what an unset `append` means; the protocol says "overwrite", and a client's own header must not stand
/// beside the service's.
#[allow(deprecated, reason = "services still send it, and it wins where it is there")]
fn edits(list: Vec<core::HeaderValueOption>, unsaid: impl Fn(&str) -> AppendAction) -> Result<Vec<Edit>, String> {
    use core::header_value_option::HeaderAppendAction as Wire;
    let mut out = Vec::with_capacity(list.len());
    for core::HeaderValueOption { header, append, append_action, keep_empty_value: _ } in list {
        let core::HeaderValue { key, value, raw_value } = header.unwrap_or_default();
        let action = match (append, Wire::try_from(append_action)) {
            (Some(append), _) if append.value => AppendAction::AppendIfExistsOrAdd,
            (Some(_), _) => AppendAction::OverwriteIfExistsOrAdd,
            (None, Ok(Wire::AppendIfExistsOrAdd)) => unsaid(&key),
            (None, Ok(Wire::AddIfAbsent)) => AppendAction::AddIfAbsent,
            (None, Ok(Wire::OverwriteIfExists)) => AppendAction::OverwriteIfExists,
            (None, Ok(Wire::OverwriteIfExistsOrAdd)) => AppendAction::OverwriteIfExistsOrAdd,
            (None, Err(_)) => return Err(format!("the service changes {key:?} in a way that is not known")),
        };
        let value = if raw_value.is_empty() { value.into_bytes() } else { raw_value };
        out.extend(Edit::new(&key, &value, action)?);
    }
    Ok(out)
}

fn refused(denied: auth::DeniedHttpResponse) -> Result<Refused, String> {
    let auth::DeniedHttpResponse { status, headers, body } = denied;
    let status = match status.map_or(0, |status| status.code) {
        0 => None,
        code => {
            let status = u16::try_from(code).ok().filter(|code| (200..600).contains(code));
            Some(status.ok_or_else(|| format!("the service refuses with status {code}"))?)
        }
    };
    let mut map = HeaderMap::new();
    super::apply_to_headers(&edits(headers, unsaid_downstream)?, &mut map);
    let headers = map.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    Ok(Refused { status, headers, body: body.into() })
}
