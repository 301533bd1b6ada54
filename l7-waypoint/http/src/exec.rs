//! hyper's HTTP/2 wants an executor; ours keeps everything on the worker.

use std::future::Future;

/// Spawns on the current `LocalSet`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LocalExec;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for LocalExec {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}
