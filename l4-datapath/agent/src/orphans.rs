//! Pods that run and that the agent never added: they started under an earlier installation, or before the first one.
//!
//! Two things tell whose device a pod's is. The device's alias (`strata CONTAINER/IFNAME POD-UID`), which every pod's
//! device gets and which goes with the pod; and, for pods of another CNI, what the runtime's CNI library keeps of every
//! ADD (libcni's results folder). A new agent finds the pods that its registry does not name, holds their addresses
//! back, and takes them over when their objects are known.
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use compat_objects::HasMeta as _;
use compat_objects::core::Pod as PodObject;
use l4_cni::protocol::{AttachmentId, PodName};
use l4_loader::PodAttach;
use l4_netns::{Link, MAX_ALIAS, Netlink};

use crate::agent::{Agent, Pod, has_vanished};
use crate::arrivals::is_the_pod;
use crate::cni_results;
use crate::ipam::Lease;
use crate::state::PodState;

/// Where container runtimes bind the namespaces of pods.
const NAMESPACES: &str = "/run/netns";
const PREFIX: &str = "strata ";

/// A pod's namespace and where it is bound.
type Netns = (PathBuf, OwnedFd);

/// What is written on a device; None if it would not fit, which no runtime's ids come near.
fn alias(attachment: &AttachmentId, pod: &PodName) -> Option<String> {
    let text = format!("{PREFIX}{attachment} {}", pod.uid);
    (text.len() <= MAX_ALIAS).then_some(text)
}

fn parse(alias: &str) -> Option<(AttachmentId, &str)> {
    let (attachment, uid) = alias.strip_prefix(PREFIX)?.rsplit_once(' ')?;
    let (container_id, ifname) = attachment.rsplit_once('/')?;
    Some((AttachmentId { container_id: container_id.into(), ifname: ifname.into() }, uid))
}

impl Agent {
    /// Writes on a pod's device whose it is.
    pub(crate) async fn mark(&self, state: &PodState) {
        let Some(alias) = alias(&state.attachment, &state.pod) else { return };
        if let Err(error) = self.netlink.set_alias(state.ifindex, &alias).await {
            tracing::warn!(attachment = %state.attachment, %error, "a later installation will not know this pod");
        }
    }

    /// Looks for running pods that the registry does not name. Their addresses are taken from now on.
    pub(crate) async fn find_orphans(&mut self) {
        let links = match self.netlink.links().await {
            Ok(links) => links,
            Err(error) => {
                tracing::error!(%error, "pods that ran before cannot be looked for: devices cannot be listed");
                return;
            }
        };
        for link in &links {
            let Some((attachment, uid)) = link.alias.as_deref().and_then(parse) else { continue };
            let netns = if self.knows(&attachment) { continue } else { self.netns_behind(link).await };
            self.hold(&attachment, uid, netns, link).await;
        }
        let remembered = self.cni_results_dir.as_deref().map(cni_results::read).unwrap_or_default();
        for result in remembered {
            if self.knows(&result.attachment) {
                continue;
            }
            // What is remembered of a pod that is gone, and of pods without a device on the node, is of no use here.
            let Ok(netns) = l4_netns::open(&result.netns) else { continue };
            let Ok(Some(inner)) = l4_netns::pod_link(netns.as_fd(), &result.attachment.ifname).await else { continue };
            let host = links.iter().find(|link| link.index == inner.peer_index && link.peer_index == inner.index);
            if let Some(host) = host {
                self.hold(&result.attachment, &result.uid, Ok((result.netns, netns)), host).await;
            }
        }
    }

    fn knows(&self, attachment: &AttachmentId) -> bool {
        self.pods.contains_key(attachment) || self.orphans.iter().any(|orphan| orphan.attachment == *attachment)
    }

    /// Holds a pod back until its object is known.
    async fn hold(&mut self, attachment: &AttachmentId, uid: &str, netns: Result<Netns, String>, host: &Link) {
        let state = match netns {
            Ok(netns) => self.orphan(attachment, uid, netns, host).await,
            Err(reason) => Err(reason),
        };
        match state {
            Ok(state) => {
                let addresses: Vec<_> = state.addresses().collect();
                tracing::info!(%attachment, device = host.name, ?addresses, "a pod that this agent did not add runs");
                self.ipam.reserve(&state.lease);
                self.orphans.push(state);
            }
            Err(reason) => {
                tracing::warn!(%attachment, device = host.name, reason, "a pod that this agent did not add cannot be taken over, restart it");
            }
        }
    }

    /// What a device and its namespace tell of a pod. Its name is not known yet.
    async fn orphan(
        &mut self,
        attachment: &AttachmentId,
        uid: &str,
        (path, netns): Netns,
        host: &Link,
    ) -> Result<PodState, String> {
        let id = l4_netns::id_of(netns.as_fd()).map_err(|error| error.to_string())?;
        let lease = lease_in(netns.as_fd(), &attachment.ifname).await.map_err(|error| error.to_string())?;
        let own_name = l4_netns::host_device_name(&format!("{}/{attachment}", self.node));
        self.registry.last_pod_index += 1;
        Ok(PodState {
            attachment: attachment.clone(),
            pod: PodName { namespace: String::new(), name: String::new(), uid: uid.to_owned() },
            netns_cookie: l4_netns::cookie_of(netns.as_fd()).map_err(|error| error.to_string())?,
            netns_id: (id.device, id.inode),
            netns: path,
            lease,
            pod_index: self.registry.last_pod_index,
            chained: host.name != own_name,
            host_device: host.name.clone(),
            ifindex: host.index,
            enrolled: false,
            service_account: None,
        })
    }

