//! A request's head, checked and cleaned before any filter sees it.

use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING,
    UPGRADE,
};
use http::uri::{Authority, PathAndQuery};
use http::{Method, Version, request};
use hyper::ext::Protocol;
use l7_telemetry::Flags;
use xds_model::envoy::chain::{HttpOptions, UnderscoreAction};

use crate::reply::Reply;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
pub(crate) const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What of a request is routed, judged and sent on.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) method: Method,
    pub(crate) version: Version,
    pub(crate) path: PathAndQuery,
    pub(crate) authority: Authority,
    /// `Host` as the client sent it, as long as that is the authority.
    pub(crate) host: Option<HeaderValue>,
    pub(crate) scheme: &'static str,
    pub(crate) headers: HeaderMap,
    pub(crate) grpc: bool,
    /// Protocol the client wants to switch to, lower case.
    pub(crate) upgrade: Option<String>,
}

impl Head {
    /// Checks and cleans the head of a request as hyper parsed it.
    pub(crate) fn new(parts: request::Parts, options: &HttpOptions, tls: bool) -> Result<Self, Reply> {
        let request::Parts { method, uri, version, mut headers, extensions, .. } = parts;
        check_http10(version, &headers, options)?;
        check_framing(&headers)?;
        let host = headers.get(HOST).filter(|_| uri.authority().is_none() && !options.strip_port_from_host).cloned();
        let authority = authority(&uri, &mut headers, version, options)?;
        let upgrade = match extensions.get::<Protocol>() {
            Some(protocol) => Some(protocol.as_str().to_ascii_lowercase()),
            None => upgrade_asked(&headers),
        };
        if upgrade.is_some() && extensions.get::<Protocol>().is_none() && has_body(&headers) {
            // An upgrade's body is not sent on; a length without it would eat the next client's request.
            return Err(Reply { close: true, ..Reply::bad_request("http1.upgrade_with_body") });
        }
        let path = match (uri.path_and_query(), &method) {
            (Some(path), _) if path.as_str().starts_with('/') || (path == "*" && method == Method::OPTIONS) => {
                path.clone()
            }
            // CONNECT has no path; without one nothing but a route for CONNECT can match.
            (None, &Method::CONNECT) => PathAndQuery::from_static("/"),
            (None, _) => PathAndQuery::from_static("/"),
            _ => return Err(Reply::bad_request("http1.invalid_url")),
        };
        if headers.len() > options.max_headers_count as usize {
            let reply = Reply::new(431, "", Flags::DOWNSTREAM_PROTOCOL_ERROR, "http1.too_many_headers");
            return Err(Reply { close: true, ..reply });
        }
        underscores(&mut headers, options.underscores)?;
        strip_hop_by_hop(&mut headers);
        headers.remove(EXPECT);
        let scheme = if tls { "https" } else { "http" };
        let grpc = headers.get(CONTENT_TYPE).is_some_and(|value| is_grpc(value.as_bytes()));
        Ok(Self { method, version, path, authority, host, scheme, headers, grpc, upgrade })
    }
}

fn is_grpc(content_type: &[u8]) -> bool {
    content_type
        .strip_prefix(b"application/grpc")
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
}

fn check_http10(version: Version, headers: &HeaderMap, options: &HttpOptions) -> Result<(), Reply> {
    if version == Version::HTTP_09 || (version == Version::HTTP_10 && !options.accept_http10) {
        let reply = Reply::new(426, "", Flags::DOWNSTREAM_PROTOCOL_ERROR, "low_version");
        return Err(Reply { close: true, ..reply });
    }
    if version == Version::HTTP_10 && !headers.contains_key(HOST) && options.default_host_http10.is_none() {
        return Err(Reply::bad_request("missing_host_header"));
    }
    Ok(())
}

