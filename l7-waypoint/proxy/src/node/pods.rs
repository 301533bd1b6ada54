//! The enrolled pods of this node.
use std::collections::HashMap;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use strata_handoff::PodInfo;
use tokio_util::sync::CancellationToken;
use xds_model::spiffe::SpiffeId;
use xds_model::wds::Workload;

use crate::sockets::PodSockets;

/// A pod whose connections this proxy carries.
#[derive(Debug)]
pub(crate) struct Pod {
    /// What whoever told us of the pod calls it. istio-cni's is Kubernetes' uid: a pod and its successor of the same
    /// name are two.
    pub key: String,
    pub info: PodInfo,
    pub identity: SpiffeId,
    pub sockets: PodSockets,
    /// Cancelled when the pod's listeners shall close.
    pub listening: CancellationToken,
    /// Cancelled when its open connections shall end.
    pub gone: CancellationToken,
    /// One of each kind, kept to be handed out again when the agent comes back. Emptied with `listening`.
    listeners: Mutex<Vec<(u32, TcpListener)>>,
}

impl Pod {
    pub(crate) fn new(key: String, info: PodInfo, identity: SpiffeId, sockets: PodSockets) -> Pod {
        let (listening, gone) = (CancellationToken::new(), CancellationToken::new());
        Pod { key, info, identity, sockets, listening, gone, listeners: Mutex::default() }
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

    /// Serves a connection of the pod, until the pod's connections shall end.
    pub(crate) fn spawn(self: &Arc<Pod>, connection: impl Future<Output = ()> + Send + 'static) {
        let pod = self.clone();
        tokio::spawn(async move { pod.gone.run_until_cancelled(connection).await });
    }

    /// Closes the pod's listeners.
    pub(crate) fn stop_listening(&self) {
        self.listening.cancel();
        self.listeners.lock().clear();
    }

    /// Whether `ip` is one of the addresses our agent gave the pod; istio-cni tells none.
    pub(crate) fn owns(&self, ip: IpAddr) -> bool {
        self.info.ips.contains(&ip.to_canonical())
    }

    /// The pod's addresses: by our agent, who gave them, or by the control plane. What its namespace says is no proof,
    /// since whoever is root in there can add some.
    pub(crate) fn addresses<'a>(&'a self, workload: &'a Workload) -> &'a [IpAddr] {
        if self.info.ips.is_empty() { &workload.addresses } else { &self.info.ips }
    }

    /// Whether `ip` is one of [`Pod::addresses`].
    pub(crate) fn is_at(&self, ip: IpAddr, workload: &Workload) -> bool {
        self.addresses(workload).contains(&ip.to_canonical())
    }
}

#[derive(Default, Clone)]
struct Table {
    by_key: HashMap<String, Arc<Pod>>,
    by_ip: HashMap<IpAddr, Arc<Pod>>,
}

/// Read by every connection, written by the task that follows whoever knows the pods.
#[derive(Default)]
pub(crate) struct Pods {
    table: ArcSwap<Table>,
}

impl Pods {
    pub(crate) fn by_key(&self, key: &str) -> Option<Arc<Pod>> {
        self.table.load().by_key.get(key).cloned()
    }

    pub(crate) fn by_ip(&self, ip: IpAddr) -> Option<Arc<Pod>> {
        self.table.load().by_ip.get(&ip.to_canonical()).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Pod>> {
        self.table.load().by_key.values().cloned().collect()
    }

    /// Whether another pod still uses the identity.
    pub(crate) fn uses(&self, identity: &SpiffeId) -> bool {
        self.table.load().by_key.values().any(|pod| pod.identity == *identity)
    }

    pub(crate) fn insert(&self, pod: Arc<Pod>) {
        self.change(|table| {
            for ip in &pod.info.ips {
                table.by_ip.insert(ip.to_canonical(), pod.clone());
            }
            table.by_key.insert(pod.key.clone(), pod.clone());
        });
    }

    /// Takes the pod out. Its connections go on; its listeners are the caller's to close.
    pub(crate) fn remove(&self, key: &str) -> Option<Arc<Pod>> {
        let pod = self.by_key(key)?;
        self.change(|table| {
            table.by_key.remove(key);
            table.by_ip.retain(|_, other| other.key != key);
        });
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
