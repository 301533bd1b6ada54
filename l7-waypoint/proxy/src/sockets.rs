//! The sockets inside a pod's namespace: listeners, connections out, and the hop to the application.
//!
//! Mechanisms and their reasons: `../shared/research/capture-spike.md` E1d, E2, E3.
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use strata_handoff::{DNS_CAPTURE_PORT, listener, mark};
use tokio::net::{TcpSocket, TcpStream};
use xds_model::wds::unmapped;

use crate::netns::Netns;

const BACKLOG: i32 = 4096;
/// Of each family.
const LOOPBACK: (IpAddr, IpAddr) = (IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST));
const ANY: (IpAddr, IpAddr) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED));
/// `include/uapi/linux/in6.h`.
const IPV6_TRANSPARENT: libc::c_int = 75;
/// `include/uapi/linux/in.h`.
const IP_BIND_ADDRESS_NO_PORT: libc::c_int = 24;
/// Source ports of hops to the application: above the range clients draw from, so that no hop ever has the
/// four-tuple of a captured connection that is still open.
const HOP_PORTS: std::ops::RangeInclusive<u16> = 61_000..=65_535;
/// Ports tried before giving up.
const HOP_ATTEMPTS: usize = 64;

/// Our own ports inside a pod: never a destination.
pub(crate) const OUTBOUND_PORT: u16 = 15001;
pub(crate) const INBOUND_PORT: u16 = 15006;
pub(crate) const OWN_PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PORT, l7_hbone::PORT];

/// What istio-cni's rules let pass, and by what they find the way back of a hop to the application
/// (cni/pkg/config of istio/istio, `InpodMark`).
const ISTIO_MARK: u32 = 0x539;

/// How a pod's connections come to our listeners, and how ours are told from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Capture {
    /// By our lower layer: `sk_lookup` hands them over with the addresses they have; our cgroup exempts us.
    Steered,
    /// By istio-cni's rules in the pod: REDIRECT, conntrack knows where they were going; a mark exempts us.
    Redirected,
}

/// Makes sockets inside a pod's namespace.
#[derive(Debug, Clone)]
pub(crate) struct PodSockets {
    netns: Netns,
    capture: Capture,
}

impl PodSockets {
    pub(crate) fn new(netns: Netns, capture: Capture) -> PodSockets {
        PodSockets { netns, capture }
    }

    /// Whether they are made in this namespace.
    pub(crate) fn are_in(&self, netns: &Netns) -> bool {
        self.netns.is(netns)
    }

    /// Opens one listener of every kind (`strata_handoff::listener`) the namespace has addresses for.
    ///
    /// # Errors
    /// If a listener cannot be opened for another reason than a missing address family.
    pub(crate) fn listen(&self) -> io::Result<Vec<(u32, TcpListener)>> {
        // REDIRECT leads to the device's own address what comes from outside, to loopback what comes from the pod.
        let (from_pod, from_outside) = match self.capture {
            Capture::Steered => (LOOPBACK, LOOPBACK),
            Capture::Redirected => (LOOPBACK, ANY),
        };
        let kinds = [
            (listener::OUTBOUND_V4, from_pod.0, OUTBOUND_PORT),
            (listener::OUTBOUND_V6, from_pod.1, OUTBOUND_PORT),
            (listener::INBOUND_V4, from_outside.0, INBOUND_PORT),
            (listener::INBOUND_V6, from_outside.1, INBOUND_PORT),
            (listener::HBONE_V4, from_outside.0, l7_hbone::PORT),
            (listener::HBONE_V6, from_outside.1, l7_hbone::PORT),
        ];
        self.netns.run_on_thread(|| {
            // Connections in the queue of a listener that closes move to the next proxy's. Without the sysctl (kernels
            // before 5.14) they are reset, so failing to set it is no reason not to serve.
            if let Err(error) = std::fs::write("/proc/sys/net/ipv4/tcp_migrate_req", "1") {
                tracing::debug!(%error, "tcp_migrate_req not set");
            }
            let mut out = Vec::with_capacity(kinds.len());
            for (kind, ip, port) in kinds {
                let addr = SocketAddr::new(ip, port);
                out.extend(where_possible(addr, listen(addr, self.capture))?.map(|socket| (kind, socket)));
            }
            Ok(out)
        })
    }

