//! Bytes both ways between two streams, each direction ending on its own (half-close).

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

const BUFFER: usize = 16 * 1024;

/// How a copy ended.
#[derive(Debug, Default)]
pub(crate) struct Copied {
    /// Bytes from the first stream to the second.
    pub(crate) forth: u64,
    /// Bytes back.
    pub(crate) back: u64,
    pub(crate) error: Option<io::Error>,
    /// Nothing moved for the idle time.
    pub(crate) idle: bool,
}

/// Copies until both directions are at their end, one fails, or nothing moves for `idle`.
pub(crate) async fn copy_both(
    mut first: impl AsyncRead + AsyncWrite + Unpin,
    mut second: impl AsyncRead + AsyncWrite + Unpin,
    idle: Option<Duration>,
) -> Copied {
    let moved = Cell::new(Instant::now());
    let (mut forth, mut back) = (OneWay::new(), OneWay::new());
    let transfer = std::future::poll_fn(|cx| {
        let there = forth.poll(&mut first, &mut second, &moved, cx);
        let here = back.poll(&mut second, &mut first, &moved, cx);
        match (there, here) {
            (Poll::Ready(Err(error)), _) | (_, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(Ok(())),
            _ => Poll::Pending,
        }
    });
    let quiet = async {
        let Some(idle) = idle else { return std::future::pending().await };
        loop {
            let until = moved.get() + idle;
            tokio::time::sleep_until(until).await;
            if moved.get() + idle <= Instant::now() {
                return;
            }
        }
    };
    let (error, idle) = tokio::select! {
        biased;
        outcome = transfer => (outcome.err(), false),
        () = quiet => (None, true),
    };
    Copied { forth: forth.total, back: back.total, error, idle }
}

struct OneWay {
    buffer: Option<Box<[u8]>>,
    start: usize,
    end: usize,
    total: u64,
    unflushed: bool,
    state: State,
}

#[derive(PartialEq)]
enum State {
    Moving,
    Closing,
    Done,
}

impl OneWay {
    fn new() -> Self {
        Self { buffer: None, start: 0, end: 0, total: 0, unflushed: false, state: State::Moving }
    }

    fn poll(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        moved: &Cell<Instant>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match self.state {
                State::Done => return Poll::Ready(Ok(())),
                State::Closing => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    self.buffer = None;
                    self.state = State::Done;
                }
                State::Moving if self.start < self.end => {
                    let buffer = self.buffer.as_deref().unwrap_or_default();
                    let count = ready!(Pin::new(&mut *to).poll_write(cx, &buffer[self.start..self.end]))?;
                    if count == 0 {
                        return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                    }
                    self.start += count;
                    self.total += count as u64;
                    self.unflushed = true;
                    moved.set(Instant::now());
                }
                State::Moving => {
                    let buffer = self.buffer.get_or_insert_with(|| vec![0; BUFFER].into());
                    let mut read = ReadBuf::new(buffer);
                    match Pin::new(&mut *from).poll_read(cx, &mut read) {
                        Poll::Ready(outcome) => outcome?,
                        Poll::Pending => {
                            if self.unflushed {
                                ready!(Pin::new(&mut *to).poll_flush(cx))?;
                                self.unflushed = false;
                            }
                            return Poll::Pending;
                        }
                    }
                    (self.start, self.end) = (0, read.filled().len());
                    if self.end == 0 {
                        self.state = State::Closing;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn half_close_leaves_the_other_direction_open() {
        let ((client, near), (far, mut server)) = (duplex(1024), duplex(1024));
        let (mut reader, mut writer) = tokio::io::split(client);
        let upload = async {
            writer.write_all(b"ping").await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let serve = async {
            let mut text = String::new();
            server.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "ping");
            server.write_all(&[7; 100_000]).await.unwrap();
            server.shutdown().await.unwrap();
        };
        let download = async {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).await.unwrap();
            all.len()
        };
        let (copied, (), (), count) = tokio::join!(copy_both(near, far, None), upload, serve, download);
        assert_eq!(count, 100_000);
        assert_eq!((copied.forth, copied.back), (4, 100_000));
        assert!(copied.error.is_none() && !copied.idle);
    }

    #[tokio::test(start_paused = true)]
    async fn quiet_streams_end() {
        let ((_client, near), (far, _server)) = (duplex(64), duplex(64));
        let start = Instant::now();
        let copied = copy_both(near, far, Some(Duration::from_secs(60))).await;
        assert!(copied.idle);
        assert_eq!(start.elapsed(), Duration::from_secs(60));
    }
}
