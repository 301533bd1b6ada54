//! The agent's pods in, our listeners, short-cuts and refusals out.
use std::collections::BTreeSet;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use strata_handoff::{AgentMessage, HandoffError, PodInfo, ProxyEnd, ProxyMessage, VERSION, listener};
use strata_runtime::ReadyGuard;
use tokio::sync::mpsc;
use xds_model::spiffe::SpiffeId;

use super::pods::Pod;
use super::{Shared, Worker, inbound, outbound, passthrough};
use crate::netns::{self, Netns};
use crate::sockets;
use crate::workers::Workers;

const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// The agent's connection, for as long as the process lives.
pub(crate) async fn run(
    path: PathBuf,
    trust_domain: String,
    shared: Arc<Shared>,
    workers: Workers<Arc<Worker>>,
    mut messages: mpsc::Receiver<ProxyMessage>,
    ready: ReadyGuard,
) {
    let home = match netns::current() {
        Ok(home) => home,
        Err(error) => {
            tracing::error!(%error, "cannot open the own network namespace");
            return;
        }
    };
    let mut session = Session { trust_domain, shared, workers, home, ready: Some(ready) };
    let mut pause = FIRST_BACKOFF;
    loop {
        match ProxyEnd::connect(&path) {
            Ok(connection) => {
                tracing::info!(path = %path.display(), "connected to the agent");
                let began = Instant::now();
                let error = session.serve(&connection, &mut messages).await;
                tracing::warn!(%error, "the agent's connection ended; listeners and connections go on");
                // An agent that answers and hangs up does not want this proxy: its log says why.
                if began.elapsed() > MAX_BACKOFF {
                    pause = FIRST_BACKOFF;
                }
            }
            Err(error) => tracing::debug!(path = %path.display(), %error, "agent not reachable"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_BACKOFF);
    }
}

struct Session {
    trust_domain: String,
    shared: Arc<Shared>,
    workers: Workers<Arc<Worker>>,
    home: Arc<OwnedFd>,
    ready: Option<ReadyGuard>,
}

impl Session {
    async fn serve(&mut self, connection: &ProxyEnd, messages: &mut mpsc::Receiver<ProxyMessage>) -> HandoffError {
        let hello = ProxyMessage::Hello { version: VERSION, pid: std::process::id() };
        if let Err(error) = connection.send(&hello, &[]).await {
            return error;
        }
        // The agent dropped our grants when the last connection ended; what waits in the queue is older than that.
        self.shared.grants.forget_all();
        while messages.try_recv().is_ok() {}
        let mut unconfirmed: Option<BTreeSet<String>> =
            Some(self.shared.pods.all().iter().map(|pod| pod.info.uid.clone()).collect());
        loop {
            let outcome = tokio::select! {
                received = connection.recv() => match received {
                    Ok((message, descriptors)) => self.receive(connection, message, descriptors, &mut unconfirmed).await,
                    Err(error) if error.is_recoverable() => {
                        tracing::warn!(%error, "message from the agent skipped");
                        Ok(())
                    }
                    Err(error) => Err(error),
                },
                message = messages.recv() => match message {
                    Some(message) => self.send(connection, message, messages).await,
                    None => return HandoffError::Closed,
                },
            };
            if let Err(error) = outcome {
                return error;
            }
        }
    }

    async fn send(
        &self,
        connection: &ProxyEnd,
        message: ProxyMessage,
        messages: &mut mpsc::Receiver<ProxyMessage>,
    ) -> Result<(), HandoffError> {
        if self.shared.grants.take_overflow() {
            // A revocation was lost: all grants go, also those that still wait in the queue.
            while messages.try_recv().is_ok() {}
            return connection.send(&ProxyMessage::RevokeAll, &[]).await;
        }
        connection.send(&message, &[]).await
    }

    async fn receive(
        &mut self,
        connection: &ProxyEnd,
        message: AgentMessage,
        descriptors: Vec<OwnedFd>,
        unconfirmed: &mut Option<BTreeSet<String>>,
    ) -> Result<(), HandoffError> {
        match message {
            AgentMessage::Hello { version, node } => {
                if version != VERSION {
                    tracing::error!(version, ours = VERSION, "the agent speaks another version of the handoff");
                    return Err(HandoffError::Closed);
                }
                tracing::info!(node, "agent says hello");
            }
            AgentMessage::PodAdded { pod } => {
                if let Some(unconfirmed) = unconfirmed {
                    unconfirmed.remove(&pod.uid);
                }
                let uid = pod.uid.clone();
                match self.add(pod, descriptors).await {
                    Ok(listeners) => {
                        let kinds = listeners.iter().map(|(kind, _)| *kind).collect();
                        let fds: Vec<_> = listeners.iter().map(|(_, socket)| socket.as_fd()).collect();
                        connection.send(&ProxyMessage::Listeners { uid, kinds }, &fds).await?;
                    }
                    Err(error) => {
                        tracing::error!(pod = uid, error, "pod cannot be served");
                        connection.send(&ProxyMessage::PodFailed { uid, error }, &[]).await?;
                    }
                }
            }
            AgentMessage::PodRemoved { uid } => self.remove(&uid),
            AgentMessage::SnapshotSent => {
                for uid in unconfirmed.take().unwrap_or_default() {
                    self.remove(&uid);
                }
                self.ready = None;
            }
        }
        Ok(())
    }

    /// Listens inside the pod on every worker. Returns what the agent gets: one listener of each kind (the
    /// kernel spreads connections over the others of its SO_REUSEPORT group).
    async fn add(&self, info: PodInfo, mut descriptors: Vec<OwnedFd>) -> Result<Vec<(u32, TcpListener)>, String> {
        let descriptor = descriptors.pop().ok_or("no descriptor of the network namespace came along")?;
        let identity = SpiffeId::new(&self.trust_domain, &info.namespace, &info.service_account)
            .map_err(|error| error.to_string())?;
        let netns = Netns::new(descriptor, self.home.clone());
        if let Some(known) = self.shared.pods.by_uid(&info.uid)
            && known.info == info
            && known.netns.is(&netns)
        {
            // The agent is back: the same listeners, so that no connection in their queues is lost.
            return known.listeners().map_err(|error| error.to_string());
        }
        self.shared.pods.remove(&info.uid);
        let pod = Arc::new(Pod::new(info, identity, netns));
        for worker in 0..self.workers.count() {
            let opener = pod.clone();
            let opened = tokio::task::spawn_blocking(move || sockets::open_listeners(&opener.netns)).await;
            let listeners = opened.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
            if worker == 0 {
                let kept = listeners.iter().map(|(kind, socket)| Ok((*kind, socket.try_clone()?)));
                pod.keep(kept.collect::<std::io::Result<_>>().map_err(|error| error.to_string())?);
            }
            let pod = pod.clone();
            let job = move |worker: Arc<Worker>| {
                for (kind, socket) in listeners {
                    tokio::spawn(listen(worker.clone(), pod.clone(), kind, socket));
                }
            };
            self.workers.run(worker, job).await;
        }
        self.shared.identities.prefetch(&pod.identity);
        tracing::info!(pod = pod.info.uid, identity = %pod.identity, "listening inside the pod");
        let handed_out = pod.listeners().map_err(|error| error.to_string());
        self.shared.pods.insert(pod);
        handed_out
    }

    fn remove(&self, uid: &str) {
        if let Some(pod) = self.shared.pods.remove(uid) {
            tracing::info!(pod = uid, "pod is no longer served");
            self.shared.grants.forget_pod(&pod);
            if !self.shared.pods.uses(&pod.identity) {
                self.shared.identities.forget(&pod.identity);
            }
        }
    }
}

/// Accepts on one listener until the pod or the process goes away.
async fn listen(worker: Arc<Worker>, pod: Arc<Pod>, kind: u32, socket: TcpListener) {
    let socket = match tokio::net::TcpListener::from_std(socket) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::error!(pod = pod.info.uid, kind, %error, "listener cannot be used");
            return;
        }
    };
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            () = pod.listening.cancelled() => return,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors or the like: accepting again at once would only burn CPU.
                tracing::warn!(pod = pod.info.uid, kind, %error, "accept failed");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let (worker, pod) = (worker.clone(), pod.clone());
        match kind {
            listener::OUTBOUND_V4 | listener::OUTBOUND_V6 => {
                tokio::spawn(outbound::serve(worker, pod, stream, client));
            }
            listener::HBONE_V4 | listener::HBONE_V6 => {
                tokio::spawn(inbound::serve(worker, pod, stream, client));
            }
            _ => {
                tokio::spawn(passthrough::serve(worker, pod, stream, client));
            }
        }
    }
}
