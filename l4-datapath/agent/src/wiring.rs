//! CNI's commands on the agent's side.
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use l4_cni::code;
use l4_cni::protocol::{Add, Added, Address, AttachmentId, Check, Device, Failure, Request, Response};
use l4_loader::PodAttach;
use l4_netns::{Link, NetnsId, PodWiring, Wired};
use strata_abi::{Addr, PodRecord, identity, pod_flag};
use tokio::sync::oneshot;

use crate::agent::{Agent, Pod, Waiting};
use crate::ipam::{IpamError, Lease};
use crate::state::PodState;
use crate::tables::LocalRecord;

/// MTU of pods' devices where no uplink was named.
const DEFAULT_MTU: u32 = 1500;
/// How long an ADD of a pod that belongs into the mesh waits for its capture.
const CAPTURE_TIMEOUT: Duration = Duration::from_secs(10);

impl Agent {
    pub(crate) async fn cni(&mut self, request: Request, reply: oneshot::Sender<Response>) {
        let response = match request {
            Request::Add(add) => return self.add_when_known(add, reply).await,
            Request::Del { attachment } => {
                self.forget_arrival(&attachment);
                self.del(&attachment).await;
                Ok(())
            }
            Request::Check(check) => self.check(&check).await,
            Request::Gc { valid } => {
                self.gc(&valid).await;
                Ok(())
            }
            Request::Status => self.ready(),
        };
        // A plugin that gave up gets no answer; the runtime will call again.
        let _plugin = reply.send(response.map_or_else(Response::Failed, |()| Response::Done));
    }

    pub(crate) async fn answer_add(&mut self, add: Add, reply: oneshot::Sender<Response>) {
        let attachment = add.attachment.clone();
        let response = match self.add(&add).await {
            Ok(added) => Response::Added(added),
            Err(failure) => {
                tracing::warn!(%attachment, pod = %format_args!("{}/{}", add.pod.namespace, add.pod.name), error = %failure, "CNI ADD failed");
                let _plugin = reply.send(Response::Failed(failure));
                return;
            }
        };
        match self.pods.get_mut(&attachment) {
            // Capture first: the pod must not send a byte around the mesh.
            Some(pod) if pod.wanted && !pod.phase.is_enrolled() => {
                pod.waiting = Some(Waiting { reply, response, until: Instant::now() + CAPTURE_TIMEOUT });
            }
            _ => {
                let _plugin = reply.send(response);
            }
        }
    }

    /// Whether ADD would succeed.
    pub(crate) fn ready(&self) -> Result<(), Failure> {
        let unavailable = |reason: String| Failure::new(code::NOT_AVAILABLE, "not ready for pods").because(reason);
        if !self.ipam.has_range() {
            return Err(unavailable(format!("Node {} is not known or has no spec.podCIDRs", self.node)));
        }
        match &self.problem {
            Some(problem) => Err(unavailable(problem.clone())),
            None => Ok(()),
        }
    }

    async fn add(&mut self, add: &Add) -> Result<Added, Failure> {
        let (netns, id) = self.open_netns(&add.netns)?;
        if let Some(existing) = self.existing(add, id).await? {
            return Ok(existing);
        }
        let lease = match &add.chained {
            Some(addresses) => chained_lease(addresses)?,
            None => self.ipam.allocate().map_err(|error| match error {
                IpamError::NoRange => Failure::new(code::TRY_AGAIN_LATER, "no range of pod addresses yet")
                    .because(format!("Node {} is not known or has no spec.podCIDRs", self.node)),
                IpamError::Exhausted(_) => Failure::new(code::NO_ADDRESS, "no free address").because(error),
            })?,
        };
        self.registry.last_pod_index += 1;
        let key = format!("{}/{}", self.node, add.attachment);
        let state = PodState {
            attachment: add.attachment.clone(),
            pod: add.pod.clone(),
            netns: add.netns.clone(),
            netns_id: (id.device, id.inode),
            netns_cookie: l4_netns::cookie_of(netns.as_fd()).map_err(network)?,
            lease,
            pod_index: self.registry.last_pod_index,
            host_device: l4_netns::host_device_name(&key),
            ifindex: 0,
            chained: add.chained.is_some(),
            enrolled: false,
            service_account: None,
        };
        self.ipam.reserve(&state.lease);
        self.pods.insert(add.attachment.clone(), Pod::new(state, Arc::new(netns)));
        // Stored before anything is made: an agent that dies in between finds what to take back.
        match self.finish_add(&add.attachment).await {
            Ok(added) => Ok(added),
            Err(failure) => {
                self.remove_pod(&add.attachment).await;
                self.reconcile_and_report().await;
                Err(failure)
            }
        }
    }

