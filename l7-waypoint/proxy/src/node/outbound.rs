//! What a pod connects to: resolve, then tunnel, short hop on the same node, or plaintext.
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderValue};
use l7_hbone::{Baggage, ConnectError, ConnectRequest, PoolKey, Tunnel, forwarded_value};
use strata_runtime::drain;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use xds_model::spiffe::SpiffeId;
use xds_model::wds::{Peer, ResolveError, Service, Upstream, Via, Workload, WorkloadType, unmapped};

use super::live::Subject;
use super::placed::Captured;
use super::pods::Pod;
use super::{CONNECT_TIMEOUT, Worker, local};
use crate::copy;
use crate::sockets::{self, OWN_PORTS};
use crate::telemetry::{Failure, Report, Reporter, Security};

/// Draws before an endpoint behind a short-cut is taken all the same: then it is most likely the only one.
const MAX_DRAWS: usize = 16;
/// Addresses a tunnel is tried at: one that has just gone is still known for a moment.
const MAX_ADDRESSES: usize = 3;

/// One captured connection of `pod`.
pub(crate) async fn serve(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    client: TcpStream,
    client_addr: SocketAddr,
    watch: drain::Watch,
) {
    let started = Instant::now();
    let original = match pod.sockets.original_destination(&client) {
        Ok(addr) => addr,
        Err(error) => {
            tracing::warn!(pod = pod.info.uid, %error, "captured connection without a destination");
            return sockets::reset(client);
        }
    };
    let _ = client.set_nodelay(true); // see local::open
    if worker.shared.dns.stands_at(original) {
        return worker.shared.dns.connection(&pod, client).await;
    }
    let mut connection = Outbound {
        worker,
        pod,
        client,
        watch,
        tried: Vec::new(),
        report: Report {
            reporter: Reporter::Source,
            source: None,
            source_identity: None,
            destination: None,
            destination_identity: None,
            service: None,
            security: Security::Unknown,
            src: unmapped(client_addr),
            dst: original,
            hbone: None,
        },
        started,
    };
    connection.report.source_identity = Some(connection.pod.identity.clone());
    connection.run(original).await;
}

struct Outbound {
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    client: TcpStream,
    /// Held until the connection is over.
    watch: drain::Watch,
    /// Where nobody took the tunnel.
    tried: Vec<SocketAddr>,
    report: Report,
    started: Instant,
}

impl Outbound {
    async fn run(mut self, original: SocketAddr) {
        let port = original.port();
        let own_port = OWN_PORTS.contains(&port);
        if own_port && original.ip().is_loopback() {
            return self.fail(Failure::connect(format_args!("port {port} is the proxy's own")));
        }
        // What comes over lo has met no check of its source yet, and whoever is root in the pod can add an address.
        let from = self.report.src.ip();
        let Some(source) = self.worker.shared.workload_at(&self.pod, from).await else {
            let unknown = format!("the control plane knows no workload of this pod at {from}");
            return self.fail(Failure::connect(unknown));
        };
        if own_port && self.pod.is_at(original.ip(), &source) {
            return self.fail(Failure::connect(format_args!("port {port} is the proxy's own")));
        }
        self.report.source = Some(source.clone());
        let seed = rand::random();
        if let Some(number) = self.placed(&source, original, seed) {
            return self.govern(number, original).await;
        }
        let mut upstream = self.resolve(&source, original, seed);
        while let Ok(Upstream::Hbone { addr, authority, identities, peer, via }) = upstream {
            self.set_peer(peer, true);
            let here = match via {
                Via::Endpoint => self.worker.shared.pods.by_ip(authority.ip()),
                Via::Waypoint => None,
            };
            if let Some(pod) = here {
                return self.same_node(pod, authority).await;
            }
            match self.open_tunnel(&source, addr, authority, identities).await {
                Ok(tunnel) => return self.carry(tunnel).await,
                Err(error) => match self.elsewhere(&source, original, addr, &error) {
                    Some(other) => upstream = Ok(other),
                    None => return self.fail(Failure::new(error.response_flag(), error)),
                },
            }
        }
        match upstream {
            Err(error) => {
                self.report.service =
                    self.worker.shared.mesh.load().service_by_vip(original.ip(), &source.namespace).cloned();
                self.fail(Failure::connect(error));
            }
            Ok(Upstream::Passthrough { addr, service }) => {
                self.report.service = service;
                self.plaintext(addr).await;
            }
            Ok(Upstream::Plain { addr, peer }) => {
                self.set_peer(peer, false);
                self.plaintext(addr).await;
            }
            Ok(Upstream::PlainHost { hostname, port, peer }) => {
                self.set_peer(peer, false);
                let found = tokio::net::lookup_host((&*hostname, port)).await.map(|mut found| found.next());
                match found {
                    Ok(Some(addr)) => self.plaintext(addr).await,
                    Ok(None) => self.fail(Failure::connect(format_args!("{hostname} has no address"))),
                    Err(error) => self.fail(Failure::connect(format_args!("{hostname}: {error}"))),
                }
            }
            // Dealt with above.
            Ok(Upstream::Hbone { .. }) => {}
        }
    }

