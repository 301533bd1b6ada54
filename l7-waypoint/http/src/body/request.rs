//! The request's body on its way upstream. While a retry is possible what was sent is kept, up to a bound; when the
//! bound is passed or the response has begun, frames pass through and nothing is kept.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::Notify;

use super::{BoxError, Inbound, Messages};

/// The body the client sends, read once, given out once per attempt.
pub(crate) struct Upload {
    source: RefCell<Inbound>,
    kept: RefCell<Vec<Bytes>>,
    trailers: RefCell<Option<HeaderMap>>,
    kept_bytes: Cell<usize>,
    limit: usize,
    keeping: Cell<bool>,
    finished: Cell<bool>,
    ended: Notify,
    failed: Cell<bool>,
    received: Cell<u64>,
    messages: RefCell<Option<Messages>>,
    /// Number of the attempt that may read; an earlier one still held by a dying connection gets an error.
    attempt: Cell<u32>,
}

impl Upload {
    /// `limit`: bytes kept for retries; 0 keeps none. Messages are counted where there is a counter.
    pub(crate) fn new(source: Inbound, limit: usize, messages: Option<Messages>) -> Rc<Self> {
        Rc::new(Self {
            source: RefCell::new(source),
            kept: RefCell::default(),
            trailers: RefCell::default(),
            kept_bytes: Cell::new(0),
            limit,
            keeping: Cell::new(limit > 0),
            finished: Cell::new(false),
            ended: Notify::new(),
            failed: Cell::new(false),
            received: Cell::new(0),
            messages: RefCell::new(messages),
            attempt: Cell::new(0),
        })
    }

    /// The body for the next attempt.
    pub(crate) fn attempt(self: &Rc<Self>) -> RequestBody {
        self.attempt.set(self.attempt.get() + 1);
        RequestBody::Upload { upload: self.clone(), position: 0, attempt: self.attempt.get(), trailers_given: false }
    }

    /// Whether another attempt would send the same body. Nothing read yet is as good as everything kept.
    pub(crate) fn can_repeat(&self) -> bool {
        !self.failed.get() && (self.keeping.get() || self.received.get() == 0)
    }

    /// No further attempt will come.
    pub(crate) fn commit(&self) {
        self.keeping.set(false);
    }

    /// Whether the client has sent all of it.
    pub(crate) fn finished(&self) -> bool {
        self.finished.get()
    }

    /// Whether reading from the client failed.
    pub(crate) fn failed(&self) -> bool {
        self.failed.get()
    }

    /// The whole body, if all of it came and was kept.
    pub(crate) fn kept_whole(&self) -> Option<Bytes> {
        let whole = self.keeping.get() && self.finished.get() && !self.failed.get();
        whole.then(|| crate::mirror::join(&self.kept.borrow()))
    }

    /// Bytes received from the client.
    pub(crate) fn received(&self) -> u64 {
        self.received.get()
    }

    /// Messages received from the client, if they are counted.
    pub(crate) fn messages(&self) -> u64 {
        self.messages.borrow().as_ref().map_or(0, Messages::count)
    }

    /// Resolves when the client has sent all of it.
    pub(crate) async fn wait(&self) {
        while !self.finished.get() {
            self.ended.notified().await;
        }
    }

    fn finish(&self) {
        self.finished.set(true);
        self.ended.notify_one();
    }

    fn poll(
        &self,
        cx: &mut Context<'_>,
        position: &mut usize,
        trailers_given: &mut bool,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(chunk) = self.kept.borrow().get(*position).cloned() {
            *position += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        if self.finished.get() {
            let trailers = if *trailers_given { None } else { self.trailers.borrow().clone() };
            *trailers_given = true;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let polled = Pin::new(&mut *self.source.borrow_mut()).poll_frame(cx);
        match std::task::ready!(polled) {
            None => {
                self.finish();
                Poll::Ready(None)
            }
            Some(Err(error)) => {
                self.failed.set(true);
                Poll::Ready(Some(Err(error.into())))
            }
            Some(Ok(frame)) => Poll::Ready(Some(Ok(self.take_in(frame, position, trailers_given)))),
        }
    }

    fn take_in(&self, frame: Frame<Bytes>, position: &mut usize, trailers_given: &mut bool) -> Frame<Bytes> {
        let frame = match frame.into_data() {
            Ok(chunk) => {
                self.received.set(self.received.get() + chunk.len() as u64);
                if let Some(messages) = &mut *self.messages.borrow_mut() {
                    messages.pass(&chunk);
                }
                if self.keeping.get() {
                    self.keep(&chunk, position);
                }
                if self.source.borrow().is_end_stream() {
                    self.finish();
                }
                return Frame::data(chunk);
            }
            Err(frame) => frame,
        };
        self.finish();
        *trailers_given = true;
        match frame.into_trailers() {
            Ok(trailers) => {
                *self.trailers.borrow_mut() = Some(trailers.clone());
                Frame::trailers(trailers)
            }
            // Frames are data or trailers; an unknown kind passes as empty data.
            Err(_) => Frame::data(Bytes::new()),
        }
    }

    fn keep(&self, chunk: &Bytes, position: &mut usize) {
        let bytes = self.kept_bytes.get() + chunk.len();
        if bytes > self.limit {
            self.keeping.set(false);
            self.kept.borrow_mut().clear();
            *position = 0;
            return;
        }
        self.kept_bytes.set(bytes);
        self.kept.borrow_mut().push(chunk.clone());
        *position += 1;
    }
}

/// The body of one attempt.
pub(crate) enum RequestBody {
    Empty,
    Full(Bytes),
    Upload { upload: Rc<Upload>, position: usize, attempt: u32, trailers_given: bool },
}

impl RequestBody {
    /// No body.
    pub(crate) fn none() -> Self {
        Self::Empty
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            this @ Self::Full(_) => match std::mem::replace(this, Self::Empty) {
                Self::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
                _ => Poll::Ready(None),
            },
            Self::Upload { upload, position, attempt, trailers_given } => {
                if upload.attempt.get() != *attempt {
                    return Poll::Ready(Some(Err("a later attempt has taken over the request body".into())));
                }
                upload.poll(cx, position, trailers_given)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Upload { upload, position, trailers_given, .. } => {
                let no_trailers = *trailers_given || upload.trailers.borrow().is_none();
                upload.finished.get() && no_trailers && *position >= upload.kept.borrow().len()
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Upload { upload, .. } if upload.received.get() == 0 => upload.source.borrow().size_hint(),
            Self::Upload { .. } => SizeHint::default(),
        }
    }
}
