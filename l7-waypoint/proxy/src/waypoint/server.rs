//! The waypoint's HBONE server: one CONNECT, one connection for the engine.
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{HeaderMap, StatusCode};
use l7_hbone::{Inbound, Server, accept_tls};
use l7_http::{ConnInfo, Engine};
use l7_identity::IdentityManager;
use l7_route::Snapshot;
use l7_telemetry::Security;
use socket2::{Domain, Protocol, Socket, Type};
use strata_runtime::drain;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use xds_model::spiffe::SpiffeId;
use xds_model::wds::unmapped;

use super::connector::{CLIENT, Client};

const BACKLOG: i32 = 4096;

/// One data-plane thread of a waypoint.
pub(crate) struct Worker {
    pub engine: Rc<Engine>,
    pub identities: IdentityManager,
    pub own: SpiffeId,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
}

/// Listens; workers share the address.
pub(crate) fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Accepts until told to stop.
pub(crate) async fn serve(worker: Rc<Worker>, socket: TcpListener, listening: CancellationToken, watch: drain::Watch) {
    let socket = match tokio::net::TcpListener::from_std(socket) {
        Ok(socket) => socket,
        Err(error) => return tracing::error!(%error, "listener cannot be used"),
    };
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            () = listening.cancelled() => return,
        };
        match accepted {
            Ok((tcp, client)) => {
                tokio::task::spawn_local(connection(worker.clone(), tcp, unmapped(client), watch.clone()));
            }
            Err(error) => {
                // Out of descriptors or the like: accepting again at once would only burn CPU.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

async fn connection(worker: Rc<Worker>, tcp: TcpStream, client: SocketAddr, mut drain: drain::Watch) {
    // Failing to say so only makes small messages slower.
    let _ = tcp.set_nodelay(true);
    let certificate = match worker.identities.certificate(&worker.own).await {
        Ok(certificate) => certificate,
        Err(error) => return tracing::warn!(%client, %error, "connection refused"),
    };
    let (tls, peer) = match accept_tls(tcp, &certificate).await {
        Ok(accepted) => accepted,
        Err(error) => return tracing::warn!(%client, %error, "connection refused"),
    };
    if !worker.snapshot.load().terminate.as_ref().is_some_and(|terminate| terminate.accepts(peer.as_str())) {
        return tracing::warn!(%client, %peer, "connection refused: the configuration does not accept this peer");
    }
    let mut server = match Server::handshake(tls, peer, client).await {
        Ok(server) => server,
        Err(error) => return tracing::debug!(%client, %error, "connection ended"),
    };
    let mut draining = false;
    loop {
        let next = tokio::select! {
            next = server.accept() => next,
            _ = drain.signaled(), if !draining => {
                draining = true;
                server.drain();
                continue;
            }
        };
        match next {
            Ok(Some(inbound)) => {
                tokio::task::spawn_local(tunnel(worker.clone(), inbound, drain.clone()));
            }
            Ok(None) => return,
            Err(error) => return tracing::debug!(%client, %error, "HBONE connection broke"),
        }
    }
}

async fn tunnel(worker: Rc<Worker>, inbound: Inbound, drain: drain::Watch) {
    let client = inbound.peer_addr();
    let destination = match inbound.authority().map(str::parse::<SocketAddr>) {
        Some(Ok(destination)) => unmapped(destination),
        Some(Err(_)) => {
            tracing::warn!(%client, authority = inbound.authority(), "CONNECT to a host name: double HBONE is not supported yet");
            return inbound.refuse(StatusCode::SERVICE_UNAVAILABLE);
        }
        None => return inbound.refuse(StatusCode::BAD_REQUEST),
    };
    if worker.snapshot.load().terminate.as_ref().is_none_or(|terminate| !terminate.rbac.is_empty()) {
        // Policies on the CONNECT itself cannot be honoured yet: fail closed.
        tracing::error!(%client, %destination, "CONNECT refused: the listener has authorization policies of its own, which are not supported yet");
        return inbound.refuse(StatusCode::FORBIDDEN);
    }
    let info = ConnInfo {
        peer: client,
        destination,
        peer_principal: Some(inbound.peer().shared()),
        local_principal: Some(worker.own.shared()),
        tls: false,
        security: Security::MutualTls,
        cookie: None,
    };
    match inbound.accept(HeaderMap::new()) {
        Ok(tunnel) => {
            CLIENT.scope(Client { address: client, destination }, worker.engine.serve(tunnel, info, drain)).await
        }
        Err(error) => tracing::debug!(%client, %error, "client went away"),
    }
}