    /// Another address to try, after one where nobody took the tunnel. The client waits meanwhile: nothing is lost.
    fn elsewhere(
        &mut self,
        source: &Workload,
        original: SocketAddr,
        addr: SocketAddr,
        error: &ConnectError,
    ) -> Option<Upstream> {
        self.tried.push(addr);
        if !error.is_unreachable() || self.tried.len() >= MAX_ADDRESSES || self.started.elapsed() >= CONNECT_TIMEOUT {
            return None;
        }
        let mesh = self.worker.shared.mesh.load();
        let draw = |_| mesh.resolve_outbound(source, original, rand::random()).ok();
        let other = (0..MAX_DRAWS)
            .filter_map(draw)
            .find(|upstream| matches!(upstream, Upstream::Hbone { addr, .. } if !self.tried.contains(addr)))?;
        tracing::debug!(pod = self.pod.info.uid, %addr, %error, "nobody takes the tunnel there, another address is tried");
        Some(other)
    }

    /// The kernel draws a backend first and keeps the connection to itself if it holds a short-cut to it. What comes
    /// here was drawn for another one: endpoints behind a short-cut have had their share and are drawn again.
    fn resolve(&self, source: &Workload, original: SocketAddr, seed: u64) -> Result<Upstream, ResolveError> {
        let shared = &self.worker.shared;
        let mesh = shared.mesh.load();
        let mut upstream = mesh.resolve_outbound(source, original, seed)?;
        for _ in 1..MAX_DRAWS {
            let Upstream::Hbone { authority, via: Via::Endpoint, .. } = &upstream else { break };
            if *authority == original || !shared.grants.holds(self.report.src.ip(), *authority) {
                break;
            }
            upstream = mesh.resolve_outbound(source, original, rand::random())?;
        }
        Ok(upstream)
    }

    /// The waypoint placed on this node that the connection goes through, as an index.
    fn placed(&self, source: &Workload, original: SocketAddr, seed: u64) -> Option<usize> {
        let shared = &self.worker.shared;
        if shared.placed.is_empty() {
            return None;
        }
        let mesh = shared.mesh.load();
        let key = mesh.waypoint_towards(source, original, seed)?;
        shared.placed.iter().position(|placed| placed.is(key))
    }

    /// Hands the connection to the engine of a waypoint placed here, which reports it from then on.
    async fn govern(mut self, number: usize, original: SocketAddr) {
        let shared = self.worker.shared.clone();
        let (Some(placed), Some(engine)) = (shared.placed.get(number), self.worker.placed.get(number)) else { return };
        self.report.security = Security::KernelAttested;
        if let Some(reason) = placed.refusal(&self.pod.identity) {
            return self.fail(Failure::connect(reason));
        }
        let info = placed.info(self.report.src, original, &self.pod.identity);
        let captured = Captured { client: self.client, info, drain: self.watch };
        if let Err(error) = engine.send(captured).await {
            tracing::error!(pod = self.pod.info.uid, "the thread's engine is gone");
            sockets::reset(error.0.client);
        }
    }

    fn set_peer(&mut self, peer: Peer, proven: bool) {
        let Peer { workload, service } = peer;
        self.report.destination_identity = proven.then(|| workload.identity.clone());
        self.report.destination = Some(workload);
        self.report.service = service;
    }

    fn fail(self, failure: Failure) {
        self.worker.shared.telemetry.failed(&self.report, &failure, self.started);
        sockets::reset(self.client);
    }

    async fn plaintext(mut self, addr: SocketAddr) {
        let dial = self.pod.sockets.connect_from(addr);
        let mut upstream = match tokio::time::timeout(CONNECT_TIMEOUT, dial).await {
            Ok(Ok(upstream)) => upstream,
            Ok(Err(error)) => return self.fail(Failure::connect(format_args!("{addr}: {error}"))),
            Err(_) => return self.fail(Failure::connect(format_args!("{addr}: no answer"))),
        };
        let _ = upstream.set_nodelay(true); // see local::open
        let open = self.worker.shared.telemetry.opened(self.report.clone(), self.started);
        let outcome = tokio::select! {
            outcome = copy::tcp_and_tcp(&mut self.client, &mut upstream, open.carried()) => outcome,
            () = open.carried().rest(&mut self.watch) => Ok(()),
        };
        match outcome {
            Ok(()) => open.close(Ok(())),
            Err(error) => {
                sockets::reset(self.client);
                sockets::reset(upstream);
                open.close(Err(Failure::new("-", error)));
            }
        }
    }

