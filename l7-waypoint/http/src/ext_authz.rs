//! The `ext_authz` filter: whether a request passes is asked of a service outside, over the clusters' own connections.
//! Without an answer nothing passes, unless the configuration says so.

mod edits;
mod grpc;
mod http;

use std::collections::BTreeMap;
use std::sync::Arc;

use ::http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use l7_authz::l7::Shadow;
use l7_route::ext_authz::{ExtAuthz, Kind};
use l7_route::{Decision, Verdict};
use l7_telemetry::{ExtAuthzOutcome, Flags};
use serde_json::Value;
use tokio::time::Instant;
use xds_model::envoy::ext_authz::ExtAuthzPerRoute;

use crate::body::Beginning;
use crate::call;
use crate::filters::Filters;
use crate::head::Head;
use crate::reply::Reply;
use crate::server::Client;
use edits::Edits;
pub(crate) use edits::{Edit, apply_to_headers};

const ALLOWED_BY_FAILURE: HeaderName = HeaderName::from_static("x-envoy-auth-failure-mode-allowed");
const PARTIAL_BODY: HeaderName = HeaderName::from_static("x-envoy-auth-partial-body");

/// What the service said.
enum Answer {
    Allowed(Box<Edits>),
    Denied(Refused),
    /// It could not decide, and says what to answer then.
    Failed(Refused),
}

/// An answer for the client, as the service wants it.
#[derive(Default)]
struct Refused {
    status: Option<u16>,
    headers: Vec<(HeaderName, HeaderValue)>,
    body: bytes::Bytes,
}

/// What a service is asked about.
struct Check<'c> {
    service: &'c ExtAuthz,
    head: &'c Head,
    client: &'c Client,
    started: Instant,
    body: Option<Beginning>,
    extensions: Option<&'c BTreeMap<String, String>>,
}

impl<'a> Filters<'a, '_> {
    /// Asks the service, which the caller knows to be concerned. An error is the answer to give; else the headers
    /// that the response gets.
    pub(crate) async fn ext_authz(
        &mut self,
        service: &'a ExtAuthz,
        shadows: &[Shadow<'a>],
        decision: &mut Option<Decision<'a>>,
        claims: Option<&Arc<Value>>,
    ) -> Result<Vec<Edit>, Reply> {
        // Before the service changes what routes look at.
        let route = self.decide(decision, claims);
        let (extensions, no_body) = match route.ext_authz() {
            Some(ExtAuthzPerRoute::Disabled) => return Ok(Vec::new()),
            Some(ExtAuthzPerRoute::Check { context_extensions, no_body }) => (Some(context_extensions), *no_body),
            None => (None, false),
        };
        let body = if no_body { None } else { self.beginning(service).await? };
        let started = self.exchange.started;
        let asked = {
            let check = Check { service, head: &*self.head, client: self.client, started, body, extensions };
            self.ask(&check).await
        };
        let who = || match service.policy(shadows) {
            Some(policy) => format!("{}, AuthorizationPolicy {policy}", service.cluster),
            None => service.cluster.to_string(),
        };
        let (reason, refused) = match asked {
            Ok(Answer::Allowed(edits)) => match edits.apply(self.head) {
                Ok(changed) => {
                    self.count(&route, ExtAuthzOutcome::Ok);
                    if changed && service.config.clear_route_cache {
                        *decision = None;
                    }
                    return Ok(edits.response);
                }
                Err(reason) => (reason, Refused::default()),
            },
            Ok(Answer::Denied(refused)) => {
                self.count(&route, ExtAuthzOutcome::Denied);
                self.exchange.reasons.push(format!("denied by external authorization ({})", who()));
                return Err(refused.reply(403, "ext_authz_denied"));
            }
            Ok(Answer::Failed(refused)) => ("the service could not decide".to_owned(), refused),
            Err(reason) => (reason, Refused::default()),
        };
        self.count(&route, ExtAuthzOutcome::Error);
        self.exchange.reasons.push(format!("external authorization failed ({}): {reason}", who()));
        if !service.config.failure_mode_allow {
            return Err(refused.reply(service.config.status_on_error, "ext_authz_error"));
        }
        self.count(&route, ExtAuthzOutcome::FailureModeAllowed);
        if service.config.failure_mode_allow_header {
            self.head.headers.insert(ALLOWED_BY_FAILURE, HeaderValue::from_static("true"));
        }
        Ok(Vec::new())
    }

    /// By the cluster the request would go to.
    fn count(&self, route: &Decision<'_>, outcome: ExtAuthzOutcome) {
        if let Verdict::Forward { cluster, .. } = route.verdict {
            self.engine.config.shared.telemetry.ext_authz(&cluster.name, outcome);
        }
    }

    /// As much of the body as the service is to see; `None`: there is none, or it sees none.
    async fn beginning(&mut self, service: &ExtAuthz) -> Result<Option<Beginning>, Reply> {
        use http_body::Body;
        let Some(wanted) = service.config.body.filter(|wanted| wanted.max_request_bytes > 0) else { return Ok(None) };
        if self.head.upgrade.is_some() || self.body.is_end_stream() {
            return Ok(None);
        }
        let read = self.body.begin(wanted.max_request_bytes as usize, !wanted.allow_partial).await;
        let gone = |_| Reply::new(400, "", Flags::DOWNSTREAM_TERMINATION, "downstream_remote_disconnect");
        let beginning = read.map_err(gone)?;
        if beginning.partial && !wanted.allow_partial {
            self.exchange.reasons.push("the body is larger than what external authorization takes".to_owned());
            return Err(Reply::new(413, "Payload Too Large", Flags::default(), "request_payload_too_large"));
        }
        Ok(Some(beginning))
    }

    async fn ask(&self, check: &Check<'_>) -> Result<Answer, String> {
        let service = check.service;
        let upstream = self.engine.upstream(self.worker, &service.cluster);
        let upstream = upstream.ok_or_else(|| format!("cluster {} is not known", service.cluster))?;
        let to = call::To {
            engine: self.engine,
            upstream: &upstream,
            grpc: matches!(service.kind, Kind::Grpc { .. }),
            timeout: service.timeout,
            original: check.client.info.destination,
        };
        match &service.kind {
            Kind::Grpc { authority, metadata } => {
                let question = grpc::question(check, authority, metadata)?;
                grpc::answer(to.call(&question).await?)
            }
            Kind::Http(http) => {
                let question = http::question(check, http)?;
                http::answer(http, to.call(&question).await?)
            }
        }
    }
}

impl Refused {
    fn reply(self, status: u16, details: &'static str) -> Reply {
        let mut reply = Reply::new(self.status.unwrap_or(status), self.body, Flags::EXTERNAL_AUTH, details);
        reply.headers = self.headers;
        reply
    }
}

impl Check<'_> {
    /// Headers the service is told, each value on its own.
    fn headers(&self) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
        let all = self.head.headers.iter();
        all.filter(|(name, _)| !is_framing(name) && self.service.sends(name.as_str()))
    }

    fn partial_body(&self) -> Option<&'static str> {
        self.body.as_ref().map(|body| if body.partial { "true" } else { "false" })
    }
}

/// Headers that say how one message is framed, and the host, which has its own place: nobody may change them on
/// behalf of another message.
fn is_framing(name: &HeaderName) -> bool {
    [CONNECTION, CONTENT_LENGTH, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE].contains(name)
        || matches!(name.as_str(), "keep-alive" | "proxy-connection")
}
