//! DNS of pods whose queries istio-cni's rules lead to us: relayed as they are to this node proxy's own resolvers, from
//! the pod's namespace, so that NetworkPolicy and the resolver see the pod. Names of the mesh alone are not answered.
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use super::pods::Pod;

const PORT: u16 = 53;
/// Time for one resolver to answer; stub resolvers ask again after 5 s (resolv.conf(5)).
const ANSWER_TIME: Duration = Duration::from_secs(2);
/// Longest a TCP connection may take; zone transfers are nothing for a pod's resolver.
const TCP_TIME: Duration = Duration::from_secs(30);
/// Queries of a pod that may wait for their answers.
const IN_FLIGHT: usize = 1024;
/// A datagram's most (RFC 6891 allows as much as UDP does).
const MAX_DATAGRAM: usize = 64 << 10;

/// Whom this process asks for names, in order.
#[derive(Clone)]
pub(crate) struct Resolvers(Arc<[SocketAddr]>);

impl Resolvers {
    /// Those of `/etc/resolv.conf`: of the cluster, where the proxy is an ordinary pod.
    pub(crate) fn of_process() -> Resolvers {
        match std::fs::read_to_string("/etc/resolv.conf") {
            Ok(text) => Resolvers::read(&text),
            Err(error) => {
                tracing::warn!(%error, "/etc/resolv.conf cannot be read: pods whose DNS is captured get no answers");
                Resolvers(Arc::new([]))
            }
        }
    }

    fn read(text: &str) -> Resolvers {
        let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
        let addresses = servers.filter_map(|rest| rest.split_whitespace().next()?.parse::<IpAddr>().ok());
        Resolvers(addresses.map(|ip| SocketAddr::new(ip, PORT)).collect())
    }
}

/// Serves `listening` (both transports of each family) until the pod or the process goes away.
pub(crate) fn serve(pod: &Arc<Pod>, resolvers: &Resolvers, listening: Vec<(UdpSocket, TcpListener)>) {
    for (udp, tcp) in listening {
        let (udp, tcp) = match (tokio::net::UdpSocket::from_std(udp), tokio::net::TcpListener::from_std(tcp)) {
            (Ok(udp), Ok(tcp)) => (udp, tcp),
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(pod = pod.info.uid, %error, "socket for DNS cannot be used");
                continue;
            }
        };
        tokio::spawn(datagrams(pod.clone(), resolvers.clone(), Arc::new(udp)));
        tokio::spawn(connections(pod.clone(), resolvers.clone(), tcp));
    }
}

async fn datagrams(pod: Arc<Pod>, resolvers: Resolvers, socket: Arc<tokio::net::UdpSocket>) {
    let room = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = pod.listening.cancelled() => return,
        };
        // An error is an ICMP message about an earlier answer (udp(7)): its client has gone.
        let Ok((length, client)) = received else { continue };
        // Without room the query is lost, as it would be in a resolver that has too much to do.
        let Ok(place) = room.clone().try_acquire_owned() else { continue };
        let (query, socket) = (buffer[..length].to_vec(), socket.clone());
        let (asking, resolvers) = (pod.clone(), resolvers.clone());
        pod.spawn(async move {
            match answer(&asking, &resolvers, &query).await {
                Ok(answer) => drop(socket.send_to(&answer, client).await),
                Err(error) => tracing::debug!(pod = asking.info.uid, %error, "DNS query without an answer"),
            }
            drop(place);
        });
    }
}

/// The first resolver's answer, or the next one's.
async fn answer(pod: &Pod, resolvers: &Resolvers, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "/etc/resolv.conf of the proxy names no resolver");
    for resolver in &*resolvers.0 {
        match tokio::time::timeout(ANSWER_TIME, ask(pod, *resolver, query)).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::Error::new(io::ErrorKind::TimedOut, format!("{resolver} does not answer")),
        }
    }
    Err(last)
}

async fn ask(pod: &Pod, resolver: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    // A socket of its own: a port nobody can guess, and answers from nobody else.
    let socket = tokio::net::UdpSocket::from_std(pod.sockets.datagrams_to(resolver)?)?;
    socket.send(query).await?;
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // The query's id: what else comes here is a late or forged answer.
        if buffer[..length].get(..2) == query.get(..2) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn connections(pod: Arc<Pod>, resolvers: Resolvers, listener: tokio::net::TcpListener) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = pod.listening.cancelled() => return,
        };
        let Ok((client, _)) = accepted else {
            // Out of descriptors or the like.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let (asking, resolvers) = (pod.clone(), resolvers.clone());
        pod.spawn(async move {
            if let Err(error) = relay(&asking, &resolvers, client).await {
                tracing::debug!(pod = asking.info.uid, %error, "DNS over TCP ended early");
            }
        });
    }
}

async fn relay(pod: &Pod, resolvers: &Resolvers, mut client: TcpStream) -> io::Result<()> {
    for resolver in &*resolvers.0 {
        let dialled = tokio::time::timeout(ANSWER_TIME, pod.sockets.connect_from(*resolver)).await;
        if let Ok(Ok(mut upstream)) = dialled {
            let carried = tokio::time::timeout(TCP_TIME, copy_bidirectional(&mut client, &mut upstream)).await;
            return carried.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map(drop);
        }
    }
    Err(io::Error::new(io::ErrorKind::HostUnreachable, "no resolver can be reached"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_read_in_order() {
        let text = "# made by the kubelet\nsearch shop.svc.cluster.local\nnameserver 10.96.0.10\n\
            nameserver fd00::a # second\n nameserver nonsense\noptions ndots:5\n";
        let read = Resolvers::read(text);
        let expected: Vec<SocketAddr> = vec!["10.96.0.10:53".parse().unwrap(), "[fd00::a]:53".parse().unwrap()];
        assert_eq!(*read.0, *expected);
    }
}
