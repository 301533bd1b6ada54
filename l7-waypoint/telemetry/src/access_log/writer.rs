//! Writing lines without making a request wait: a bounded queue and one thread per file.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{BufWriter, Write};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;

/// Lines that may wait for one file.
const QUEUE: usize = 8192;

/// All files of the process: two logs to one path share a thread and do not mix their lines.
pub(crate) struct Writers {
    open: Mutex<HashMap<String, SyncSender<String>>>,
    dropped: Counter,
}

/// One file.
#[derive(Clone)]
pub(crate) struct Writer {
    queue: SyncSender<String>,
    dropped: Counter,
}

impl Writers {
    pub(crate) fn new(dropped: Counter) -> Self {
        Self { open: Mutex::default(), dropped }
    }

    /// The writer of `path`. `/dev/stdout` and `/dev/stderr` are the process's own, also where they can't be reopened.
    pub(crate) fn open(&self, path: &str) -> Writer {
        let mut open = self.open.lock();
        let queue = open.entry(path.to_owned()).or_insert_with(|| start(path)).clone();
        Writer { queue, dropped: self.dropped.clone() }
    }
}

impl Writer {
    pub(crate) fn send(&self, line: String) {
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.queue.try_send(line) {
            self.dropped.inc();
        }
    }
}

fn start(path: &str) -> SyncSender<String> {
    let (sender, receiver) = sync_channel(QUEUE);
    let path = path.to_owned();
    let spawned = std::thread::Builder::new().name("access-log".into()).spawn(move || match path.as_str() {
        "/dev/stdout" => drain(&receiver, std::io::stdout()),
        "/dev/stderr" => drain(&receiver, std::io::stderr()),
        path => match OpenOptions::new().create(true).append(true).open(path) {
            Ok(file) => drain(&receiver, file),
            Err(error) => tracing::error!(path, %error, "access log can't be opened; its lines are dropped"),
        },
    });
    if let Err(error) = spawned {
        tracing::error!(%error, "no thread for the access log; its lines are dropped");
    }
    sender
}

/// Writes what is there in one go, then flushes.
fn drain(receiver: &Receiver<String>, sink: impl Write) {
    let mut sink = BufWriter::with_capacity(64 * 1024, sink);
    while let Ok(line) = receiver.recv() {
        let mut result = sink.write_all(line.as_bytes());
        while let Ok(line) = receiver.try_recv() {
            result = result.and_then(|()| sink.write_all(line.as_bytes()));
        }
        if let Err(error) = result.and_then(|()| sink.flush()) {
            tracing::error!(%error, "access log can't be written");
            return;
        }
    }
}
