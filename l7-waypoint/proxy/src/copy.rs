//! Bytes both ways between two ends, each way closed on its own, memory bounded, none held while idle.
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use l7_hbone::{Tunnel, TunnelReader, TunnelWriter};
use prometheus_client::metrics::counter::Counter;
use strata_runtime::drain;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

/// First and largest read from a socket, bytes.
const SMALL: usize = 8 << 10;
const LARGE: usize = 64 << 10;

/// How long nothing must have moved for a connection to rest.
const REST: Duration = Duration::from_millis(10);
/// How long the other side of a tunnel may take to end its direction after ours.
const GOODBYE: Duration = Duration::from_millis(500);

/// What has been carried; shared with the metrics.
#[derive(Clone)]
pub(crate) struct Carried {
    /// Client to server.
    pub request: Tally,
    /// Server to client.
    pub response: Tally,
}

impl Carried {
    /// `request`, `response`: the counters of all connections with the same labels.
    pub(crate) fn new(request: Counter, response: Counter) -> Carried {
        let asked = Arc::new(AtomicBool::new(false));
        let tally = |shared, asks| Tally { own: Arc::default(), shared, asks, asked: asked.clone() };
        Carried { request: tally(request, true), response: tally(response, false) }
    }

    /// Resolves after a drain's last call, when the connection rests: nothing moves, and the client does not wait for an
    /// answer. Ended then, it most likely loses nothing.
    pub(crate) async fn rest(&self, drain: &mut drain::Watch) {
        drain.last_call().await;
        let moved = || (self.request.get(), self.response.get());
        let mut last = moved();
        loop {
            tokio::time::sleep(REST).await;
            let now = moved();
            if now == last && !self.request.asked.load(Ordering::Relaxed) {
                return;
            }
            last = now;
        }
    }
}

/// One direction's count: of this connection, and of all with the same labels.
#[derive(Clone)]
pub(crate) struct Tally {
    own: Arc<AtomicU64>,
    shared: Counter,
    /// The direction of requests.
    asks: bool,
    /// What moved last went in the direction of requests.
    asked: Arc<AtomicBool>,
}

impl Tally {
    pub(crate) fn add(&self, bytes: u64) {
        self.own.fetch_add(bytes, Ordering::Relaxed);
        self.asked.store(self.asks, Ordering::Relaxed);
        self.shared.inc_by(bytes);
    }

    /// Of this connection.
    pub(crate) fn get(&self) -> u64 {
        self.own.load(Ordering::Relaxed)
    }
}

/// Between a client's socket and a tunnel. After an error both are to be reset.
pub(crate) async fn tcp_and_tunnel(client: &mut TcpStream, tunnel: &mut Tunnel, carried: &Carried) -> io::Result<()> {
    let (mut tcp_read, mut tcp_write) = client.split();
    let (tunnel_read, tunnel_write) = tunnel.split();
    tokio::try_join!(
        tcp_to_tunnel(&mut tcp_read, tunnel_write, &carried.request),
        tunnel_to_tcp(tunnel_read, &mut tcp_write, &carried.response),
    )?;
    Ok(())
}

/// Between a tunnel from a client and the application's socket.
pub(crate) async fn tunnel_and_tcp(tunnel: &mut Tunnel, app: &mut TcpStream, carried: &Carried) -> io::Result<()> {
    let (mut tcp_read, mut tcp_write) = app.split();
    let (tunnel_read, tunnel_write) = tunnel.split();
    tokio::try_join!(
        tunnel_to_tcp(tunnel_read, &mut tcp_write, &carried.request),
        tcp_to_tunnel(&mut tcp_read, tunnel_write, &carried.response),
    )?;
    Ok(())
}

/// Between two sockets, `a` the client's.
pub(crate) async fn tcp_and_tcp(a: &mut TcpStream, b: &mut TcpStream, carried: &Carried) -> io::Result<()> {
    let (mut a_read, mut a_write) = a.split();
    let (mut b_read, mut b_write) = b.split();
    tokio::try_join!(
        tcp_to_tcp(&mut a_read, &mut b_write, &carried.request),
        tcp_to_tcp(&mut b_read, &mut a_write, &carried.response),
    )?;
    Ok(())
}

/// Ends a tunnel that rests: says so, and gives the other side time to do the same.
pub(crate) async fn end(tunnel: &mut Tunnel) -> io::Result<()> {
    let (reader, writer) = tunnel.split();
    writer.finish()?;
    let rest = async {
        while reader.chunk().await?.is_some() {}
        Ok(())
    };
    tokio::time::timeout(GOODBYE, rest).await.unwrap_or(Ok(()))
}

/// Reads what is there; the buffer is taken only when there is something, and grows for those who fill it.
struct Reader {
    size: usize,
    buffer: BytesMut,
}

impl Reader {
    fn new() -> Reader {
        Reader { size: SMALL, buffer: BytesMut::new() }
    }

    /// `None` at the end.
    async fn read(&mut self, from: &mut ReadHalf<'_>) -> io::Result<Option<BytesMut>> {
        loop {
            from.readable().await?;
            self.buffer.reserve(self.size);
            match from.try_read_buf(&mut self.buffer) {
                Ok(0) => return Ok(None),
                Ok(read) => {
                    self.size = if read >= self.size { (self.size * 2).min(LARGE) } else { self.size };
                    return Ok(Some(self.buffer.split()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.buffer = BytesMut::new(),
                Err(error) => return Err(error),
            }
        }
    }
}

async fn tcp_to_tunnel(from: &mut ReadHalf<'_>, to: &mut TunnelWriter, tally: &Tally) -> io::Result<()> {
    let mut reader = Reader::new();
    while let Some(piece) = reader.read(from).await? {
        tally.add(piece.len() as u64);
        to.send(piece.freeze()).await?;
    }
    to.finish()
}

async fn tunnel_to_tcp(from: &mut TunnelReader, to: &mut WriteHalf<'_>, tally: &Tally) -> io::Result<()> {
    while let Some(piece) = from.chunk().await? {
        tally.add(piece.len() as u64);
        to.write_all(&piece).await?;
    }
    to.shutdown().await
}

async fn tcp_to_tcp(from: &mut ReadHalf<'_>, to: &mut WriteHalf<'_>, tally: &Tally) -> io::Result<()> {
    let mut reader = Reader::new();
    while let Some(piece) = reader.read(from).await? {
        tally.add(piece.len() as u64);
        to.write_all(&piece).await?;
    }
    to.shutdown().await
}
