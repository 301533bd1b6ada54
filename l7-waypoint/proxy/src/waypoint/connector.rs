//! The way from a waypoint to endpoints: HBONE from the shared pool, or plain TCP.
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures::future::LocalBoxFuture;
use http::{HeaderMap, HeaderValue};
use l7_hbone::{ConnectRequest, Pool, PoolKey, Tunnel, forwarded_value};
use l7_http::{Connector, Io};
use l7_route::Snapshot;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use xds_model::envoy::cluster::{Cluster, Endpoint, EndpointTarget};
use xds_model::spiffe::SpiffeId;
use xds_model::wds::MeshView;

/// How long a connection waits for the workload behind a new endpoint: istiod sends endpoints first.
const WORKLOAD_WAIT: Duration = Duration::from_secs(2);

tokio::task_local! {
    /// The client of the connection this task serves.
    pub(crate) static CLIENT: SocketAddr;
}

/// Opens connections to endpoints with the waypoint's own identity.
pub(crate) struct HboneConnector {
    pool: Pool,
    own: SpiffeId,
    mesh: MeshView,
    snapshot: Arc<ArcSwap<Snapshot>>,
}

impl HboneConnector {
    pub(crate) fn new(pool: Pool, own: SpiffeId, mesh: MeshView, snapshot: Arc<ArcSwap<Snapshot>>) -> HboneConnector {
        HboneConnector { pool, own, mesh, snapshot }
    }

    fn tunnel(
        &self,
        authority: SocketAddr,
        waypoint: Option<SocketAddr>,
        headers: HeaderMap,
    ) -> LocalBoxFuture<'static, io::Result<Box<dyn Io>>> {
        let (pool, own, mesh, snapshot) =
            (self.pool.clone(), self.own.clone(), self.mesh.clone(), self.snapshot.clone());
        Box::pin(async move {
            let port = snapshot.load().originate.as_ref().map_or(l7_hbone::PORT, |originate| originate.config.port);
            let addr = waypoint.unwrap_or_else(|| SocketAddr::new(authority.ip(), port));
            let identity = identity_of(&mesh, addr).await?;
            if snapshot.load().originate.as_ref().is_some_and(|originate| !originate.accepts(identity.as_str())) {
                let reason = format!("{identity} is not an identity the waypoint may talk to");
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
            }
            let key = PoolKey::new(own, vec![identity], addr, None);
            let request = ConnectRequest { key, authority: authority.to_string().into(), headers };
            let tunnel = pool.connect(request, move || TcpStream::connect(addr)).await.map_err(io::Error::other)?;
            Ok(Box::new(HboneIo(tunnel)) as Box<dyn Io>)
        })
    }
}

/// The exact identity expected at `addr`. Without one nothing is dialled: a chain to the right root alone would
/// let any workload answer for any other.
async fn identity_of(mesh: &MeshView, addr: SocketAddr) -> io::Result<SpiffeId> {
    let find = || mesh.load().workload_by_ip(addr.ip()).map(|workload| workload.identity.clone());
    if let Some(identity) = find() {
        return Ok(identity);
    }
    let mut changes = mesh.changes();
    let wait = async {
        while changes.changed().await.is_ok() {
            if let Some(identity) = find() {
                return Some(identity);
            }
        }
        None
    };
    tokio::time::timeout(WORKLOAD_WAIT, wait).await.ok().flatten().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("no workload is known at {addr}, so nobody can be expected there"),
        )
    })
}

impl Connector for HboneConnector {
    fn connect(&self, endpoint: &Endpoint, cluster: &Cluster) -> LocalBoxFuture<'static, io::Result<Box<dyn Io>>> {
        let unsupported = |reason: String| -> LocalBoxFuture<'static, io::Result<Box<dyn Io>>> {
            Box::pin(std::future::ready(Err(io::Error::new(io::ErrorKind::Unsupported, reason))))
        };
        if cluster.tls.is_some() {
            return unsupported(format!(
                "{}: TLS of a DestinationRule towards the endpoint is not supported yet",
                cluster.name
            ));
        }
        if cluster.proxy_protocol.is_some() {
            return unsupported(format!(
                "{}: the PROXY protocol towards the endpoint is not supported yet",
                cluster.name
            ));
        }
        match &endpoint.target {
            EndpointTarget::Hbone { authority, waypoint } => {
                // Only a TCP connection belongs to one client; HTTP connections are shared, so nobody's address fits.
                let client = if cluster.name.contains("|tcp") { CLIENT.try_with(|client| *client).ok() } else { None };
                let mut headers = HeaderMap::new();
                if let Some(value) = client.and_then(|client| HeaderValue::try_from(forwarded_value(client, None)).ok())
                {
                    headers.insert("forwarded", value);
                }
                self.tunnel(*authority, *waypoint, headers)
            }
            EndpointTarget::Plain { address, additional } => {
                let addresses: Vec<_> = std::iter::once(*address).chain(additional.iter().copied()).collect();
                Box::pin(async move {
                    let stream = TcpStream::connect(addresses.as_slice()).await?;
                    stream.set_nodelay(true)?;
                    Ok(Box::new(stream) as Box<dyn Io>)
                })
            }
            EndpointTarget::Unreachable { reason } => unsupported(reason.clone()),
        }
    }
}

/// A tunnel as the engine's stream.
struct HboneIo(Tunnel);

impl Io for HboneIo {}

impl AsyncRead for HboneIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for HboneIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