    /// Device, policy, guard, and only then packets.
    async fn finish_add(&mut self, attachment: &AttachmentId) -> Result<Added, Failure> {
        let stored = self.save();
        stored.map_err(|error| Failure::new(code::IO, "the pod could not be stored").because(error))?;
        let wired = self.make_device(attachment).await?;
        let Some(pod) = self.pods.get_mut(attachment) else { return Err(unknown(attachment)) };
        pod.state.ifindex = wired.host.index;
        pod.state.host_device.clone_from(&wired.host.name);
        let (state, netns, chained) = (pod.state.clone(), pod.netns.clone(), pod.state.chained);
        self.mark(&state).await;
        self.save().map_err(|error| Failure::new(code::IO, "the pod could not be stored").because(error))?;
        self.reconcile().map_err(|error| {
            Failure::new(code::TRY_AGAIN_LATER, "the pod's policy is not in force").because(format!("{error:#}"))
        })?;
        let attach = PodAttach { pod_index: state.pod_index, ifindex: wired.host.index };
        self.datapath.attach_pod(&attach).map_err(network)?;
        if !chained {
            let addresses: Vec<_> = state.addresses().collect();
            l4_netns::activate(&self.netlink, netns.as_fd(), &wired, &addresses).await.map_err(network)?;
        }
        tracing::info!(%attachment, uid = state.uid(), addresses = ?state.addresses().collect::<Vec<_>>(), "pod added");
        self.reconcile_and_report().await;
        Ok(added(&state.lease, &wired))
    }

    async fn make_device(&mut self, attachment: &AttachmentId) -> Result<Wired, Failure> {
        let Some(pod) = self.pods.get(attachment) else { return Err(unknown(attachment)) };
        if pod.state.chained {
            return self.find_chained(&pod.state, pod.netns.as_fd()).await;
        }
        let mtu = self.uplink.map_or(DEFAULT_MTU, |(_, mtu)| mtu);
        l4_netns::wire(&self.netlink, &wiring(&pod.state, pod.netns.as_fd(), mtu)).await.map_err(network)
    }

    /// The device another plugin made.
    async fn find_chained(&self, state: &PodState, netns: std::os::fd::BorrowedFd<'_>) -> Result<Wired, Failure> {
        let ifname = &state.attachment.ifname;
        let inner = l4_netns::pod_link(netns, ifname).await.map_err(network)?;
        let missing = |what: &str| {
            Failure::new(code::INVALID_CONFIG, "the pod's device cannot be taken over")
                .because(format!("{ifname}: {what}"))
        };
        let inner = inner.ok_or_else(|| missing("there is no such device in the pod"))?;
        let host = match inner.peer_index {
            0 => None,
            index => self.netlink.find_link_by_index(index).await.map_err(network)?,
        };
        let host = host.ok_or_else(|| missing("it is no veth whose other end is on the node"))?;
        Ok(Wired { host, pod: inner })
    }

    fn open_netns(&self, path: &Path) -> Result<(OwnedFd, NetnsId), Failure> {
        let gone = |error: l4_netns::Error| {
            Failure::new(code::UNKNOWN_CONTAINER, "the pod's network namespace cannot be opened").because(error)
        };
        let netns = l4_netns::open(path).map_err(gone)?;
        let id = l4_netns::id_of(netns.as_fd()).map_err(gone)?;
        if id == self.own_netns {
            let reason = format!("{} is the node's own", path.display());
            return Err(
                Failure::new(code::INVALID_ENVIRONMENT, "invalid environment variable CNI_NETNS").because(reason)
            );
        }
        Ok((netns, id))
    }

