//! The handoff's messages over a [`SeqPacket`], one JSON object each.
use std::marker::PhantomData;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::message::{AgentMessage, ProxyMessage};
use crate::seqpacket::{Listener, SeqPacket};

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    #[error("unix socket: {0}")]
    Io(#[from] std::io::Error),
    #[error("the other end closed the connection")]
    Closed,
    #[error("message could not be understood: {source}: {text}")]
    Malformed { source: serde_json::Error, text: String },
    #[error("message or its descriptors were cut off")]
    Truncated,
    #[error("message could not be written: {0}")]
    Encode(serde_json::Error),
}

impl HandoffError {
    /// Whether the connection can go on: the message is lost, the next one may be fine.
    pub fn is_recoverable(&self) -> bool {
        matches!(self, HandoffError::Malformed { .. } | HandoffError::Truncated | HandoffError::Encode(_))
    }
}

/// The agent's side: sends [`AgentMessage`], receives [`ProxyMessage`].
pub type AgentEnd = Connection<AgentMessage, ProxyMessage>;
/// The proxy's side: sends [`ProxyMessage`], receives [`AgentMessage`].
pub type ProxyEnd = Connection<ProxyMessage, AgentMessage>;

/// One end of a handoff connection. `send` and `recv` take `&self` and may run at the same time.
#[derive(Debug)]
pub struct Connection<Out, In> {
    socket: SeqPacket,
    _messages: PhantomData<fn(Out) -> In>,
}

impl Listener {
    /// The next proxy.
    ///
    /// # Errors
    /// If accepting fails, for example for want of descriptors.
    pub async fn accept(&self) -> Result<AgentEnd, HandoffError> {
        Ok(Connection::over(self.accept_any().await?))
    }
}

impl AgentEnd {
    /// The socket itself. The kernel makes the accepting end in the network namespace of the process that connected
    /// (af_unix, `unix_stream_connect`): asked for its namespace it tells the proxy's.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.socket()
    }

    /// The proxy's process, as this process's pid namespace knows it; `None` if it is in none that can be seen from here.
    /// Told by the kernel (`SO_PEERCRED`, unix(7)), not by the proxy.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn peer_pid(&self) -> Result<Option<u32>, HandoffError> {
        let credentials = getsockopt(&self.socket(), PeerCredentials).map_err(std::io::Error::from)?;
        Ok(u32::try_from(credentials.pid()).ok().filter(|pid| *pid != 0))
    }
}

impl ProxyEnd {
    /// Connects to the agent of this node.
    ///
    /// # Errors
    /// If nobody listens on `path`.
    pub fn connect(path: &Path) -> Result<Self, HandoffError> {
        Ok(Connection::over(SeqPacket::connect(path)?))
    }
}

impl<Out: Serialize, In: DeserializeOwned> Connection<Out, In> {
    /// Speaks the handoff on an open socket.
    pub fn over(socket: SeqPacket) -> Self {
        Self { socket, _messages: PhantomData }
    }

    /// Sends one message with its descriptors (which stay the caller's).
    ///
    /// # Errors
    /// If the other end is gone, or the message or the number of descriptors is too large.
    pub async fn send(&self, message: &Out, descriptors: &[BorrowedFd<'_>]) -> Result<(), HandoffError> {
        let text = serde_json::to_vec(message).map_err(HandoffError::Encode)?;
        self.socket.send(&text, descriptors).await
    }

    /// Receives one message with its descriptors.
    ///
    /// # Errors
    /// `Closed` at the end; a recoverable error for a message that cannot be understood.
    pub async fn recv(&self) -> Result<(In, Vec<OwnedFd>), HandoffError> {
        let (text, descriptors) = self.socket.recv().await?;
        match serde_json::from_slice(&text) {
            Ok(message) => Ok((message, descriptors)),
            Err(source) => Err(HandoffError::Malformed { source, text: String::from_utf8_lossy(&text).into_owned() }),
        }
    }
}

#[cfg(test)]
mod tests;
