//! One tunnel: bytes both ways, each way closed on its own.
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use xds_model::spiffe::SpiffeId;

use crate::MAX_PIECE;
use crate::pool::StreamGuard;

/// How long a tunnel that has ended our direction waits, after it was dropped, for the other side to end its own.
const LINGER: Duration = Duration::from_secs(2);

/// An open CONNECT stream. Dropping it resets the stream, unless one of the directions has ended: then the other is ended
/// as well, and the other side gets a moment for its own, so that a clean end looks like one there.
pub struct Tunnel {
    reader: TunnelReader,
    writer: TunnelWriter,
    authority: Arc<str>,
    peer: SpiffeId,
    peer_addr: SocketAddr,
}

/// Which directions have ended cleanly.
#[derive(Default)]
struct Ends {
    ours: AtomicBool,
    theirs: AtomicBool,
}

/// The half that receives.
pub struct TunnelReader {
    /// None only after it was dropped.
    stream: Option<RecvStream>,
    /// Nothing comes any more, cleanly or not.
    over: bool,
    ends: Arc<Ends>,
    /// Received and not yet handed out; its window credit is returned as it is handed out.
    pending: Bytes,
    /// Credit of the piece handed out last by [`TunnelReader::chunk`].
    lent: usize,
    guard: Option<Arc<StreamGuard>>,
}

/// The half that sends.
pub struct TunnelWriter {
    stream: SendStream<Bytes>,
    closed: bool,
    ends: Arc<Ends>,
    _guard: Option<Arc<StreamGuard>>,
}

impl Tunnel {
    pub(crate) fn new(
        send: SendStream<Bytes>,
        recv: RecvStream,
        authority: Arc<str>,
        peer: SpiffeId,
        peer_addr: SocketAddr,
        guard: Option<StreamGuard>,
    ) -> Tunnel {
        let (guard, ends) = (guard.map(Arc::new), Arc::new(Ends::default()));
        Tunnel {
            reader: TunnelReader {
                stream: Some(recv),
                over: false,
                ends: ends.clone(),
                pending: Bytes::new(),
                lent: 0,
                guard: guard.clone(),
            },
            writer: TunnelWriter { stream: send, closed: false, ends, _guard: guard },
            authority,
            peer,
            peer_addr,
        }
    }

    /// What the CONNECT asked for.
    pub fn authority(&self) -> &Arc<str> {
        &self.authority
    }

    /// The verified identity at the other end.
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// The other end's TCP address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer_addr
    }

    /// The two halves, to be used by different tasks.
    pub fn into_split(self) -> (TunnelReader, TunnelWriter) {
        (self.reader, self.writer)
    }

    /// Both halves by reference.
    pub fn split(&mut self) -> (&mut TunnelReader, &mut TunnelWriter) {
        (&mut self.reader, &mut self.writer)
    }
}

impl TunnelReader {
    /// The next received bytes without a copy; `None` at the end. The window credit of a piece is returned
    /// when the next one is asked for: a consumer that is slow holds back its sender.
    ///
    /// # Errors
    /// If the stream was reset or the connection broke.
    pub async fn chunk(&mut self) -> io::Result<Option<Bytes>> {
        std::future::poll_fn(|cx| self.poll_chunk(cx)).await
    }

