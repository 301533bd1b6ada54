//! One connection or one datagram, and what the socket calls said.
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::timeout;

use crate::failure;
use crate::serve::duration;

/// Where to connect to.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// ADDRESS:PORT or NAME:PORT
    #[arg(value_parser = crate::target)]
    target: SocketAddr,
    /// UDP instead of TCP
    #[arg(long)]
    udp: bool,
    /// UDP: sendto()/recvfrom() on a socket that is not connected
    #[arg(long)]
    unconnected: bool,
    /// What to send once connected; the answer is shown. `WHO` makes strata-echo's TCP port tell what it sees
    #[arg(long)]
    say: Option<String>,
    /// Give up after
    #[arg(long, value_parser = |text: &str| duration(text).ok_or("not a time"), default_value = "3s")]
    timeout: Duration,
}

#[derive(Debug, Default, Serialize)]
struct Seen {
    ok: bool,
    /// Symbolic errno, or `timeout`.
    error: Option<String>,
    /// Until connect() (or the answer, over UDP) returned.
    took_ms: f64,
    /// getpeername(), or the source of the answer on an unconnected socket.
    peer: Option<String>,
    /// getsockname().
    local: Option<String>,
    reply: Option<serde_json::Value>,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut seen = Seen::default();
    let tried = async {
        match (args.udp, args.unconnected) {
            (false, _) => tcp(&args, &mut seen, began).await,
            (true, false) => connected(&args, &mut seen).await,
            (true, true) => unconnected(&args, &mut seen).await,
        }
    };
    match timeout(args.timeout, tried).await {
        Ok(Ok(())) => seen.ok = true,
        Ok(Err(error)) => seen.error = Some(failure::name(&error)),
        Err(_) => seen.error = Some("timeout".into()),
    }
    if seen.took_ms == 0.0 {
        seen.took_ms = began.elapsed().as_secs_f64() * 1e3;
    }
    crate::print(&seen)
}

async fn tcp(args: &Args, seen: &mut Seen, began: Instant) -> io::Result<()> {
    let socket = if args.target.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    let mut stream = socket.connect(args.target).await?;
    seen.took_ms = began.elapsed().as_secs_f64() * 1e3;
    seen.peer = Some(stream.peer_addr()?.to_string());
    seen.local = Some(stream.local_addr()?.to_string());
    if let Some(say) = &args.say {
        stream.write_all(format!("{say}\n").as_bytes()).await?;
        let mut buffer = vec![0; 4096];
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        seen.reply = Some(reply(&buffer[..length]));
    }
    Ok(())
}

async fn connected(args: &Args, seen: &mut Seen) -> io::Result<()> {
    let socket = UdpSocket::bind(any(args.target)).await?;
    socket.connect(args.target).await?;
    seen.peer = Some(socket.peer_addr()?.to_string());
    seen.local = Some(socket.local_addr()?.to_string());
    socket.send(args.say.as_deref().unwrap_or("hello").as_bytes()).await?;
    let mut buffer = vec![0; 4096];
    let length = socket.recv(&mut buffer).await?;
    seen.reply = Some(reply(&buffer[..length]));
    Ok(())
}

async fn unconnected(args: &Args, seen: &mut Seen) -> io::Result<()> {
    let socket = UdpSocket::bind(any(args.target)).await?;
    socket.send_to(args.say.as_deref().unwrap_or("hello").as_bytes(), args.target).await?;
    seen.local = Some(socket.local_addr()?.to_string());
    let mut buffer = vec![0; 4096];
    let (length, from) = socket.recv_from(&mut buffer).await?;
    seen.peer = Some(from.to_string());
    seen.reply = Some(reply(&buffer[..length]));
    Ok(())
}

fn any(like: SocketAddr) -> SocketAddr {
    if like.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() }
}

fn reply(bytes: &[u8]) -> serde_json::Value {
    let text = || serde_json::Value::String(String::from_utf8_lossy(bytes).trim_end().to_owned());
    serde_json::from_slice(bytes).unwrap_or_else(|_| text())
}