    /// The result of an ADD that was done before; an error if this one contradicts it.
    async fn existing(&mut self, add: &Add, id: NetnsId) -> Result<Option<Added>, Failure> {
        let exists = |what: String| Failure::new(code::ALREADY_EXISTS, "already exists").because(what);
        let same_id = |state: &PodState| state.netns_id == (id.device, id.inode);
        if let Some(pod) = self.pods.get(&add.attachment) {
            let state = &pod.state;
            if !same_id(state) {
                let path = state.netns.display();
                return Err(exists(format!(
                    "attachment {} has the network namespace {path}; DEL it first",
                    add.attachment
                )));
            }
            if state.pod != add.pod {
                let (namespace, name) = (&state.pod.namespace, &state.pod.name);
                return Err(exists(format!("attachment {} is pod {namespace}/{name}'s; DEL it first", add.attachment)));
            }
            // An agent that died before it answered: the runtime asks again.
            let mtu = self.uplink.map_or(DEFAULT_MTU, |(_, mtu)| mtu);
            let whole = wiring(state, pod.netns.as_fd(), mtu);
            if !state.chained && l4_netns::check(&self.netlink, &whole).await.is_ok() {
                let host = self.netlink.link(&state.host_device).await.map_err(network)?;
                let inner = l4_netns::pod_link(pod.netns.as_fd(), &add.attachment.ifname).await.map_err(network)?;
                let inner = inner.ok_or_else(|| unknown(&add.attachment))?;
                return Ok(Some(added(&state.lease, &Wired { host, pod: inner })));
            }
            self.remove_pod(&add.attachment).await;
            return Ok(None);
        }
        let same_name =
            |state: &PodState| (&state.pod.namespace, &state.pod.name) == (&add.pod.namespace, &add.pod.name);
        let rival = self.pods.values().map(|pod| &pod.state).find(|state| same_id(state) || same_name(state)).cloned();
        let Some(rival) = rival else { return Ok(None) };
        if same_id(&rival) {
            let path = add.netns.display();
            return Err(exists(format!("network namespace {path} is attachment {}'s; DEL it first", rival.attachment)));
        }
        if l4_netns::open(&rival.netns).is_ok() {
            let (namespace, name) = (&add.pod.namespace, &add.pod.name);
            let path = rival.netns.display();
            let what = format!("pod {namespace}/{name} is attachment {} in {path}; DEL it first", rival.attachment);
            return Err(exists(what));
        }
        tracing::info!(attachment = %rival.attachment, "the pod's earlier sandbox is gone, it is removed");
        self.remove_pod(&rival.attachment).await;
        Ok(None)
    }

    async fn del(&mut self, attachment: &AttachmentId) {
        self.forget_orphans(|orphan| orphan == attachment).await;
        if self.remove_pod(attachment).await {
            tracing::info!(%attachment, "pod removed");
            self.reconcile_and_report().await;
        }
    }

    async fn gc(&mut self, valid: &[AttachmentId]) {
        self.forget_orphans(|orphan| !valid.contains(orphan)).await;
        let stale: Vec<AttachmentId> = self.pods.keys().filter(|id| !valid.contains(id)).cloned().collect();
        for attachment in &stale {
            tracing::info!(%attachment, "the runtime does not know the pod any more, it is removed");
            self.remove_pod(attachment).await;
        }
        if !stale.is_empty() {
            self.reconcile_and_report().await;
        }
    }

