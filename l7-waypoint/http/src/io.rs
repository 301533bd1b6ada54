//! Byte streams: what a connector returns, and a stream whose first bytes were read already.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connected stream to an upstream. It need not be `Send`: it stays on its worker.
pub trait Io: AsyncRead + AsyncWrite + Unpin + 'static {
    /// Protocol that ALPN settled on, where there was TLS inside.
    fn alpn(&self) -> Option<&[u8]> {
        None
    }

    /// Our own address of the connection, for logs.
    fn local_addr(&self) -> Option<std::net::SocketAddr> {
        None
    }
}

impl Io for tokio::net::TcpStream {
    fn local_addr(&self) -> Option<std::net::SocketAddr> {
        tokio::net::TcpStream::local_addr(self).ok()
    }
}

impl Io for tokio::io::DuplexStream {}

impl<T: Io + ?Sized> Io for Box<T> {
    fn alpn(&self) -> Option<&[u8]> {
        (**self).alpn()
    }

    fn local_addr(&self) -> Option<std::net::SocketAddr> {
        (**self).local_addr()
    }
}

/// A stream that gives `first` before it reads on.
#[derive(Debug)]
pub(crate) struct Rewind<T> {
    first: Bytes,
    inner: T,
}

impl<T> Rewind<T> {
    pub(crate) fn new(first: Bytes, inner: T) -> Self {
        Self { first, inner }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Rewind<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let count = self.first.len().min(buf.remaining());
        buf.put_slice(&self.first[..count]);
        self.first.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Rewind<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
