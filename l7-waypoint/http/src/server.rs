//! A client's connection: sniffed, given to its chain, driven until it ends or is drained.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{CONNECTION, HeaderValue};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use l7_telemetry::Peer;
use strata_runtime::drain::Watch;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Sleep};
use xds_model::envoy::chain::HttpOptions;

use crate::body::ResponseBody;
use crate::conn::ConnInfo;
use crate::engine::Engine;
use crate::exec::LocalExec;
use crate::io::Rewind;
use crate::upgrade::Switch;

/// A connected client, as its requests see it.
pub(crate) struct Client {
    pub(crate) info: ConnInfo,
    pub(crate) source: Arc<Peer>,
    pub(crate) http2: bool,
    /// Left by a request that switched protocols on an HTTP/1.1 connection.
    pub(crate) switch: RefCell<Option<Switch>>,
    /// Set when the connection is to end after the current response.
    pub(crate) close: Cell<bool>,
    /// The process drains: HTTP/1.1 responses say `Connection: close`.
    draining: Cell<bool>,
    active: Cell<u32>,
    requests: Cell<u32>,
    last_active: Cell<Instant>,
}

impl Client {
    pub(crate) fn new(info: ConnInfo, source: Arc<Peer>, http2: bool) -> Rc<Self> {
        Rc::new(Self {
            info,
            source,
            http2,
            switch: RefCell::default(),
            close: Cell::new(false),
            draining: Cell::new(false),
            active: Cell::new(0),
            requests: Cell::new(0),
            last_active: Cell::new(Instant::now()),
        })
    }

    pub(crate) fn request_begins(&self) {
        self.active.set(self.active.get() + 1);
        self.requests.set(self.requests.get() + 1);
    }

    pub(crate) fn request_ends(&self) {
        self.active.set(self.active.get().saturating_sub(1));
        self.last_active.set(Instant::now());
    }
}

/// Serves HTTP/1.1.
pub(crate) async fn http1<T>(engine: Rc<Engine>, io: Rewind<T>, client: Rc<Client>, options: HttpOptions, drain: Watch)
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let service = service(engine, client.clone());
    let mut builder = http1::Builder::new();
    builder.preserve_header_case(options.preserve_header_case);
    // hyper's own limit is the same; setting one moves the parsed headers to the heap.
    if options.max_headers_count != 100 {
        builder.max_headers(options.max_headers_count.max(1) as usize);
    }
    builder.max_buf_size((options.max_request_headers_kb as usize * 1024).max(16 * 1024)).half_close(false);
    if let Some(timeout) = options.request_headers_timeout {
        builder.timer(TokioTimer::new()).header_read_timeout(timeout);
    }
    let mut connection = builder.serve_connection(TokioIo::new(io), service);
    let outcome = {
        let mut lifetime = pin!(Lifetime::new(&client, &options, drain));
        std::future::poll_fn(|cx| {
            if lifetime.as_mut().should_end(cx) {
                Pin::new(&mut connection).graceful_shutdown();
            }
            if lifetime.as_mut().overran(cx) {
                return Poll::Ready(Ok(()));
            }
            connection.poll_without_shutdown(cx)
        })
        .await
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, peer = %client.info.peer, "client connection ended");
        // A switch that was agreed on holds the client, which holds it.
        drop(client.switch.take());
        return;
    }
    let http1::Parts { io, read_buf, .. } = connection.into_parts();
    let mut io = io.into_inner();
    match client.switch.take() {
        Some(switch) => switch.run(Rewind::new(read_buf, io)).await,
        // The other end may be gone already.
        None => drop(io.shutdown().await),
    }
}

