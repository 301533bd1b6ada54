//! Serves `cni.sock`: one JSON request and answer a connection.
use std::path::Path;
use std::time::Duration;

use l4_cni::code;
use l4_cni::protocol::{Failure, MAX_LINE, Request, Response};
use strata_runtime::{drain, task};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::agent::Event;

/// How long a plugin may take to send its request.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Listens on `path` and hands every request to the agent's task. Returns once it listens.
///
/// # Errors
/// If the socket cannot be bound.
pub(crate) fn serve(path: &Path, events: mpsc::Sender<Event>, mut watch: drain::Watch) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    task::spawn("cni-server", async move {
        loop {
            let accepted = tokio::select! {
                _ = watch.signaled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (events, watch) = (events.clone(), watch.clone());
                    task::spawn("cni-call", async move {
                        if let Err(error) = answer(stream, events).await {
                            tracing::warn!(%error, "CNI call ended early");
                        }
                        // A drain waits for calls under way.
                        drop(watch);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "CNI socket: accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

async fn answer(mut stream: UnixStream, events: mpsc::Sender<Event>) -> std::io::Result<()> {
    let (reader, mut writer) = stream.split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(MAX_LINE));
    tokio::time::timeout(READ_TIMEOUT, reader.read_line(&mut line)).await??;
    let response = match serde_json::from_str::<Request>(&line) {
        Ok(request) => ask(request, &events).await,
        Err(error) => Response::Failed(Failure::new(code::DECODE, "request could not be understood").because(error)),
    };
    // Serialising these types cannot fail: no maps, no foreign serialisers.
    let mut text = serde_json::to_vec(&response).unwrap_or_default();
    text.push(b'\n');
    writer.write_all(&text).await
}

async fn ask(request: Request, events: &mpsc::Sender<Event>) -> Response {
    let stopping = || Response::Failed(Failure::new(code::TRY_AGAIN_LATER, "the agent is stopping"));
    let (reply, answer) = oneshot::channel();
    if events.send(Event::Cni(request, reply)).await.is_err() {
        return stopping();
    }
    answer.await.unwrap_or_else(|_| stopping())
}
