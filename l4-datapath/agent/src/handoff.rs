//! The agent's end of the handoff: accepts proxies and carries messages to and from the agent's task.
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use strata_abi::ProxyPlace;
use strata_handoff::{AgentEnd, AgentMessage, HandoffError, Listener, ProxyMessage, VERSION};
use strata_runtime::{drain, task};
use tokio::sync::mpsc;

use crate::agent::Event;
use crate::proxies::{self, PlaceError};

/// How long a proxy may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Messages that wait for a slow proxy; more pods than a node can have.
const QUEUE: usize = 4096;

/// A message to the proxy, with the descriptor it carries.
pub(crate) type Outgoing = (AgentMessage, Option<Arc<OwnedFd>>);

/// What the agent's task hears of a proxy. Connections are numbered; the newest is the proxy in charge.
#[derive(Debug)]
pub(crate) enum ProxyEvent {
    Connected {
        connection: u64,
        pid: u32,
        place: ProxyPlace,
        /// In whose place it answers DNS queries.
        resolvers: Vec<IpAddr>,
        out: mpsc::Sender<Outgoing>,
    },
    Message {
        connection: u64,
        message: ProxyMessage,
        descriptors: Vec<OwnedFd>,
    },
    Gone {
        connection: u64,
    },
}

/// Listens on `path`; proxies are looked for in the hierarchy of the cgroup2 folder `cgroup`. Returns once it listens.
///
/// # Errors
/// If the socket cannot be bound.
pub(crate) fn serve(
    path: &Path,
    node: Arc<str>,
    cgroup: PathBuf,
    events: mpsc::Sender<Event>,
    mut watch: drain::Watch,
) -> Result<(), HandoffError> {
    let listener = Listener::bind(path)?;
    let numbers = AtomicU64::new(1);
    task::spawn("handoff-server", async move {
        loop {
            let accepted = tokio::select! {
                _ = watch.signaled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(connection) => {
                    let number = numbers.fetch_add(1, Ordering::Relaxed);
                    let (node, cgroup, events) = (node.clone(), cgroup.clone(), events.clone());
                    task::spawn("handoff-connection", async move {
                        if let Err(error) = converse(&connection, number, &node, cgroup, &events).await {
                            tracing::warn!(connection = number, %error, "handoff connection ended");
                        }
                        // The agent's task may be gone: then nobody needs to know.
                        let _told = events.send(Event::Proxy(ProxyEvent::Gone { connection: number })).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "handoff socket: accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(())
}

/// Why a conversation ended before the other side closed it.
#[derive(Debug, thiserror::Error)]
enum ConverseError {
    #[error(transparent)]
    Handoff(#[from] HandoffError),
    #[error("the proxy did not say hello")]
    NoHello,
    #[error("the proxy is not let in: {0}")]
    Place(#[from] PlaceError),
    #[error("the proxy speaks version {0} of the handoff, this agent {VERSION}")]
    Version(u32),
}

async fn converse(
    connection: &AgentEnd,
    number: u64,
    node: &str,
    cgroup: PathBuf,
    events: &mpsc::Sender<Event>,
) -> Result<(), ConverseError> {
    let hello = tokio::time::timeout(HELLO_TIMEOUT, connection.recv()).await.map_err(|_| ConverseError::NoHello)?;
    let (version, pid, resolvers) = match hello {
        Ok((ProxyMessage::Hello { version, pid, resolvers }, _)) => (version, pid, resolvers),
        Ok(_) => return Err(ConverseError::NoHello),
        Err(HandoffError::Closed) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // Answered also when refused, so that the proxy can say why.
    connection.send(&AgentMessage::Hello { version: VERSION, node: node.to_owned() }, &[]).await?;
    if version != VERSION {
        return Err(ConverseError::Version(version));
    }
    let (seen, home) =
        (connection.peer_pid()?, l4_loader::netns_cookie(connection.socket()).map_err(PlaceError::from)?);
    // A walk over folders: not on a thread that others wait for.
    let located = tokio::task::spawn_blocking(move || proxies::locate(seen, home, &cgroup)).await;
    let place = located.map_err(|error| HandoffError::Io(std::io::Error::other(error)))??;
    let (out, queue) = mpsc::channel(QUEUE);
    let pid = seen.unwrap_or(pid);
    let connected = ProxyEvent::Connected { connection: number, pid, place, resolvers, out };
    if events.send(Event::Proxy(connected)).await.is_err() {
        return Ok(());
    }
    // The agent's task ends a conversation by dropping its sender: a proxy that does not read is made to reconnect.
    tokio::select! {
        result = read(connection, number, events) => result,
        () = write(connection, queue) => Ok(()),
    }
}

async fn read(connection: &AgentEnd, number: u64, events: &mpsc::Sender<Event>) -> Result<(), ConverseError> {
    loop {
        match connection.recv().await {
            Ok((message, descriptors)) => {
                let event = ProxyEvent::Message { connection: number, message, descriptors };
                if events.send(Event::Proxy(event)).await.is_err() {
                    return Ok(());
                }
            }
            Err(HandoffError::Closed) => return Ok(()),
            Err(error) if error.is_recoverable() => tracing::warn!(connection = number, %error, "message skipped"),
            Err(error) => return Err(error.into()),
        }
    }
}

async fn write(connection: &AgentEnd, mut queue: mpsc::Receiver<Outgoing>) {
    while let Some((message, descriptor)) = queue.recv().await {
        let descriptors: Vec<_> = descriptor.iter().map(|fd| fd.as_fd()).collect();
        if let Err(error) = connection.send(&message, &descriptors).await {
            tracing::debug!(%error, "handoff write failed");
            return;
        }
    }
}
