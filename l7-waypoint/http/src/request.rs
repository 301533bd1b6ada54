//! One request: checked, filtered, routed, answered.

use std::rc::Rc;
use std::time::Duration;

use http::header::{HeaderMap, HeaderName, HeaderValue, LOCATION, SERVER, SET_COOKIE};
use http::uri::{Authority, PathAndQuery};
use http::{Response, request};
use hyper::body::{Body, Incoming};
use hyper::upgrade::OnUpgrade;
use l7_resilience::deadline;
use l7_route::{Chain, ChainKind, HttpChain, NormalizedPath, Sniffed, Verdict, normalize_path};
use l7_telemetry::Flags;
use xds_model::envoy::chain::{ForwardClientCert, ServerHeader};

use crate::body::{Deadline, Inbound, Messages, ResponseBody, Upload};
use crate::engine::{Engine, Worker};
use crate::exchange::{Exchange, grpc_status};
use crate::ext_authz::apply_to_headers;
use crate::filters::{Filters, Judged, format_context, view};
use crate::forward::Forwarding;
use crate::head::{Head, X_FORWARDED_PROTO, X_REQUEST_ID, strip_hop_by_hop};
use crate::mirror;
use crate::prepared::PreparedChain;
use crate::reply::Reply;
use crate::server::Client;
use crate::trace::Traced;
use crate::upgrade::{UpstreamSide, switch};

const ENVOY_ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");
const ENVOY_SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
const ENVOY_OPERATION: HeaderName = HeaderName::from_static("x-envoy-decorator-operation");
const ENVOY_TIMEOUT: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// Answers one request.
pub(crate) async fn handle(
    engine: Rc<Engine>,
    client: Rc<Client>,
    request: hyper::Request<Incoming>,
) -> Response<ResponseBody> {
    let mut exchange = Exchange::new(engine.clone(), client.clone());
    let worker = engine.worker();
    let (mut parts, body) = request.into_parts();
    let sniffed = match (client.http2, parts.version) {
        (true, _) => Sniffed::H2c,
        (false, http::Version::HTTP_10) => Sniffed::Http10,
        (false, _) => Sniffed::Http11,
    };
    // The snapshot may be another one than when the connection came.
    let chain = worker.prepared.snapshot.chain(client.info.destination, sniffed).cloned();
    let Some((chain, http)) = chain.as_deref().and_then(as_http) else {
        client.close.set(true);
        let reply = Reply::new(503, "", Flags::NO_ROUTE, "no_chain");
        return finish(exchange, None, reply, None);
    };
    exchange.chain = worker.chain(chain).cloned();
    let upgrade = if client.http2 { parts.extensions.remove::<OnUpgrade>() } else { None };
    match serve(&mut exchange, &worker, http, parts, body).await {
        Ok(Served::Answer(response, deadline)) => {
            let (parts, body) = response.into_parts();
            let messages = exchange.head.as_ref().is_some_and(|head| head.grpc).then(Messages::default);
            let body = ResponseBody::upstream(body, deadline, messages, exchange);
            Response::from_parts(parts, body)
        }
        Ok(Served::Switched(response, side)) => switch(exchange, response, side, upgrade),
        Err(Refusal { reply, extra }) => finish(exchange, Some(http), reply, extra),
    }
}

/// What a request came to.
enum Served {
    Answer(Response<Incoming>, Option<Deadline>),
    Switched(Response<()>, UpstreamSide),
}

/// An answer of our own, with headers that go onto it.
struct Refusal {
    reply: Reply,
    extra: Option<HeaderMap>,
}

impl From<Reply> for Refusal {
    fn from(reply: Reply) -> Self {
        Self { reply, extra: None }
    }
}

fn as_http(chain: &Chain) -> Option<(&Chain, &HttpChain)> {
    match &chain.kind {
        ChainKind::Http(http) => Some((chain, http)),
        _ => None,
    }
}

