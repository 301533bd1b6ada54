//! The filters of an HTTP chain, in their order, up to the router.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use http::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use http::uri::PathAndQuery;
use l7_authn::{Authenticator, Denied, Request, Status};
use l7_authz::l7::{AuthzRequest, Outcome, Rbac, RequestView, Shadow};
use l7_route::filter::Fault;
use l7_route::headers::HeaderOps;
use l7_route::{Decision, FilterKind, FormatContext, HttpChain};
use l7_telemetry::Flags;
use serde_json::Value;
use smallvec::SmallVec;
use xds_model::envoy::filter::AbortWith;

use crate::body::Inbound;
use crate::cors;
use crate::engine::{Engine, Worker};
use crate::exchange::Exchange;
use crate::ext_authz::Edit;
use crate::head::Head;
use crate::prepared::PreparedChain;
use crate::reply::{Reply, http_status_of};
use crate::server::Client;

/// A request that passed all filters.
pub(crate) struct Judged<'a> {
    pub(crate) decision: Decision<'a>,
    pub(crate) claims: Option<Arc<Value>>,
    /// For the response; also for one of our own.
    pub(crate) cors: Option<HeaderMap>,
    pub(crate) response_ops: SmallVec<[&'a HeaderOps; 1]>,
    /// What external authorization adds to the response; also to one of our own.
    pub(crate) response_edits: Vec<Edit>,
}

/// A request on its way through the filters.
pub(crate) struct Filters<'a, 'r> {
    pub(crate) http: &'a HttpChain,
    pub(crate) prepared: &'r PreparedChain,
    pub(crate) client: &'r Client,
    pub(crate) engine: &'r Rc<Engine>,
    pub(crate) exchange: &'r mut Exchange,
    pub(crate) worker: &'r Rc<Worker>,
    pub(crate) head: &'r mut Head,
    pub(crate) body: &'r mut Inbound,
    pub(crate) seed: u64,
}

/// The view of a request that rules and routes see.
pub(crate) fn view<'h>(head: &'h Head, client: &Client, claims: Option<&'h Arc<Value>>) -> RequestView<'h> {
    RequestView {
        method: head.method.as_str(),
        path: head.path.path(),
        query: head.path.query(),
        authority: head.authority.as_str(),
        scheme: head.scheme,
        headers: &head.headers,
        source_ip: client.info.peer.ip(),
        claims: claims.map(|claims| &**claims),
    }
}

/// What header formats may refer to.
pub(crate) fn format_context<'a>(request: &'a RequestView<'a>, client: &'a Client) -> FormatContext<'a> {
    FormatContext {
        request: Some(request),
        downstream_remote: Some(client.info.peer),
        downstream_local: Some(client.info.destination),
        peer: client.info.peer_principal.as_deref(),
        local: client.info.local_principal.as_deref(),
        protocol: Some(if client.http2 { "HTTP/2" } else { "HTTP/1.1" }),
        ..FormatContext::default()
    }
}

