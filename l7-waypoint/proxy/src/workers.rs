//! Data-plane threads: each a single-threaded runtime that shares nothing mutable with the others.
use std::io;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Work handed to a thread, as a future made there.
type Job<W> = Box<dyn FnOnce(W) + Send>;

/// Jobs a thread may have waiting; each is a connection, or listeners to serve.
const QUEUE: usize = 1024;

/// The threads.
pub(crate) struct Workers<W> {
    queues: Arc<[mpsc::Sender<Job<W>>]>,
}

impl<W> Clone for Workers<W> {
    fn clone(&self) -> Workers<W> {
        Workers { queues: self.queues.clone() }
    }
}

impl<W: Clone + 'static> Workers<W> {
    /// Starts `count` threads; `state` makes each one's own state, on the thread (it is cloned for each job). The thread
    /// lets go of it when it is told so by `closing`.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub(crate) fn start(
        count: u16,
        closing: CancellationToken,
        state: impl Fn(u16) -> W + Send + Clone + 'static,
    ) -> io::Result<Workers<W>> {
        let mut queues = Vec::with_capacity(usize::from(count));
        for number in 0..count {
            let (sender, mut jobs) = mpsc::channel::<Job<W>>(QUEUE);
            let (state, closing) = (state.clone(), closing.clone());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                let local = tokio::task::LocalSet::new();
                local.block_on(&runtime, async move {
                    let state = state(number);
                    loop {
                        tokio::select! {
                            job = jobs.recv() => match job {
                                Some(job) => job(state.clone()),
                                None => break,
                            },
                            () = closing.cancelled() => break,
                        }
                    }
                    // Connections go on until the process ends.
                    closing.cancelled().await;
                    drop(state);
                    std::future::pending::<()>().await;
                });
            })?;
            queues.push(sender);
        }
        Ok(Workers { queues: queues.into() })
    }

    pub(crate) fn count(&self) -> usize {
        self.queues.len()
    }

    /// Runs `job` on one thread, inside its runtime (it may spawn).
    pub(crate) async fn run(&self, worker: usize, job: impl FnOnce(W) + Send + 'static) {
        if let Some(queue) = self.queues.get(worker)
            && queue.send(Box::new(job)).await.is_err()
        {
            tracing::debug!(worker, "thread is closing");
        }
    }
}
