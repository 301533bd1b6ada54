//! `SOCK_SEQPACKET` with descriptors, in tokio's terms: what every protocol about a node's pods rides on.
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    connect, listen, recvmsg, sendmsg, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::HandoffError;

/// Largest message in bytes; a pod's description is well below 1 KiB.
const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors in one message: a listener of each kind, with room to grow.
const MAX_DESCRIPTORS: usize = 32;

/// One end of a connection. `send` and `recv` take `&self`, may run at the same time, and lose nothing when cancelled.
#[derive(Debug)]
pub struct SeqPacket {
    fd: AsyncFd<OwnedFd>,
}

impl SeqPacket {
    /// Connects to whoever listens on `path`.
    ///
    /// # Errors
    /// If nobody does.
    pub fn connect(path: &Path) -> Result<SeqPacket, HandoffError> {
        let fd = seqpacket()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path).map_err(std::io::Error::from)?).map_err(std::io::Error::from)?;
        Ok(SeqPacket { fd: register(fd)? })
    }

    /// The socket itself.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }

    /// Sends one message with its descriptors (which stay the caller's).
    ///
    /// # Errors
    /// If the other end is gone, or the message or the number of descriptors is too large.
    pub async fn send(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), HandoffError> {
        if message.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
            return Err(HandoffError::Truncated);
        }
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let sent = self
            .fd
            .async_io(Interest::WRITABLE, |fd| {
                let flags = MsgFlags::MSG_NOSIGNAL;
                sendmsg::<UnixAddr>(fd.as_raw_fd(), &[IoSlice::new(message)], control, flags, None).map_err(Into::into)
            })
            .await;
        match sent {
            Ok(_) => Ok(()),
            Err(error) if is_gone(&error) => Err(HandoffError::Closed),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives one message, never an empty one, with its descriptors.
    ///
    /// # Errors
    /// `Closed` at the end; `Truncated` for a message that does not fit.
    pub async fn recv(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), HandoffError> {
        let received = self.fd.async_io(Interest::READABLE, |fd| receive(fd.as_raw_fd())).await;
        let (message, descriptors, whole) = match received {
            Ok(received) => received,
            Err(error) if is_gone(&error) => return Err(HandoffError::Closed),
            Err(error) => return Err(error.into()),
        };
        if message.is_empty() {
            return Err(HandoffError::Closed);
        }
        if whole { Ok((message, descriptors)) } else { Err(HandoffError::Truncated) }
    }
}

/// A listening socket.
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

    /// The next connection, whatever is spoken on it.
    ///
    /// # Errors
    /// If accepting fails, for example for want of descriptors.
    pub async fn accept_any(&self) -> Result<SeqPacket, HandoffError> {
        let raw = self
            .fd
            .async_io(Interest::READABLE, |fd| {
                accept4(fd.as_raw_fd(), SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC).map_err(Into::into)
            })
            .await?;
        // SAFETY: accept4 just returned this descriptor and nothing else owns it.
        Ok(SeqPacket { fd: register(unsafe { OwnedFd::from_raw_fd(raw) })? })
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
