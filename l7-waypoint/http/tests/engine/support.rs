//! A mesh in a process: [`Mesh`] holds the engine, the upstreams and what they were asked.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures::future::LocalBoxFuture;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use l7_authn::JwksStore;
use l7_http::{ConnInfo, Connector, Engine, EngineConfig, Io, Shared};
use l7_route::Snapshot;
use l7_telemetry::{RequestEvent, Telemetry};
use strata_runtime::drain;
use tokio::io::DuplexStream;
use xds_model::envoy::WaypointConfig;
use xds_model::envoy::cluster::{Cluster, Endpoint, EndpointTarget};

pub(crate) type Body = BoxBody<Bytes, Infallible>;
pub(crate) type RawHandler = Rc<dyn Fn(DuplexStream) -> LocalBoxFuture<'static, ()>>;
pub(crate) type Handler = Rc<dyn Fn(String, Request<Incoming>) -> LocalBoxFuture<'static, Response<Body>>>;

pub(crate) fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed()
}

pub(crate) fn status(code: u16) -> Response<Body> {
    Response::builder().status(code).body(full(format!("status {code}"))).unwrap()
}

/// What an upstream was asked.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) endpoint: String,
    pub(crate) authority: String,
    pub(crate) path: String,
    pub(crate) method: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// Connects to in-process servers that run `handler`.
pub(crate) struct Upstreams {
    handler: RefCell<Handler>,
    pub(crate) seen: Rc<RefCell<Vec<Seen>>>,
    pub(crate) connections: Cell<u32>,
    /// The host each connection was made for, where it counts.
    pub(crate) hosts: RefCell<Vec<Option<String>>>,
    /// Endpoints that refuse connections.
    pub(crate) down: RefCell<Vec<String>>,
    /// Instead of HTTP.
    pub(crate) raw: RefCell<Option<RawHandler>>,
    /// Servers of their own, by the end of their endpoints' addresses.
    pub(crate) services: RefCell<Vec<(String, RawHandler)>>,
}

#[derive(Clone, Copy)]
pub(crate) struct Local;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

struct Shim(Rc<Upstreams>);

impl Connector for Shim {
    fn connect(
        &self,
        endpoint: &Endpoint,
        _: &Arc<Cluster>,
        host: Option<&Arc<str>>,
    ) -> LocalBoxFuture<'static, std::io::Result<Box<dyn Io>>> {
        self.0.hosts.borrow_mut().push(host.map(|host| host.to_string()));
        let name = match &endpoint.target {
            EndpointTarget::Hbone { authority, .. } => authority.to_string(),
            EndpointTarget::Plain { address, .. } => address.to_string(),
            EndpointTarget::Unreachable { reason } => panic!("{reason}"),
        };
        let upstreams = self.0.clone();
        Box::pin(async move {
            if upstreams.down.borrow().contains(&name) {
                return Err(std::io::ErrorKind::ConnectionRefused.into());
            }
            upstreams.connections.set(upstreams.connections.get() + 1);
            let (near, far) = tokio::io::duplex(64 * 1024);
            let service = upstreams.services.borrow().iter().find(|(end, _)| name.ends_with(end)).cloned();
            let raw = service.map(|(_, handler)| handler).or_else(|| upstreams.raw.borrow().clone());
            match raw {
                Some(raw) => drop(tokio::task::spawn_local(raw(far))),
                None => drop(tokio::task::spawn_local(serve(upstreams, name, far))),
            }
            Ok(Box::new(near) as Box<dyn Io>)
        })
    }
}

async fn serve(upstreams: Rc<Upstreams>, name: String, io: DuplexStream) {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let (upstreams, name) = (upstreams.clone(), name.clone());
        async move {
            let (parts, body) = request.into_parts();
            let host = parts.headers.get("host").map(|host| host.to_str().unwrap().to_owned());
            let seen = Seen {
                endpoint: name.clone(),
                authority: parts.uri.authority().map(ToString::to_string).or(host).unwrap_or_default(),
                path: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
                method: parts.method.to_string(),
                headers: parts.headers.clone(),
                body: Bytes::new(),
            };
            let index = upstreams.seen.borrow().len();
            upstreams.seen.borrow_mut().push(seen);
            let handler = upstreams.handler.borrow().clone();
            let collect = parts.headers.contains_key("x-collect");
            let request = if collect {
                let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                upstreams.seen.borrow_mut()[index].body = body;
                return Ok::<_, Infallible>(status(200));
            } else {
                Request::from_parts(parts, body)
            };
            Ok(handler(name, request).await)
        }
    });
    let mut builder = hyper_util::server::conn::auto::Builder::new(Local);
    builder.http2().enable_connect_protocol();
    // Whatever ends the connection ends the test's wish for it.
    let _ = builder.serve_connection_with_upgrades(TokioIo::new(io), service).await;
}

