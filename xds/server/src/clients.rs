//! Who is connected and what they accepted: the source of `proxy-status`.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

/// The connected clients; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Clients {
    next: Arc<AtomicU64>,
    connected: Arc<Mutex<BTreeMap<u64, ClientStatus>>>,
}

/// One stream.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ClientStatus {
    pub node: String,
    pub peer: String,
    pub types: BTreeMap<String, TypeStatus>,
}

/// One type on one stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TypeStatus {
    pub sent: u64,
    pub acked: u64,
    pub nacked: u64,
    /// Text of the last NACK, gone with the next ACK.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Clients {
    /// A copy of everything, ordered by age of the stream.
    pub fn snapshot(&self) -> Vec<ClientStatus> {
        self.connected.lock().values().cloned().collect()
    }

    pub(crate) fn add(&self, node: String, peer: String) -> ClientHandle {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.connected.lock().insert(id, ClientStatus { node, peer, types: BTreeMap::new() });
        ClientHandle { id, clients: self.clone() }
    }
}

/// Removes the client when dropped.
#[derive(Debug)]
pub(crate) struct ClientHandle {
    id: u64,
    clients: Clients,
}

impl ClientHandle {
    pub(crate) fn update(&self, type_url: &str, change: impl FnOnce(&mut TypeStatus)) {
        let mut connected = self.clients.connected.lock();
        if let Some(client) = connected.get_mut(&self.id) {
            change(client.types.entry(type_url.to_owned()).or_default());
        }
    }
}

impl Drop for ClientHandle {
    fn drop(&mut self) {
        self.clients.connected.lock().remove(&self.id);
    }
}
