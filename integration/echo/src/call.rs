//! The HTTP client: many requests, one summary.
mod summary;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::failure;
use crate::serve::duration;
use summary::{Answer, Summary};

/// What to ask for, how often and how fast.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// http://ADDRESS:PORT/PATH or http://NAME:PORT/PATH; a name is looked up once, at the start
    url: Uri,
    /// The Host header (:authority in HTTP/2)
    #[arg(long)]
    host: Option<String>,
    /// NAME: VALUE, may be repeated
    #[arg(long = "header", short = 'H', value_parser = header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    #[arg(long, default_value = "GET")]
    method: Method,
    /// Body to send
    #[arg(long, default_value = "")]
    data: String,
    /// How many requests; default: 1, or with --duration as many as fit; 0: until stopped
    #[arg(long)]
    count: Option<u64>,
    /// Stop after this time, for example 5s; SIGTERM stops too
    #[arg(long, value_parser = time)]
    duration: Option<Duration>,
    /// Requests a second, all workers together; 0: as fast as they are answered
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    /// Workers, each with a connection of its own
    #[arg(long, default_value_t = 1)]
    concurrency: usize,
    /// For one request with its connection, for example 2s
    #[arg(long, value_parser = time, default_value = "10s")]
    timeout: Duration,
    /// A new connection for every request instead of one per worker
    #[arg(long)]
    new_connection: bool,
    /// HTTP/2 with prior knowledge instead of HTTP/1.1
    #[arg(long)]
    http2: bool,
    /// List every request: [milliseconds since 1970 when it began, status (0: error), version that answered, ms it took]
    #[arg(long)]
    samples: bool,
}

fn time(text: &str) -> Result<Duration, String> {
    duration(text).ok_or_else(|| format!("{text:?} is not a time such as 200ms or 5s"))
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("not of the form NAME: VALUE")?;
    let name = name.trim().parse().map_err(|_| format!("{name:?} is not a header name"))?;
    Ok((name, value.trim().parse().map_err(|_| format!("{value:?} is not a header value"))?))
}

struct Work {
    args: Args,
    target: SocketAddr,
    uri: Uri,
    host: String,
    started: Instant,
    next: AtomicU64,
    stopped: AtomicBool,
    summary: Mutex<Summary>,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let authority = args.url.authority().context("the URL needs http://ADDRESS:PORT")?;
    if args.url.scheme_str() != Some("http") {
        bail!("only http:// is spoken");
    }
    let port = authority.port_u16().unwrap_or(80);
    let target = crate::target(&format!("{}:{port}", authority.host())).map_err(anyhow::Error::msg)?;
    let host = args.host.clone().unwrap_or_else(|| authority.to_string());
    let path = args.url.path_and_query().map_or("/", |path| path.as_str());
    let uri = if args.http2 { format!("http://{host}{path}") } else { path.to_owned() };
    let work = Arc::new(Work {
        target,
        uri: uri.parse().context("path")?,
        host,
        started: Instant::now(),
        next: AtomicU64::new(0),
        stopped: AtomicBool::new(false),
        summary: Mutex::new(Summary::new(args.samples)),
        args,
    });
    let workers: Vec<_> = (0..work.args.concurrency.max(1)).map(|_| tokio::spawn(worker(work.clone()))).collect();
    let (mut terminated, stopping) = (signal(SignalKind::terminate())?, work.clone());
    tokio::spawn(async move {
        terminated.recv().await;
        stopping.stopped.store(true, Ordering::Relaxed);
    });
    for worker in workers {
        worker.await?;
    }
    let mut summary = work.summary.lock().await;
    summary.finish(work.started.elapsed());
    crate::print(&*summary)
}

