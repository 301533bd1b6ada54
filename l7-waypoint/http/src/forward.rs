//! Getting a request answered by an upstream: host, connection, attempt, and again where the policy says so.

mod failed;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::{HOST, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Incoming};
use hyper::ext::Protocol;
use hyper_util::rt::TokioIo;
use l7_resilience::{Kind, Outcome, Reset, RetryPolicy, Rng};
use l7_route::ClusterRef;
use l7_route::chain::ClusterTarget;
use l7_route::route::Retry;
use l7_telemetry::Flags;
use serde_json::Value;
use smallvec::SmallVec;
use tokio::time::Instant;
use xds_model::envoy::cluster::UpstreamVersion;

use crate::body::{Deadline, RequestBody, Upload};
use crate::engine::Worker;
use crate::exchange::{Exchange, Lease, grpc_status};
use crate::filters::view;
use crate::io::Rewind;
use crate::pool::{ConnectError, HostPool};
use crate::reply::{Reply, http_status_of};
use crate::upgrade::{UpstreamSide, ask_http1};
use crate::upstream::{Choice, Mode, Picked, Upstream};
use failed::{Failed, overflow, timed_out};

const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");
const RATE_LIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");

/// What is to be done.
pub(crate) struct Forwarding<'a> {
    pub(crate) worker: &'a Rc<Worker>,
    pub(crate) cluster: &'a ClusterRef,
    /// Status when the cluster is not known.
    pub(crate) not_found: u16,
    pub(crate) policy: Option<&'a RetryPolicy>,
    pub(crate) retry: Option<&'a Retry>,
    pub(crate) hash: Option<u64>,
    pub(crate) seed: u64,
    pub(crate) include_attempts: bool,
    pub(crate) authority_from_endpoint: bool,
    pub(crate) claims: Option<&'a Arc<Value>>,
}

/// The state of the attempts.
struct Attempts {
    upstream: Rc<Upstream>,
    tried: SmallVec<[usize; 4]>,
    priorities: u64,
    rng: Rng,
    /// The host of the attempt under way.
    current: Option<usize>,
}

/// A response, and the stream behind it when protocols were switched.
type Answered = (Response<Incoming>, Option<UpstreamSide>);