async fn serve(
    exchange: &mut Exchange,
    worker: &Rc<Worker>,
    http: &HttpChain,
    parts: request::Parts,
    body: Incoming,
) -> Result<Served, Refusal> {
    let (engine, client) = (exchange.engine.clone(), exchange.client.clone());
    let prepared = exchange.chain.clone().unwrap_or_default();
    let mut head = Head::new(parts, &http.options, client.info.tls)?;
    let mut body = Inbound::new(body);
    let normalised = normalise(&mut head, http);
    identify(&mut head, &client, http, &engine);
    exchange.trace = prepared.tracer.as_ref().map(|tracer| Traced::begin(tracer, &mut head.headers, &engine));
    let seed = engine.seed();
    let judged = match normalised {
        Err(reply) => Err(reply),
        Ok(()) => {
            let (engine, client, prepared) = (&engine, &*client, &*prepared);
            let (head, body) = (&mut head, &mut body);
            Filters { http, prepared, client, engine, exchange, worker, head, body, seed }.run().await
        }
    };
    let judged = match judged {
        Ok(judged) => judged,
        Err(reply) => {
            exchange.head = Some(head);
            return Err(reply.into());
        }
    };
    let outcome = route(exchange, Scope { worker, http, prepared: &prepared, seed }, &judged, head, body).await;
    outcome.map_err(|reply| {
        let mut headers = judged.cors.clone().unwrap_or_default();
        if let Some(head) = &exchange.head {
            let request = view(head, &client, judged.claims.as_ref());
            judged.decision.apply_response_headers(&mut headers, &format_context(&request, &client));
        }
        apply_to_headers(&judged.response_edits, &mut headers);
        Refusal { reply, extra: Some(headers).filter(|headers| !headers.is_empty()) }
    })
}

/// Cleans the path, before anything looks at it.
fn normalise(head: &mut Head, http: &HttpChain) -> Result<(), Reply> {
    let refused = || Reply { close: false, ..Reply::bad_request("path_normalization_failed") };
    let changed = match normalize_path(head.path.as_str(), &http.options.path) {
        NormalizedPath::Use(path) if path == head.path.as_str() => return Ok(()),
        NormalizedPath::Use(path) => path.into_owned(),
        NormalizedPath::Redirect(location) => {
            let reply = Reply::new(307, "", Flags::default(), "path_normalization_redirect");
            let location = HeaderValue::from_str(&location).map_err(|_| refused())?;
            return Err(reply.header(LOCATION, location));
        }
        NormalizedPath::Reject => return Err(refused()),
    };
    head.path = PathAndQuery::try_from(changed).map_err(|_| refused())?;
    Ok(())
}

/// Request id, forwarded protocol, client certificate: as Envoy behind another proxy (`use_remote_address` false).
fn identify(head: &mut Head, client: &Client, http: &HttpChain, engine: &Engine) {
    let options = &http.options;
    if options.generate_request_id && !head.headers.contains_key(X_REQUEST_ID) {
        let mut rng = engine.rng.borrow_mut();
        let random = (u128::from(rng.next_u64()) << 64) | u128::from(rng.next_u64());
        let id = uuid::Builder::from_random_bytes(random.to_be_bytes()).into_uuid();
        let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
        // A UUID's text is a header value.
        if let Ok(value) = HeaderValue::from_str(id.hyphenated().encode_lower(&mut text)) {
            head.headers.insert(X_REQUEST_ID, value);
        }
    }
    if !head.headers.contains_key(X_FORWARDED_PROTO) {
        head.headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(head.scheme));
    }
    if options.use_remote_address
        && let Ok(address) = HeaderValue::from_str(&client.info.peer.ip().to_canonical().to_string())
    {
        head.headers.append("x-forwarded-for", address);
    }
    if options.client_cert == ForwardClientCert::Sanitize {
        head.headers.remove(CLIENT_CERT);
    }
}

