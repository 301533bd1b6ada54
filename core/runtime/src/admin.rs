//! The admin server of a process: health, metrics, state as JSON, and live event streams, over its unix
//! socket and, where asked for, loopback TCP.
//!
//! Paths every process has: `/healthz/ready` (200 or 503 with what is missing), `/healthz/live`, `/metrics`
//! and `/stats/prometheus` (the same), `/` (a list of paths).
use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;

use crate::metrics::Registry;
use crate::{Readiness, drain};

type Body = BoxBody<Bytes, Infallible>;
type JsonFuture = Pin<Box<dyn Future<Output = serde_json::Value> + Send>>;
type JsonHandler = Arc<dyn Fn() -> JsonFuture + Send + Sync>;
type GetFuture = Pin<Box<dyn Future<Output = Reply> + Send>>;
type GetHandler = Arc<dyn Fn(String) -> GetFuture + Send + Sync>;
type PostFuture = Pin<Box<dyn Future<Output = Result<String, String>> + Send>>;
type PostHandler = Arc<dyn Fn(String) -> PostFuture + Send + Sync>;

/// How many recent lines of a stream a late reader gets.
const RECENT_LINES: usize = 1024;

/// A process's admin surface, built once and served on one or more listeners.
#[derive(Clone)]
pub struct Admin {
    component: &'static str,
    readiness: Readiness,
    registry: Registry,
    json: BTreeMap<&'static str, JsonHandler>,
    get: BTreeMap<&'static str, GetHandler>,
    post: BTreeMap<&'static str, PostHandler>,
    streams: BTreeMap<&'static str, Stream>,
}

/// What a handler of [`Admin::get`] answers with.
pub enum Reply {
    Text(String),
    Json(serde_json::Value),
}

#[derive(Clone)]
struct Stream {
    live: broadcast::Sender<Arc<str>>,
    recent: Arc<Mutex<VecDeque<Arc<str>>>>,
}

impl Admin {
    /// The paths every process has, and nothing else yet.
    pub fn new(component: &'static str, readiness: Readiness, registry: Registry) -> Self {
        let (json, get, post, streams) = Default::default();
        Self { component, readiness, registry, json, get, post, streams }
    }