    async fn check(&mut self, check: &Check) -> Result<(), Failure> {
        let failed = |what: String| Failure::new(code::CHECK_FAILED, "the pod is not as it was made").because(what);
        let Some(pod) = self.pods.get(&check.attachment) else { return Err(unknown(&check.attachment)) };
        let (_, id) = self.open_netns(&check.netns)?;
        if pod.state.netns_id != (id.device, id.inode) {
            return Err(failed(format!("its network namespace is not {}", check.netns.display())));
        }
        if let Some(address) = check.addresses.iter().find(|address| !pod.state.addresses().any(|a| a == **address)) {
            return Err(failed(format!("{address} is not its address")));
        }
        if !pod.state.chained {
            let mtu = self.uplink.map_or(DEFAULT_MTU, |(_, mtu)| mtu);
            let whole = wiring(&pod.state, pod.netns.as_fd(), mtu);
            l4_netns::check(&self.netlink, &whole).await.map_err(|error| failed(error.to_string()))?;
        }
        let maps = self.datapath.maps();
        let record = maps.pods.get(&pod.state.netns_cookie).map_err(network)?;
        if record != Some(record_of(pod)) {
            return Err(failed("its record in the kernel's map is missing or wrong".into()));
        }
        let attached = self.datapath.attached().map_err(network)?;
        let links = attached.get(&pod.state.pod_index).copied().unwrap_or_default();
        if !links.from_pod || !links.to_pod || links.ifindex != pod.state.ifindex {
            return Err(failed("its guard is not attached".into()));
        }
        if pod.phase.is_enrolled() && !links.sk_lookup {
            return Err(failed("it is in the mesh and its capture program is not attached".into()));
        }
        Ok(())
    }

    /// Takes everything of a pod back, as far as it is there; false if there is no such pod. The caller reconciles.
    pub(crate) async fn remove_pod(&mut self, attachment: &AttachmentId) -> bool {
        let Some(pod) = self.pods.remove(attachment) else { return false };
        self.withdraw(&pod);
        let state = &pod.state;
        if !state.chained
            && let Err(error) = l4_netns::unwire(&self.netlink, &state.host_device).await
        {
            tracing::error!(%attachment, %error, "the pod's device could not be removed");
        }
        if let Err(error) = self.datapath.detach_pod(state.pod_index) {
            tracing::error!(%attachment, %error, "the pod's programs could not be detached");
        }
        if let Err(error) = self.datapath.maps().listeners.remove_pod(state.pod_index) {
            tracing::error!(%attachment, %error, "the pod's listeners could not be removed");
        }
        self.revoke_grants_of(&pod);
        if !state.chained {
            self.ipam.release(&state.lease);
        }
        self.save_or_log();
        true
    }

    /// Takes over the pods an earlier agent wired; those whose namespace or device is gone are removed.
    pub(crate) async fn adopt(&mut self) {
        let known = std::mem::take(&mut self.registry.pods);
        for state in known {
            let attachment = state.attachment.clone();
            self.ipam.reserve(&state.lease);
            match self.adoptable(&state).await {
                Ok(netns) => {
                    tracing::info!(%attachment, uid = state.uid(), enrolled = state.enrolled, "pod adopted");
                    self.mark(&state).await;
                    self.pods.insert(attachment, Pod::new(state, Arc::new(netns)));
                }
                Err(reason) => {
                    tracing::info!(%attachment, reason, "pod not adopted, its remains are removed");
                    self.clear_remains(&state).await;
                }
            }
        }
        self.find_orphans().await;
        self.save_or_log();
    }

    async fn adoptable(&self, state: &PodState) -> Result<OwnedFd, String> {
        let netns = l4_netns::open(&state.netns).map_err(|error| error.to_string())?;
        let id = l4_netns::id_of(netns.as_fd()).map_err(|error| error.to_string())?;
        if (id.device, id.inode) != state.netns_id {
            return Err(format!("{} is another namespace now", state.netns.display()));
        }
        let device = self.netlink.find_link(&state.host_device).await.map_err(|error| error.to_string())?;
        match device {
            Some(Link { index, .. }) if index == state.ifindex => Ok(netns),
            _ => Err(format!("device {} is gone or was never finished", state.host_device)),
        }
    }

    async fn clear_remains(&mut self, state: &PodState) {
        if !state.chained
            && let Err(error) = l4_netns::unwire(&self.netlink, &state.host_device).await
        {
            tracing::error!(device = state.host_device, %error, "device could not be removed");
        }
        if let Err(error) = self.datapath.detach_pod(state.pod_index) {
            tracing::error!(pod_index = state.pod_index, %error, "programs could not be detached");
        }
        if let Err(error) = self.datapath.maps().listeners.remove_pod(state.pod_index) {
            tracing::error!(pod_index = state.pod_index, %error, "listeners could not be removed");
        }
        self.ipam.release(&state.lease);
    }

