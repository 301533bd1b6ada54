//! istio-cni at the other end of ztunnel's socket: its pods in, an answer to each of its messages out.
//!
//! It waits 5 s for an answer and takes what comes without being asked for a fault (cni/pkg/nodeagent of istio/istio), so
//! nothing here waits for anything but the kernel, and nothing is sent but answers.
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use prost::Message;
use strata_handoff::{HandoffError, PodInfo, SeqPacket};
use xds_proto::istio::zds::workload_request::Payload;
use xds_proto::istio::zds::{
    Ack, AddWorkload, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response,
};

use super::enrolment::{Enrolment, PodSource};
use crate::netns::Netns;

/// Between attempts at pods that could not be served.
const RETRY: Duration = Duration::from_secs(3);
/// istio-cni reads no more than 1024 bytes of an answer.
const MAX_ERROR: usize = 800;

/// istio-cni.
pub(crate) struct IstioCni {
    /// By which istiod names the workloads of this cluster.
    cluster_id: String,
    node_name: String,
    /// Pods that could not be served, by their uids: tried again until they can, or are gone.
    failed: BTreeMap<String, (PodInfo, Netns)>,
}

/// Why a message has no effect.
#[derive(Debug)]
enum Fault {
    /// The pod cannot be served now. istio-cni is told; it may go on.
    Pod(String),
    /// It does not speak as agreed: the connection ends.
    Protocol(String),
}

impl PodSource for IstioCni {
    const NAME: &'static str = "istio-cni";

    async fn converse(&mut self, socket: SeqPacket, pods: &mut Enrolment) -> String {
        // All its pods come anew.
        self.failed.clear();
        match self.serve(&socket, pods).await {
            Ok(()) => HandoffError::Closed.to_string(),
            Err(error) => error,
        }
    }
}

impl IstioCni {
    pub(crate) fn new(cluster_id: &str, node_name: &str) -> IstioCni {
        IstioCni { cluster_id: cluster_id.to_owned(), node_name: node_name.to_owned(), failed: BTreeMap::new() }
    }

