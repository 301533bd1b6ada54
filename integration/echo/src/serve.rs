//! The server: every answer says who answered and what the application saw of the client.
mod control;
mod http;
mod plain;
mod websocket;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
pub(crate) use control::duration;
use socket2::{Domain, Protocol, Socket, Type};

/// What to serve, and under which name.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name to report; default: the host's, which in a pod is the pod's
    #[arg(long, env = "POD_NAME")]
    name: Option<String>,
    /// Version to report
    #[arg(long, env = "POD_VERSION", default_value = "v1")]
    version: String,
    /// Namespace to report
    #[arg(long, env = "POD_NAMESPACE", default_value = "")]
    namespace: String,
    /// HTTP/1.1, h2c with prior knowledge, WebSocket: a port (all addresses, IPv4 and IPv6) or ADDRESS:PORT
    #[arg(long, default_value = "8080", value_parser = listen_address)]
    http: SocketAddr,
    /// TCP: echoes bytes; a first line WHO is answered with JSON, SINK counts what follows. Off if not given
    #[arg(long, value_parser = listen_address)]
    tcp: Option<SocketAddr>,
    /// UDP: answers every datagram with JSON. Off if not given
    #[arg(long, value_parser = listen_address)]
    udp: Option<SocketAddr>,
    /// Fail this share of the requests with 503, whatever they ask for
    #[arg(long, default_value_t = 0.0)]
    fail_percent: f64,
}

/// Who answers.
#[derive(Debug)]
struct Me {
    name: String,
    version: String,
    namespace: String,
    fail_percent: f64,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let me = Arc::new(Me {
        name: args.name.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_else(|| "echo".to_owned()),
        version: args.version,
        namespace: args.namespace,
        fail_percent: args.fail_percent,
    });
    if let Some(address) = args.udp {
        let socket = socket(address, Type::DGRAM)?;
        tokio::spawn(plain::udp(tokio::net::UdpSocket::from_std(socket.into())?, me.clone()));
    }
    if let Some(address) = args.tcp {
        let socket = socket(address, Type::STREAM)?;
        tokio::spawn(plain::tcp(tokio::net::TcpListener::from_std(socket.into())?, me.clone()));
    }
    let socket = socket(args.http, Type::STREAM)?;
    let listener = tokio::net::TcpListener::from_std(socket.into())?;
    eprintln!("strata-echo {} {} serves HTTP on {}", me.name, me.version, listener.local_addr()?);
    http::serve(listener, me).await
}

/// A bound (and listening) socket; `[::]` takes IPv4 too.
fn socket(address: SocketAddr, kind: Type) -> anyhow::Result<Socket> {
    let protocol = if kind == Type::DGRAM { Protocol::UDP } else { Protocol::TCP };
    let context = || format!("listening on {address}");
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol)).with_context(context)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into()).with_context(context)?;
    if kind == Type::STREAM {
        socket.listen(4096)?;
    }
    Ok(socket)
}

fn listen_address(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<u16>() {
        Ok(port) => Ok((Ipv6Addr::UNSPECIFIED, port).into()),
        Err(_) => text.parse().map_err(|_| format!("{text:?} is neither a port nor ADDRESS:PORT")),
    }
}

/// An IPv4 client of an IPv6 socket under its IPv4 address.
fn plain_address(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => (v4, address.port()).into(),
            None => address,
        },
        IpAddr::V4(_) => address,
    }
}
