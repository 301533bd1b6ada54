//! Pods in and out, whoever tells of them: listeners in their namespaces, certificates, reconciliation after a snapshot.
use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::Socket;
use strata_handoff::{PodInfo, SeqPacket, listener};
use strata_runtime::{ReadyGuard, drain};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use xds_model::spiffe::SpiffeId;

use super::dns::Dns;
use super::pods::Pod;
use super::{Shared, WORKLOAD_WAIT, Worker, inbound, outbound, passthrough};
use crate::config::Flags;
use crate::netns::{self, Netns};
use crate::sockets::{Capture, PodSockets};
use crate::workers::Workers;

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// Who tells us of this node's pods: first of all there are, then of changes. It is connected to for as long as the
/// process lives; what it told holds while it is away.
pub(crate) trait PodSource: Send {
    /// Its name, for the log.
    const NAME: &'static str;

    /// Speaks with it until the connection cannot go on, and says why.
    fn converse(&mut self, socket: SeqPacket, pods: &mut Enrolment) -> impl Future<Output = String> + Send;
}

/// Connects to `source` on `path`, again and again.
pub(crate) async fn follow<S: PodSource>(path: &Path, mut source: S, mut pods: Enrolment) {
    let (who, shown) = (S::NAME, path.display());
    let mut pause = FIRST_BACKOFF;
    let mut missed = false;
    loop {
        match SeqPacket::connect(path) {
            Ok(socket) => {
                tracing::info!(path = %shown, "connected to {who}");
                missed = false;
                pods.unconfirmed = Some(pods.shared.pods.all().iter().map(|pod| pod.key.clone()).collect());
                let began = Instant::now();
                let error = source.converse(socket, &mut pods).await;
                tracing::warn!(error, "{who}'s connection ended; listeners and connections go on");
                // One that answers and hangs up does not want this proxy: its log says why.
                if began.elapsed() > MAX_BACKOFF {
                    pause = FIRST_BACKOFF;
                }
            }
            Err(error) if missed => tracing::debug!(path = %shown, %error, "{who} not reachable"),
            Err(error) => {
                tracing::warn!(path = %shown, %error, "{who} not reachable, trying on");
                missed = true;
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_BACKOFF);
    }
}

/// Takes pods in and lets them go.
pub(crate) struct Enrolment {
    pub shared: Arc<Shared>,
    workers: Workers<Arc<Worker>>,
    trust_domain: String,
    capture: Capture,
    /// How long connections of a pod that left may go on where its rules left before it.
    grace: Duration,
    home: Arc<OwnedFd>,
    ready: Option<ReadyGuard>,
    /// Pods we had when the connection began and did not hear of since; `None` once all have been named.
    unconfirmed: Option<BTreeSet<String>>,
}

impl Enrolment {
    /// # Errors
    /// If the own network namespace cannot be opened.
    pub(crate) fn new(
        flags: &Flags,
        shared: Arc<Shared>,
        workers: Workers<Arc<Worker>>,
        ready: ReadyGuard,
    ) -> std::io::Result<Enrolment> {
        Ok(Enrolment {
            shared,
            workers,
            trust_domain: flags.trust_domain.clone(),
            capture: flags.pods_from.capture(),
            grace: flags.drain_deadline(),
            home: netns::current()?,
            ready: Some(ready),
            unconfirmed: None,
        })
    }

    /// The namespace behind a descriptor.
    pub(crate) fn namespace(&self, descriptor: OwnedFd) -> Netns {
        Netns::new(descriptor, self.home.clone())
    }

    /// The pod is still there.
    pub(crate) fn confirm(&mut self, key: &str) {
        if let Some(unconfirmed) = &mut self.unconfirmed {
            unconfirmed.remove(key);
        }
    }

    /// Whether not all pods have been named yet since the connection began.
    pub(crate) fn in_snapshot(&self) -> bool {
        self.unconfirmed.is_some()
    }

    /// All pods have been named: others are gone, and we are ready.
    pub(crate) fn snapshot_complete(&mut self) {
        for key in self.unconfirmed.take().unwrap_or_default() {
            self.remove(&key);
        }
        self.ready = None;
    }

    /// Listens inside the pod. A pod that is known is left as it is; in another namespace it is another.
    ///
    /// # Errors
    /// What keeps it from being served.
    pub(crate) async fn add(&mut self, key: &str, info: &PodInfo, netns: Netns) -> Result<Arc<Pod>, String> {
        self.confirm(key);
        let identity = SpiffeId::new(&self.trust_domain, &info.namespace, &info.service_account)
            .map_err(|error| error.to_string())?;
        if let Some(known) = self.shared.pods.by_key(key)
            && known.info == *info
            && known.sockets.are_in(&netns)
        {
            // Told again: the same listeners, so that no connection in their queues is lost.
            return Ok(known);
        }
        self.remove(key);
        let pod = Pod::new(key.to_owned(), info.clone(), identity, PodSockets::new(netns, self.capture));
        let pod = Arc::new(pod);
        if let Err(error) = self.open(&pod).await {
            // What is open already must not take connections that nobody answers for.
            pod.stop_listening();
            return Err(error.to_string());
        }
        self.shared.identities.prefetch(&pod.identity);
        tracing::info!(pod = pod.info.uid, identity = %pod.identity, "listening inside the pod");
        self.shared.pods.insert(pod.clone());
        if self.shared.watch().is_none() {
            // Every listener was closed while these were opened.
            pod.stop_listening();
        }
        Ok(pod)
    }

    async fn open(&self, pod: &Arc<Pod>) -> std::io::Result<()> {
        let watch = self.shared.watch().ok_or_else(|| std::io::Error::other("the proxy is going away"))?;
        let sockets = pod.sockets.clone();
        let listeners = blocking(move || sockets.listen()).await?;
        let kept = listeners.iter().map(|(kind, socket)| Ok((*kind, socket.try_clone()?)));
        pod.keep(kept.collect::<std::io::Result<_>>()?);
        // Pods take turns with the threads that accept for them.
        let first = rand::random_range(0..self.workers.count());
        for (kind, socket) in listeners {
            let (pod, workers, watch) = (pod.clone(), self.workers.clone(), watch.clone());
            let accepting = Accepting { pod, kind, workers, turn: first, watch };
            self.workers.run(first, move |_| drop(tokio::spawn(accepting.run(socket)))).await;
        }
        self.open_dns(pod, first).await
    }

    async fn open_dns(&self, pod: &Arc<Pod>, worker: usize) -> std::io::Result<()> {
        let (pod, dns) = (pod.clone(), self.shared.dns.clone());
        match self.capture {
            Capture::Steered if dns.stands_for().is_empty() => Ok(()),
            // The hooks look for our socket: without it the pod's queries go where they went before, or to a proxy whose
            // place we take.
            Capture::Steered => {
                let wait = move |_| drop(tokio::spawn(answer_when_known(pod, dns)));
                self.workers.run(worker, wait).await;
                Ok(())
            }
            // istio-cni's rules lead queries here whether we know names or not.
            Capture::Redirected => {
                let sockets = pod.sockets.clone();
                let listening = blocking(move || sockets.listen_for_dns()).await?;
                let serve = async move {
                    drop(tokio::time::timeout(WORKLOAD_WAIT, dns.names_known()).await);
                    dns.serve(&pod, listening);
                };
                self.workers.run(worker, move |_| drop(tokio::spawn(serve))).await;
                Ok(())
            }
        }
    }

    /// Lets a pod go; one that is not known is gone already.
    pub(crate) fn remove(&mut self, key: &str) {
        let Some(pod) = self.shared.pods.remove(key) else { return };
        tracing::info!(pod = pod.info.uid, key, "pod is no longer served");
        self.shared.grants.forget_pod(&pod);
        if !self.shared.pods.uses(&pod.identity) {
            self.shared.identities.forget(&pod.identity);
        }
        match self.capture {
            // Nothing new is steered here, but who is in the midst of a handshake would be reset with the listener.
            Capture::Steered => drop(tokio::spawn(async move {
                tokio::time::sleep(super::LATECOMERS).await;
                pod.stop_listening();
            })),
            // istio-cni has taken its rules away before it says so: answers of the application no longer come back to
            // us, and whoever waits for one would wait for long.
            Capture::Redirected => {
                pod.stop_listening();
                let grace = self.grace;
                tokio::spawn(async move {
                    tokio::time::sleep(grace).await;
                    pod.gone.cancel();
                });
            }
        }
    }
}

/// Answers the pod's queries from when there are names to answer for.
async fn answer_when_known(pod: Arc<Pod>, dns: Arc<Dns>) {
    if pod.listening.run_until_cancelled(dns.names_known()).await.is_none() {
        return;
    }
    let sockets = pod.sockets.clone();
    match blocking(move || sockets.listen_for_dns()).await {
        Ok(listening) => dns.serve(&pod, listening),
        Err(error) => tracing::warn!(pod = pod.info.uid, %error, "the pod is not told the mesh's names"),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}

/// One of a pod's listeners.
struct Accepting {
    pod: Arc<Pod>,
    kind: u32,
    workers: Workers<Arc<Worker>>,
    /// The thread whose turn it is.
    turn: usize,
    /// Of each connection: held until it is over.
    watch: drain::Watch,
}

impl Accepting {
    /// Accepts until the pod or the process goes away; threads take turns with the connections.
    async fn run(mut self, socket: TcpListener) {
        // SAFETY: `as_raw_fd` of a Socket always answers the same descriptor, open for as long as the AsyncFd owns it.
        let registered = unsafe { AsyncFd::register_with_interest(Socket::from(socket), Interest::READABLE) };
        let socket = match registered {
            Ok(socket) => socket,
            Err(error) => {
                let error = std::io::Error::from(error);
                tracing::error!(pod = self.pod.info.uid, kind = self.kind, %error, "listener cannot be used");
                return;
            }
        };
        let pod = self.pod.clone();
        loop {
            let accepted = tokio::select! {
                accepted = socket.async_io(Interest::READABLE, accept) => accepted,
                () = pod.listening.cancelled() => break,
            };
            match accepted {
                Ok((stream, client)) => self.hand_on(stream, client).await,
                Err(error) => {
                    // Out of descriptors or the like: accepting again at once would only burn CPU.
                    tracing::warn!(pod = self.pod.info.uid, kind = self.kind, %error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
        // Those that are through their handshake by now would be reset with the listener.
        while let Ok((stream, client)) = accept(socket.get_ref()) {
            self.hand_on(stream, client).await;
        }
    }

    async fn hand_on(&mut self, stream: TcpStream, client: SocketAddr) {
        let (pod, kind, watch) = (self.pod.clone(), self.kind, self.watch.clone());
        let serve = move |worker: Arc<Worker>| {
            let stream = match tokio::net::TcpStream::from_std(stream) {
                Ok(stream) => stream,
                Err(error) => return tracing::warn!(pod = pod.info.uid, kind, %error, "connection cannot be used"),
            };
            match kind {
                listener::OUTBOUND_V4 | listener::OUTBOUND_V6 => {
                    pod.spawn(outbound::serve(worker, pod.clone(), stream, client, watch));
                }
                listener::HBONE_V4 | listener::HBONE_V6 => {
                    pod.spawn(inbound::serve(worker, pod.clone(), stream, client, watch));
                }
                _ => pod.spawn(passthrough::serve(worker, pod.clone(), stream, client, watch)),
            }
        };
        self.workers.run(self.turn, serve).await;
        self.turn = (self.turn + 1) % self.workers.count();
    }
}

fn accept(socket: &Socket) -> std::io::Result<(TcpStream, SocketAddr)> {
    let (stream, client) = socket.accept4(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK)?;
    let client = client.as_socket().ok_or(std::io::ErrorKind::AddrNotAvailable)?;
    Ok((stream.into(), client))
}