/// One worker: takes the next number, waits for its turn, asks.
async fn worker(work: Arc<Work>) {
    let mut sender = None;
    loop {
        let number = work.next.fetch_add(1, Ordering::Relaxed);
        let args = &work.args;
        let limit = match args.count {
            Some(0) => u64::MAX,
            Some(count) => count,
            None if args.duration.is_some() => u64::MAX,
            None => 1,
        };
        if number >= limit || work.stopped.load(Ordering::Relaxed) {
            return;
        }
        if args.rate > 0.0 {
            let turn = work.started + Duration::from_secs_f64(number as f64 / args.rate);
            tokio::time::sleep_until(turn.into()).await;
        }
        if args.duration.is_some_and(|limit| work.started.elapsed() >= limit) {
            return;
        }
        let began = Instant::now();
        let result = match timeout(args.timeout, ask(&work, &mut sender)).await {
            Ok(result) => result,
            Err(_) => Err("timeout".to_owned()),
        };
        if result.is_err() || args.new_connection {
            sender = None;
        }
        work.summary.lock().await.record(work.started, began, result);
    }
}

/// One request; connects if there is no connection that still works. As HTTP clients do, a request of which a kept
/// connection sent nothing before it ended is sent on another one (RFC 9112 section 9.3.1).
async fn ask(work: &Work, sender: &mut Option<Sender>) -> Result<Answer, String> {
    if let Some(kept) = sender.as_mut().filter(|kept| !kept.is_closed()) {
        match kept.send(request(work)?).await {
            Err(error) if error.is_canceled() => {}
            sent => return answer(sent).await,
        }
    }
    let fresh = sender.insert(Sender::connect(work).await?);
    answer(fresh.send(request(work)?).await).await
}

fn request(work: &Work) -> Result<Request<Full<Bytes>>, String> {
    let mut request = Request::new(Full::new(Bytes::from(work.args.data.clone())));
    *request.method_mut() = work.args.method.clone();
    *request.uri_mut() = work.uri.clone();
    if !work.args.http2 {
        let host = HeaderValue::from_str(&work.host).map_err(|error| error.to_string())?;
        request.headers_mut().insert("host", host);
    }
    for (name, value) in &work.args.headers {
        request.headers_mut().append(name, value.clone());
    }
    Ok(request)
}

async fn answer(sent: Result<http::Response<hyper::body::Incoming>, hyper::Error>) -> Result<Answer, String> {
    let response = sent.map_err(|error| failure::name_of(&error))?;
    let (parts, body) = response.into_parts();
    let collected = body.collect().await.map_err(|error| format!("body: {}", failure::name_of(&error)))?;
    let trailers = collected.trailers().cloned().unwrap_or_default();
    Ok(Answer::new(&parts, &trailers, &collected.to_bytes()))
}

enum Sender {
    One(http1::SendRequest<Full<Bytes>>),
    Two(http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    async fn connect(work: &Work) -> Result<Sender, String> {
        let stream = TcpStream::connect(work.target).await;
        let stream = stream.map_err(|error| format!("connect: {}", failure::name(&error)))?;
        // Failing here means the connection is gone already; the request will say so.
        let _ = stream.set_nodelay(true);
        let (peer, local) = (stream.peer_addr().ok(), stream.local_addr().ok());
        work.summary.lock().await.connected(peer, local);
        let io = TokioIo::new(stream);
        let handshake = |error: hyper::Error| format!("handshake: {}", failure::name_of(&error));
        if work.args.http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.map_err(handshake)?;
            tokio::spawn(connection);
            Ok(Sender::Two(sender))
        } else {
            let (sender, connection) = http1::handshake(io).await.map_err(handshake)?;
            tokio::spawn(connection);
            Ok(Sender::One(sender))
        }
    }

    fn is_closed(&self) -> bool {
        match self {
            Sender::One(sender) => sender.is_closed(),
            Sender::Two(sender) => sender.is_closed(),
        }
    }

    async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<http::Response<hyper::body::Incoming>, hyper::Error> {
        match self {
            Sender::One(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Sender::Two(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        }
    }
}
