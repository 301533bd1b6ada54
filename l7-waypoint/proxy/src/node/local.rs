//! The last step on the destination's node: authorization, then the hop to the application.
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use l7_authz::l4::Decision;
use strata_handoff::{ProxyMessage, Refused};
use tokio::net::TcpStream;
use xds_model::wds::{Mesh, Service, Workload};

use super::live::{Registered, Subject, denial};
use super::pods::Pod;
use super::{CONNECT_TIMEOUT, Shared};
use crate::sockets;
use crate::telemetry::Failure;

/// Why the application is not reached.
#[derive(Debug)]
pub(crate) enum Refusal {
    Denied(Decision),
    /// The target port is one of our own.
    OwnPort(u16),
    Connect(std::io::Error),
}

impl Refusal {
    /// As metrics, logs and events say it.
    pub(crate) fn failure(&self, subject: &Subject) -> Failure {
        match self {
            Refusal::Denied(decision) => denial(decision, subject.identity.as_ref()),
            Refusal::OwnPort(port) => Failure::connect(format_args!("port {port} is the proxy's own")),
            Refusal::Connect(error) => {
                Failure::connect(format_args!("application at {}: {error}", subject.destination))
            }
        }
    }
}

/// Authorizes `subject` and connects to the application of `pod` as `client`. The connection counts as live
/// from before it is opened, so that no policy change slips through in between.
pub(crate) async fn open(
    shared: &Arc<Shared>,
    pod: &Pod,
    subject: &Subject,
    client: SocketAddr,
) -> Result<(TcpStream, Registered), Refusal> {
    if sockets::OWN_PORTS.contains(&subject.destination.port()) {
        return Err(Refusal::OwnPort(subject.destination.port()));
    }
    let registered = match Registered::new(shared, subject.clone()) {
        Ok(registered) => registered,
        Err(decision) => {
            tell_agent(shared, subject, client, &decision);
            return Err(Refusal::Denied(decision));
        }
    };
    let app =
        pod.sockets.connect_as(client.ip(), subject.destination, CONNECT_TIMEOUT).await.map_err(Refusal::Connect)?;
    // Failing to say so only makes small messages slower.
    let _ = app.set_nodelay(true);
    Ok((app, registered))
}

fn tell_agent(shared: &Shared, subject: &Subject, client: SocketAddr, decision: &Decision) {
    let failure = denial(decision, subject.identity.as_ref());
    let refused = Refused {
        src: subject.source_ip.to_canonical(),
        src_port: client.port(),
        dst: subject.destination.ip(),
        dst_port: subject.destination.port(),
        policy: failure.policy.as_deref().unwrap_or_default().to_owned(),
        reason: failure.error,
    };
    if shared.agent.try_send(ProxyMessage::Refused(refused)).is_err() {
        tracing::debug!("refusal not reported to the agent: its queue is full, or there is none");
    }
}

/// The service a connection to a workload's port was most likely meant for: the first whose port leads there.
pub(crate) fn service_behind(mesh: &Mesh, workload: &Workload, target_port: u16) -> Option<Arc<Service>> {
    workload.services.iter().find_map(|(key, overrides)| {
        let service = mesh.service(key)?;
        let leads = overrides.iter().chain(&service.ports).any(|port| port.target_port == target_port);
        leads.then(|| service.clone())
    })
}

/// The workload at a peer's address, if it is the one the peer proved to be.
pub(crate) fn workload_of_peer(
    mesh: &Mesh,
    ip: IpAddr,
    identity: Option<&xds_model::spiffe::SpiffeId>,
) -> Option<Arc<Workload>> {
    let workload = mesh.workload_by_ip(ip)?;
    identity.is_none_or(|identity| workload.identity == *identity).then(|| workload.clone())
}
