//! How an endpoint is reached. The proxy brings the real one (HBONE); the plain one is for tests and benches, and for
//! endpoints outside the mesh.

use std::io;
use std::sync::Arc;

use futures::future::LocalBoxFuture;
use tokio::net::TcpStream;
use xds_model::envoy::cluster::{Cluster, Endpoint, EndpointTarget};

use crate::io::Io;

/// Opens connections to endpoints.
pub trait Connector {
    /// A stream on which the cluster's protocol can be spoken. `host` is the host of the request the connection is made
    /// for; it is given where TLS depends on it. The caller applies the cluster's connect timeout and drops the future
    /// when it is over.
    fn connect(
        &self,
        endpoint: &Endpoint,
        cluster: &Arc<Cluster>,
        host: Option<&Arc<str>>,
    ) -> LocalBoxFuture<'static, io::Result<Box<dyn Io>>>;
}

/// Connects over TCP to the endpoint's own address, without HBONE and without TLS.
#[derive(Debug, Default, Clone, Copy)]
pub struct PlainConnector;

impl Connector for PlainConnector {
    fn connect(
        &self,
        endpoint: &Endpoint,
        cluster: &Arc<Cluster>,
        _host: Option<&Arc<str>>,
    ) -> LocalBoxFuture<'static, io::Result<Box<dyn Io>>> {
        let addresses = match &endpoint.target {
            EndpointTarget::Plain { address, additional } => {
                std::iter::once(*address).chain(additional.iter().copied()).collect()
            }
            EndpointTarget::Hbone { authority, .. } => vec![*authority],
            EndpointTarget::Unreachable { reason } => {
                let error = io::Error::new(io::ErrorKind::Unsupported, reason.clone());
                return Box::pin(async move { Err(error) });
            }
        };
        let keepalive = cluster.tcp_keepalive;
        Box::pin(async move {
            // One address after the other; each failure is fast or ends with the caller's timeout.
            let stream = TcpStream::connect(addresses.as_slice()).await?;
            stream.set_nodelay(true)?;
            if let Some(keepalive) = keepalive {
                set_keepalive(&stream, keepalive)?;
            }
            Ok(Box::new(stream) as Box<dyn Io>)
        })
    }
}

fn set_keepalive(stream: &TcpStream, settings: xds_model::envoy::cluster::TcpKeepalive) -> io::Result<()> {
    let mut keepalive = socket2::TcpKeepalive::new();
    if let Some(time) = settings.time {
        keepalive = keepalive.with_time(time);
    }
    if let Some(interval) = settings.interval {
        keepalive = keepalive.with_interval(interval);
    }
    if let Some(probes) = settings.probes {
        keepalive = keepalive.with_retries(probes);
    }
    socket2::SockRef::from(stream).set_tcp_keepalive(&keepalive)
}