pub(crate) struct Mesh {
    pub(crate) engine: Rc<Engine>,
    pub(crate) upstreams: Rc<Upstreams>,
    pub(crate) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(crate) registry: strata_runtime::metrics::Registry,
    events: RefCell<tokio::sync::broadcast::Receiver<Arc<str>>>,
    pub(crate) trigger: RefCell<Option<drain::Trigger>>,
    pub(crate) watch: drain::Watch,
}

/// Runs a test on a worker-like runtime with paused time.
pub(crate) fn run<F: Future<Output = ()>>(test: impl FnOnce() -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async { test().await });
}

impl Mesh {
    /// A mesh whose upstreams answer 200 with their own address as the body.
    pub(crate) fn new(config: &WaypointConfig) -> Self {
        let (snapshot, rejections) = Snapshot::compile(config);
        assert!(rejections.is_empty(), "{rejections:?}");
        Self::of(snapshot)
    }

    /// As a later configuration comes.
    pub(crate) fn renew(&self, config: &WaypointConfig) {
        let (snapshot, rejections) = Snapshot::compile(config);
        assert!(rejections.is_empty(), "{rejections:?}");
        self.snapshot.store(Arc::new(snapshot));
    }

    pub(crate) fn of(snapshot: Snapshot) -> Self {
        let registry = strata_runtime::metrics::Registry::new();
        let telemetry = Telemetry::new(&registry);
        let events = telemetry.events();
        // Two receivers: as if somebody followed.
        let (events, _second) = (events.subscribe(), Box::leak(Box::new(events.subscribe())));
        let shared = Shared::new(telemetry, JwksStore::default(), None);
        let snapshot = Arc::new(ArcSwap::from_pointee(snapshot));
        let answer: Handler = Rc::new(|endpoint, _| Box::pin(async move { Response::new(full(endpoint)) }));
        let upstreams = Rc::new(Upstreams {
            handler: RefCell::new(answer),
            seen: Rc::default(),
            connections: Cell::new(0),
            hosts: RefCell::default(),
            down: RefCell::default(),
            raw: RefCell::default(),
            services: RefCell::default(),
        });
        let mut config = EngineConfig::new(snapshot.clone(), shared, Rc::new(Shim(upstreams.clone())));
        config.seed = Some(1);
        let (trigger, watch) = drain::channel();
        let (events, trigger) = (RefCell::new(events), RefCell::new(Some(trigger)));
        Self { engine: Engine::new(config), upstreams, snapshot, registry, events, trigger, watch }
    }

    pub(crate) fn handler<F, Fut>(&self, handler: F)
    where
        F: Fn(String, Request<Incoming>) -> Fut + 'static,
        Fut: Future<Output = Response<Body>> + 'static,
    {
        *self.upstreams.handler.borrow_mut() = Rc::new(move |endpoint, request| Box::pin(handler(endpoint, request)));
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.upstreams.seen.borrow().clone()
    }

    pub(crate) fn event(&self) -> RequestEvent {
        let text = self.events.borrow_mut().try_recv().expect("an event");
        serde_json::from_str(&text).unwrap()
    }

    /// A connection to the engine, as raw bytes.
    pub(crate) fn connect(&self, info: ConnInfo) -> DuplexStream {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let (engine, watch) = (self.engine.clone(), self.watch.clone());
        tokio::task::spawn_local(async move { engine.serve(far, info, watch).await });
        near
    }

    pub(crate) async fn http1(&self, info: ConnInfo) -> hyper::client::conn::http1::SendRequest<Body> {
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(self.connect(info))).await.unwrap();
        tokio::task::spawn_local(async move { drop(connection.with_upgrades().await) });
        sender
    }

    pub(crate) async fn http2(&self, info: ConnInfo) -> hyper::client::conn::http2::SendRequest<Body> {
        let handshake = hyper::client::conn::http2::handshake(Local, TokioIo::new(self.connect(info)));
        let (sender, connection) = handshake.await.unwrap();
        tokio::task::spawn_local(async move { drop(connection.await) });
        sender
    }

    /// One request on a connection of its own.
    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        self.send_as(info(), request).await
    }

    pub(crate) async fn send_as(&self, info: ConnInfo, request: Request<Body>) -> Answer {
        let response = self.http1(info).await.send_request(request).await.unwrap();
        Answer::read(response).await
    }
}

pub(crate) fn info() -> ConnInfo {
    ConnInfo::plain("10.8.0.10:40000".parse().unwrap(), crate::config::vip())
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
    pub(crate) trailers: Option<HeaderMap>,
}

impl Answer {
    pub(crate) async fn read(response: Response<Incoming>) -> Self {
        let (parts, body) = response.into_parts();
        let collected = body.collect().await.unwrap();
        let trailers = collected.trailers().cloned();
        let body = String::from_utf8(collected.to_bytes().to_vec()).unwrap();
        Self { status: parts.status, headers: parts.headers, body, trailers }
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

pub(crate) fn get(path: &str) -> Request<Body> {
    Request::get(path).header("host", "reviews").body(full("")).unwrap()
}

pub(crate) fn with(mut request: Request<Body>, name: &'static str, value: &str) -> Request<Body> {
    request.headers_mut().append(name, value.parse().unwrap());
    request
}