/// What a request is served by.
#[derive(Clone, Copy)]
struct Scope<'a> {
    worker: &'a Rc<Worker>,
    http: &'a HttpChain,
    prepared: &'a PreparedChain,
    seed: u64,
}

/// Does what the decision says.
async fn route(
    exchange: &mut Exchange,
    scope: Scope<'_>,
    judged: &Judged<'_>,
    mut head: Head,
    body: Inbound,
) -> Result<Served, Reply> {
    let Scope { worker, http, prepared, seed } = scope;
    let decision = &judged.decision;
    let client = exchange.client.clone();
    exchange.route_name = decision.route.map(|route| route.name.clone());
    if let Some(traced) = &mut exchange.trace {
        traced.operation = decision.route.and_then(|route| route.operation.clone());
    }
    if let Some(config) = decision.route.and_then(|route| route.config.as_deref()) {
        exchange.reasons.push(format!("route from {config}"));
    }
    let location = decision.location(&view(&head, &client, judged.claims.as_ref()));
    let (forward, cluster) = match decision.verdict {
        Verdict::Forward { forward, cluster } => (forward, cluster),
        other => {
            exchange.head = Some(head);
            return Err(local_verdict(other, location, exchange));
        }
    };
    if let Some(wanted) = &head.upgrade
        && !upgrade_allowed(wanted, &http.options.upgrades, &forward.upgrades)
    {
        exchange.head = Some(head);
        return Err(Reply::new(403, "", Flags::default(), "upgrade_failed"));
    }
    let hashed = forward.hash.hash(&view(&head, &client, judged.claims.as_ref()), seed);
    let from_endpoint = rewrite(exchange, &client, judged, &mut head, http);
    let grpc_timeout = head.headers.get("grpc-timeout").map(HeaderValue::as_bytes);
    let timeout = deadline::overall(forward.timeout, forward.grpc_timeout_max, grpc_timeout);
    add_upstream_headers(exchange, &mut head, timeout);
    let longest = forward.max_stream_duration.filter(|most| !most.is_zero());
    let policy = forward.retry.as_ref().and_then(|retry| prepared.retry(retry));
    let mirrors: Vec<_> = forward.mirrors.iter().filter(|mirror| mirror.hit(seed)).collect();
    let keep = if mirrors.is_empty() {
        if policy.is_some_and(|policy| policy.retries > 0) { exchange.engine.config.retry_buffer } else { 0 }
    } else {
        mirror::KEEP
    };
    if !body.is_end_stream() && head.upgrade.is_none() {
        let messages = head.grpc.then(Messages::default);
        exchange.upload = Some(Upload::new(body, keep, messages));
    }
    let mut deadline = deadline_of(exchange.upload.clone(), timeout, longest);
    mirror::prepare(exchange, worker, &mirrors, &head);
    exchange.head = Some(head);
    let include_attempts = decision.host.is_some_and(|host| host.include_attempt_count);
    let forwarding = Forwarding {
        worker,
        cluster,
        not_found: forward.cluster_not_found_status,
        policy,
        retry: forward.retry.as_deref(),
        hash: hashed.hash,
        seed,
        include_attempts,
        authority_from_endpoint: from_endpoint,
        claims: judged.claims.as_ref(),
    };
    let (response, side) = forwarding.run(exchange, deadline.as_mut()).await?;
    let response = complete(exchange, http, judged, response, &hashed.set_cookies);
    Ok(match side {
        Some(side) => Served::Switched(response.map(drop), side),
        None => Served::Answer(response, deadline),
    })
}

