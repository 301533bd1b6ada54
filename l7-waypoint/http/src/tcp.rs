//! Plain TCP: judged by the chain's network RBAC, sent to a cluster by weight, copied both ways.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use l7_authz::l7::AuthzRequest;
use l7_resilience::{Outcome as Health, Rng};
use l7_route::chain::ClusterTarget;
use l7_route::{Chain, ChainKind, TcpChain};
use l7_telemetry::{Flags, Peer, Record, ServiceInfo, Upstream as UpstreamRecord};
use strata_runtime::drain::Watch;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use crate::conn::ConnInfo;
use crate::copy::copy_both;
use crate::engine::{Engine, Worker};
use crate::filters::denial;
use crate::io::{Io, Rewind};
use crate::pool::{ConnectError, Slot};
use crate::prepared::PreparedChain;
use crate::upstream::{Choice, Upstream};

/// What became of a connection.
#[derive(Default)]
pub(crate) struct Outcome<'a> {
    pub(crate) flags: Flags,
    pub(crate) details: &'a str,
    pub(crate) cluster: Option<&'a str>,
    pub(crate) host: Option<Arc<str>>,
    pub(crate) service: Option<Arc<ServiceInfo>>,
    pub(crate) destination: Option<Arc<Peer>>,
    pub(crate) received: u64,
    pub(crate) sent: u64,
    pub(crate) duration: Duration,
    pub(crate) attempts: u32,
    pub(crate) failure: Option<String>,
    pub(crate) reasons: Vec<String>,
}

/// Serves one connection until it ends. A drain is not a reason to end it: bytes have no safe point to stop at; the
/// process waits for its deadline.
pub(crate) async fn serve<T>(
    engine: Rc<Engine>,
    worker: Rc<Worker>,
    chain: Arc<Chain>,
    io: Rewind<T>,
    info: ConnInfo,
    source: Arc<Peer>,
    _drain: Watch,
) where
    T: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let ChainKind::Tcp(tcp) = &chain.kind else { return };
    let started = Instant::now();
    let prepared = worker.chain(&chain).cloned().unwrap_or_default();
    let mut outcome = Outcome::default();
    let report = |outcome: &mut Outcome<'_>| {
        outcome.duration = started.elapsed();
        log(&engine, &prepared, &info, &source, outcome, None);
    };
    if let Some(reason) = denied(tcp, &info) {
        outcome.flags.set(Flags::DENIED);
        outcome.details = "rbac_access_denied";
        outcome.reasons.push(reason);
        return report(&mut outcome);
    }
    let seed = engine.seed();
    let cluster = tcp.choose(seed);
    outcome.cluster = Some(&cluster.name);
    let known = !matches!(cluster.target, ClusterTarget::Unknown);
    let Some(upstream) = known.then(|| engine.upstream(&worker, &cluster.name)).flatten() else {
        outcome.flags.set(Flags::NO_CLUSTER);
        return report(&mut outcome);
    };
    drop(worker);
    outcome.service = Some(upstream.shared.service.clone());
    let Some((stream, _slot, index)) = connect(&engine, tcp, &upstream, &info, seed, &mut outcome).await else {
        return report(&mut outcome);
    };
    let _active = index.map(|index| upstream.shared.balancer.host(index).begin());
    let opened = open(&engine, &prepared, &info, &source, &outcome);
    let copy = copy_both(io, stream, tcp.idle_timeout);
    let copied = match tcp.max_connection_duration {
        None => copy.await,
        Some(most) => tokio::time::timeout(most, copy).await.unwrap_or_default(),
    };
    (outcome.received, outcome.sent) = (copied.forth, copied.back);
    if copied.idle {
        outcome.flags.set(Flags::IDLE_TIMEOUT);
    }
    outcome.duration = started.elapsed();
    log(&engine, &prepared, &info, &source, &outcome, Some(opened));
}

/// Why the chain's policies refuse the connection, if they do.
fn denied(chain: &TcpChain, info: &ConnInfo) -> Option<String> {
    let ip = info.peer.ip();
    let request = AuthzRequest {
        http: None,
        peer: info.peer_principal.as_deref(),
        direct_remote_ip: ip,
        remote_ip: ip,
        destination: info.destination,
        server_name: None,
    };
    let verdict = chain.rbac.iter().map(|rbac| rbac.evaluate(&request)).find(|verdict| !verdict.allowed)?;
    Some(denial(&verdict))
}