    async fn serve(&mut self, socket: &SeqPacket, pods: &mut Enrolment) -> Result<(), String> {
        let hello = ZdsHello { version: Version::V1.into() };
        socket.send(&hello.encode_to_vec(), &[]).await.map_err(|error| error.to_string())?;
        let mut retry = tokio::time::interval_at(tokio::time::Instant::now() + RETRY, RETRY);
        retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let received = tokio::select! {
                received = socket.recv() => received,
                _ = retry.tick() => {
                    self.retry(pods).await;
                    continue;
                }
            };
            let outcome = match received {
                Ok((message, descriptors)) => match read(&message) {
                    Ok(payload) => self.act(payload, descriptors, pods).await,
                    Err(error) => Err(Fault::Protocol(error)),
                },
                Err(HandoffError::Closed) => return Ok(()),
                Err(error) => Err(Fault::Protocol(error.to_string())),
            };
            let (error, ends) = match outcome {
                Ok(()) => (String::new(), false),
                Err(Fault::Pod(error)) => (error, false),
                Err(Fault::Protocol(error)) => (error, true),
            };
            let answered = acknowledge(socket, &error).await;
            if ends {
                return Err(error);
            }
            answered.map_err(|error| error.to_string())?;
        }
    }

    async fn act(
        &mut self,
        payload: Payload,
        mut descriptors: Vec<OwnedFd>,
        pods: &mut Enrolment,
    ) -> Result<(), Fault> {
        let descriptor = descriptors.pop();
        let wanted = usize::from(matches!(payload, Payload::Add(_)));
        let came = descriptors.len() + usize::from(descriptor.is_some());
        if came != wanted {
            return Err(Fault::Protocol(format!("{}: {came} descriptors came along, not {wanted}", name(&payload))));
        }
        match (payload, descriptor) {
            (Payload::Add(add), Some(descriptor)) => self.add(add, descriptor, pods).await,
            (Payload::Keep(keep), _) if pods.in_snapshot() => {
                let uid = given("KeepWorkload.uid", keep.uid)?;
                if pods.shared.pods.by_key(&uid).is_none() {
                    tracing::warn!(
                        uid,
                        "istio-cni keeps a pod whose namespace neither of us has: not served until it comes"
                    );
                }
                pods.confirm(&uid);
                Ok(())
            }
            (Payload::SnapshotSent(_), _) if pods.in_snapshot() => {
                tracing::info!("istio-cni has named all pods");
                pods.snapshot_complete();
                Ok(())
            }
            (Payload::Del(del), _) => {
                let uid = given("DelWorkload.uid", del.uid)?;
                self.failed.remove(&uid);
                pods.remove(&uid);
                Ok(())
            }
            (other, _) => Err(Fault::Protocol(format!("{} after SnapshotSent", name(&other)))),
        }
    }

    async fn add(&mut self, add: AddWorkload, descriptor: OwnedFd, pods: &mut Enrolment) -> Result<(), Fault> {
        let uid = given("AddWorkload.uid", add.uid)?;
        let info = add
            .workload_info
            .ok_or_else(|| Fault::Protocol(format!("AddWorkload.workload_info of pod {uid} is missing")))?;
        let namespace = given("AddWorkload.workload_info.namespace", info.namespace)?;
        let name = given("AddWorkload.workload_info.name", info.name)?;
        let info = PodInfo {
            uid: format!("{}//Pod/{namespace}/{name}", self.cluster_id),
            service_account: given("AddWorkload.workload_info.service_account", info.service_account)?,
            namespace,
            name,
            node: self.node_name.clone(),
            ips: Vec::new(),
            pod_index: 0,
        };
        let netns = pods.namespace(descriptor);
        self.failed.remove(&uid);
        let Err(error) = pods.add(&uid, &info, netns.clone()).await else { return Ok(()) };
        tracing::error!(pod = info.uid, uid, error, "pod cannot be served, trying on");
        self.failed.insert(uid, (info, netns));
        Err(Fault::Pod(error))
    }

    async fn retry(&mut self, pods: &mut Enrolment) {
        let mut still = BTreeMap::new();
        for (uid, (info, netns)) in std::mem::take(&mut self.failed) {
            if let Err(error) = pods.add(&uid, &info, netns.clone()).await {
                tracing::warn!(pod = info.uid, uid, error, "pod still cannot be served");
                still.insert(uid, (info, netns));
            }
        }
        self.failed = still;
    }
}

fn read(message: &[u8]) -> Result<Payload, String> {
    let request = WorkloadRequest::decode(message).map_err(|error| format!("WorkloadRequest: {error}"))?;
    request
        .payload
        .ok_or_else(|| "WorkloadRequest.payload is missing, or of a kind this proxy does not know".to_owned())
}

fn name(payload: &Payload) -> &'static str {
    match payload {
        Payload::Add(_) => "AddWorkload",
        Payload::Keep(_) => "KeepWorkload",
        Payload::Del(_) => "DelWorkload",
        Payload::SnapshotSent(_) => "SnapshotSent",
    }
}

fn given(field: &str, value: String) -> Result<String, Fault> {
    if value.is_empty() { Err(Fault::Protocol(format!("{field} is empty"))) } else { Ok(value) }
}

async fn acknowledge(socket: &SeqPacket, error: &str) -> Result<(), HandoffError> {
    let error = error[..error.floor_char_boundary(MAX_ERROR)].to_owned();
    let response = WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error })) };
    socket.send(&response.encode_to_vec(), &[]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_named() {
        // DelWorkload with a uid that is no UTF-8: fields 2, then 2, of kind bytes.
        let error = read(&[0x12, 0x03, 0x12, 0x01, 0xff]).unwrap_err();
        assert!(error.contains("DelWorkload.uid"), "{error}");
        // A payload of tomorrow: field 9.
        assert!(read(&[0x4a, 0x00]).unwrap_err().contains("WorkloadRequest.payload"));
        let del = read(&[0x12, 0x03, 0x12, 0x01, b'x']).unwrap();
        assert_eq!(name(&del), "DelWorkload");
        assert!(
            matches!(given("DelWorkload.uid", String::new()), Err(Fault::Protocol(error)) if error.contains("DelWorkload.uid"))
        );
    }
}