    /// `GET path` answers the JSON the handler returns.
    pub fn json<F, Fut>(mut self, path: &'static str, handler: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = serde_json::Value> + Send + 'static,
    {
        self.json.insert(path, Arc::new(move || Box::pin(handler())));
        self
    }

    /// `GET path?query` answers what the handler makes of the raw query.
    pub fn get<F, Fut>(mut self, path: &'static str, handler: F) -> Self
    where
        F: Fn(String) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Reply> + Send + 'static,
    {
        self.get.insert(path, Arc::new(move |query| Box::pin(handler(query))));
        self
    }

    /// `POST path?query` runs the handler with the raw query: 200 with its text, or 400 with its error.
    pub fn post<F, Fut>(mut self, path: &'static str, handler: F) -> Self
    where
        F: Fn(String) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<String, String>> + Send + 'static,
    {
        self.post.insert(path, Arc::new(move |query| Box::pin(handler(query))));
        self
    }

    /// `GET path` answers the recent lines; with `?follow=true` it goes on with each new one.
    ///
    /// Must be called inside a tokio runtime: a task keeps the recent lines.
    pub fn stream(mut self, path: &'static str, live: broadcast::Sender<Arc<str>>) -> Self {
        let recent = Arc::new(Mutex::new(VecDeque::with_capacity(RECENT_LINES)));
        crate::task::spawn("admin-recent", keep_recent(live.subscribe(), recent.clone()));
        self.streams.insert(path, Stream { live, recent });
        self
    }

    /// Serves on a unix socket, replacing a stale one. Returns once the socket listens.
    ///
    /// # Errors
    /// If the socket cannot be bound.
    pub async fn serve_unix(&self, path: &Path, watch: drain::Watch) -> std::io::Result<()> {
        if let Some(folder) = path.parent() {
            tokio::fs::create_dir_all(folder).await?;
        }
        match tokio::fs::remove_file(path).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        let admin = Arc::new(self.clone());
        crate::task::spawn("admin-unix", async move {
            let mut watch = watch;
            loop {
                tokio::select! {
                    _ = watch.signaled() => return,
                    accepted = listener.accept() => match accepted {
                        Ok((io, _)) => admin.clone().spawn_connection(io),
                        Err(error) => back_off(&error).await,
                    },
                }
            }
        });
        Ok(())
    }

    /// Serves on TCP; admin addresses should be loopback. Returns the bound address.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn serve_tcp(&self, addr: SocketAddr, watch: drain::Watch) -> std::io::Result<SocketAddr> {
        let listener = TcpListener::bind(addr).await?;
        let bound = listener.local_addr()?;
        let admin = Arc::new(self.clone());
        crate::task::spawn("admin-tcp", async move {
            let mut watch = watch;
            loop {
                tokio::select! {
                    _ = watch.signaled() => return,
                    accepted = listener.accept() => match accepted {
                        Ok((io, _)) => admin.clone().spawn_connection(io),
                        Err(error) => back_off(&error).await,
                    },
                }
            }
        });
        Ok(bound)
    }

    fn spawn_connection(self: Arc<Self>, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        crate::task::spawn("admin-connection", async move {
            let service = hyper::service::service_fn(move |request| {
                let admin = self.clone();
                async move { Ok::<_, Infallible>(admin.answer(request).await) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(io), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "admin connection ended");
            }
        });
    }

    async fn answer(&self, request: Request<hyper::body::Incoming>) -> Response<Body> {
        let path = request.uri().path();
        let query = request.uri().query().unwrap_or_default();
        if request.method() == Method::POST {
            return match self.post.get(path) {
                Some(handler) => match handler(query.to_owned()).await {
                    Ok(text) => plain(StatusCode::OK, text),
                    Err(error) => plain(StatusCode::BAD_REQUEST, error),
                },
                None => plain(StatusCode::NOT_FOUND, self.paths()),
            };
        }
        if let Some(handler) = self.json.get(path) {
            return json(&handler().await);
        }
        if let Some(handler) = self.get.get(path) {
            return match handler(query.to_owned()).await {
                Reply::Text(text) => plain(StatusCode::OK, text),
                Reply::Json(value) => json(&value),
            };
        }
        if let Some(stream) = self.streams.get(path) {
            return stream.answer(query);
        }
        match path {
            "/" => plain(StatusCode::OK, self.paths()),
            "/healthz/live" => plain(StatusCode::OK, "live\n".to_owned()),
            "/healthz/ready" => match self.readiness.pending() {
                pending if pending.is_empty() => plain(StatusCode::OK, "ready\n".to_owned()),
                pending => plain(StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n", pending.join(", "))),
            },
            "/metrics" | "/stats/prometheus" => metrics(self.registry.encode()),
            _ => plain(StatusCode::NOT_FOUND, self.paths()),
        }
    }

    fn paths(&self) -> String {
        let fixed = ["/healthz/live", "/healthz/ready", "/metrics", "/stats/prometheus"];
        let mut paths: Vec<String> = fixed.iter().map(|path| format!("GET  {path}")).collect();
        paths.extend(self.json.keys().chain(self.get.keys()).map(|path| format!("GET  {path}")));
        paths.extend(self.streams.keys().map(|path| format!("GET  {path}?follow=true")));
        paths.extend(self.post.keys().map(|path| format!("POST {path}")));
        paths.sort();
        format!("{} admin\n{}\n", self.component, paths.join("\n"))
    }
}

impl Stream {
    fn answer(&self, query: &str) -> Response<Body> {
        // Subscribe before copying the past: a line between the two may come twice, none is lost.
        let live = self.live.subscribe();
        let past: Vec<Arc<str>> = self.recent.lock().iter().cloned().collect();
        let past = futures::stream::iter(past).map(|text| line(&text));
        let body = if query.split('&').any(|pair| pair == "follow=true") {
            let live = BroadcastStream::new(live).map(|next| match next {
                Ok(text) => line(&text),
                Err(BroadcastStreamRecvError::Lagged(count)) => line(&format!("{{\"lost\":{count}}}")),
            });
            BodyExt::boxed(StreamBody::new(past.chain(live)))
        } else {
            BodyExt::boxed(StreamBody::new(past))
        };
        with_type("application/x-ndjson", body)
    }
}

async fn keep_recent(mut live: broadcast::Receiver<Arc<str>>, recent: Arc<Mutex<VecDeque<Arc<str>>>>) {
    loop {
        match live.recv().await {
            Ok(text) => {
                let mut recent = recent.lock();
                if recent.len() == RECENT_LINES {
                    recent.pop_front();
                }
                recent.push_back(text);
            }
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// Out of file descriptors or the like: accepting again at once would only burn CPU.
async fn back_off(error: &std::io::Error) {
    tracing::warn!(%error, "admin accept failed");
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
}

fn line(text: &str) -> Result<Frame<Bytes>, Infallible> {
    let mut bytes = Vec::with_capacity(text.len() + 1);
    bytes.extend_from_slice(text.as_bytes());
    bytes.push(b'\n');
    Ok(Frame::data(Bytes::from(bytes)))
}

fn with_type(content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

fn plain(status: StatusCode, text: String) -> Response<Body> {
    let mut response = with_type("text/plain; charset=utf-8", Full::new(Bytes::from(text)).boxed());
    *response.status_mut() = status;
    response
}

fn metrics(text: String) -> Response<Body> {
    with_type("application/openmetrics-text; version=1.0.0; charset=utf-8", Full::new(Bytes::from(text)).boxed())
}

fn json(value: &serde_json::Value) -> Response<Body> {
    let text = serde_json::to_vec_pretty(value).unwrap_or_else(|error| error.to_string().into_bytes());
    with_type("application/json", Full::new(Bytes::from(text)).boxed())
}

#[cfg(test)]
mod tests;