    /// Opens what [`DNS_CAPTURE_PORT`] needs, for the families the namespace has. Steered connections come to the outbound
    /// listener, those to resolvers like all others.
    ///
    /// # Errors
    /// As [`PodSockets::listen`].
    pub(crate) fn listen_for_dns(&self) -> io::Result<Vec<(UdpSocket, Option<TcpListener>)>> {
        let tcp = |addr| match self.capture {
            Capture::Steered => Ok(None),
            Capture::Redirected => listen(addr, self.capture).map(Some),
        };
        self.netns.run_on_thread(|| {
            let mut out = Vec::with_capacity(2);
            for ip in [LOOPBACK.0, LOOPBACK.1] {
                let addr = SocketAddr::new(ip, DNS_CAPTURE_PORT);
                let both = bound(addr, Type::DGRAM).and_then(|udp| Ok((udp.into(), tcp(addr)?)));
                out.extend(where_possible(addr, both)?);
            }
            Ok(out)
        })
    }

    /// Where the client of a captured connection wanted to go.
    ///
    /// # Errors
    /// If the kernel does not know.
    pub(crate) fn original_destination(&self, stream: &TcpStream) -> io::Result<SocketAddr> {
        let own = stream.local_addr()?;
        match self.capture {
            Capture::Steered => Ok(unmapped(own)),
            Capture::Redirected => {
                let socket = SockRef::from(stream);
                let original = if own.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() }?;
                original.as_socket().map(unmapped).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
            }
        }
    }

    /// Connects from inside the pod: the source address is the pod's. Nothing captures the connection again.
    ///
    /// # Errors
    /// As connect(2).
    pub(crate) async fn connect_from(&self, addr: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.netns.run(|| self.exempt(addr, Type::STREAM))?;
        // SAFETY: `into_raw_fd` gives up ownership of an open, non-blocking TCP socket, which TcpSocket takes over.
        let socket = unsafe { TcpSocket::from_raw_fd(socket.into_raw_fd()) };
        socket.connect(addr).await
    }

    /// A datagram socket inside the pod, towards `addr`. Nothing captures what it sends.
    ///
    /// # Errors
    /// As socket(2) and connect(2).
    pub(crate) fn datagrams_to(&self, addr: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.netns.run(|| self.exempt(addr, Type::DGRAM))?;
        socket.connect(&addr.into())?;
        Ok(socket.into())
    }

    /// A socket towards `addr` that capture leaves alone.
    fn exempt(&self, addr: SocketAddr, kind: Type) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(addr), kind, None)?;
        socket.set_nonblocking(true)?;
        if self.capture == Capture::Redirected {
            socket.set_mark(ISTIO_MARK)?;
        }
        Ok(socket)
    }

    /// Connects to the application at `app`, the pod's own address, so that it sees `client` as its peer.
    ///
    /// # Errors
    /// As connect(2); `AddrNotAvailable` if no source port of the hop range is free for this client and application.
    pub(crate) async fn connect_as(&self, client: IpAddr, app: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        let client = client.to_canonical();
        // A pod that calls itself is its own source anyway. (A waypoint may have been reached over the other address
        // family; the application then sees the hop itself.)
        if client == app.ip() || client.is_ipv4() != app.is_ipv4() {
            return within(limit, self.connect_from(app)).await;
        }
        let first = rand::random_range(HOP_PORTS);
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for attempt in 0..HOP_ATTEMPTS {
            let port = hop_port(first, attempt);
            let socket = self.netns.run(|| transparent_socket(SocketAddr::new(client, port), self.capture));
            let outcome = match socket {
                Ok(socket) => within(limit, socket.connect(app)).await,
                Err(error) => Err(error),
            };
            match outcome {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL)) => {
                    last = error;
                }
                outcome => return outcome,
            }
        }
        Err(last)
    }
}

