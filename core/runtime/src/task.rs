//! Named background tasks and the process's end.
use std::future::Future;

use tokio::task::JoinHandle;
use tracing::Instrument;

/// Spawns a task inside a span that carries its name, so that its log lines say where they come from.
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(future.instrument(tracing::info_span!("task", name)))
}

/// Resolves at the first SIGTERM or SIGINT.
///
/// # Panics
/// If the process cannot install signal handlers, which only happens outside a tokio runtime.
pub async fn shutdown_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).expect("inside a tokio runtime");
    let mut interrupt = signal(SignalKind::interrupt()).expect("inside a tokio runtime");
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal = name, "shutting down");
}
