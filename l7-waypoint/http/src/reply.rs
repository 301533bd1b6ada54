//! Answers we give ourselves, in Envoy's words.

use std::borrow::Cow;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Response, StatusCode};
use l7_telemetry::Flags;

/// An answer without an upstream.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    pub(crate) flags: Flags,
    /// Envoy's response code details.
    pub(crate) details: Cow<'static, str>,
    /// For gRPC callers, where it does not follow from the status.
    pub(crate) grpc_status: Option<u32>,
    /// Close the connection afterwards: it can't be trusted any more.
    pub(crate) close: bool,
}

impl Reply {
    pub(crate) fn new(
        status: u16,
        body: impl Into<Bytes>,
        flags: Flags,
        details: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            // Statuses come from configuration or from here; one out of range is our own failure.
            status: StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            body: body.into(),
            headers: Vec::new(),
            flags,
            details: details.into(),
            grpc_status: None,
            close: false,
        }
    }

    /// The client broke the protocol.
    pub(crate) fn bad_request(details: &'static str) -> Self {
        let reply = Self::new(400, Bytes::new(), Flags::DOWNSTREAM_PROTOCOL_ERROR, details);
        Self { close: true, ..reply }
    }

    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// The response; for gRPC callers as a trailers-only response.
    pub(crate) fn into_response(self, grpc: bool) -> (Response<()>, Bytes) {
        let mut response = Response::new(());
        let headers = response.headers_mut();
        headers.extend(self.headers);
        if grpc {
            let status = self.grpc_status.unwrap_or_else(|| grpc_status_of(self.status));
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(status));
            if !self.body.is_empty() {
                let message = percent_encoding::percent_encode(&self.body, MESSAGE).to_string();
                // Percent-encoded text is always a header value.
                if let Ok(message) = HeaderValue::from_str(&message) {
                    headers.insert("grpc-message", message);
                }
            }
            return (response, Bytes::new());
        }
        headers.insert(CONTENT_LENGTH, HeaderValue::from(self.body.len()));
        if !self.body.is_empty() {
            headers.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain"));
        }
        if self.status == StatusCode::NO_CONTENT {
            headers.remove(CONTENT_LENGTH);
        }
        *response.status_mut() = self.status;
        (response, self.body)
    }
}

/// What `grpc-message` may not hold as it is (gRPC over HTTP/2, "Percent-Encoded").
const MESSAGE: &percent_encoding::AsciiSet = &percent_encoding::CONTROLS.add(b'%');

/// gRPC's own table for HTTP answers ("HTTP to gRPC Status Code Mapping").
pub(crate) fn grpc_status_of(status: StatusCode) -> u32 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

/// HTTP's nearest equivalent of a gRPC failure, for outlier detection.
pub(crate) fn http_status_of(grpc_status: u32) -> u16 {
    match grpc_status {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_callers_get_trailers_only() {
        let reply = Reply::new(403, "RBAC: access denied", Flags::default(), "rbac_access_denied");
        let (response, body) = reply.into_response(true);
        assert_eq!((response.status(), body.len()), (StatusCode::OK, 0));
        assert_eq!(response.headers()["grpc-status"], "7");
        assert_eq!(response.headers()["grpc-message"], "RBAC: access denied");
        let (response, body) = Reply::new(404, "", Flags::NO_ROUTE, "route_not_found").into_response(false);
        assert_eq!((response.status(), body.len()), (StatusCode::NOT_FOUND, 0));
        assert_eq!(response.headers()[CONTENT_LENGTH], "0");
    }
}
