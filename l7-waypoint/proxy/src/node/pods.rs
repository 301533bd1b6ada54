//! The enrolled pods of this node.
use std::collections::HashMap;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use strata_handoff::PodInfo;
use tokio_util::sync::CancellationToken;
use xds_model::spiffe::SpiffeId;

use crate::netns::Netns;

/// A pod whose connections this proxy carries.
#[derive(Debug)]
pub(crate) struct Pod {
    pub info: PodInfo,
    pub identity: SpiffeId,
    pub netns: Netns,
    /// Cancelled when the pod's listeners shall close.
    pub listening: CancellationToken,
    /// One of each kind, kept to be handed out again when the agent comes back. Emptied with `listening`.
    listeners: Mutex<Vec<(u32, TcpListener)>>,
}

impl Pod {
    pub(crate) fn new(info: PodInfo, identity: SpiffeId, netns: Netns) -> Pod {
        Pod { info, identity, netns, listening: CancellationToken::new(), listeners: Mutex::default() }
    }

    /// Keeps `listeners` to be handed out again.
    pub(crate) fn keep(&self, listeners: Vec<(u32, TcpListener)>) {
        *self.listeners.lock() = listeners;
    }

    /// Descriptors of the listeners in use.
    ///
    /// # Errors
    /// If descriptors run out.
    pub(crate) fn listeners(&self) -> std::io::Result<Vec<(u32, TcpListener)>> {
        self.listeners.lock().iter().map(|(kind, socket)| Ok((*kind, socket.try_clone()?))).collect()
    }

    fn stop_listening(&self) {
        self.listening.cancel();
        self.listeners.lock().clear();
    }

    /// Whether `ip` is one of the pod's addresses.
    pub(crate) fn owns(&self, ip: IpAddr) -> bool {
        self.info.ips.contains(&ip.to_canonical())
    }
}

#[derive(Default, Clone)]
struct Table {
    by_uid: HashMap<String, Arc<Pod>>,
    by_ip: HashMap<IpAddr, Arc<Pod>>,
}

/// Read by every connection, written by the handoff task.
#[derive(Default)]
pub(crate) struct Pods {
    table: ArcSwap<Table>,
}

impl Pods {
    pub(crate) fn by_uid(&self, uid: &str) -> Option<Arc<Pod>> {
        self.table.load().by_uid.get(uid).cloned()
    }

    pub(crate) fn by_ip(&self, ip: IpAddr) -> Option<Arc<Pod>> {
        self.table.load().by_ip.get(&ip.to_canonical()).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Pod>> {
        self.table.load().by_uid.values().cloned().collect()
    }

    /// Whether another pod still uses the identity.
    pub(crate) fn uses(&self, identity: &SpiffeId) -> bool {
        self.table.load().by_uid.values().any(|pod| pod.identity == *identity)
    }

    pub(crate) fn insert(&self, pod: Arc<Pod>) {
        self.change(|table| {
            for ip in &pod.info.ips {
                table.by_ip.insert(ip.to_canonical(), pod.clone());
            }
            table.by_uid.insert(pod.info.uid.clone(), pod.clone());
        });
    }

    /// Takes the pod out; its listeners close, its connections go on.
    pub(crate) fn remove(&self, uid: &str) -> Option<Arc<Pod>> {
        let pod = self.by_uid(uid)?;
        self.change(|table| {
            table.by_uid.remove(uid);
            table.by_ip.retain(|_, other| other.info.uid != uid);
        });
        pod.stop_listening();
        Some(pod)
    }

    /// Closes every listener: the process is going away.
    pub(crate) fn stop_listening(&self) {
        for pod in self.all() {
            pod.stop_listening();
        }
    }

    fn change(&self, edit: impl Fn(&mut Table)) {
        self.table.rcu(|table| {
            let mut next = Table::clone(table);
            edit(&mut next);
            next
        });
    }
}
