//! The way from a waypoint to endpoints: HBONE from the shared pool, or plain TCP; in either TLS, if the service speaks it.
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
use l7_origination::Origination;
use l7_route::Snapshot;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use xds_model::envoy::cluster::{Cluster, Endpoint, EndpointTarget};
use xds_model::spiffe::SpiffeId;
use xds_model::wds::MeshView;

use super::proxy_protocol;

/// How long a connection waits for the workload behind a new endpoint: istiod sends endpoints first.
const WORKLOAD_WAIT: Duration = Duration::from_secs(2);

tokio::task_local! {
    /// The connection this task serves.
    pub(crate) static CLIENT: Client;
}

/// Who asked for a connection, and where to.
#[derive(Clone, Copy)]
pub(crate) struct Client {
    pub(crate) address: SocketAddr,
    pub(crate) destination: SocketAddr,
}

/// The client a connection to the cluster is made for. Only a TCP connection belongs to one; HTTP connections are
/// shared, so nobody's address fits.
fn only_client(cluster: &Cluster) -> Option<Client> {
    if cluster.name.contains("|tcp") { CLIENT.try_with(|client| *client).ok() } else { None }
}

/// Opens connections to endpoints with the waypoint's own identity.
pub(crate) struct HboneConnector {
    pool: Pool,
    own: SpiffeId,
    mesh: MeshView,
    snapshot: Arc<ArcSwap<Snapshot>>,
    origination: Arc<Origination>,
}

impl HboneConnector {
    pub(crate) fn new(
        pool: Pool,
        own: SpiffeId,
        mesh: MeshView,
        snapshot: Arc<ArcSwap<Snapshot>>,
        origination: Arc<Origination>,
    ) -> HboneConnector {
        HboneConnector { pool, own, mesh, snapshot, origination }
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

impl HboneConnector {
    /// The stream to the endpoint, whatever is spoken on it.
    fn reach(&self, endpoint: &Endpoint, cluster: &Cluster) -> LocalBoxFuture<'static, io::Result<Box<dyn Io>>> {
        match &endpoint.target {
            EndpointTarget::Hbone { authority, waypoint } => {
                let mut headers = HeaderMap::new();
                let forwarded = |client: Client| HeaderValue::try_from(forwarded_value(client.address, None)).ok();
                if let Some(value) = only_client(cluster).and_then(forwarded) {
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

fn unsupported(reason: String) -> LocalBoxFuture<'static, io::Result<Box<dyn Io>>> {
    Box::pin(std::future::ready(Err(io::Error::new(io::ErrorKind::Unsupported, reason))))
}

impl Connector for HboneConnector {
    fn connect(
        &self,
        endpoint: &Endpoint,
        cluster: &Arc<Cluster>,
        host: Option<&Arc<str>>,
    ) -> LocalBoxFuture<'static, io::Result<Box<dyn Io>>> {
        let announced = match cluster.proxy_protocol {
            None => Vec::new(),
            Some(version) => match only_client(cluster) {
                Some(client) => proxy_protocol::header(version, client.address, client.destination),
                None => {
                    let reason = "the PROXY protocol is not supported on HTTP connections, which are shared by clients";
                    return unsupported(format!("{}: {reason}", cluster.name));
                }
            },
        };
        let reached = self.reach(endpoint, cluster);
        if announced.is_empty() && cluster.tls.is_none() {
            return reached;
        }
        let (origination, cluster) = (self.origination.clone(), cluster.clone());
        // A TCP connection is for no host; the endpoint's own name, if it was resolved, is as good.
        let host = host.cloned().or_else(|| endpoint.hostname.as_deref().map(Arc::from));
        Box::pin(async move {
            let mut stream = reached.await?;
            if !announced.is_empty() {
                stream.write_all(&announced).await?;
                stream.flush().await?;
            }
            let Some(tls) = &cluster.tls else { return Ok(stream) };
            let stream = origination.connect(&cluster.name, tls, host.as_deref(), stream).await?;
            Ok(Box::new(TlsIo(stream)) as Box<dyn Io>)
        })
    }
}

/// Gives a stream of ours the reading and writing of the one inside.
macro_rules! stream_inside {
    ($outer:ty) => {
        impl AsyncRead for $outer {
            fn poll_read(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                Pin::new(&mut self.0).poll_read(cx, buf)
            }
        }

        impl AsyncWrite for $outer {
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
    };
}

/// TLS as the engine's stream.
struct TlsIo(TlsStream<Box<dyn Io>>);

stream_inside!(TlsIo);

impl Io for TlsIo {
    fn alpn(&self) -> Option<&[u8]> {
        self.0.get_ref().1.alpn_protocol()
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        self.0.get_ref().0.local_addr()
    }
}

/// A tunnel as the engine's stream.
struct HboneIo(Tunnel);

stream_inside!(HboneIo);

impl Io for HboneIo {}