/// Serves HTTP/2 with prior knowledge.
pub(crate) async fn http2<T>(engine: Rc<Engine>, io: Rewind<T>, client: Rc<Client>, options: HttpOptions, drain: Watch)
where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let service = service(engine, client.clone());
    let mut builder = http2::Builder::new(LocalExec);
    builder.max_concurrent_streams(options.max_concurrent_streams.unwrap_or(1024));
    builder.max_header_list_size(options.max_request_headers_kb.max(16) * 1024);
    builder.initial_stream_window_size(256 * 1024).initial_connection_window_size(1024 * 1024);
    if !options.upgrades.is_empty() {
        builder.enable_connect_protocol();
    }
    let mut connection = pin!(builder.serve_connection(TokioIo::new(io), service));
    let mut lifetime = pin!(Lifetime::new(&client, &options, drain));
    let outcome = std::future::poll_fn(|cx| {
        if lifetime.as_mut().should_end(cx) {
            connection.as_mut().graceful_shutdown();
        }
        connection.as_mut().poll(cx)
    })
    .await;
    if let Err(error) = outcome {
        tracing::debug!(%error, peer = %client.info.peer, "client connection ended");
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, std::convert::Infallible>>>>;

fn service(
    engine: Rc<Engine>,
    client: Rc<Client>,
) -> impl hyper::service::Service<
    Request<hyper::body::Incoming>,
    Response = Response<ResponseBody>,
    Error = std::convert::Infallible,
    Future = Answer,
> {
    service_fn(move |request| -> Answer {
        let (engine, client) = (engine.clone(), client.clone());
        Box::pin(async move {
            let mut response = crate::request::handle(engine, client.clone(), request).await;
            if client.draining.get() && !client.http2 && response.status() != StatusCode::SWITCHING_PROTOCOLS {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok(response)
        })
    })
}

/// When a connection should end gracefully: drain, idle time, longest life, most requests.
struct Lifetime<'a> {
    client: &'a Client,
    idle: Option<Duration>,
    until: Option<Instant>,
    most_requests: Option<u32>,
    drain: Pin<Box<dyn Future<Output = ()>>>,
    /// When a drained connection without a request is closed.
    last_call: Option<Pin<Box<dyn Future<Output = ()>>>>,
    /// Held until the connection is over: that is what a drain waits for.
    watch: Watch,
    alarm: Option<Pin<Box<Sleep>>>,
    ending: bool,
    grace: Option<Pin<Box<Sleep>>>,
}

/// How long an HTTP/1.1 connection without a request may take to end once its end began.
const GRACE: Duration = Duration::from_secs(5);

impl<'a> Lifetime<'a> {
    fn new(client: &'a Client, options: &HttpOptions, drain: Watch) -> Self {
        let mut held = drain.clone();
        let idle = options.idle_timeout.filter(|timeout| !timeout.is_zero());
        let until = options.max_connection_duration.map(|most| Instant::now() + most);
        let first = [idle.map(|idle| Instant::now() + idle), until].into_iter().flatten().min();
        Self {
            client,
            idle,
            until,
            most_requests: options.max_requests_per_connection.filter(|most| *most > 0),
            drain: Box::pin(async move {
                held.signaled().await;
            }),
            last_call: None,
            watch: drain,
            alarm: first.map(|at| Box::pin(tokio::time::sleep_until(at))),
            ending: false,
            grace: None,
        }
    }

    /// True once, when the end should begin.
    fn should_end(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> bool {
        if self.ending {
            return false;
        }
        let worn_out = self.most_requests.is_some_and(|most| self.client.requests.get() >= most);
        let end = worn_out || self.client.close.get() || self.drained(cx) || self.overdue(cx);
        self.ending = end;
        end
    }

    /// Whether a drain ends the connection now. HTTP/2 tells the client to open another one. An HTTP/1.1 connection ends
    /// with its next response, which says so: closed at once, it would cut off a request that is on its way.
    fn drained(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.client.draining.get() {
            if self.drain.as_mut().poll(cx).is_pending() {
                return false;
            }
            self.client.draining.set(true);
            let mut watch = self.watch.clone();
            self.last_call = Some(Box::pin(async move { watch.last_call().await }));
        }
        self.client.http2 || self.last_call.as_mut().is_none_or(|last_call| last_call.as_mut().poll(cx).is_ready())
    }

    /// True when the connection does not end by itself: hyper waits for the rest of a request's head, which a client
    /// may never send.
    fn overran(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> bool {
        if !self.ending || self.client.active.get() > 0 {
            self.grace = None;
            return false;
        }
        // A drain has been patient before.
        let grace = if self.last_call.is_some() { Duration::ZERO } else { GRACE };
        let grace = self.grace.get_or_insert_with(|| Box::pin(tokio::time::sleep(grace)));
        grace.as_mut().poll(cx).is_ready()
    }

    fn overdue(&mut self, cx: &mut Context<'_>) -> bool {
        while let Some(alarm) = &mut self.alarm {
            if alarm.as_mut().poll(cx) == Poll::Pending {
                return false;
            }
            let now = Instant::now();
            if self.until.is_some_and(|until| until <= now) {
                return true;
            }
            let quiet_since = if self.client.active.get() > 0 { now } else { self.client.last_active.get() };
            let idle_at = self.idle.map(|idle| quiet_since + idle);
            if idle_at.is_some_and(|at| at <= now) {
                return true;
            }
            match [idle_at, self.until].into_iter().flatten().min() {
                Some(at) => alarm.as_mut().reset(at),
                None => self.alarm = None,
            }
        }
        false
    }
}