impl<'a> Filters<'a, '_> {
    /// Runs them; an error is the answer to give.
    pub(crate) async fn run(mut self) -> Result<Judged<'a>, Reply> {
        let mut claims = None;
        let mut decision = None;
        let mut cors_headers = None;
        let mut response_ops = SmallVec::new();
        let mut response_edits = Vec::new();
        let mut shadows: SmallVec<[Shadow<'a>; 2]> = SmallVec::new();
        for (position, filter) in self.http.filters.iter().enumerate() {
            match &filter.kind {
                FilterKind::Rbac(rbac) => self.rbac(rbac, claims.as_ref(), &mut shadows)?,
                FilterKind::JwtAuthn(_) => {
                    if let Some(verified) = self.jwt(position)? {
                        claims = Some(verified);
                    }
                    decision = None;
                }
                FilterKind::ExtAuthz(service) if !service.applies(&shadows) => {}
                FilterKind::ExtAuthz(service) => {
                    let asked = self.ext_authz(service, &shadows, &mut decision, claims.as_ref());
                    // On the heap: most requests ask nobody and should not carry the space.
                    response_edits.extend(Box::pin(asked).await?);
                }
                FilterKind::Fault(chain_fault) => {
                    let route = self.decide(&mut decision, claims.as_ref());
                    if let Some(fault) = route.fault().or(chain_fault.as_deref()) {
                        self.fault(fault, claims.as_ref()).await?;
                    }
                }
                FilterKind::Cors => {
                    let route = self.decide(&mut decision, claims.as_ref());
                    match route.cors().map_or(cors::Verdict::Pass, |policy| cors::judge(policy, self.head, self.seed)) {
                        cors::Verdict::Pass => {}
                        cors::Verdict::Allow(headers) => cors_headers = Some(headers),
                        cors::Verdict::Answer(reply) => return Err(reply),
                    }
                }
                FilterKind::HeaderMutation { request, response } => {
                    self.mutate(request, claims.as_ref());
                    response_ops.push(response);
                }
                FilterKind::GrpcStats | FilterKind::GrpcWeb | FilterKind::Stats(_) | FilterKind::PeerMetadata => {}
                FilterKind::Router(_) => break,
            }
        }
        let decision = self.decide(&mut decision, claims.as_ref());
        Ok(Judged { decision, claims, cors: cors_headers, response_ops, response_edits })
    }

    pub(crate) fn decide(&self, decision: &mut Option<Decision<'a>>, claims: Option<&Arc<Value>>) -> Decision<'a> {
        *decision.get_or_insert_with(|| self.http.decide(&view(self.head, self.client, claims), self.seed))
    }

    fn rbac(
        &mut self,
        rbac: &'a Rbac,
        claims: Option<&Arc<Value>>,
        shadows: &mut SmallVec<[Shadow<'a>; 2]>,
    ) -> Result<(), Reply> {
        let request = view(self.head, self.client, claims);
        let info = &self.client.info;
        let outcome = rbac.evaluate(&AuthzRequest {
            http: Some(&request),
            peer: info.peer_principal.as_deref(),
            direct_remote_ip: info.peer.ip(),
            remote_ip: info.peer.ip(),
            destination: info.destination,
            server_name: None,
        });
        shadows.extend(outcome.shadow);
        if outcome.allowed {
            return Ok(());
        }
        self.exchange.reasons.push(denial(&outcome));
        let policy = outcome.policy.map_or("none", |policy| &policy.id);
        let details = format!("rbac_access_denied_matched_policy[{policy}]");
        Err(Reply::new(403, "RBAC: access denied", Flags::default(), details))
    }

    fn jwt(&mut self, position: usize) -> Result<Option<Arc<Value>>, Reply> {
        let unusable = || {
            Reply::new(
                401,
                "Jwt verification fails",
                Flags::default(),
                "jwt_authn_access_denied{unusable_configuration}",
            )
        };
        let authenticator: &Authenticator = match self.prepared.authn.get(&position) {
            Some(Ok(authenticator)) => authenticator,
            Some(Err(reason)) => {
                self.exchange.reasons.push(format!("the JWT filter can't be honoured: {reason}"));
                return Err(unusable());
            }
            None => return Err(unusable()),
        };
        let request =
            Request { method: &self.head.method, path_and_query: self.head.path.as_str(), headers: &self.head.headers };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let verdict = authenticator.authenticate(request, &mut self.engine.tokens.borrow_mut(), now);
        let passed = verdict.map_err(|denied| self.jwt_denied(denied))?;
        passed.edits.apply(&mut self.head.headers);
        if let Some(path) = passed.edits.rewrite(self.head.path.as_str())
            && let Ok(path) = PathAndQuery::try_from(path)
        {
            self.head.path = path;
        }
        Ok(passed.metadata.into_iter().next().map(|(_, claims)| claims))
    }

    fn jwt_denied(&mut self, denied: Denied) -> Reply {
        let Denied { status, silent } = denied;
        let text = status.to_string();
        let realm = format!("{}://{}{}", self.head.scheme, self.head.authority, self.head.path.path());
        let error = if status == Status::Missing { "" } else { ", error=\"invalid_token\"" };
        let challenge = HeaderValue::from_str(&format!("Bearer realm=\"{realm}\"{error}"));
        let details = format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_"));
        self.exchange.reasons.push(format!("denied by JWT authentication: {text}"));
        let reply =
            Reply::new(status.http_status(), if silent { String::new() } else { text }, Flags::default(), details);
        // A path with bytes no header may hold gets the answer without the hint.
        challenge.map_or_else(
            |_| Reply::new(401, "", Flags::default(), "jwt_authn_access_denied"),
            |value| reply.header(WWW_AUTHENTICATE, value),
        )
    }

    async fn fault(&mut self, fault: &Fault, claims: Option<&Arc<Value>>) -> Result<(), Reply> {
        let active = &self.engine.faults_active;
        if fault.max_active().is_some_and(|most| active.get() >= most) {
            return Ok(());
        }
        let injected = fault.inject(&view(self.head, self.client, claims), self.seed);
        if let Some(delay) = injected.delay {
            let _counted = Counted::new(self.engine);
            self.exchange.flags.set(Flags::DELAY_INJECTED);
            self.exchange.reasons.push(format!("delayed by fault injection: {delay:?}"));
            tokio::time::sleep(delay).await;
        }
        let Some(abort) = injected.abort else { return Ok(()) };
        let (status, grpc_status) = match abort {
            AbortWith::HttpStatus(status) => (status, None),
            AbortWith::GrpcStatus(code) => (http_status_of(code), Some(code)),
        };
        self.exchange.reasons.push("aborted by fault injection".to_owned());
        Err(Reply {
            grpc_status,
            ..Reply::new(status, "fault filter abort", Flags::FAULT_INJECTED, "fault_filter_abort")
        })
    }

    fn mutate(&mut self, ops: &HeaderOps, claims: Option<&Arc<Value>>) {
        if ops.is_empty() {
            return;
        }
        let mut headers = self.head.headers.clone();
        let request = view(self.head, self.client, claims);
        ops.apply(&mut headers, &format_context(&request, self.client));
        self.head.headers = headers;
    }
}

struct Counted<'a>(&'a Engine);

impl<'a> Counted<'a> {
    fn new(engine: &'a Engine) -> Self {
        engine.faults_active.set(engine.faults_active.get() + 1);
        Self(engine)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.faults_active.set(self.0.faults_active.get() - 1);
    }
}

/// Who said no, for people.
pub(crate) fn denial(outcome: &Outcome<'_>) -> String {
    match outcome.policy {
        Some(policy) => format!("denied by AuthorizationPolicy {policy}"),
        None => "denied: no AuthorizationPolicy allows it".to_owned(),
    }
}
