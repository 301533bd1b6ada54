//! The sockets inside a pod's namespace: listeners, connections out, and the hop to the application.
//!
//! Mechanisms and their reasons: `../shared/research/capture-spike.md` E1d, E2, E3.
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use strata_handoff::{listener, mark};
use tokio::net::{TcpSocket, TcpStream};

use crate::netns::Netns;

const BACKLOG: i32 = 4096;
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

/// Opens one listener of every kind (`strata_handoff::listener`) the namespace has addresses for.
/// `sk_lookup` leads connections for any address to them; IP_TRANSPARENT lets them answer as that address.
///
/// # Errors
/// If a listener cannot be opened for another reason than a missing address family.
pub(crate) fn open_listeners(netns: &Netns) -> io::Result<Vec<(u32, TcpListener)>> {
    let kinds = [
        (listener::OUTBOUND_V4, IpAddr::V4(Ipv4Addr::LOCALHOST), OUTBOUND_PORT),
        (listener::OUTBOUND_V6, IpAddr::V6(Ipv6Addr::LOCALHOST), OUTBOUND_PORT),
        (listener::INBOUND_V4, IpAddr::V4(Ipv4Addr::LOCALHOST), INBOUND_PORT),
        (listener::INBOUND_V6, IpAddr::V6(Ipv6Addr::LOCALHOST), INBOUND_PORT),
        (listener::HBONE_V4, IpAddr::V4(Ipv4Addr::LOCALHOST), l7_hbone::PORT),
        (listener::HBONE_V6, IpAddr::V6(Ipv6Addr::LOCALHOST), l7_hbone::PORT),
    ];
    netns.run_on_thread(|| {
        // Connections in the queue of a listener that closes move to the next proxy's. Without the sysctl (kernels
        // before 5.14) they are reset, so failing to set it is no reason not to serve.
        if let Err(error) = std::fs::write("/proc/sys/net/ipv4/tcp_migrate_req", "1") {
            tracing::debug!(%error, "tcp_migrate_req not set");
        }
        let mut out = Vec::with_capacity(kinds.len());
        for (kind, ip, port) in kinds {
            match listen(SocketAddr::new(ip, port)) {
                Ok(socket) => out.push((kind, socket)),
                // A pod without IPv6: no address ::1, or no such family at all.
                Err(error) if ip.is_ipv6() && is_missing_family(&error) => {}
                Err(error) => return Err(io::Error::new(error.kind(), format!("listening on {ip}:{port}: {error}"))),
            }
        }
        Ok(out)
    })
}

fn is_missing_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT))
}

fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    // Workers, and the next proxy during an upgrade, listen on the same address.
    socket.set_reuse_port(true)?;
    set_transparent(&socket, addr.ip())?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Connects from inside a pod's namespace: the source address is the pod's. Our cgroup keeps the connection
/// from being captured again.
///
/// # Errors
/// As connect(2).
pub(crate) async fn connect_from(netns: &Netns, addr: SocketAddr) -> io::Result<TcpStream> {
    let socket = netns.run(|| {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })?;
    // SAFETY: `into_raw_fd` gives up ownership of an open, non-blocking TCP socket, which TcpSocket takes over.
    let socket = unsafe { TcpSocket::from_raw_fd(socket.into_raw_fd()) };
    socket.connect(addr).await
}

/// Connects to the application at `app` inside its pod's namespace so that it sees `client` as its peer.
///
/// # Errors
/// As connect(2); `AddrNotAvailable` if no source port of the hop range is free for this client and application.
pub(crate) async fn connect_as(
    netns: &Netns,
    client: IpAddr,
    app: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    let client = client.to_canonical();
    // A pod that calls itself is its own source anyway. (A waypoint may have been reached over the other address
    // family; the application then sees the hop itself.)
    if client == app.ip() || client.is_ipv4() != app.is_ipv4() {
        return within(limit, connect_from(netns, app)).await;
    }
    let first = rand::random_range(HOP_PORTS);
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for attempt in 0..HOP_ATTEMPTS {
        let port = hop_port(first, attempt);
        let socket = netns.run(|| transparent_socket(SocketAddr::new(client, port)));
        let outcome = match socket {
            Ok(socket) => within(limit, socket.connect(app)).await,
            Err(error) => Err(error),
        };
        match outcome {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL)) => last = error,
            outcome => return outcome,
        }
    }
    Err(last)
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

/// A socket bound to a foreign address, whose packets stay on lo: marked, so that the answers are led back by
/// the pod's rule, and bound to lo, so that `sk_lookup` sees a hop and not a new inbound connection.
fn transparent_socket(source: SocketAddr) -> io::Result<TcpSocket> {
    let socket = Socket::new(Domain::for_address(source), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    set_transparent(&socket, source.ip())?;
    socket.set_mark(mark::TO_APP)?;
    socket.bind_device(Some(b"lo"))?;
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
