//! After a protocol switch (WebSocket): bytes both ways until either side ends.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine as _;
use http::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::body::{RequestBody, ResponseBody};
use crate::copy::copy_both;
use crate::exchange::Exchange;
use crate::head::Head;
use crate::io::{Io, Rewind};

/// The upstream's side of a switched connection.
pub(crate) enum UpstreamSide {
    /// HTTP/1.1: the connection itself.
    Stream(Rewind<Box<dyn Io>>),
    /// HTTP/2: one stream of a connection.
    H2(TokioIo<Upgraded>),
}

/// A switch that both sides agreed on; `done` is told the bytes from and to the client.
pub(crate) struct Switch {
    pub(crate) upstream: UpstreamSide,
    pub(crate) idle: Option<Duration>,
    pub(crate) done: Box<dyn FnOnce(u64, u64)>,
}

impl Switch {
    /// Moves bytes until it is over.
    pub(crate) async fn run(self, client: impl AsyncRead + AsyncWrite + Unpin) {
        let copied = copy_both(client, self.upstream, self.idle).await;
        if let Some(error) = &copied.error {
            tracing::debug!(%error, "switched connection ended");
        }
        (self.done)(copied.forth, copied.back);
    }
}

impl AsyncRead for UpstreamSide {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Stream(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::H2(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for UpstreamSide {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Stream(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::H2(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Stream(stream) => Pin::new(stream).poll_flush(cx),
            Self::H2(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Stream(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::H2(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Asks an HTTP/1.1 upstream for the switch the client wants.
pub(crate) fn ask_http1(head: &Head, request: &mut Request<RequestBody>) {
    let Some(protocol) = &head.upgrade else { return };
    *request.method_mut() = if head.method == Method::CONNECT { Method::GET } else { head.method.clone() };
    let headers = request.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    if let Ok(protocol) = HeaderValue::from_str(protocol) {
        headers.insert(UPGRADE, protocol);
    }
    // A client on HTTP/2 has no key (RFC 8441, 5.1).
    if protocol == "websocket" && !headers.contains_key("sec-websocket-key") {
        let key = base64::engine::general_purpose::STANDARD.encode(uuid::Uuid::new_v4().as_bytes());
        if let Ok(key) = HeaderValue::from_str(&key) {
            headers.insert("sec-websocket-key", key);
        }
    }
}

/// Completes a protocol switch towards the client.
pub(crate) fn switch(
    mut exchange: Box<Exchange>,
    response: Response<()>,
    upstream: UpstreamSide,
    on_upgrade: Option<OnUpgrade>,
) -> Response<ResponseBody> {
    let client = exchange.client.clone();
    let protocol = exchange.head.as_ref().and_then(|head| head.upgrade.clone()).unwrap_or_default();
    let (mut parts, ()) = response.into_parts();
    let idle = Some(Duration::from_secs(3600));
    let status = if client.http2 { StatusCode::OK } else { StatusCode::SWITCHING_PROTOCOLS };
    exchange.status = status.as_u16();
    (parts.status, parts.version) = (status, if client.http2 { Version::HTTP_2 } else { Version::HTTP_11 });
    let done = Box::new(move |received, sent| exchange.switched(received, sent));
    let switch = Switch { upstream, idle, done };
    if let Some(on_upgrade) = on_upgrade {
        parts.headers.remove("sec-websocket-accept");
        tokio::task::spawn_local(async move {
            match on_upgrade.await {
                Ok(upgraded) => switch.run(TokioIo::new(upgraded)).await,
                Err(error) => tracing::debug!(%error, "client gave up a protocol switch"),
            }
        });
    } else {
        switched_headers(&mut parts.headers, &protocol);
        *client.switch.borrow_mut() = Some(switch);
    }
    Response::from_parts(parts, ResponseBody::full(bytes::Bytes::new(), None))
}

fn switched_headers(headers: &mut HeaderMap, protocol: &str) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    if let Ok(protocol) = HeaderValue::from_str(protocol) {
        headers.insert(UPGRADE, protocol);
    }
}
