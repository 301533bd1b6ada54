//! Short-cuts: which pairs of this node's pods may talk straight, and the withdrawal of that leave.
//!
//! A grant bypasses the proxy, so it is given only where the proxy would do nothing but carry bytes: both pods
//! enrolled here, no waypoint in front of the port, L4 policy allows this identity. The kernel attests both
//! ends, which is what STRICT asks for.
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use strata_handoff::{ProxyMessage, ShortCut};
use tokio::sync::mpsc;
use xds_model::wds::{Mesh, MeshView};

use strata_runtime::drain;

use super::Shared;
use super::live::Subject;
use super::pods::Pod;

/// Grants in force and what they rest on.
pub(crate) struct Grants {
    enabled: bool,
    mesh: MeshView,
    agent: mpsc::Sender<ProxyMessage>,
    granted: Mutex<HashMap<ShortCut, Subject>>,
    /// A message did not fit the queue: everything is to be revoked first.
    overflow: AtomicBool,
}

impl Grants {
    pub(crate) fn new(enabled: bool, mesh: MeshView, agent: mpsc::Sender<ProxyMessage>) -> Grants {
        Grants { enabled, mesh, agent, granted: Mutex::new(HashMap::new()), overflow: AtomicBool::new(false) }
    }

    /// Considers a connection between two pods of this node that was just allowed.
    pub(crate) fn consider(&self, subject: &Subject) {
        if !self.enabled {
            return;
        }
        let short_cut = ShortCut {
            src: subject.source_ip.to_canonical(),
            dst: subject.destination.ip().to_canonical(),
            port: subject.destination.port(),
        };
        let mut granted = self.granted.lock();
        // Under the lock, so that a view published after this look finds the grant in `reconsider`.
        if granted.contains_key(&short_cut) || !may(&self.mesh.load(), subject) {
            return;
        }
        if self.agent.try_send(ProxyMessage::Grant(short_cut)).is_ok() {
            tracing::info!(src = %short_cut.src, dst = %short_cut.dst, port = short_cut.port, "short-cut granted");
            granted.insert(short_cut, subject.clone());
        }
    }

    /// Whether the kernel takes connections from `src` to this pod's port by itself.
    pub(crate) fn holds(&self, src: IpAddr, dst: SocketAddr) -> bool {
        let short_cut = ShortCut { src: src.to_canonical(), dst: dst.ip().to_canonical(), port: dst.port() };
        self.enabled && self.granted.lock().contains_key(&short_cut)
    }

    /// Revokes what the view no longer allows.
    fn reconsider(&self, mesh: &Mesh) {
        self.revoke_where(|_, subject| !may(mesh, subject));
    }

    /// Revokes everything that starts or ends at a pod that is gone.
    pub(crate) fn forget_pod(&self, pod: &Pod) {
        self.revoke_where(|short_cut, _| pod.owns(short_cut.src) || pod.owns(short_cut.dst));
    }

    /// The agent has dropped them all.
    pub(crate) fn forget_all(&self) {
        self.granted.lock().clear();
        self.overflow.store(false, Ordering::Release);
    }

    /// Whether all must be revoked before the next message.
    pub(crate) fn take_overflow(&self) -> bool {
        self.overflow.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn in_force(&self) -> Vec<ShortCut> {
        let mut list: Vec<_> = self.granted.lock().keys().copied().collect();
        list.sort();
        list
    }

    fn revoke_where(&self, revoke: impl Fn(&ShortCut, &Subject) -> bool) {
        let mut granted = self.granted.lock();
        let revoked: Vec<_> = granted.extract_if(|short_cut, subject| revoke(short_cut, subject)).collect();
        for (short_cut, _) in revoked {
            tracing::info!(src = %short_cut.src, dst = %short_cut.dst, port = short_cut.port, "short-cut revoked");
            if self.agent.try_send(ProxyMessage::Revoke(short_cut)).is_err() {
                self.overflow.store(true, Ordering::Release);
                granted.clear();
                return;
            }
        }
    }
}

fn may(mesh: &Mesh, subject: &Subject) -> bool {
    let Some(workload) = mesh.workload(&subject.destination_uid) else { return false };
    workload.application_tunnel.is_none()
        && !mesh.is_behind_waypoint(workload, subject.destination.port())
        && subject.decide_for(mesh, workload).allowed
}

/// Reconsiders all grants with each new view.
pub(crate) async fn follow(shared: Arc<Shared>, mut drain: drain::Watch) {
    let mut changes = shared.mesh.changes();
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            _ = drain.signaled() => return,
        }
        let mesh = shared.mesh.load_full();
        shared.grants.reconsider(&mesh);
    }
}
