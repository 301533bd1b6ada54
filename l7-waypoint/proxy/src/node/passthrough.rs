//! Plaintext to a pod of this node: the same authorization, with nobody's identity.
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use strata_runtime::drain;
use tokio::net::TcpStream;
use xds_model::wds::unmapped;

use super::Worker;
use super::live::Subject;
use super::local;
use super::pods::Pod;
use crate::copy;
use crate::sockets;
use crate::telemetry::{Failure, Report, Reporter, Security};

/// One captured plaintext connection to `pod`.
pub(crate) async fn serve(
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    mut client: TcpStream,
    client_addr: SocketAddr,
    mut watch: drain::Watch,
) {
    let shared = worker.shared.clone();
    let started = Instant::now();
    let client_addr = unmapped(client_addr);
    let destination = match pod.sockets.original_destination(&client) {
        Ok(addr) => addr,
        Err(error) => {
            tracing::warn!(pod = pod.info.uid, %error, "captured connection without a destination");
            return sockets::reset(client);
        }
    };
    let _ = client.set_nodelay(true); // see local::open
    let mut report = Report {
        reporter: Reporter::Destination,
        source: None,
        source_identity: None,
        destination: None,
        destination_identity: Some(pod.identity.clone()),
        service: None,
        security: Security::Unknown,
        src: client_addr,
        dst: destination,
        hbone: None,
    };
    // Rules that redirect do so for whatever comes to the pod, also for what it would only forward.
    let Some(workload) = shared.workload_at(&pod, destination.ip()).await else {
        let failure =
            Failure::connect(format_args!("the control plane knows no workload of this pod at {}", destination.ip()));
        shared.telemetry.failed(&report, &failure, started);
        return sockets::reset(client);
    };
    {
        let mesh = shared.mesh.load();
        report.source = local::workload_of_peer(&mesh, client_addr.ip(), None);
        report.service = local::service_behind(&mesh, &workload, destination.port());
        report.destination = Some(workload.clone());
    }
    let subject =
        Subject { destination_uid: workload.uid.clone(), source_ip: client_addr.ip(), identity: None, destination };
    let (mut app, registered) = match local::open(&shared, &pod, &subject, client_addr).await {
        Ok(open) => open,
        Err(refusal) => {
            shared.telemetry.failed(&report, &refusal.failure(&subject), started);
            return sockets::reset(client);
        }
    };
    let open = shared.telemetry.opened(report, started);
    let outcome = tokio::select! {
        outcome = copy::tcp_and_tcp(&mut client, &mut app, open.carried()) => outcome.map_err(|error| Failure::new("-", error)),
        denied = registered.denied() => Err(denied),
        () = open.carried().rest(&mut watch) => Ok(()),
    };
    if outcome.is_err() {
        sockets::reset(client);
        sockets::reset(app);
    }
    open.close(outcome);
}
