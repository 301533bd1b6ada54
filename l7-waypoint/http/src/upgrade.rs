//! After a protocol switch (WebSocket): bytes both ways until either side ends.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::copy::copy_both;
use crate::io::{Io, Rewind};

/// The upstream's side of a switched connection.
pub(crate) enum UpstreamSide {
    /// HTTP/1.1: the connection itself.
    Stream(Rewind<Box<dyn Io>>),
    /// HTTP/2: one stream of a connection.
    H2(TokioIo<Upgraded>),
}

/// A switch that both sides agreed on; `done` is told the bytes from and to the client.
pub(crate) struct Switch {
    pub(crate) upstream: UpstreamSide,
    pub(crate) idle: Option<Duration>,
    pub(crate) done: Box<dyn FnOnce(u64, u64)>,
}

impl Switch {
    /// Moves bytes until it is over.
    pub(crate) async fn run(self, client: impl AsyncRead + AsyncWrite + Unpin) {
        let copied = copy_both(client, self.upstream, self.idle).await;
        if let Some(error) = &copied.error {
            tracing::debug!(%error, "switched connection ended");
        }
        (self.done)(copied.forth, copied.back);
    }
}

impl AsyncRead for UpstreamSide {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Stream(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::H2(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for UpstreamSide {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Stream(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::H2(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Stream(stream) => Pin::new(stream).poll_flush(cx),
            Self::H2(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Stream(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::H2(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