    /// Both pods are ours: authorize as the destination, then straight to its application.
    async fn same_node(mut self, destination: Arc<Pod>, authority: SocketAddr) {
        let shared = self.worker.shared.clone();
        self.report.security = Security::KernelAttested;
        let subject = Subject {
            destination_uid: destination.info.uid.as_str().into(),
            source_ip: self.report.src.ip(),
            identity: Some(self.pod.identity.clone()),
            destination: authority,
        };
        // Both ends report, as if there were two proxies.
        let mut far = Report { reporter: Reporter::Destination, dst: authority, ..self.report.clone() };
        far.destination = shared.mesh.load().workload(&destination.info.uid).cloned().or(far.destination);
        let (mut app, registered) = match local::open(&shared, &destination, &subject, self.report.src).await {
            Ok(open) => open,
            Err(refusal) => {
                let failure = refusal.failure(&subject);
                shared.telemetry.failed(&far, &failure, self.started);
                return self.fail(failure);
            }
        };
        if destination.info.uid != self.pod.info.uid {
            shared.grants.consider(&subject);
        }
        let near = shared.telemetry.opened(self.report.clone(), self.started);
        let far = shared.telemetry.opened(far, self.started);
        let outcome = tokio::select! {
            outcome = copy::tcp_and_tcp(&mut self.client, &mut app, near.carried()) => outcome.map_err(|error| Failure::new("-", error)),
            denied = registered.denied() => Err(denied),
            () = near.carried().rest(&mut self.watch) => Ok(()),
        };
        far.carried().request.add(near.carried().request.get());
        far.carried().response.add(near.carried().response.get());
        if outcome.is_err() {
            sockets::reset(self.client);
            sockets::reset(app);
        }
        far.close(outcome.clone());
        near.close(outcome);
    }

    async fn open_tunnel(
        &mut self,
        source: &Workload,
        addr: SocketAddr,
        authority: SocketAddr,
        identities: Vec<SpiffeId>,
    ) -> Result<Tunnel, ConnectError> {
        self.report.security = Security::MutualTls;
        self.report.hbone = Some(addr);
        let request = ConnectRequest {
            key: PoolKey::new(self.pod.identity.clone(), identities, addr, Some(self.report.src.ip())),
            authority: authority.to_string().into(),
            headers: headers(source, self.report.src, self.report.service.as_deref()),
        };
        let pod = self.pod.clone();
        let dial = move || {
            let sockets = pod.sockets.clone();
            async move { sockets.connect_from(addr).await }
        };
        self.worker.pool.connect(request, dial).await
    }

    async fn carry(mut self, mut tunnel: Tunnel) {
        self.report.destination_identity = Some(tunnel.peer().clone());
        let open = self.worker.shared.telemetry.opened(self.report.clone(), self.started);
        let outcome = tokio::select! {
            outcome = copy::tcp_and_tunnel(&mut self.client, &mut tunnel, open.carried()) => outcome,
            () = open.carried().rest(&mut self.watch) => {
                // The client hears first: what it sent from now on would be lost.
                match self.client.shutdown().await {
                    Ok(()) => copy::end(&mut tunnel).await,
                    Err(error) => Err(error),
                }
            }
        };
        match outcome {
            Ok(()) => open.close(Ok(())),
            Err(error) => {
                tunnel.split().1.reset();
                sockets::reset(self.client);
                open.close(Err(Failure::new("-", error)));
            }
        }
    }
}

/// What rides on the CONNECT: telemetry and the client on whose behalf it is made.
fn headers(source: &Workload, client: SocketAddr, service: Option<&Service>) -> HeaderMap {
    let baggage = Baggage {
        cluster: &source.cluster_id,
        namespace: &source.namespace,
        workload_type: match source.workload_type {
            WorkloadType::Deployment => "deployment",
            WorkloadType::CronJob => "cronjob",
            WorkloadType::Pod => "pod",
            WorkloadType::Job => "job",
        },
        workload_name: &source.workload_name,
        service_name: &source.canonical_name,
        service_version: &source.canonical_revision,
        region: &source.locality.region,
        zone: &source.locality.zone,
    };
    let traceparent = format!("00-{:032x}-{:016x}-01", rand::random::<u128>() | 1, rand::random::<u64>() | 1);
    let mut headers = HeaderMap::with_capacity(3);
    let values = [
        ("baggage", baggage.value()),
        ("forwarded", forwarded_value(client, service.map(|service| &*service.hostname))),
        ("traceparent", traceparent),
    ];
    for (name, value) in values {
        // All three are made of visible ASCII by construction; one that were not is better left out.
        if let Ok(value) = HeaderValue::try_from(value)
            && !value.is_empty()
        {
            headers.insert(name, value);
        }
    }
    headers
}
