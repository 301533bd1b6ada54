//! The agent's pods in, our listeners, short-cuts and refusals out.
use std::os::fd::{AsFd, OwnedFd};

use strata_handoff::{AgentMessage, Connection, HandoffError, ProxyEnd, ProxyMessage, SeqPacket, VERSION};
use tokio::sync::mpsc;

use super::enrolment::{Enrolment, PodSource};

/// Our agent, at the other end of `handoff.sock`.
pub(crate) struct Agent {
    /// What this node's connections have to say to it.
    pub messages: mpsc::Receiver<ProxyMessage>,
}

impl PodSource for Agent {
    const NAME: &'static str = "the agent";

    async fn converse(&mut self, socket: SeqPacket, pods: &mut Enrolment) -> String {
        self.serve(&Connection::over(socket), pods).await.to_string()
    }
}

impl Agent {
    async fn serve(&mut self, connection: &ProxyEnd, pods: &mut Enrolment) -> HandoffError {
        let resolvers = pods.shared.dns.stands_for();
        let hello = ProxyMessage::Hello { version: VERSION, pid: std::process::id(), resolvers };
        if let Err(error) = connection.send(&hello, &[]).await {
            return error;
        }
        // The agent dropped our grants when the last connection ended; what waits in the queue is older than that.
        pods.shared.grants.forget_all();
        while self.messages.try_recv().is_ok() {}
        loop {
            let outcome = tokio::select! {
                received = connection.recv() => match received {
                    Ok((message, descriptors)) => receive(connection, message, descriptors, pods).await,
                    Err(error) if error.is_recoverable() => {
                        tracing::warn!(%error, "message from the agent skipped");
                        Ok(())
                    }
                    Err(error) => Err(error),
                },
                message = self.messages.recv() => match message {
                    Some(message) => self.send(connection, message, pods).await,
                    None => return HandoffError::Closed,
                },
            };
            if let Err(error) = outcome {
                return error;
            }
        }
    }

    async fn send(
        &mut self,
        connection: &ProxyEnd,
        message: ProxyMessage,
        pods: &Enrolment,
    ) -> Result<(), HandoffError> {
        if pods.shared.grants.take_overflow() {
            // A revocation was lost: all grants go, also those that still wait in the queue.
            while self.messages.try_recv().is_ok() {}
            return connection.send(&ProxyMessage::RevokeAll, &[]).await;
        }
        connection.send(&message, &[]).await
    }
}

async fn receive(
    connection: &ProxyEnd,
    message: AgentMessage,
    mut descriptors: Vec<OwnedFd>,
    pods: &mut Enrolment,
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
            let uid = pod.uid.clone();
            let listeners = match descriptors.pop() {
                Some(descriptor) => {
                    let netns = pods.namespace(descriptor);
                    pods.add(&uid, &pod, netns).await.and_then(|pod| pod.listeners().map_err(|error| error.to_string()))
                }
                None => Err("no descriptor of the network namespace came along".to_owned()),
            };
            match listeners {
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
        AgentMessage::PodRemoved { uid } => pods.remove(&uid),
        AgentMessage::SnapshotSent => pods.snapshot_complete(),
    }
    Ok(())
}