/// What was opened at `addr`; `None` in a pod without IPv6, which has no address ::1 or no such family at all.
fn where_possible<T>(addr: SocketAddr, opened: io::Result<T>) -> io::Result<Option<T>> {
    match opened {
        Ok(socket) => Ok(Some(socket)),
        Err(error) if addr.is_ipv6() && is_missing_family(&error) => Ok(None),
        Err(error) => Err(io::Error::new(error.kind(), format!("listening on {addr}: {error}"))),
    }
}

fn is_missing_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT))
}

fn listen(addr: SocketAddr, capture: Capture) -> io::Result<TcpListener> {
    let socket = bound(addr, Type::STREAM)?;
    if capture == Capture::Steered {
        // What `sk_lookup` leads here was for any address, and is answered as that address.
        set_transparent(&socket, addr.ip())?;
    }
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A socket bound to `addr`, beside that of the next proxy during an upgrade.
fn bound(addr: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), kind, None)?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&addr.into())?;
    Ok(socket)
}

/// Steps through the range with a stride that is coprime to its size, so that attempts do not repeat.
fn hop_port(first: u16, attempt: usize) -> u16 {
    let size = usize::from(HOP_PORTS.end() - HOP_PORTS.start()) + 1;
    let offset = (usize::from(first - HOP_PORTS.start()) + attempt * 1_237) % size;
    // `offset` is below `size`, so the sum is within the range.
    HOP_PORTS.start() + offset as u16
}

async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// A socket bound to a foreign address, whose packets stay on lo. The mark leads the answers back: by the pod's rule,
/// or by the mark istio-cni's rules then put on the connection. Bound to lo, so that `sk_lookup` sees a hop and not a new
/// inbound connection; where nothing looks at that, the route to the pod's own address does it.
fn transparent_socket(source: SocketAddr, capture: Capture) -> io::Result<TcpSocket> {
    let socket = Socket::new(Domain::for_address(source), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    set_transparent(&socket, source.ip())?;
    match capture {
        Capture::Steered => {
            socket.set_mark(mark::TO_APP)?;
            socket.bind_device(Some(b"lo"))?;
        }
        Capture::Redirected => socket.set_mark(ISTIO_MARK)?,
    }
    // Several hops may share a source port towards different applications.
    socket.set_reuse_address(true)?;
    if source.port() == 0 {
        set_option(&socket, libc::IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT)?;
    }
    socket.bind(&source.into())?;
    // SAFETY: `into_raw_fd` gives up ownership of an open, non-blocking TCP socket, which TcpSocket takes over.
    Ok(unsafe { TcpSocket::from_raw_fd(socket.into_raw_fd()) })
}

fn set_transparent(socket: &Socket, ip: IpAddr) -> io::Result<()> {
    match ip {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true),
        IpAddr::V6(_) => set_option(socket, libc::IPPROTO_IPV6, IPV6_TRANSPARENT),
    }
}

fn set_option(socket: &Socket, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int that outlives the call, and its size is passed.
    let outcome = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), size_of_val(&on) as libc::socklen_t)
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes with a reset: what a client of a refused or broken connection shall see instead of a clean end.
pub(crate) fn reset(stream: TcpStream) {
    if let Err(error) = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "connection closed instead of reset");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hop_ports_stay_in_range_and_do_not_repeat() {
        for first in [61_000, 61_001, 65_535] {
            let ports: std::collections::BTreeSet<_> = (0..HOP_ATTEMPTS).map(|n| hop_port(first, n)).collect();
            assert_eq!(ports.len(), HOP_ATTEMPTS);
            assert!(ports.iter().all(|port| HOP_PORTS.contains(port)));
        }
    }
}