    /// [`TunnelReader::chunk`] as a poll function.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        self.release(self.lent);
        self.lent = 0;
        if self.pending.is_empty() {
            ready!(self.poll_pending(cx))?;
        }
        let piece = std::mem::take(&mut self.pending);
        self.lent = piece.len();
        Poll::Ready(Ok((!piece.is_empty()).then_some(piece)))
    }

    /// Fills `pending`; leaves it empty at the end of the stream.
    fn poll_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(Ok(())) };
        loop {
            match ready!(stream.poll_data(cx)) {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => {
                    self.pending = data;
                    return Poll::Ready(Ok(()));
                }
                Some(Err(error)) => {
                    self.over = true;
                    return Poll::Ready(Err(to_io(error)));
                }
                None => {
                    self.over = true;
                    self.ends.theirs.store(true, Ordering::Relaxed);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }

    fn release(&mut self, bytes: usize) {
        if let Some(stream) = self.stream.as_mut().filter(|_| bytes > 0) {
            // Fails only for more credit than was taken, which the accounting above excludes.
            let _ = stream.flow_control().release_capacity(bytes);
        }
    }
}

impl Drop for TunnelReader {
    fn drop(&mut self) {
        if self.over || !self.ends.ours.load(Ordering::Relaxed) {
            return;
        }
        if let (Some(mut stream), Ok(runtime)) = (self.stream.take(), tokio::runtime::Handle::try_current()) {
            let guard = self.guard.take();
            runtime.spawn(async move {
                let rest = async { while let Some(Ok(_)) = stream.data().await {} };
                // Late or not: dropping it is all that is left to do.
                let _ = tokio::time::timeout(LINGER, rest).await;
                drop(guard);
            });
        }
    }
}

impl AsyncRead for TunnelReader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if this.pending.is_empty() {
            ready!(this.poll_pending(cx))?;
        }
        let len = this.pending.len().min(buf.remaining());
        buf.put_slice(&this.pending[..len]);
        this.pending.advance(len);
        this.release(len);
        Poll::Ready(Ok(()))
    }
}

impl TunnelWriter {
    /// Sends all of `data` as the window allows, without a copy.
    ///
    /// # Errors
    /// If the stream was reset or the connection broke.
    pub async fn send(&mut self, mut data: Bytes) -> io::Result<()> {
        while !data.is_empty() {
            let len = data.len().min(MAX_PIECE);
            let granted = std::future::poll_fn(|cx| self.poll_capacity(cx, len)).await?;
            self.stream.send_data(data.split_to(granted), false).map_err(to_io)?;
        }
        Ok(())
    }

    fn poll_capacity(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        self.stream.reserve_capacity(wanted);
        loop {
            let granted = self.stream.capacity();
            if granted > 0 {
                return Poll::Ready(Ok(granted.min(wanted)));
            }
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(to_io(error))),
                None => return Poll::Ready(Err(reset_error(&mut self.stream, cx))),
            }
        }
    }

    /// Ends this direction; the other goes on.
    ///
    /// # Errors
    /// If the stream was reset or the connection broke.
    pub fn finish(&mut self) -> io::Result<()> {
        if !self.closed {
            self.closed = true;
            self.stream.send_data(Bytes::new(), true).map_err(to_io)?;
            self.ends.ours.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Aborts both directions: what a TCP reset is on the other side.
    pub fn reset(&mut self) {
        self.closed = true;
        self.ends.ours.store(false, Ordering::Relaxed);
        self.stream.send_reset(Reason::CANCEL);
    }
}

impl Drop for TunnelWriter {
    fn drop(&mut self) {
        if self.ends.theirs.load(Ordering::Relaxed) {
            // Fails if the stream is gone, which is as good.
            let _ = self.finish();
        }
    }
}

impl AsyncWrite for TunnelWriter {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let granted = ready!(this.poll_capacity(cx, buf.len().min(MAX_PIECE)))?;
        this.stream.send_data(Bytes::copy_from_slice(&buf[..granted]), false).map_err(to_io)?;
        Poll::Ready(Ok(granted))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's task writes what it was given without being asked.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.get_mut().finish())
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().reader).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().writer).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().writer).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().writer).poll_shutdown(cx)
    }
}

impl std::fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tunnel").field("authority", &self.authority).field("peer", &self.peer).finish_non_exhaustive()
    }
}

fn reset_error(stream: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> io::Error {
    match stream.poll_reset(cx) {
        Poll::Ready(Ok(reason)) => io::Error::new(io::ErrorKind::ConnectionReset, reason.description()),
        Poll::Ready(Err(error)) => to_io(error),
        Poll::Pending => io::ErrorKind::BrokenPipe.into(),
    }
}

fn to_io(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
