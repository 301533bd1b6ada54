//! HBONE to a pod of this node (xds-contract 4.3).
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, StatusCode};
use l7_hbone::{Inbound, Server, accept_tls, forwarded_for};
use strata_runtime::drain;
use tokio::net::TcpStream;
use xds_model::wds::{Mesh, Workload, unmapped};

use super::Worker;
use super::live::Subject;
use super::local::{self, Refusal};
use super::pods::Pod;
use crate::copy;
use crate::sockets;
use crate::telemetry::{Failure, Report, Reporter, Security};

/// One TCP connection to port 15008 of `pod`.
pub(crate) async fn serve(worker: Arc<Worker>, pod: Arc<Pod>, tcp: TcpStream, client: SocketAddr, drain: drain::Watch) {
    let started = Instant::now();
    let client = unmapped(client);
    let Ok(local) = tcp.local_addr().map(unmapped) else { return };
    let _ = tcp.set_nodelay(true); // see local::open
    let fail = |failure: Failure| {
        let report = blank_report(&worker, &pod, client, local);
        worker.shared.telemetry.failed(&report, &failure, started);
    };
    let certificate = match worker.shared.identities.certificate(&pod.identity).await {
        Ok(certificate) => certificate,
        Err(error) => return fail(Failure::new("IDENTITY_ERROR", error)),
    };
    let (tls, peer) = match accept_tls(tcp, &certificate).await {
        Ok(accepted) => accepted,
        Err(error) => return fail(Failure::new("TLS_FAILURE", error)),
    };
    let mut server = match Server::handshake(tls, peer, client).await {
        Ok(server) => server,
        Err(error) => return fail(Failure::new("H2_HANDSHAKE_FAILURE", error)),
    };
    let mut draining = false;
    loop {
        let next = tokio::select! {
            next = server.accept() => next,
            // No new tunnels on this connection to a pod that takes no new connections.
            () = pod.listening.cancelled(), if !draining => {
                draining = true;
                server.drain();
                continue;
            }
        };
        match next {
            Ok(Some(inbound)) => {
                pod.spawn(tunnel(worker.clone(), pod.clone(), inbound, local, drain.clone()));
            }
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%client, %error, "HBONE connection broke");
                return;
            }
        }
    }
}

fn blank_report(worker: &Worker, pod: &Pod, src: SocketAddr, dst: SocketAddr) -> Report {
    Report {
        reporter: Reporter::Destination,
        source: None,
        source_identity: None,
        destination: worker.shared.mesh.load().workload(&pod.info.uid).cloned(),
        destination_identity: Some(pod.identity.clone()),
        service: None,
        security: Security::Unknown,
        src,
        dst,
        hbone: None,
    }
}