/// hyper refuses most ambiguous framings itself; what it lets through for leniency's sake must not get behind us.
fn check_framing(headers: &HeaderMap) -> Result<(), Reply> {
    if headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH) {
        return Err(Reply::bad_request("http1.content_length_and_chunked_not_allowed"));
    }
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    let plain = encodings.next().is_none_or(|value| value.as_bytes().eq_ignore_ascii_case(b"chunked"))
        && encodings.next().is_none();
    if !plain {
        let reply = Reply::new(501, "", Flags::DOWNSTREAM_PROTOCOL_ERROR, "http1.invalid_transfer_encoding");
        return Err(Reply { close: true, ..reply });
    }
    if headers.get_all(CONTENT_LENGTH).iter().count() > 1 {
        return Err(Reply::bad_request("http1.content_length_not_allowed"));
    }
    Ok(())
}

/// The host asked for; `Host` leaves the header map, so that there is one truth.
fn authority(
    uri: &http::Uri,
    headers: &mut HeaderMap,
    version: Version,
    options: &HttpOptions,
) -> Result<Authority, Reply> {
    if headers.get_all(HOST).iter().count() > 1 {
        return Err(Reply::bad_request("http1.multiple_host_headers"));
    }
    let host = headers.remove(HOST);
    let authority = match (uri.authority(), host) {
        (Some(authority), _) => authority.clone(),
        (None, Some(host)) => {
            Authority::from_maybe_shared(host).map_err(|_| Reply::bad_request("http.invalid_authority"))?
        }
        (None, None) => {
            let default = options.default_host_http10.as_ref().filter(|_| version == Version::HTTP_10);
            let default = default.and_then(|host| host.parse().ok());
            default.ok_or_else(|| Reply::bad_request("missing_host_header"))?
        }
    };
    if authority.as_str().is_empty() || authority.as_str().contains('@') {
        return Err(Reply::bad_request("http.invalid_authority"));
    }
    if options.strip_port_from_host && authority.port().is_some() {
        let bare = authority.host().parse();
        return bare.map_err(|_| Reply::bad_request("http.invalid_authority"));
    }
    Ok(authority)
}

fn has_body(headers: &HeaderMap) -> bool {
    headers.contains_key(TRANSFER_ENCODING) || headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0")
}

/// `Upgrade` counts only together with `Connection: upgrade`; an offer of `h2c` is not taken up (RFC 9113 section 3.1).
fn upgrade_asked(headers: &HeaderMap) -> Option<String> {
    let upgrade = headers.get(UPGRADE)?.to_str().ok()?;
    let connection = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let asked = connection.flat_map(|value| value.split(',')).any(|token| token.trim().eq_ignore_ascii_case("upgrade"));
    let protocol = upgrade.trim().to_ascii_lowercase();
    (asked && protocol != "h2c").then_some(protocol)
}

fn underscores(headers: &mut HeaderMap, action: UnderscoreAction) -> Result<(), Reply> {
    if action == UnderscoreAction::Allow || !headers.keys().any(|name| name.as_str().contains('_')) {
        return Ok(());
    }
    if action == UnderscoreAction::Reject {
        return Err(Reply::bad_request("http.unexpected_underscore"));
    }
    let odd: Vec<HeaderName> = headers.keys().filter(|name| name.as_str().contains('_')).cloned().collect();
    odd.iter().for_each(|name| drop(headers.remove(name)));
    Ok(())
}

/// Removes what concerns one hop only (RFC 9110, 7.6.1), also headers that `Connection` names, except those that
/// others rely on: a client must not be able to take them away.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|token| HeaderName::from_bytes(token.trim().as_bytes()).ok())
            .filter(|name| !(*name == TE || *name == CONTENT_LENGTH || is_relied_on(name.as_str())))
            .collect();
        named.iter().for_each(|name| drop(headers.remove(name)));
        headers.remove(CONNECTION);
    }
    for name in [KEEP_ALIVE, PROXY_CONNECTION, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    if headers.contains_key(TE) {
        let trailers = headers.get_all(TE).iter().any(|value| value.as_bytes().eq_ignore_ascii_case(b"trailers"));
        headers.remove(TE);
        if trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
    }
}

fn is_relied_on(name: &str) -> bool {
    name.starts_with("x-forwarded-")
        || name.starts_with("x-envoy-")
        || matches!(name, "authorization" | "cookie" | "x-request-id")
}

#[cfg(test)]
mod tests;
