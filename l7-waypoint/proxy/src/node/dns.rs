//! DNS of captured pods. Names of the mesh are answered here ([`names`]); what else is asked for goes as it is to this node
//! proxy's own resolvers, from the pod's namespace, so that NetworkPolicy and the resolver see the pod.
//!
//! Who leads queries here: our lower layer, by its hooks, those to our own resolvers and while we listen (TCP with all other
//! connections of the pod); istio-cni, by its rules, all of them.
mod names;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use strata_runtime::metrics::Registry;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use xds_model::wds::MeshView;

use super::WORKLOAD_WAIT;
use super::pods::Pod;
use crate::config::{Flags, Switch};
use names::Asker;

pub(crate) const PORT: u16 = 53;
/// Time for one resolver to answer; stub resolvers ask again after 5 s (resolv.conf(5)).
const ANSWER_TIME: Duration = Duration::from_secs(2);
/// How long a TCP connection may be idle (RFC 7766 section 6.2.3).
const IDLE_TIME: Duration = Duration::from_secs(10);
/// Queries of a pod that may wait for their answers.
const IN_FLIGHT: usize = 1024;
/// A datagram's most (RFC 6891 allows as much as UDP does).
const MAX_DATAGRAM: usize = 64 << 10;
/// Bounds of the durations' histogram in seconds, as ztunnel's.
const BUCKETS: [f64; 6] = [0.001, 0.005, 0.01, 0.1, 1.0, 5.0];

/// Who asks nothing: the discard service's port (RFC 863).
const NOBODY: u16 = 9;
/// How long a socket that is given no more queries is read from: those on their way to it when that began.
const LAST_QUERIES: Duration = Duration::from_millis(200);

/// What answers pods' queries.
pub(crate) struct Dns {
    /// Whom this process asks for names, in order.
    resolvers: Vec<SocketAddr>,
    /// Names of the mesh are answered.
    names: bool,
    cluster_domain: String,
    mesh: MeshView,
    metrics: Metrics,
}

impl Dns {
    pub(crate) fn new(flags: &Flags, mesh: MeshView, registry: &Registry) -> Dns {
        let resolvers = match flags.dns_resolvers.as_slice() {
            [] => of_process(),
            given => given.to_vec(),
        };
        Dns {
            resolvers: resolvers.into_iter().map(|ip| SocketAddr::new(ip, PORT)).collect(),
            names: flags.dns_capture == Switch::On,
            cluster_domain: flags.cluster_domain(),
            mesh,
            metrics: Metrics::register(registry),
        }
    }

    /// Resolvers in whose place pods are answered; none if names of the mesh are not.
    pub(crate) fn stands_for(&self) -> Vec<IpAddr> {
        self.resolvers.iter().filter(|_| self.names).map(SocketAddr::ip).collect()
    }

    /// Whether a connection to `addr` is to one of those.
    pub(crate) fn stands_at(&self, addr: SocketAddr) -> bool {
        self.names && self.resolvers.contains(&addr)
    }

    /// Until the control plane has said what services there are: before, every name would be the resolver's.
    pub(crate) async fn names_known(&self) {
        let mut changes = self.mesh.changes();
        while self.names && !self.mesh.load().addresses_known() {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// The mesh's answer to a query of `pod`.
    fn known(&self, pod: &Pod, query: &[u8]) -> Option<Vec<u8>> {
        self.metrics.requests.inc();
        if !self.names {
            return None;
        }
        let asker = Asker { namespace: &pod.info.namespace, cluster_domain: &self.cluster_domain };
        names::answer(&self.mesh.load(), asker, query)
    }

    /// The answer to one datagram: the mesh's, the first resolver's that has one, or that there is none.
    async fn answer(&self, pod: &Pod, query: &[u8]) -> Option<Vec<u8>> {
        if let Some(known) = self.known(pod, query) {
            return Some(known);
        }
        for resolver in &self.resolvers {
            match self.timed(*resolver, ask(pod, *resolver, query)).await {
                Ok(answer) => return Some(answer),
                Err(error) => tracing::debug!(pod = pod.info.uid, %resolver, %error, "DNS query without an answer"),
            }
        }
        names::failure(query)
    }

    /// One question to one resolver, counted.
    async fn timed<T>(&self, resolver: SocketAddr, asking: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        self.metrics.upstream_requests.inc();
        let began = Instant::now();
        let outcome = match tokio::time::timeout(ANSWER_TIME, asking).await {
            Ok(outcome) => outcome,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("{resolver} does not answer"))),
        };
        self.metrics.upstream_duration.observe(began.elapsed().as_secs_f64());
        if outcome.is_err() {
            self.metrics.upstream_failures.inc();
        }
        outcome
    }

    /// One TCP connection of `pod`: its queries in turn, each after a length of two bytes (RFC 7766 section 8).
    pub(crate) async fn connection(&self, pod: &Pod, client: TcpStream) {
        if let Err(error) = self.converse(pod, client).await {
            tracing::debug!(pod = pod.info.uid, %error, "DNS over TCP ended early");
        }
    }

    async fn converse(&self, pod: &Pod, mut client: TcpStream) -> io::Result<()> {
        // A proxy that has just begun knows no names yet.
        drop(tokio::time::timeout(WORKLOAD_WAIT, self.names_known()).await);
        let mut upstream = None;
        loop {
            let query = match tokio::time::timeout(IDLE_TIME, read_message(&mut client)).await {
                Ok(Ok(query)) => query,
                Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Err(_) => return Ok(()),
            };
            let answer = match self.known(pod, &query) {
                Some(known) => known,
                None => self.relay(pod, &mut upstream, &query).await?,
            };
            write_message(&mut client, &answer).await?;
        }
    }