    /// Puts this build's programs under the adopted pods, and takes away what belongs to no pod.
    pub(crate) fn reattach(&mut self) {
        for pod in self.pods.values() {
            let attach = PodAttach { pod_index: pod.state.pod_index, ifindex: pod.state.ifindex };
            if let Err(error) = self.datapath.attach_pod(&attach) {
                tracing::error!(attachment = %pod.state.attachment, %error, "the pod's guard could not be renewed");
            }
        }
        self.renew_captures();
        let known: Vec<u32> = self.pods.values().map(|pod| pod.state.pod_index).collect();
        match self.datapath.attached() {
            Ok(attached) => {
                for index in attached.keys().filter(|index| !known.contains(index)) {
                    tracing::info!(pod_index = index, "programs of an unknown pod are detached");
                    if let Err(error) = self.datapath.detach_pod(*index) {
                        tracing::error!(pod_index = index, %error, "programs could not be detached");
                    }
                }
            }
            Err(error) => tracing::error!(%error, "attached programs could not be listed"),
        }
    }

    /// The pods as the maps should hold them.
    pub(crate) fn records(&self) -> Vec<LocalRecord> {
        let record = |pod: &Pod| LocalRecord { record: record_of(pod), has_device: pod.state.ifindex != 0 };
        self.pods.values().map(record).collect()
    }
}

fn record_of(pod: &Pod) -> PodRecord {
    let enrolled = if pod.phase.is_enrolled() { pod_flag::ENROLLED } else { 0 };
    PodRecord {
        v4: pod.state.lease.v4.map_or(Addr::UNSPECIFIED, |v4| Addr::v4(v4.octets())),
        v6: pod.state.lease.v6.map_or(Addr::UNSPECIFIED, |v6| Addr::v6(v6.octets())),
        security_id: if pod.described { pod.security_id } else { identity::UNMANAGED },
        flags: pod.flags | enrolled,
        ifindex: pod.state.ifindex,
        pod_index: pod.state.pod_index,
        netns_cookie: pod.state.netns_cookie,
    }
}

fn wiring<'a>(state: &'a PodState, netns: std::os::fd::BorrowedFd<'a>, mtu: u32) -> PodWiring<'a> {
    PodWiring {
        netns,
        ifname: &state.attachment.ifname,
        host_device: &state.host_device,
        v4: state.lease.v4,
        v6: state.lease.v6,
        mtu,
    }
}

fn chained_lease(addresses: &[std::net::IpAddr]) -> Result<Lease, Failure> {
    use std::net::IpAddr::{V4, V6};
    let v4 = addresses.iter().find_map(|address| if let V4(v4) = address { Some(*v4) } else { None });
    let v6 = addresses.iter().find_map(|address| if let V6(v6) = address { Some(*v6) } else { None });
    if usize::from(v4.is_some()) + usize::from(v6.is_some()) != addresses.len() {
        let reason = "prevResult.ips: more than one address of a family";
        return Err(Failure::new(code::UNSUPPORTED_FIELD, "unsupported network configuration").because(reason));
    }
    Ok(Lease { v4, v6 })
}

fn added(lease: &Lease, wired: &Wired) -> Added {
    let device = |link: &Link| Device {
        name: link.name.clone(),
        mac: link.mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"),
        mtu: link.mtu,
    };
    let address = |address: std::net::IpAddr| Address { address: address.into(), gateway: l4_netns::gateway(address) };
    Added { host: device(&wired.host), pod: device(&wired.pod), addresses: lease.addresses().map(address).collect() }
}

fn network(error: impl std::fmt::Display) -> Failure {
    Failure::new(code::NETWORK, "the pod's network could not be set up").because(error)
}

fn unknown(attachment: &AttachmentId) -> Failure {
    Failure::new(code::UNKNOWN_CONTAINER, "unknown attachment").because(attachment)
}
