//! Tables in place of the kernel's maps.
use core::cell::{Cell, RefCell};
use std::{boxed::Box, collections::HashMap, net::IpAddr, vec::Vec};

use strata_abi::{
    Addr, AffinityEntry, AffinityKey, Backend, BackendKey, FlowKey, FragmentKey, Grant, GrantKey, Identity, NodeConfig,
    PodRecord, PolicyEntry, PolicyKey, Prefix, Service, ServiceKey,
};

use crate::Maps;

#[derive(Default)]
pub struct Tables {
    pub config: NodeConfig,
    pub identities: Vec<(Prefix<Addr>, Identity)>,
    pub services: HashMap<ServiceKey, Service>,
    pub backends: HashMap<BackendKey, Backend>,
    pub policy: Vec<(Prefix<PolicyKey>, PolicyEntry)>,
    pub grants: HashMap<GrantKey, Grant>,
    pub affinity: RefCell<HashMap<AffinityKey, &'static AffinityEntry>>,
    pub flows: RefCell<HashMap<FlowKey, u64>>,
    pub fragments: RefCell<HashMap<FragmentKey, u64>>,
    pub now: Cell<u64>,
    pub random: Cell<u32>,
}

/// The address written as text.
pub fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

impl Tables {
    /// Gives an address (all of it) an identity.
    pub fn identify(&mut self, text: &str, security_id: u32, flags: u32) {
        self.identities.push((Prefix::new(128, addr(text)), Identity { security_id, flags }));
    }

    pub fn add_policy(&mut self, prefix: u32, key: PolicyKey, verdict: u8, rule: u32) {
        self.policy.push((Prefix::new(prefix, key), PolicyEntry { verdict, _pad: [0; 3], rule }));
    }

    pub fn add_service(&mut self, vip: &str, port: u16, proto: u8, set: u32, backends: &[(&str, u16)]) {
        for (slot, (text, port)) in backends.iter().enumerate() {
            let backend = Backend { addr: addr(text), port: *port, flags: 0 };
            self.backends.insert(BackendKey { backend_set: set, slot: slot as u32 }, backend);
        }
        let service = Service { backend_set: set, backend_count: backends.len() as u32, affinity_seconds: 0, flags: 0 };
        self.services.insert(ServiceKey { addr: addr(vip), port, proto, _pad: 0 }, service);
        self.services.insert(ServiceKey { addr: addr(vip), port: 0, proto: 0, _pad: 0 }, Service::default());
    }

    pub fn add_grant(&mut self, src: &str, dst: &str, port: u16) {
        let grant = Grant { generation: self.config.grant_generation };
        self.grants.insert(GrantKey { src: addr(src), dst: addr(dst), port, _pad: 0 }, grant);
    }
}

/// A pod with these addresses.
pub fn pod(v4: &str, v6: &str, security_id: u32, flags: u32) -> PodRecord {
    PodRecord { v4: addr(v4), v6: addr(v6), security_id, flags, ..PodRecord::default() }
}

fn key_bytes(key: &PolicyKey) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&key.subject.to_ne_bytes());
    bytes[4..8].copy_from_slice(&key.peer.to_ne_bytes());
    bytes[8] = key.direction;
    bytes[9] = key.proto;
    bytes[10..].copy_from_slice(&key.port_be);
    bytes
}

/// Whether the first `length` bits are equal.
fn matches(length: u32, a: &[u8], b: &[u8]) -> bool {
    (0..length as usize).all(|bit| (a[bit / 8] ^ b[bit / 8]) & (0x80 >> (bit % 8)) == 0)
}

impl Maps for Tables {
    fn config(&self) -> Option<&NodeConfig> {
        Some(&self.config)
    }

    fn identity(&self, address: &Prefix<Addr>) -> Option<&Identity> {
        let found = self.identities.iter().filter(|(p, _)| matches(p.prefix_len, &p.data.0, &address.data.0));
        found.max_by_key(|(p, _)| p.prefix_len).map(|(_, identity)| identity)
    }

    fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(key)
    }

    fn backend(&self, key: &BackendKey) -> Option<&Backend> {
        self.backends.get(key)
    }

    fn policy(&self, key: &Prefix<PolicyKey>) -> Option<&PolicyEntry> {
        let found =
            self.policy.iter().filter(|(p, _)| matches(p.prefix_len, &key_bytes(&p.data), &key_bytes(&key.data)));
        found.max_by_key(|(p, _)| p.prefix_len).map(|(_, entry)| entry)
    }

    fn grant(&self, key: &GrantKey) -> Option<&Grant> {
        self.grants.get(key)
    }

    fn affinity(&self, key: &AffinityKey) -> Option<&AffinityEntry> {
        self.affinity.borrow().get(key).copied()
    }

    fn set_affinity(&self, key: &AffinityKey, entry: &AffinityEntry) {
        self.affinity.borrow_mut().insert(*key, Box::leak(Box::new(*entry)));
    }

    fn flow_seen(&self, key: &FlowKey) -> Option<u64> {
        self.flows.borrow().get(key).copied()
    }

    fn set_flow_seen(&self, key: &FlowKey, now_ns: u64) {
        self.flows.borrow_mut().insert(*key, now_ns);
    }

    fn fragment_seen(&self, key: &FragmentKey) -> Option<u64> {
        self.fragments.borrow().get(key).copied()
    }

    fn set_fragment_seen(&self, key: &FragmentKey, now_ns: u64) {
        self.fragments.borrow_mut().insert(*key, now_ns);
    }

    fn now_ns(&self) -> u64 {
        self.now.get()
    }

    fn random(&self) -> u32 {
        self.random.get()
    }
}