    /// The namespace of a device's other end.
    async fn netns_behind(&self, host: &Link) -> Result<Netns, String> {
        let number = host.peer_netns.ok_or("its other end is in no other namespace")?;
        let entries = std::fs::read_dir(NAMESPACES).map_err(|error| format!("{NAMESPACES}: {error}"))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            // Whatever cannot be opened is not the one.
            let Ok(netns) = l4_netns::open(&path) else { continue };
            if self.netlink.number_of(netns.as_fd()).await.is_ok_and(|found| found == Some(number)) {
                return Ok((path, netns));
            }
        }
        Err(format!("{NAMESPACES} does not have the namespace of its other end"))
    }

    /// Takes over the pods whose objects are known by now: policy first, then the programs on their devices.
    pub(crate) async fn take_over_orphans(&mut self) {
        let mut taken = Vec::new();
        for mut state in std::mem::take(&mut self.orphans) {
            let object = self.objects.pods().find(|object| is_here(object, &self.node, &state.pod.uid));
            let Some((namespace, name)) =
                object.map(|object| (object.namespace().to_owned(), object.name().to_owned()))
            else {
                self.orphans.push(state);
                continue;
            };
            let known = |pod: &Pod| (&pod.state.pod.namespace, &pod.state.pod.name) == (&namespace, &name);
            if self.pods.values().any(known) {
                // An earlier sandbox of the same pod: the runtime will say when it is gone.
                self.orphans.push(state);
                continue;
            }
            (state.pod.namespace, state.pod.name) = (namespace, name);
            match l4_netns::open(&state.netns) {
                Ok(netns) => {
                    taken.push(PodAttach { pod_index: state.pod_index, ifindex: state.ifindex });
                    tracing::info!(attachment = %state.attachment, uid = state.uid(), "running pod taken over");
                    self.pods.insert(state.attachment.clone(), Pod::new(state, Arc::new(netns)));
                }
                Err(error) => {
                    tracing::info!(attachment = %state.attachment, %error, "a pod that was to be taken over is gone");
                    self.ipam.release(&state.lease);
                }
            }
        }
        if taken.is_empty() {
            return;
        }
        self.save_or_log();
        if let Err(error) = self.reconcile() {
            tracing::error!(%error, "objects are not in force, the last good ones stay");
        }
        for attach in taken {
            if let Err(error) = self.datapath.attach_pod(&attach) {
                tracing::error!(pod_index = attach.pod_index, %error, "programs could not be attached");
            }
        }
    }

    /// The runtime is done with an attachment (`is_gone`), or its namespace went by itself.
    pub(crate) async fn forget_orphans(&mut self, is_gone: impl Fn(&AttachmentId) -> bool) {
        for state in std::mem::take(&mut self.orphans) {
            if !is_gone(&state.attachment) && !has_vanished(&state) {
                self.orphans.push(state);
                continue;
            }
            tracing::info!(attachment = %state.attachment, "a pod that was to be taken over is removed");
            if !state.chained
                && let Err(error) = l4_netns::unwire(&self.netlink, &state.host_device).await
            {
                tracing::error!(device = state.host_device, %error, "device could not be removed");
            }
            self.ipam.release(&state.lease);
        }
    }
}

fn is_here(pod: &PodObject, node: &str, uid: &str) -> bool {
    let spec_node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    spec_node == Some(node) && !uid.is_empty() && is_the_pod(pod, uid)
}

/// The addresses of a pod's device.
async fn lease_in(netns: BorrowedFd<'_>, ifname: &str) -> Result<Lease, l4_netns::Error> {
    let inside = Netlink::open_in(netns)?;
    let link = inside.link(ifname).await?;
    let mut lease = Lease { v4: None, v6: None };
    for address in inside.addresses(link.index).await? {
        match address {
            IpAddr::V4(v4) => lease.v4 = lease.v4.or(Some(v4)),
            IpAddr::V6(v6) if v6.is_unicast_link_local() => {}
            IpAddr::V6(v6) => lease.v6 = lease.v6.or(Some(v6)),
        }
    }
    Ok(lease)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_names_the_attachment_and_the_pod() {
        let attachment = AttachmentId { container_id: "0a1b".into(), ifname: "eth0".into() };
        let mut pod = PodName { namespace: "shop".into(), name: "a".into(), uid: "c0ffee".into() };
        let text = alias(&attachment, &pod).unwrap();
        assert_eq!(text, "strata 0a1b/eth0 c0ffee");
        assert_eq!(parse(&text), Some((attachment.clone(), "c0ffee")));
        pod.uid.clear();
        assert_eq!(parse(&alias(&attachment, &pod).unwrap()), Some((attachment.clone(), "")));
        assert_eq!(parse("uplink of rack 4"), None);
        pod.uid = "u".repeat(300);
        assert_eq!(alias(&attachment, &pod), None);
    }
}
