//! The mesh around the waypoint under test: the client's side, which wraps each connection into a tunnel to the waypoint, and the
//! destinations', which unwraps the waypoint's. Neither is measured.
use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use http::HeaderMap;
use l7_hbone::{ConnectRequest, Inbound, Pool, PoolConfig, PoolKey, Server, accept_tls};
use l7_identity::IdentityManager;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use xds_model::spiffe::SpiffeId;

/// Takes connections at `listen` and makes each a tunnel to `service` through the waypoint at `waypoint`.
pub(super) async fn client(
    identities: IdentityManager,
    listen: SocketAddr,
    waypoint: SocketAddr,
    service: SocketAddr,
) -> Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| listen.to_string())?;
    let pool = Pool::new(identities, PoolConfig::default());
    let (client, server) = (identity("client")?, identity("waypoint")?);
    let request = ConnectRequest {
        key: PoolKey::new(client, vec![server], waypoint, None),
        authority: service.to_string().into(),
        headers: HeaderMap::new(),
    };
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let (pool, request) = (pool.clone(), request.clone());
            tokio::spawn(async move {
                tcp.set_nodelay(true)?;
                let tunnel = pool.connect(request, move || dial(waypoint)).await.map_err(io::Error::other);
                // A waypoint that is not there yet: whoever waits for it tries again.
                copy_bidirectional(&mut tcp, &mut tunnel?).await
            });
        }
    });
    Ok(())
}

async fn dial(to: SocketAddr) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect(to).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

/// Serves HBONE for the pod at `ip`, as its node's proxy would.
pub(super) async fn destination(identities: IdentityManager, ip: Ipv4Addr) -> Result<()> {
    let listen = SocketAddr::from((ip, l7_hbone::PORT));
    let listener = TcpListener::bind(listen).await.with_context(|| listen.to_string())?;
    let certificate = identities.certificate(&identity("upstream")?).await?;
    tokio::spawn(async move {
        while let Ok((tcp, peer)) = listener.accept().await {
            let certificate = certificate.clone();
            tokio::spawn(async move {
                tcp.set_nodelay(true)?;
                let (tls, caller) = accept_tls(tcp, &certificate).await.map_err(io::Error::other)?;
                let mut server = Server::handshake(tls, caller, peer).await.map_err(io::Error::other)?;
                while let Some(inbound) = server.accept().await.map_err(io::Error::other)? {
                    tokio::spawn(unwrap(inbound));
                }
                io::Result::Ok(())
            });
        }
    });
    Ok(())
}

async fn unwrap(inbound: Inbound) -> io::Result<()> {
    let to = inbound.authority().unwrap_or_default().parse().map_err(io::Error::other)?;
    let mut tcp = dial(to).await?;
    let mut tunnel = inbound.accept(HeaderMap::new()).map_err(io::Error::other)?;
    copy_bidirectional(&mut tcp, &mut tunnel).await.map(drop)
}

pub(super) fn identity(account: &str) -> Result<SpiffeId> {
    SpiffeId::new("cluster.local", "bench", account).context("no identity")
}
