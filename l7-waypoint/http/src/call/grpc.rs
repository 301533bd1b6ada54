//! gRPC calls of one message each way, framed by hand ("gRPC over HTTP/2", "Length-Prefixed-Message") so that they travel
//! like everything else to a cluster.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::Method;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, TE};
use http::uri::PathAndQuery;
use prost::Message;

use super::{Question, Reached};
use crate::exchange::grpc_status;

/// Flag and length before a message.
const PREFIX: usize = 5;

/// The call of `method` (`/package.Service/Method`) with `message`. `headers` are its metadata; a timeout of zero is none.
///
/// # Errors
/// If the message is too large.
pub(crate) fn question(
    method: &'static str,
    authority: &str,
    mut headers: HeaderMap,
    timeout: Duration,
    message: &impl Message,
) -> Result<Question, String> {
    let length = message.encoded_len();
    let mut body = BytesMut::with_capacity(PREFIX + length);
    body.put_u8(0);
    body.put_u32(u32::try_from(length).map_err(|_| "the message is too large")?);
    message.encode(&mut body).map_err(|error| error.to_string())?;
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    if !timeout.is_zero() {
        // At most eight digits ("gRPC over HTTP/2", "Timeout").
        let millis = timeout.as_millis().min(99_999_999);
        let value = HeaderValue::from_str(&format!("{millis}m")).map_err(|error| error.to_string())?;
        headers.insert("grpc-timeout", value);
    }
    Ok(Question {
        method: Method::POST,
        // Cluster names hold what no authority may; the service's name is in the call anyway.
        authority: authority.parse().or_else(|_| "service".parse()).map_err(|_| "no authority")?,
        path: PathAndQuery::from_static(method),
        headers,
        body: body.freeze(),
    })
}

/// What the service said.
///
/// # Errors
/// If it is not a whole and readable answer, or a status other than OK.
pub(crate) fn answer<M: Message + Default>(reached: &Reached) -> Result<M, String> {
    let Reached { parts, body, trailers } = reached;
    if parts.status != http::StatusCode::OK {
        return Err(format!("the service answers with HTTP status {}, not gRPC", parts.status.as_u16()));
    }
    // Without a message the status comes in the head.
    let last = trailers.as_ref().filter(|trailers| trailers.contains_key("grpc-status")).unwrap_or(&parts.headers);
    match grpc_status(last) {
        Some(0) => {}
        Some(code) => {
            let text = last.get("grpc-message").and_then(|text| text.to_str().ok()).unwrap_or_default();
            return Err(format!("gRPC status {code} {text}"));
        }
        None => return Err("the answer ends without a gRPC status".to_owned()),
    }
    message(body)
}

/// The one message of a body. Compression was not offered.
fn message<M: Message + Default>(body: &Bytes) -> Result<M, String> {
    let malformed = || "the answer is not one gRPC message".to_owned();
    let (prefix, rest) = body.split_at_checked(PREFIX).ok_or_else(malformed)?;
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    if prefix[0] != 0 || rest.len() != length as usize {
        return Err(malformed());
    }
    M::decode(rest).map_err(|error| format!("the answer can't be read: {error}"))
}
