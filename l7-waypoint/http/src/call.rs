//! One request of our own to a service, over the pools of its cluster.

pub(crate) mod grpc;

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, HeaderMap, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Response, Uri, Version, response};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use l7_resilience::{Kind, Outcome, Rng};
use xds_model::envoy::cluster::UpstreamVersion;

use crate::body::RequestBody;
use crate::engine::Engine;
use crate::exchange::Lease;
use crate::pool::{ConnectError, HostPool};
use crate::upstream::{Choice, Upstream};

/// Bytes of an answer that are read; one with more is none.
const MOST: usize = 1024 * 1024;

/// A request to the service.
pub(crate) struct Question {
    pub(crate) method: Method,
    pub(crate) authority: Authority,
    pub(crate) path: PathAndQuery,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// What came back.
pub(crate) struct Reached {
    pub(crate) parts: response::Parts,
    pub(crate) body: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
}

/// Where the service is.
pub(crate) struct To<'t> {
    pub(crate) engine: &'t Rc<Engine>,
    pub(crate) upstream: &'t Rc<Upstream>,
    /// gRPC needs HTTP/2, whatever the cluster says.
    pub(crate) grpc: bool,
    /// Zero: none.
    pub(crate) timeout: Duration,
    pub(crate) original: SocketAddr,
}

impl To<'_> {
    /// Asks; an error says why there is no answer.
    pub(crate) async fn call(&self, question: &Question) -> Result<Reached, String> {
        let balancer = &self.upstream.shared.balancer;
        let guard = balancer.breakers().acquire(Kind::Request, &balancer.spec().limits);
        let _request = guard.ok_or("a circuit breaker of the service's cluster is open")?;
        let mut rng = Rng::new(self.engine.seed());
        let now = self.engine.config.shared.now();
        let picked = self
            .upstream
            .pick(Choice::once(&mut rng, now, self.original, question.authority.host()))
            .ok_or("no healthy upstream")?;
        let _active = picked.index.map(|index| balancer.host(index).begin());
        let http2 = self.grpc || picked.pool.cluster.http.version == UpstreamVersion::Http2;
        let sent = send(&picked.pool, question, http2);
        let outcome = if self.timeout.is_zero() {
            sent.await
        } else {
            let late = |_| Err(format!("no answer within {:?}", self.timeout));
            tokio::time::timeout(self.timeout, sent).await.unwrap_or_else(late)
        };
        if let Some(index) = picked.index {
            let heard = match &outcome {
                Ok(reached) => Outcome::Response(reached.parts.status.as_u16()),
                Err(_) => Outcome::LocalFailure,
            };
            balancer.report(index, heard, self.engine.config.shared.now());
        }
        outcome
    }
}

async fn send(pool: &Rc<HostPool>, question: &Question, http2: bool) -> Result<Reached, String> {
    let mut fresh = false;
    loop {
        let lease = if http2 { pool.h2(fresh).await.map(Lease::H2) } else { pool.h1(fresh).await.map(Lease::H1) };
        let mut lease = lease.map_err(describe)?;
        let request = question.request(http2)?;
        let (answer, reused) = match &mut lease {
            Lease::H1(lease) => (lease.send(request).await, lease.reused()),
            Lease::H2(lease) => (lease.send(request).await, lease.reused()),
        };
        match answer {
            Ok(response) => return read(lease, response).await,
            // The other end closed an idle connection; a question may be asked twice.
            Err(_) if reused && !fresh => fresh = true,
            Err(unsent) => return Err(unsent.error.to_string()),
        }
    }
}

async fn read(lease: Lease, response: Response<Incoming>) -> Result<Reached, String> {
    let (parts, body) = response.into_parts();
    let collected = Limited::new(body, MOST).collect().await.map_err(|error| error.to_string())?;
    if let Lease::H1(lease) = lease {
        lease.give_back();
    }
    let trailers = collected.trailers().cloned();
    Ok(Reached { parts, body: collected.to_bytes(), trailers })
}

impl Question {
    fn request(&self, http2: bool) -> Result<Request<RequestBody>, String> {
        let body = if self.body.is_empty() { RequestBody::none() } else { RequestBody::Full(self.body.clone()) };
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.headers_mut() = self.headers.clone();
        if http2 {
            let uri = Uri::builder().scheme(Scheme::HTTP).authority(self.authority.clone());
            *request.uri_mut() = uri.path_and_query(self.path.clone()).build().map_err(|error| error.to_string())?;
            *request.version_mut() = Version::HTTP_2;
        } else {
            *request.uri_mut() = Uri::from(self.path.clone());
            let host = HeaderValue::from_str(self.authority.as_str()).map_err(|error| error.to_string())?;
            request.headers_mut().insert(HOST, host);
        }
        Ok(request)
    }
}

fn describe(error: ConnectError) -> String {
    match error {
        ConnectError::Overflow => "a circuit breaker of the service's cluster is open".to_owned(),
        ConnectError::Failed(reason) => format!("no connection: {reason}"),
        ConnectError::TimedOut => "no connection: timed out".to_owned(),
    }
}