/// An upstream's response as the client gets it.
fn complete(
    exchange: &mut Exchange,
    http: &HttpChain,
    judged: &Judged<'_>,
    mut response: Response<Incoming>,
    cookies: &[String],
) -> Response<Incoming> {
    let client = exchange.client.clone();
    finish_headers(exchange, http, judged, response.headers_mut(), &client);
    for cookie in cookies {
        if let Ok(value) = HeaderValue::from_str(cookie) {
            response.headers_mut().append(SET_COOKIE, value);
        }
    }
    exchange.status = response.status().as_u16();
    exchange.details = "via_upstream".into();
    exchange.grpc_status = grpc_status(response.headers());
    if exchange.keeps_headers() {
        exchange.response_headers = Some(response.headers().clone());
    }
    response
}

/// The route's timeout runs from the end of the request, as in Envoy; the longest stream's from its start.
fn deadline_of(upload: Option<Rc<Upload>>, timeout: Option<Duration>, longest: Option<Duration>) -> Option<Deadline> {
    if timeout.is_none() && longest.is_none() {
        return None;
    }
    Some(Box::pin(async move {
        let answered = async {
            let Some(timeout) = timeout else { return std::future::pending().await };
            if let Some(upload) = upload {
                upload.wait().await;
            }
            tokio::time::sleep(timeout).await;
        };
        match longest {
            None => answered.await,
            Some(longest) => drop(tokio::time::timeout(longest, answered).await),
        }
    }))
}

fn local_verdict(verdict: Verdict<'_>, location: Option<String>, exchange: &mut Exchange) -> Reply {
    match verdict {
        Verdict::Respond { status, body } => Reply::new(status, body.clone(), Flags::default(), "direct_response"),
        Verdict::Redirect(redirect) => {
            let reply = Reply::new(redirect.status(), "", Flags::default(), "direct_response");
            match location.and_then(|location| HeaderValue::from_str(&location).ok()) {
                Some(location) => reply.header(LOCATION, location),
                None => Reply::bad_request("redirect_not_possible"),
            }
        }
        Verdict::Invalid { status, reason } => {
            exchange.reasons.push(format!("the route can't be honoured: {reason}"));
            Reply::new(status, "", Flags::NO_ROUTE, "route_invalid")
        }
        Verdict::NotFound | Verdict::Forward { .. } => {
            exchange.reasons.push("no route matches".to_owned());
            Reply::new(404, "", Flags::NO_ROUTE, "route_not_found")
        }
    }
}

fn upgrade_allowed(wanted: &str, chain: &[String], route: &[(String, bool)]) -> bool {
    match route.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted)) {
        Some((_, allowed)) => *allowed,
        None => chain.iter().any(|name| name.eq_ignore_ascii_case(wanted)),
    }
}

/// Header changes and rewrites of the route; true when the authority is to be the endpoint's host name.
fn rewrite(exchange: &mut Exchange, client: &Client, judged: &Judged<'_>, head: &mut Head, http: &HttpChain) -> bool {
    let decision = &judged.decision;
    let rewritten = {
        let request = view(head, client, judged.claims.as_ref());
        let rewritten = decision.rewrite(&request);
        if decision.changes_request_headers() {
            let mut headers = head.headers.clone();
            let context = l7_route::FormatContext {
                route_name: exchange.route_name.as_deref(),
                ..format_context(&request, client)
            };
            decision.apply_request_headers(&mut headers, &context);
            head.headers = headers;
        }
        rewritten
    };
    if let Some(path) = rewritten.path_and_query.and_then(|path| PathAndQuery::try_from(path).ok()) {
        let old = std::mem::replace(&mut head.path, path);
        let suppress = exchange.chain.as_ref().is_some_and(|chain| chain.suppress_envoy_headers);
        if !suppress && let Ok(value) = HeaderValue::from_str(old.as_str()) {
            head.headers.insert(ENVOY_ORIGINAL_PATH, value);
        }
        exchange.original_path = Some(old.as_str().to_owned());
    }
    if let Some(authority) = rewritten.authority.and_then(|authority| authority.parse::<Authority>().ok()) {
        head.authority = authority;
        head.host = None;
    }
    if let Some(via) = http.options.via.as_deref().and_then(|via| HeaderValue::from_str(via).ok()) {
        head.headers.append(http::header::VIA, via);
    }
    rewritten.authority_from_endpoint
}