/// One CONNECT.
async fn tunnel(worker: Arc<Worker>, pod: Arc<Pod>, inbound: Inbound, local: SocketAddr, mut watch: drain::Watch) {
    let shared = worker.shared.clone();
    let started = Instant::now();
    let mut report = blank_report(&worker, &pod, inbound.peer_addr(), local);
    report.security = Security::MutualTls;
    report.source_identity = Some(inbound.peer().clone());
    report.hbone = Some(local);
    let refuse = |inbound: Inbound, report: &Report, status: StatusCode, failure: Failure| {
        shared.telemetry.failed(report, &failure, started);
        inbound.refuse(status);
    };
    let Some(workload) = shared.workload_at(&pod, local.ip()).await else {
        let failure =
            Failure::connect(format_args!("the control plane knows no workload of this pod at {}", local.ip()));
        return refuse(inbound, &report, StatusCode::SERVICE_UNAVAILABLE, failure);
    };
    let mesh = shared.mesh.load_full();
    report.destination = Some(workload.clone());
    report.source = local::workload_of_peer(&mesh, inbound.peer_addr().ip(), Some(inbound.peer()));
    let destination = match target(&mesh, &workload, inbound.authority(), local) {
        Ok(destination) => destination,
        Err((status, reason)) => return refuse(inbound, &report, status, Failure::connect(reason)),
    };
    report.dst = destination;
    report.service = local::service_behind(&mesh, &workload, destination.port());
    // The application sees who really calls: the peer, or whom the destination's own waypoint speaks for.
    let forwarded = forwarded_for(inbound.headers()).filter(|_| mesh.is_own_waypoint(&workload, inbound.peer()));
    let client = forwarded.unwrap_or_else(|| inbound.peer_addr());
    drop(mesh);
    let subject = Subject {
        destination_uid: workload.uid.clone(),
        source_ip: inbound.peer_addr().ip(),
        identity: Some(inbound.peer().clone()),
        destination,
    };
    let (mut app, registered) = match local::open(&shared, &pod, &subject, client).await {
        Ok(open) => open,
        Err(refusal) => {
            let status = match refusal {
                Refusal::Denied(_) => StatusCode::UNAUTHORIZED,
                Refusal::OwnPort(_) | Refusal::Connect(_) => StatusCode::SERVICE_UNAVAILABLE,
            };
            return refuse(inbound, &report, status, refusal.failure(&subject));
        }
    };
    let mut tunnel = match inbound.accept(HeaderMap::new()) {
        Ok(tunnel) => tunnel,
        Err(error) => {
            shared.telemetry.failed(&report, &Failure::connect(error), started);
            return;
        }
    };
    let open = shared.telemetry.opened(report, started);
    let outcome = tokio::select! {
        outcome = copy::tunnel_and_tcp(&mut tunnel, &mut app, open.carried()) => outcome.map_err(|error| Failure::new("-", error)),
        denied = registered.denied() => Err(denied),
        () = open.carried().rest(&mut watch) => copy::end(&mut tunnel).await.map_err(|error| Failure::new("-", error)),
    };
    if outcome.is_err() {
        tunnel.split().1.reset();
        sockets::reset(app);
    }
    open.close(outcome);
}

/// Where the authority leads inside this pod, or the status that refuses it.
fn target(
    mesh: &Mesh,
    workload: &Workload,
    authority: Option<&str>,
    local: SocketAddr,
) -> Result<SocketAddr, (StatusCode, String)> {
    let bad = |reason: String| (StatusCode::BAD_REQUEST, reason);
    let unavailable = |reason: String| (StatusCode::SERVICE_UNAVAILABLE, reason);
    let authority = authority.ok_or_else(|| bad("not a CONNECT".to_owned()))?;
    let port = match authority.parse::<SocketAddr>() {
        Ok(addr) if addr.ip().to_canonical() == local.ip() => addr.port(),
        Ok(addr) if workload.application_tunnel.is_some() => addr.port(),
        Ok(addr) => return Err(bad(format!("authority {addr} is not the address {} of this pod", local.ip()))),
        Err(_) => {
            let (host, port) = authority
                .rsplit_once(':')
                .and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)))
                .ok_or_else(|| bad(format!("authority {authority} is neither address nor host with port")))?;
            port_by_host(mesh, workload, host, port)
                .ok_or_else(|| unavailable(format!("{host}:{port} is no service with an endpoint here")))?
        }
    };
    match workload.application_tunnel {
        Some(tunnel) if tunnel.proxy_protocol => {
            Err(unavailable("application tunnels with the PROXY protocol are not supported yet".to_owned()))
        }
        Some(tunnel) if tunnel.port > 0 => Ok(SocketAddr::new(local.ip(), tunnel.port)),
        _ => Ok(SocketAddr::new(local.ip(), port)),
    }
}

fn port_by_host(mesh: &Mesh, workload: &Workload, host: &str, service_port: u16) -> Option<u16> {
    let service = mesh.service_by_hostname(host, &workload.namespace)?;
    let own = workload.services.get(&service.key)?;
    let listed = own.iter().find(|port| port.service_port == service_port).filter(|port| port.target_port > 0);
    listed.or_else(|| service.port(service_port)).map(|port| port.target_port).filter(|port| *port > 0)
}