impl Forwarding<'_> {
    /// Does it; an error is the answer to give.
    pub(crate) async fn run(
        &self,
        exchange: &mut Exchange,
        deadline: Option<&mut Deadline>,
    ) -> Result<Answered, Reply> {
        let engine = exchange.engine.clone();
        let known = !matches!(self.cluster.target, ClusterTarget::Unknown);
        let upstream = known.then(|| engine.upstream(self.worker, &self.cluster.name)).flatten();
        exchange.cluster = Some(self.cluster.name.clone());
        let Some(upstream) = upstream else {
            exchange.reasons.push(format!("cluster {} is not known", self.cluster.name));
            return Err(Reply::new(self.not_found, "", Flags::NO_CLUSTER, "cluster_not_found"));
        };
        exchange.service = upstream.shared.service.clone();
        let balancer = &upstream.shared.balancer;
        let guard = balancer.breakers().acquire(Kind::Request, &balancer.spec().limits);
        exchange.held.request = Some(guard.ok_or_else(overflow)?);
        let (tried, rng) = (SmallVec::new(), Rng::new(self.seed));
        let mut attempts = Attempts { upstream, tried, priorities: 0, rng, current: None };
        let outcome = match deadline {
            None => self.attempts(exchange, &mut attempts).await,
            Some(deadline) => {
                let outcome = tokio::select! {
                    biased;
                    outcome = self.attempts(exchange, &mut attempts) => Some(outcome),
                    () = deadline => None,
                };
                outcome.unwrap_or_else(|| {
                    attempts.report(exchange, Outcome::LocalFailure);
                    Err(timed_out("response_timeout"))
                })
            }
        };
        if let Some(upload) = &exchange.upload
            && exchange.mirrors.is_empty()
        {
            upload.commit();
        }
        outcome
    }

    async fn attempts(&self, exchange: &mut Exchange, attempts: &mut Attempts) -> Result<Answered, Reply> {
        loop {
            exchange.attempts += 1;
            let outcome = match self.policy.and_then(|policy| policy.per_try) {
                None => self.attempt(exchange, attempts).await,
                Some(most) => {
                    let late = || Err(Failed::Reset { reset: Reset::PerTryTimeout, transport: None });
                    tokio::time::timeout(most, self.attempt(exchange, attempts)).await.unwrap_or_else(|_| late())
                }
            };
            attempts.judge(exchange, &outcome);
            if !self.retriable(exchange, &outcome) {
                return outcome.map_err(|failed| failed.reply(exchange));
            }
            match self.prepare_retry(exchange, attempts) {
                Ok(()) => {}
                Err(flag) => {
                    exchange.flags.set(flag);
                    return outcome.map_err(|failed| failed.reply(exchange));
                }
            }
            exchange.held.active = None;
            // What failed is closed.
            if let (Ok((response, None)), Some(lease)) = (outcome, exchange.held.lease.take()) {
                read_away(response, lease, exchange.upload.clone());
            }
            let policy = self.policy.map(|policy| policy.backoff).unwrap_or_default();
            tokio::time::sleep(policy.wait(exchange.attempts, &mut attempts.rng)).await;
        }
    }

    /// Whether the policy wants another try for such an outcome, limits aside.
    fn retriable(&self, exchange: &Exchange, outcome: &Result<Answered, Failed>) -> bool {
        let (Some(policy), Some(retry)) = (self.policy, self.retry) else { return false };
        let wanted = match outcome {
            Ok((_, Some(_))) => false,
            Ok((response, None)) => {
                let headers = response.headers();
                let grpc = grpc_status(headers).and_then(|code| u8::try_from(code).ok());
                let listed = policy.on.has(l7_resilience::RetryOn::HEADERS)
                    && retry.retriable_headers.iter().any(|test| test.matches_headers(headers));
                listed || policy.retries_response(response.status().as_u16(), grpc, headers.contains_key(RATE_LIMITED))
            }
            Err(Failed::Reset { reset, .. }) => policy.retries_reset(*reset),
            Err(Failed::Protocol(_)) => policy.retries_reset(Reset::Remote),
            Err(Failed::NoHost | Failed::ClientGone) => false,
        };
        wanted && self.request_allows(exchange, retry)
    }

    fn request_allows(&self, exchange: &Exchange, retry: &Retry) -> bool {
        let Some(head) = exchange.head.as_ref().filter(|_| !retry.retriable_request_headers.is_empty()) else {
            return true;
        };
        let request = view(head, &exchange.client, self.claims);
        retry.retriable_request_headers.iter().any(|test| test.matches(&request))
    }

    /// Takes what a retry needs; the flag says why there is none.
    fn prepare_retry(&self, exchange: &mut Exchange, attempts: &mut Attempts) -> Result<(), Flags> {
        let policy = self.policy.ok_or(Flags::RETRY_LIMIT)?;
        if exchange.attempts > policy.retries {
            return Err(if policy.retries > 0 { Flags::RETRY_LIMIT } else { Flags::default() });
        }
        if exchange.upload.as_ref().is_some_and(|upload| !upload.can_repeat()) {
            exchange.reasons.push("no retry: the request body is too large to be kept".to_owned());
            return Err(Flags::default());
        }
        let balancer = &attempts.upstream.shared.balancer;
        exchange.held.retry = None;
        let guard = balancer.breakers().acquire(Kind::Retry, &balancer.spec().limits);
        exchange.held.retry = Some(guard.ok_or(Flags::UPSTREAM_OVERFLOW)?);
        if let Some(index) = attempts.current.take() {
            attempts.tried.push(index);
            if policy.other_priorities.is_some_and(|every| every > 0 && exchange.attempts.is_multiple_of(every)) {
                attempts.priorities |= balancer.priority_bit(index);
            }
        }
        Ok(())
    }

    async fn attempt(&self, exchange: &mut Exchange, attempts: &mut Attempts) -> Result<Answered, Failed> {
        let engine = exchange.engine.clone();
        let picked = self.pick(exchange, attempts).await.ok_or(Failed::NoHost)?;
        let Picked { index, pool } = picked;
        attempts.current = index;
        exchange.host = Some(pool.key.clone());
        exchange.destination = pool.peer(|endpoint| engine.destination(endpoint));
        exchange.held.active = index.map(|index| attempts.upstream.shared.balancer.host(index).begin());
        let mut fresh = false;
        loop {
            let upload = exchange.upload.clone();
            let body = || upload.as_ref().map_or(RequestBody::Empty, |upload| upload.attempt());
            let mut lease = self.connect(exchange, &pool, fresh).await?;
            let request = self.build(exchange, &pool, &lease, body())?;
            let sent = Instant::now();
            let (answer, reused) = match &mut lease {
                Lease::H1(lease) => (lease.send(request).await, lease.reused()),
                Lease::H2(lease) => (lease.send(request).await, lease.reused()),
            };
            let unsent = match answer {
                Ok(response) => {
                    exchange.service_time = Some(sent.elapsed());
                    return self.answered(exchange, lease, response).await;
                }
                Err(unsent) => unsent,
            };
            if upload.as_ref().is_some_and(|upload| upload.failed()) {
                return Err(Failed::ClientGone);
            }
            // An idle connection that the upstream closed meanwhile says nothing about the upstream's health.
            let harmless =
                unsent.request.is_some() || (unsent.error.is_incomplete_message() && self.may_repeat(exchange));
            if reused && !fresh && harmless && upload.as_ref().is_none_or(|upload| upload.can_repeat()) {
                fresh = true;
                continue;
            }
            return Err(Failed::of(&unsent.error, unsent.request.is_some()));
        }
    }

    fn may_repeat(&self, exchange: &Exchange) -> bool {
        exchange.head.as_ref().is_some_and(|head| head.method.is_idempotent())
    }

    async fn pick(&self, exchange: &Exchange, attempts: &mut Attempts) -> Option<Picked> {
        let upstream = attempts.upstream.clone();
        if upstream.shared.mode == Mode::ByAuthority {
            let authority = &exchange.head.as_ref()?.authority;
            let port = authority.port_u16().unwrap_or(exchange.client.info.destination.port());
            let host = authority.host().trim_start_matches('[').trim_end_matches(']');
            let address = tokio::net::lookup_host((host, port)).await.ok()?.next()?;
            return Some(upstream.at(address));
        }
        let others = self.policy.and_then(|policy| policy.other_hosts);
        let host = Some(exchange.head.as_ref()?.authority.host());
        upstream.pick(Choice {
            hash: self.hash,
            rng: &mut attempts.rng,
            tried: if others.is_some() { &attempts.tried } else { &[] },
            attempts: others.map_or(1, |most| most.max(1)),
            skip_priorities: attempts.priorities,
            now: exchange.engine.config.shared.now(),
            original: exchange.client.info.destination,
            host,
        })
    }

    async fn connect(&self, exchange: &mut Exchange, pool: &Rc<HostPool>, fresh: bool) -> Result<Lease, Failed> {
        let http2 = match pool.cluster.http.version {
            UpstreamVersion::Http2 => true,
            UpstreamVersion::SameAsDownstream => exchange.client.http2,
            UpstreamVersion::Http1 | UpstreamVersion::Auto => false,
        };
        // WebSockets over HTTP/2 need the upstream's consent; on HTTP/1.1 every server knows them.
        let http2 = http2
            && (exchange.head.as_ref().is_none_or(|head| head.upgrade.is_none())
                || pool.cluster.http.version == UpstreamVersion::Http2);
        let lease = if http2 { pool.h2(fresh).await.map(Lease::H2) } else { pool.h1(fresh).await.map(Lease::H1) };
        let lease = lease.map_err(|error| {
            let (reset, transport) = match error {
                ConnectError::Overflow => (Reset::Overflow, None),
                ConnectError::TimedOut => (Reset::ConnectFailure, Some("connection timeout".to_owned())),
                ConnectError::Failed(text) => (Reset::ConnectFailure, Some(format!("delayed connect error: {text}"))),
            };
            Failed::Reset { reset, transport }
        })?;
        exchange.upstream_local = match &lease {
            Lease::H1(lease) => lease.local_addr(),
            Lease::H2(lease) => lease.local_addr(),
        };
        Ok(lease)
    }

    fn build(
        &self,
        exchange: &Exchange,
        pool: &HostPool,
        lease: &Lease,
        body: RequestBody,
    ) -> Result<Request<RequestBody>, Failed> {
        let head = exchange.head.as_ref().ok_or(Failed::ClientGone)?;
        let authority = match (&pool.endpoint.hostname, self.authority_from_endpoint) {
            (Some(hostname), true) => hostname.parse().unwrap_or_else(|_| head.authority.clone()),
            _ => head.authority.clone(),
        };
        let mut request = Request::new(body);
        *request.method_mut() = head.method.clone();
        *request.headers_mut() = head.headers.clone();
        if self.include_attempts {
            request.headers_mut().insert(ATTEMPT_COUNT, HeaderValue::from(exchange.attempts));
        }
        match lease {
            Lease::H1(_) => {
                *request.uri_mut() = Uri::from(head.path.clone());
                let host = match (&head.host, self.authority_from_endpoint) {
                    (Some(host), false) => host.clone(),
                    _ => HeaderValue::from_str(authority.as_str())
                        .map_err(|error| Failed::Protocol(error.to_string()))?,
                };
                request.headers_mut().insert(HOST, host);
                request.headers_mut().remove(http::header::TE);
                ask_http1(head, &mut request);
            }
            Lease::H2(lease) => {
                let uri = Uri::builder().scheme(head.scheme).authority(authority).path_and_query(head.path.clone());
                *request.uri_mut() = uri.build().map_err(|error| Failed::Protocol(error.to_string()))?;
                *request.version_mut() = Version::HTTP_2;
                if let Some(protocol) = &head.upgrade {
                    if !lease.extended_connect() {
                        return Err(Failed::Protocol("the upstream takes no WebSockets over HTTP/2".into()));
                    }
                    *request.method_mut() = Method::CONNECT;
                    // Only WebSockets are known by this way; the name is the client's own.
                    debug_assert_eq!(protocol, "websocket");
                    request.extensions_mut().insert(Protocol::from_static("websocket"));
                }
            }
        }
        Ok(request)
    }

    async fn answered(
        &self,
        exchange: &mut Exchange,
        lease: Lease,
        mut response: Response<Incoming>,
    ) -> Result<Answered, Failed> {
        let wanted = exchange.head.as_ref().and_then(|head| head.upgrade.as_deref());
        let side = match (lease, wanted) {
            (Lease::H1(lease), Some(_)) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                let parts =
                    lease.into_upgraded().await.ok_or_else(|| Failed::Protocol("upgrade without a stream".into()))?;
                Some(UpstreamSide::Stream(Rewind::new(parts.read, parts.io)))
            }
            (Lease::H2(lease), Some(_)) if response.status() == StatusCode::OK => {
                let upgraded = hyper::upgrade::on(&mut response).await;
                exchange.held.lease = Some(Lease::H2(lease));
                Some(UpstreamSide::H2(TokioIo::new(upgraded.map_err(|error| Failed::Protocol(error.to_string()))?)))
            }
            (lease, _) => {
                if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                    return Err(Failed::Protocol("switched protocols unasked".into()));
                }
                exchange.held.lease = Some(lease);
                None
            }
        };
        Ok((response, side))
    }
}

