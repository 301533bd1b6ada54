//! Copies of requests to other clusters, fire and forget: nobody waits for them and what they answer is thrown away.

use std::rc::Rc;

use bytes::Bytes;
use http::header::{HOST, HeaderValue};
use http::uri::Authority;
use http::{Request, Uri, Version};
use http_body_util::BodyExt;
use l7_resilience::Rng;
use l7_route::route::Mirror;
use xds_model::envoy::cluster::UpstreamVersion;

use crate::body::{RequestBody, Upload};
use crate::engine::{Engine, Worker};
use crate::exchange::Exchange;
use crate::head::Head;
use crate::upstream::{Choice, Upstream};

/// Bytes of a body kept for copies; requests with larger ones are not mirrored.
pub(crate) const KEEP: usize = 1024 * 1024;

/// A copy that waits for the end of the original, and with it for the whole body.
pub(crate) struct Waiting {
    upstream: Rc<Upstream>,
    head: Head,
    original: std::net::SocketAddr,
}

/// Sets up the copies the route asks for.
pub(crate) fn prepare(exchange: &mut Exchange, worker: &Rc<Worker>, mirrors: &[&Mirror], head: &Head) {
    for mirror in mirrors {
        let engine = exchange.engine.clone();
        let Some(upstream) = engine.upstream(worker, &mirror.cluster.name) else {
            exchange.reasons.push(format!("not mirrored: cluster {} is not known", mirror.cluster.name));
            continue;
        };
        let mut head = head.clone();
        head.upgrade = None;
        if let Some(host) = mirror.host_rewrite.as_deref().and_then(|host| host.parse().ok()) {
            head.authority = host;
        }
        if mirror.shadow_suffix {
            head.authority = shadow(&head.authority);
        }
        let waiting = Waiting { upstream, head, original: exchange.client.info.destination };
        if exchange.upload.is_none() {
            waiting.send(&engine, None);
        } else {
            exchange.mirrors.push(waiting);
        }
    }
}

/// `host-shadow:port`.
fn shadow(authority: &Authority) -> Authority {
    let text = match authority.port() {
        Some(port) => format!("{}-shadow:{port}", authority.host()),
        None => format!("{}-shadow", authority.host()),
    };
    text.parse().unwrap_or_else(|_| authority.clone())
}

impl Waiting {
    /// Sends the copy if the whole body is at hand.
    pub(crate) fn send(self, engine: &Rc<Engine>, upload: Option<&Upload>) {
        let body = match upload {
            None => RequestBody::none(),
            Some(upload) => match upload.kept_whole() {
                Some(bytes) => RequestBody::Full(bytes),
                None => {
                    return tracing::debug!(cluster = %self.upstream.shared.name, "not mirrored: the body is too large or incomplete");
                }
            },
        };
        let seed = engine.seed();
        let now = engine.config.shared.now();
        tokio::task::spawn_local(async move {
            let cluster = self.upstream.shared.name.clone();
            if let Err(reason) = self.run(body, seed, now).await {
                tracing::debug!(%cluster, reason, "mirrored request failed");
            }
        });
    }

    async fn run(self, body: RequestBody, seed: u64, now: u64) -> Result<(), String> {
        let mut rng = Rng::new(seed);
        let picked = self
            .upstream
            .pick(Choice::once(&mut rng, now, self.original, self.head.authority.host()))
            .ok_or("no healthy upstream")?;
        let _active = picked.index.map(|index| self.upstream.shared.balancer.host(index).begin());
        let mut request = Request::new(body);
        *request.method_mut() = self.head.method.clone();
        *request.headers_mut() = self.head.headers;
        let http2 = match picked.pool.cluster.http.version {
            UpstreamVersion::Http2 => true,
            UpstreamVersion::SameAsDownstream => self.head.version == Version::HTTP_2,
            UpstreamVersion::Http1 | UpstreamVersion::Auto => false,
        };
        if http2 {
            let uri =
                Uri::builder().scheme(self.head.scheme).authority(self.head.authority).path_and_query(self.head.path);
            *request.uri_mut() = uri.build().map_err(|error| error.to_string())?;
            let mut lease = picked.pool.h2(false).await.map_err(|error| format!("{error:?}"))?;
            let response = lease.send(request).await.map_err(|unsent| unsent.error.to_string())?;
            return read_away(response.into_body()).await;
        }
        *request.uri_mut() = Uri::from(self.head.path);
        let host = HeaderValue::from_str(self.head.authority.as_str()).map_err(|error| error.to_string())?;
        request.headers_mut().insert(HOST, host);
        let mut lease = picked.pool.h1(false).await.map_err(|error| format!("{error:?}"))?;
        let response = lease.send(request).await.map_err(|unsent| unsent.error.to_string())?;
        read_away(response.into_body()).await?;
        lease.give_back();
        Ok(())
    }
}

async fn read_away(mut body: hyper::body::Incoming) -> Result<(), String> {
    while let Some(frame) = body.frame().await {
        frame.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Joins what was kept of a body.
pub(crate) fn join(chunks: &[Bytes]) -> Bytes {
    match chunks {
        [] => Bytes::new(),
        [one] => one.clone(),
        many => many.concat().into(),
    }
}