async fn connect(
    engine: &Rc<Engine>,
    chain: &TcpChain,
    upstream: &Rc<Upstream>,
    info: &ConnInfo,
    seed: u64,
    outcome: &mut Outcome<'_>,
) -> Option<(Box<dyn Io>, Slot, Option<usize>)> {
    let hash = chain.hash_source_ip.then(|| xxhash_rust::xxh64::xxh64(info.peer.ip().to_string().as_bytes(), 0));
    let mut rng = Rng::new(seed);
    let mut tried = Vec::new();
    for _ in 0..chain.max_connect_attempts.max(1) {
        outcome.attempts += 1;
        let now = engine.config.shared.now();
        let choice = Choice {
            hash,
            rng: &mut rng,
            tried: &tried,
            attempts: 5,
            skip_priorities: 0,
            now,
            original: info.destination,
            host: None,
        };
        let Some(picked) = upstream.pick(choice) else {
            outcome.flags.set(Flags::NO_HEALTHY_UPSTREAM);
            return None;
        };
        outcome.host = Some(picked.pool.key.clone());
        outcome.destination = Some(picked.pool.peer(|endpoint| engine.destination(endpoint)));
        let error = match picked.pool.raw().await {
            Ok((stream, slot)) => return Some((stream, slot, picked.index)),
            Err(error) => error,
        };
        if let ConnectError::Overflow = error {
            outcome.flags.set(Flags::UPSTREAM_OVERFLOW);
            return None;
        }
        if let Some(index) = picked.index {
            upstream.shared.balancer.report(index, Health::LocalFailure, now);
            tried.push(index);
        }
        outcome.failure = Some(match error {
            ConnectError::Failed(text) => text,
            _ => "connection timeout".to_owned(),
        });
    }
    outcome.flags.set(Flags::UPSTREAM_CONNECTION_FAILURE);
    None
}

fn open(
    engine: &Engine,
    chain: &PreparedChain,
    info: &ConnInfo,
    source: &Arc<Peer>,
    outcome: &Outcome<'_>,
) -> l7_telemetry::ConnectionGuard {
    with_record(engine, info, source, outcome, |record| {
        engine.recorder.borrow_mut().connection_opened(record, &chain.metrics)
    })
}

/// Writes a connection's log lines, metrics and event.
pub(crate) fn log(
    engine: &Engine,
    chain: &PreparedChain,
    info: &ConnInfo,
    source: &Arc<Peer>,
    outcome: &Outcome<'_>,
    opened: Option<l7_telemetry::ConnectionGuard>,
) {
    with_record(engine, info, source, outcome, |record| {
        chain.logs.iter().for_each(|log| log.log(record));
        let mut recorder = engine.recorder.borrow_mut();
        let opened = opened.unwrap_or_else(|| recorder.connection_opened(record, &chain.metrics));
        recorder.connection_closed(opened, record, &chain.metrics);
    });
}

fn with_record<R>(
    engine: &Engine,
    info: &ConnInfo,
    source: &Arc<Peer>,
    outcome: &Outcome<'_>,
    use_it: impl FnOnce(&Record<'_>) -> R,
) -> R {
    let nothing = HeaderMap::new();
    let record = Record {
        start: SystemTime::now() - outcome.duration,
        duration: outcome.duration,
        method: None,
        path: "",
        original_path: None,
        authority: "",
        scheme: "",
        version: None,
        request_headers: &nothing,
        response_headers: None,
        trailers: None,
        status: 0,
        grpc: false,
        grpc_status: None,
        flags: outcome.flags,
        details: outcome.details,
        bytes_received: outcome.received,
        bytes_sent: outcome.sent,
        messages_received: 0,
        messages_sent: 0,
        downstream_remote: info.peer,
        downstream_local: info.destination,
        peer_principal: info.peer_principal.as_deref(),
        local_principal: info.local_principal.as_deref(),
        route_name: "",
        upstream: outcome.cluster.map(|cluster| UpstreamRecord {
            cluster,
            host: outcome.host.as_deref(),
            local: None,
            service_time: None,
            transport_failure: outcome.failure.as_deref(),
            attempts: outcome.attempts,
        }),
        request_id: None,
        trace_id: None,
        security: info.security,
        source,
        destination: outcome.destination.as_ref().unwrap_or(&engine.unknown_peer),
        service: outcome.service.as_ref().unwrap_or(&engine.unknown_service),
        reasons: &outcome.reasons,
        cookie: info.cookie,
    };
    use_it(&record)
}