impl Attempts {
    fn report(&self, exchange: &Exchange, outcome: Outcome) {
        if let Some(index) = self.current
            && self.upstream.shared.balancer.report(index, outcome, exchange.engine.config.shared.now())
        {
            let host = &self.upstream.shared.keys[index];
            tracing::info!(cluster = %self.upstream.shared.name, %host, "host ejected by outlier detection");
        }
    }

    /// Tells outlier detection.
    fn judge(&self, exchange: &Exchange, outcome: &Result<Answered, Failed>) {
        match outcome {
            Ok((response, _)) => {
                let status = grpc_status(response.headers()).map_or(response.status().as_u16(), http_status_of);
                self.report(exchange, Outcome::Response(status));
            }
            Err(Failed::Reset { reset: Reset::Overflow, .. } | Failed::NoHost | Failed::ClientGone) => {}
            Err(Failed::Reset { .. } | Failed::Protocol(_)) => self.report(exchange, Outcome::LocalFailure),
        }
    }
}

/// Bytes of an answer nobody wants that are read so that its connection can be used again.
const READ_AWAY: u64 = 64 * 1024;

/// Keeps the connection of an answer that is retried, if that costs little.
fn read_away(response: Response<Incoming>, lease: Lease, upload: Option<Rc<Upload>>) {
    let Lease::H1(lease) = lease else { return };
    let small = response.body().size_hint().upper().is_some_and(|most| most <= READ_AWAY);
    if !small || upload.is_some_and(|upload| !upload.finished()) {
        return;
    }
    tokio::task::spawn_local(async move {
        let read = tokio::time::timeout(Duration::from_secs(1), response.into_body().collect()).await;
        if matches!(read, Ok(Ok(_))) {
            lease.give_back();
        }
    });
}