    /// Over the connection there is to a resolver, or the first that takes one.
    async fn relay(&self, pod: &Pod, upstream: &mut Option<TcpStream>, query: &[u8]) -> io::Result<Vec<u8>> {
        for resolver in &self.resolvers {
            let asking = async {
                let mut stream = match upstream.take() {
                    Some(open) => open,
                    None => pod.sockets.connect_from(*resolver).await?,
                };
                write_message(&mut stream, query).await?;
                let answer = read_message(&mut stream).await?;
                Ok((stream, answer))
            };
            match self.timed(*resolver, asking).await {
                Ok((stream, answer)) => {
                    *upstream = Some(stream);
                    return Ok(answer);
                }
                Err(error) => tracing::debug!(pod = pod.info.uid, %resolver, %error, "DNS query without an answer"),
            }
        }
        names::failure(query).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "what came is no query"))
    }

    /// Serves `listening` until the pod or the process goes away.
    pub(crate) fn serve(self: Arc<Dns>, pod: &Arc<Pod>, listening: Vec<(UdpSocket, Option<TcpListener>)>) {
        for (udp, tcp) in listening {
            let opened = tokio::net::UdpSocket::from_std(udp)
                .and_then(|udp| Ok((udp, tcp.map(tokio::net::TcpListener::from_std).transpose()?)));
            match opened {
                Ok((udp, tcp)) => {
                    tokio::spawn(datagrams(self.clone(), pod.clone(), Arc::new(udp)));
                    tcp.map(|tcp| tokio::spawn(connections(self.clone(), pod.clone(), tcp)));
                }
                Err(error) => tracing::error!(pod = pod.info.uid, %error, "socket for DNS cannot be used"),
            }
        }
    }
}

/// The resolvers of `/etc/resolv.conf`: of the cluster, where the proxy is an ordinary pod.
fn of_process() -> Vec<IpAddr> {
    match std::fs::read_to_string("/etc/resolv.conf") {
        Ok(text) => nameservers(&text),
        Err(error) => {
            tracing::warn!(%error, "/etc/resolv.conf cannot be read: no pod's DNS is captured, or answered where it is");
            Vec::new()
        }
    }
}

fn nameservers(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()).collect()
}

/// ztunnel's metrics of the same names, without its labels.
struct Metrics {
    requests: Counter,
    upstream_requests: Counter,
    upstream_failures: Counter,
    upstream_duration: Histogram,
}

impl Metrics {
    fn register(registry: &Registry) -> Metrics {
        let metrics = Metrics {
            requests: Counter::default(),
            upstream_requests: Counter::default(),
            upstream_failures: Counter::default(),
            upstream_duration: Histogram::new(BUCKETS),
        };
        registry.with(|registry| {
            let mut add = |name: &str, help: &str, counter: &Counter| registry.register(name, help, counter.clone());
            add("istio_dns_requests", "DNS queries of pods", &metrics.requests);
            add("istio_dns_upstream_requests", "DNS queries handed on to a resolver", &metrics.upstream_requests);
            add("istio_dns_upstream_failures", "DNS queries a resolver did not answer", &metrics.upstream_failures);
            let help = "Time until a resolver answered";
            registry.register("istio_dns_upstream_request_duration_seconds", help, metrics.upstream_duration.clone());
        });
        metrics
    }
}

async fn datagrams(dns: Arc<Dns>, pod: Arc<Pod>, socket: Arc<tokio::net::UdpSocket>) {
    let room = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut buffer = vec![0; MAX_DATAGRAM];
    let v6 = socket.local_addr().is_ok_and(|own| own.is_ipv6());
    let mut leaving = false;
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = pod.listening.cancelled(), if !leaving => {
                leaving = true;
                // A connected socket is given no more of others' datagrams: a successor's gets them. What is in the queue is
                // answered; it would be lost with the socket.
                let own: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
                if let Err(error) = socket.connect((own, NOBODY)).await {
                    tracing::debug!(pod = pod.info.uid, %error, "queries may be lost");
                }
                continue;
            }
            () = tokio::time::sleep(LAST_QUERIES), if leaving => return,
        };
        // An error is an ICMP message about an earlier answer (udp(7)): its client has gone.
        let Ok((length, client)) = received else { continue };
        // Without room the query is lost, as it would be in a resolver that has too much to do.
        let Ok(place) = room.clone().try_acquire_owned() else { continue };
        let (query, socket) = (buffer[..length].to_vec(), socket.clone());
        let (asking, dns) = (pod.clone(), dns.clone());
        pod.spawn(async move {
            if let Some(answer) = dns.answer(&asking, &query).await {
                drop(socket.send_to(&answer, client).await);
            }
            drop(place);
        });
    }
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

async fn connections(dns: Arc<Dns>, pod: Arc<Pod>, listener: tokio::net::TcpListener) {
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
        let (asking, dns) = (pod.clone(), dns.clone());
        pod.spawn(async move { dns.connection(&asking, client).await });
    }
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    // One write: a length alone in a packet is what RFC 7766 section 8 asks not to send.
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_read_in_order() {
        let text = "# made by the kubelet\nsearch shop.svc.cluster.local\nnameserver 10.96.0.10\n\
            nameserver fd00::a # second\n nameserver nonsense\noptions ndots:5\n";
        let expected: Vec<IpAddr> = vec!["10.96.0.10".parse().unwrap(), "fd00::a".parse().unwrap()];
        assert_eq!(nameservers(text), expected);
    }
}
