//! The response's body on its way to the client. When it ends, however it ends, whoever gave it is told.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::{BoxError, Messages};

/// Why a body ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All of it was passed on.
    Complete,
    /// The upstream broke off.
    UpstreamFailed,
    /// The request's time was over.
    TimedOut,
    /// The client went away.
    ClientGone,
}

/// What went to the client.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passed {
    pub(crate) bytes: u64,
    /// Of gRPC, if they are counted.
    pub(crate) messages: u64,
}

/// Told once, when the body is over.
pub(crate) trait OnEnd {
    fn ended(self: Box<Self>, stop: Stop, passed: Passed, trailers: Option<&HeaderMap>);
}

/// Resolves when the request's time is over.
pub(crate) type Deadline = Pin<Box<dyn Future<Output = ()>>>;

/// See the module head.
pub(crate) struct ResponseBody {
    source: Source,
    deadline: Option<Deadline>,
    bytes: u64,
    messages: Option<Messages>,
    on_end: Option<Box<dyn OnEnd>>,
}

enum Source {
    Empty,
    Full(Bytes),
    Upstream(Incoming),
}

impl ResponseBody {
    pub(crate) fn full(bytes: Bytes, on_end: Option<Box<dyn OnEnd>>) -> Self {
        let source = if bytes.is_empty() { Source::Empty } else { Source::Full(bytes) };
        Self { source, deadline: None, bytes: 0, messages: None, on_end }
    }

    pub(crate) fn upstream(
        body: Incoming,
        deadline: Option<Deadline>,
        messages: Option<Messages>,
        on_end: Box<dyn OnEnd>,
    ) -> Self {
        Self { source: Source::Upstream(body), deadline, bytes: 0, messages, on_end: Some(on_end) }
    }

    fn end(&mut self, stop: Stop, trailers: Option<&HeaderMap>) {
        if let Some(on_end) = self.on_end.take() {
            let messages = self.messages.as_ref().map_or(0, Messages::count);
            on_end.ended(stop, Passed { bytes: self.bytes, messages }, trailers);
        }
    }

    fn pass(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        if let Some(data) = frame.data_ref() {
            self.bytes += data.len() as u64;
            if let Some(messages) = &mut self.messages {
                messages.pass(data);
            }
            // hyper does not poll again when this says that the body is over.
            if matches!(&self.source, Source::Upstream(body) if body.is_end_stream()) {
                self.end(Stop::Complete, None);
            }
        } else if let Some(trailers) = frame.trailers_ref() {
            let trailers = trailers.clone();
            self.end(Stop::Complete, Some(&trailers));
        }
        frame
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            this.deadline = None;
            this.end(Stop::TimedOut, None);
            return Poll::Ready(Some(Err("the request's time is over".into())));
        }
        match &mut this.source {
            Source::Empty => {
                this.end(Stop::Complete, None);
                Poll::Ready(None)
            }
            Source::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                this.source = Source::Empty;
                this.bytes += bytes.len() as u64;
                this.end(Stop::Complete, None);
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Source::Upstream(body) => match std::task::ready!(Pin::new(body).poll_frame(cx)) {
                None => {
                    this.end(Stop::Complete, None);
                    Poll::Ready(None)
                }
                Some(Ok(frame)) => Poll::Ready(Some(Ok(this.pass(frame)))),
                Some(Err(error)) => {
                    this.end(Stop::UpstreamFailed, None);
                    Poll::Ready(Some(Err(error.into())))
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Empty => true,
            Source::Full(_) => false,
            Source::Upstream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Upstream(body) => body.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        // A body that never needed polling (HEAD, 204, empty) is complete; any other was given up by the client.
        let stop = if self.is_end_stream() { Stop::Complete } else { Stop::ClientGone };
        self.end(stop, None);
    }
}
