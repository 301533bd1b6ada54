//! HTTP/1.1, h2c and WebSocket upgrades on one port.
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};

use super::control::Wish;
use super::{Me, plain_address, websocket};

type Body = BoxBody<Bytes, Infallible>;

/// What an application can see of one request.
#[derive(Debug, Serialize)]
struct Seen {
    name: String,
    version: String,
    namespace: String,
    /// As `accept()` returned it.
    peer: String,
    local: String,
    protocol: String,
    method: String,
    host: String,
    path: String,
    query: String,
    headers: BTreeMap<String, String>,
    body_bytes: usize,
    /// Number of the connection, so that clients see whether one was reused.
    connection: u64,
    /// Number of the request, of all that reached this server, so that copies of requests (mirroring) are seen.
    request: u64,
}

/// One accepted connection.
struct Connection {
    me: Arc<Me>,
    peer: SocketAddr,
    local: SocketAddr,
    number: u64,
    /// Set when the connection is to end with RST.
    reset: AtomicBool,
}

/// Serves until the process ends.
pub(super) async fn serve(listener: TcpListener, me: Arc<Me>) -> anyhow::Result<()> {
    static CONNECTIONS: AtomicU64 = AtomicU64::new(1);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                eprintln!("accept: {error}");
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                continue;
            }
        };
        let number = CONNECTIONS.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(connection(stream, peer, number, me.clone()));
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, number: u64, me: Arc<Me>) {
    let Ok(local) = stream.local_addr() else { return };
    // Answers are small and waited for. A socket that is already gone fails on its first read.
    let _ = stream.set_nodelay(true);
    let connection = Arc::new(Connection {
        me,
        peer: plain_address(peer),
        local: plain_address(local),
        number,
        reset: AtomicBool::new(false),
    });
    let socket = socket2::SockRef::from(&stream).try_clone();
    let service = service_fn(|request| answer(request, connection.clone()));
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http2().max_concurrent_streams(1024);
    let served = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(served);
    let ended = std::future::poll_fn(|cx| {
        let polled = served.as_mut().poll(cx).map(|_| ());
        if connection.reset.load(Ordering::Relaxed) { std::task::Poll::Ready(()) } else { polled }
    });
    ended.await;
    if let (true, Ok(socket)) = (connection.reset.load(Ordering::Relaxed), socket) {
        // Closing with a linger of zero sends RST (socket(7)); the last descriptor is hyper's, dropped after this.
        let _ = socket.set_linger(Some(std::time::Duration::ZERO));
    }
}

async fn answer(request: Request<Incoming>, connection: Arc<Connection>) -> Result<Response<Body>, Infallible> {
    if websocket::asked_for(&request) {
        return Ok(websocket::accept(request).map(|()| full(Bytes::new())));
    }
    static REQUESTS: AtomicU64 = AtomicU64::new(0);
    let request_number = REQUESTS.fetch_add(1, Ordering::Relaxed) + 1;
    let me = &connection.me;
    let (parts, body) = request.into_parts();
    if parts.uri.path() == "/healthz" {
        return Ok(identified(me, StatusCode::OK, full(Bytes::from_static(b"ok\n"))));
    }
    let wish = match Wish::of(&parts) {
        Ok(wish) => wish,
        Err(reason) => return Ok(identified(me, StatusCode::BAD_REQUEST, full(reason.into()))),
    };
    let received = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    if !wish.delay.is_zero() {
        tokio::time::sleep(wish.delay).await;
    }
    if wish.reset {
        connection.reset.store(true, Ordering::Relaxed);
        return std::future::pending().await;
    }
    let chance = wish.fail_percent.max(me.fail_percent);
    let told = wish.fail_on.as_ref().is_some_and(|which| *which == me.name || *which == me.version);
    if told || (chance > 0.0 && rand::random::<f64>() * 100.0 < chance) {
        return Ok(identified(me, StatusCode::SERVICE_UNAVAILABLE, full(Bytes::from_static(b"told to fail\n"))));
    }
    let status = StatusCode::from_u16(wish.status).unwrap_or(StatusCode::OK);
    if parts.headers.get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        // What the kubelet's gRPC probes ask (grpc.health.v1): SERVING, as a message of one field in one frame.
        let serving = Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1]);
        let health = parts.uri.path() == "/grpc.health.v1.Health/Check";
        return Ok(grpc(me, &wish, if health { serving } else { received }));
    }
    if let Some(bytes) = wish.body {
        return Ok(identified(me, status, full(vec![b'x'; bytes].into())));
    }
    let seen = connection.seen(&parts, received.len(), request_number);
    let mut response = identified(me, status, full(serde_json::to_vec(&seen).unwrap_or_default().into()));
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
    Ok(response)
}

impl Connection {
    fn seen(&self, parts: &http::request::Parts, body_bytes: usize, request: u64) -> Seen {
        let headers = parts.headers.iter().fold(BTreeMap::<String, String>::new(), |mut all, (name, value)| {
            let value = String::from_utf8_lossy(value.as_bytes());
            let entry = all.entry(name.to_string()).or_default();
            if !entry.is_empty() {
                entry.push_str(", ");
            }
            entry.push_str(&value);
            all
        });
        let authority = parts.uri.authority().map(ToString::to_string);
        Seen {
            name: self.me.name.clone(),
            version: self.me.version.clone(),
            namespace: self.me.namespace.clone(),
            peer: self.peer.to_string(),
            local: self.local.to_string(),
            protocol: format!("{:?}", parts.version),
            method: parts.method.to_string(),
            host: authority.or_else(|| headers.get("host").cloned()).unwrap_or_default(),
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().unwrap_or_default().to_owned(),
            headers,
            body_bytes,
            connection: self.number,
            request,
        }
    }
}

/// A gRPC-shaped answer: the request's body and the status in the trailers.
fn grpc(me: &Me, wish: &Wish, received: Bytes) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    let status = wish.grpc_status.as_deref().unwrap_or("0");
    trailers.insert("grpc-status", HeaderValue::from_str(status).unwrap_or(HeaderValue::from_static("2")));
    let frames = Full::new(received).with_trailers(async move { Some(Ok(trailers)) });
    let mut response = identified(me, StatusCode::OK, frames.boxed());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

fn identified(me: &Me, status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    for (name, value) in [("x-echo-name", &me.name), ("x-echo-version", &me.version)] {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

fn full(bytes: Bytes) -> Body {
    Full::new(bytes).boxed()
}