fn add_upstream_headers(exchange: &Exchange, head: &mut Head, timeout: Option<Duration>) {
    let suppress = exchange.chain.as_ref().is_some_and(|chain| chain.suppress_envoy_headers);
    if let Some(timeout) = timeout.filter(|_| !suppress) {
        let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        head.headers.insert(ENVOY_TIMEOUT, HeaderValue::from(millis));
    }
}

/// Headers of a response from upstream.
fn finish_headers(
    exchange: &Exchange,
    http: &HttpChain,
    judged: &Judged<'_>,
    headers: &mut HeaderMap,
    client: &Client,
) {
    strip_hop_by_hop(headers);
    let suppress = exchange.chain.as_ref().is_some_and(|chain| chain.suppress_envoy_headers);
    if !suppress {
        let millis = exchange.service_time.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        headers.insert(ENVOY_SERVICE_TIME, HeaderValue::from(millis));
    }
    if let Some(head) = &exchange.head {
        let request = view(head, client, judged.claims.as_ref());
        let context = format_context(&request, client);
        judged.decision.apply_response_headers(headers, &context);
        for ops in judged.response_ops.iter().rev() {
            ops.apply(headers, &context);
        }
    }
    if let Some(operation) = judged.decision.route.and_then(|route| route.operation.as_deref())
        && !suppress
        && let Ok(operation) = HeaderValue::from_str(operation)
    {
        headers.insert(ENVOY_OPERATION, operation);
    }
    apply_to_headers(&judged.response_edits, headers);
    if let Some(cors) = &judged.cors {
        headers.extend(cors.iter().map(|(name, value)| (name.clone(), value.clone())));
    }
    common_headers(exchange, http, headers);
}

/// Headers of every response.
fn common_headers(exchange: &Exchange, http: &HttpChain, headers: &mut HeaderMap) {
    let options = &http.options;
    let ours = match options.server_header {
        ServerHeader::Overwrite => true,
        ServerHeader::AppendIfAbsent => !headers.contains_key(SERVER),
        ServerHeader::PassThrough => false,
    };
    if ours && let Ok(name) = HeaderValue::from_str(&options.server_name) {
        headers.insert(SERVER, name);
    }
    if options.always_set_request_id_in_response
        && let Some(id) = exchange.head.as_ref().and_then(|head| head.headers.get(X_REQUEST_ID))
    {
        headers.insert(X_REQUEST_ID, id.clone());
    }
}

/// An answer of our own.
fn finish(
    mut exchange: Box<Exchange>,
    http: Option<&HttpChain>,
    reply: Reply,
    extra: Option<HeaderMap>,
) -> Response<ResponseBody> {
    exchange.status = reply.status.as_u16();
    exchange.flags.set(reply.flags);
    exchange.details = reply.details.clone();
    if reply.close && !exchange.client.http2 {
        exchange.client.close.set(true);
    }
    let grpc = exchange.head.as_ref().is_some_and(|head| head.grpc);
    let close = reply.close && !exchange.client.http2;
    let (response, body) = reply.into_response(grpc);
    let (mut parts, ()) = response.into_parts();
    let extra = extra.unwrap_or_default();
    extra.keys().for_each(|name| drop(parts.headers.remove(name)));
    parts.headers.extend(extra);
    if grpc {
        exchange.status = 200;
        exchange.grpc_status = grpc_status(&parts.headers);
    }
    if let Some(http) = http {
        common_headers(&exchange, http, &mut parts.headers);
    }
    if close {
        parts.headers.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    }
    if exchange.keeps_headers() {
        exchange.response_headers = Some(parts.headers.clone());
    }
    Response::from_parts(parts, ResponseBody::full(body, Some(exchange)))
}
