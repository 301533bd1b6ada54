//! `SOCK_SEQPACKET` with descriptors, in tokio's terms.
use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::cmsg_space;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    connect, getsockopt, listen, recvmsg, sendmsg, socket,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::message::{AgentMessage, ProxyMessage};

/// Largest message in bytes; a pod's description is well below 1 KiB.
const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors in one message: a listener of each kind, with room to grow.
const MAX_DESCRIPTORS: usize = 32;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    #[error("handoff socket: {0}")]
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
    fd: AsyncFd<OwnedFd>,
    _messages: PhantomData<fn(Out) -> In>,
}

/// The agent's listening socket.
#[derive(Debug)]
pub struct Listener {
    fd: AsyncFd<OwnedFd>,
}

impl Listener {
    /// Listens on `path`, replacing a stale socket.
    ///
    /// # Errors
    /// If the socket cannot be created, bound or listened on.
    pub fn bind(path: &Path) -> Result<Self, HandoffError> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let fd = seqpacket()?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path).map_err(std::io::Error::from)?).map_err(std::io::Error::from)?;
        let backlog = Backlog::new(8).map_err(std::io::Error::from)?;
        listen(&fd, backlog).map_err(std::io::Error::from)?;
        Ok(Self { fd: register(fd)? })
    }

    /// The next proxy.
    ///
    /// # Errors
    /// If accepting fails, for example for want of descriptors.
    pub async fn accept(&self) -> Result<AgentEnd, HandoffError> {
        let raw = self
            .fd
            .async_io(Interest::READABLE, |fd| {
                accept4(fd.as_raw_fd(), SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC).map_err(Into::into)
            })
            .await?;
        // SAFETY: accept4 just returned this descriptor and nothing else owns it.
        Connection::new(unsafe { OwnedFd::from_raw_fd(raw) })
    }
}

impl AgentEnd {
    /// The socket itself. The kernel makes the accepting end in the network namespace of the process that connected
    /// (af_unix, `unix_stream_connect`): asked for its namespace it tells the proxy's.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }

    /// The proxy's process, as this process's pid namespace knows it; `None` if it is in none that can be seen from here.
    /// Told by the kernel (`SO_PEERCRED`, unix(7)), not by the proxy.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn peer_pid(&self) -> Result<Option<u32>, HandoffError> {
        let credentials = getsockopt(self.fd.get_ref(), PeerCredentials).map_err(std::io::Error::from)?;
        Ok(u32::try_from(credentials.pid()).ok().filter(|pid| *pid != 0))
    }
}

impl ProxyEnd {
    /// Connects to the agent of this node.
    ///
    /// # Errors
    /// If nobody listens on `path`.
    pub fn connect(path: &Path) -> Result<Self, HandoffError> {
        let fd = seqpacket()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path).map_err(std::io::Error::from)?).map_err(std::io::Error::from)?;
        Connection::new(fd)
    }
}

impl<Out: Serialize, In: DeserializeOwned> Connection<Out, In> {
    fn new(fd: OwnedFd) -> Result<Self, HandoffError> {
        Ok(Self { fd: register(fd)?, _messages: PhantomData })
    }

    /// Sends one message with its descriptors (which stay the caller's).
    ///
    /// # Errors
    /// If the other end is gone, or the message or the number of descriptors is too large.
    pub async fn send(&self, message: &Out, descriptors: &[BorrowedFd<'_>]) -> Result<(), HandoffError> {
        let text = serde_json::to_vec(message).map_err(HandoffError::Encode)?;
        if text.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
            return Err(HandoffError::Truncated);
        }
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let sent = self
            .fd
            .async_io(Interest::WRITABLE, |fd| {
                let flags = MsgFlags::MSG_NOSIGNAL;
                sendmsg::<UnixAddr>(fd.as_raw_fd(), &[IoSlice::new(&text)], control, flags, None).map_err(Into::into)
            })
            .await;
        match sent {
            Ok(_) => Ok(()),
            Err(error) if is_gone(&error) => Err(HandoffError::Closed),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives one message with its descriptors.
    ///
    /// # Errors
    /// `Closed` at the end; a recoverable error for a message that cannot be understood.
    pub async fn recv(&self) -> Result<(In, Vec<OwnedFd>), HandoffError> {
        let received = self.fd.async_io(Interest::READABLE, |fd| receive(fd.as_raw_fd())).await;
        let (text, descriptors, whole) = match received {
            Ok(received) => received,
            Err(error) if is_gone(&error) => return Err(HandoffError::Closed),
            Err(error) => return Err(error.into()),
        };
        if text.is_empty() {
            return Err(HandoffError::Closed);
        }
        if !whole {
            return Err(HandoffError::Truncated);
        }
        match serde_json::from_slice(&text) {
            Ok(message) => Ok((message, descriptors)),
            Err(source) => Err(HandoffError::Malformed { source, text: String::from_utf8_lossy(&text).into_owned() }),
        }
    }
}

fn seqpacket() -> Result<OwnedFd, HandoffError> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(std::io::Error::from)?)
}

fn register(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, HandoffError> {
    // SAFETY: `as_raw_fd` of an OwnedFd always answers the same descriptor, open for as long as the AsyncFd owns it.
    unsafe { AsyncFd::register(fd) }.map_err(|error| HandoffError::Io(error.into_parts().1))
}

fn is_gone(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc) if libc == nix::errno::Errno::EPIPE as i32 || libc == nix::errno::Errno::ECONNRESET as i32)
}

fn receive(fd: RawFd) -> std::io::Result<(Vec<u8>, Vec<OwnedFd>, bool)> {
    let mut text = vec![0u8; MAX_MESSAGE];
    let mut control = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut buffers = [IoSliceMut::new(&mut text)];
    let message = recvmsg::<UnixAddr>(fd, &mut buffers, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel just installed these descriptors for us and nothing else owns them.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let (bytes, whole) = (message.bytes, !message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC));
    text.truncate(bytes);
    Ok((text, descriptors, whole))
}

#[cfg(test)]
mod tests;
