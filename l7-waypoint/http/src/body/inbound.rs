//! The request's body as the client sends it. A filter may have looked at its beginning; whoever reads it afterwards
//! gets all of it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;

/// See the module head.
pub(crate) struct Inbound {
    source: Incoming,
    first: VecDeque<Bytes>,
    first_bytes: usize,
    trailers: Option<HeaderMap>,
    /// Nothing more comes from the client.
    ended: bool,
}

/// The beginning of a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Beginning {
    pub(crate) bytes: Bytes,
    /// The body goes on.
    pub(crate) partial: bool,
}

impl Inbound {
    pub(crate) fn new(source: Incoming) -> Self {
        let ended = source.is_end_stream();
        Self { source, first: VecDeque::new(), first_bytes: 0, trailers: None, ended }
    }

    /// The first `most` bytes of the body, or all of it. Reads until they are there; with `beyond` until it is known
    /// whether there are more.
    ///
    /// # Errors
    /// If the client goes away.
    pub(crate) async fn begin(&mut self, most: usize, beyond: bool) -> Result<Beginning, hyper::Error> {
        while !self.ended && (self.first_bytes < most || (beyond && self.first_bytes == most)) {
            match self.source.frame().await.transpose()? {
                Some(frame) => self.take_in(frame),
                None => self.ended = true,
            }
        }
        let mut bytes = BytesMut::with_capacity(self.first_bytes.min(most));
        for chunk in &self.first {
            bytes.extend_from_slice(&chunk[..chunk.len().min(most - bytes.len())]);
        }
        Ok(Beginning { partial: self.first_bytes > most || !self.ended, bytes: bytes.freeze() })
    }

    fn take_in(&mut self, frame: Frame<Bytes>) {
        match frame.into_data() {
            Ok(chunk) => {
                self.first_bytes += chunk.len();
                self.first.push_back(chunk);
                self.ended = self.source.is_end_stream();
            }
            Err(frame) => {
                self.trailers = frame.into_trailers().ok();
                self.ended = true;
            }
        }
    }
}

impl Body for Inbound {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        if let Some(chunk) = this.first.pop_front() {
            this.first_bytes -= chunk.len();
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        if this.ended {
            return Poll::Ready(this.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        Pin::new(&mut this.source).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_empty() && self.trailers.is_none() && (self.ended || self.source.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let first = self.first_bytes as u64;
        if self.ended {
            return SizeHint::with_exact(first);
        }
        let rest = self.source.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + first);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + first);
        }
        hint
    }
}
