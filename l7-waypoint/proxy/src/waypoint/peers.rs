//! Workloads as telemetry names them.
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use l7_telemetry::{Peer, Peers};
use parking_lot::Mutex;
use xds_model::wds::{MeshView, Workload};

/// Finds workloads in the mesh view; the same workload stays the same `Arc` until it changes.
pub(crate) struct MeshPeers {
    mesh: MeshView,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    generation: u64,
    by_uid: HashMap<Arc<str>, (Arc<Workload>, Arc<Peer>)>,
}

impl MeshPeers {
    pub(crate) fn new(mesh: MeshView) -> MeshPeers {
        MeshPeers { mesh, known: Mutex::default() }
    }
}

impl Peers for MeshPeers {
    fn by_address(&self, address: IpAddr) -> Option<Arc<Peer>> {
        let mesh = self.mesh.load();
        let workload = mesh.workload_by_ip(address)?;
        let mut known = self.known.lock();
        if known.generation != mesh.generation() {
            known.generation = mesh.generation();
            known.by_uid.retain(|uid, (held, _)| mesh.workload(uid).is_some_and(|now| Arc::ptr_eq(now, held)));
        }
        if let Some((_, peer)) = known.by_uid.get(&workload.uid) {
            return Some(peer.clone());
        }
        let peer = Arc::new(peer(workload));
        known.by_uid.insert(workload.uid.clone(), (workload.clone(), peer.clone()));
        Some(peer)
    }
}

fn peer(workload: &Workload) -> Peer {
    let or_unknown = |text: &Arc<str>| if text.is_empty() { "unknown".into() } else { text.clone() };
    Peer {
        workload: or_unknown(if workload.workload_name.is_empty() { &workload.name } else { &workload.workload_name }),
        namespace: workload.namespace.clone(),
        principal: workload.identity.shared(),
        app: or_unknown(&workload.canonical_name),
        version: or_unknown(&workload.canonical_revision),
        canonical_service: or_unknown(&workload.canonical_name),
        canonical_revision: if workload.canonical_revision.is_empty() {
            "latest".into()
        } else {
            workload.canonical_revision.clone()
        },
        cluster: workload.cluster_id.clone(),
    }
}
