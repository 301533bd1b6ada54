//! Desired contents of the maps, and what is in them: writes are proportional to the change.
use std::collections::BTreeMap;
use std::net::IpAddr;

use compat_objects::{Fault, ObjectSet};
use l4_lb::BackendSets;
use l4_loader::{Maps, Table};
use l4_policy::IdentityAllocator;
use strata_abi::{
    Addr, Backend, BackendKey, Identity, Plain, PodRecord, PolicyEntry, PolicyKey, Prefix, Service, ServiceKey,
    identity, identity_flag,
};

/// A map and the content it is known to have. The agent is the only writer.
#[derive(Debug)]
struct Mirror<K, V> {
    content: BTreeMap<K, V>,
}

impl<K: Plain + Ord, V: Plain + PartialEq> Mirror<K, V> {
    fn read(table: &Table<K, V>) -> Result<Self, l4_loader::Error> {
        Ok(Mirror { content: table.dump()? })
    }

    /// Adds and changes; true if anything had to be.
    fn upsert(&mut self, table: &Table<K, V>, desired: &BTreeMap<K, V>) -> Result<bool, l4_loader::Error> {
        let mut changed = false;
        for (key, value) in desired {
            if self.content.get(key) != Some(value) {
                table.insert(key, value)?;
                self.content.insert(*key, *value);
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Removes what is not desired; true if anything was.
    fn prune(&mut self, table: &Table<K, V>, desired: &BTreeMap<K, V>) -> Result<bool, l4_loader::Error> {
        let stale: Vec<K> = self.content.keys().filter(|key| !desired.contains_key(key)).copied().collect();
        for key in &stale {
            table.remove(key)?;
            self.content.remove(key);
        }
        Ok(!stale.is_empty())
    }
}

/// Why the maps do not hold what the objects want; what they held stays.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TablesError {
    #[error("network policy: {0}")]
    Policy(#[from] l4_policy::Error),
    #[error(transparent)]
    Map(#[from] l4_loader::Error),
}

/// One pod of this node for the maps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LocalRecord {
    pub(crate) record: PodRecord,
    /// The record of an interface that is not made yet is left out.
    pub(crate) has_device: bool,
}

/// Both compilers' results in force.
#[derive(Debug, Default)]
pub(crate) struct InForce {
    pub(crate) policy: l4_policy::Compiled,
    pub(crate) services: l4_lb::Compiled,
}

impl InForce {
    /// What the compilers complained about.
    pub(crate) fn faults(&self) -> impl Iterator<Item = &Fault> {
        self.policy.faults.iter().chain(&self.services.faults)
    }
}

/// The node's maps.
#[derive(Debug)]
pub(crate) struct Tables {
    node: String,
    policy: Mirror<Prefix<PolicyKey>, PolicyEntry>,
    identities: Mirror<Prefix<Addr>, Identity>,
    services: Mirror<ServiceKey, Service>,
    backends: Mirror<BackendKey, Backend>,
    pods: Mirror<u64, PodRecord>,
    pods_by_ifindex: Mirror<u32, PodRecord>,
    allocator: IdentityAllocator,
    sets: BackendSets,
    pub(crate) in_force: InForce,
}

/// A new policy compilation, not yet in force.
pub(crate) struct Next {
    policy: l4_policy::Compiled,
    services: l4_lb::Compiled,
    allocator: IdentityAllocator,
}

impl Next {
    /// The numbers to keep, as JSON.
    pub(crate) fn numbers(&self) -> String {
        // Serialising to JSON fails only for maps with structured keys, which the allocator writes as lists.
        serde_json::to_string(&self.allocator).unwrap_or_default()
    }

    /// The identity of a pod, or None if no object describes it.
    pub(crate) fn identity_of(&self, uid: &str) -> Option<u32> {
        self.policy.pod_identity.get(uid).copied()
    }
}

impl Tables {
    /// Reads what the maps hold from an earlier agent.
    pub(crate) fn read(maps: &Maps, node: &str, allocator: IdentityAllocator) -> Result<Tables, l4_loader::Error> {
        let backends = Mirror::read(&maps.backends)?;
        let last_set = backends.content.keys().map(|key: &BackendKey| key.backend_set).max();
        Ok(Tables {
            node: node.to_owned(),
            policy: Mirror::read(&maps.policy)?,
            identities: Mirror::read(&maps.identities)?,
            services: Mirror::read(&maps.services)?,
            backends,
            pods: Mirror::read(&maps.pods)?,
            pods_by_ifindex: Mirror::read(&maps.pods_by_ifindex)?,
            allocator,
            sets: BackendSets::after(last_set.unwrap_or_default()),
            in_force: InForce::default(),
        })
    }

    /// Compiles the objects; nothing is changed yet.
    pub(crate) fn compile(&mut self, maps: &Maps, objects: &ObjectSet) -> Result<Next, TablesError> {
        let mut allocator = self.allocator.clone();
        let capacity = maps.policy.max_entries() as usize;
        let policy = l4_policy::compile(objects, &self.node, capacity, &mut allocator)?;
        let services = l4_lb::compile(objects, &self.node, &mut self.sets);
        Ok(Next { policy, services, allocator })
    }

    /// Puts a compilation in force. Whatever the moment, nobody sees more allowed than before or after: policy comes
    /// before the identities and pods it is about, and goes after them. True if policy or identities changed.
    pub(crate) fn apply(
        &mut self,
        maps: &Maps,
        next: Next,
        pods: &[LocalRecord],
        unmanaged: &[IpAddr],
    ) -> Result<bool, TablesError> {
        let prefixed = next.policy.policy.iter().map(|((key, length), entry)| (Prefix::new(*length, *key), *entry));
        let policy: BTreeMap<_, _> = prefixed.collect();
        let by_address = next.policy.by_address.iter();
        let mut identities: BTreeMap<_, _> =
            by_address.map(|((address, length), identity)| (Prefix::new(*length, *address), *identity)).collect();
        for address in unmanaged {
            let entry = Identity { security_id: identity::UNMANAGED, flags: identity_flag::LOCAL_POD };
            identities.insert(Prefix::new(128, Addr::from(*address)), entry);
        }
        self.backends.upsert(&maps.backends, &next.services.backends)?;
        self.services.upsert(&maps.services, &next.services.services)?;
        self.services.prune(&maps.services, &next.services.services)?;
        self.backends.prune(&maps.backends, &next.services.backends)?;
        let mut changed = self.policy.upsert(&maps.policy, &policy)?;
        changed |= self.identities.upsert(&maps.identities, &identities)?;
        self.write_pods(maps, pods)?;
        changed |= self.identities.prune(&maps.identities, &identities)?;
        changed |= self.policy.prune(&maps.policy, &policy)?;
        self.allocator = next.allocator;
        self.in_force = InForce { policy: next.policy, services: next.services };
        Ok(changed)
    }

    /// Brings only the pods' own records up to date.
    pub(crate) fn write_pods(&mut self, maps: &Maps, pods: &[LocalRecord]) -> Result<(), l4_loader::Error> {
        let by_cookie: BTreeMap<u64, PodRecord> =
            pods.iter().map(|pod| (pod.record.netns_cookie, pod.record)).collect();
        let with_device = pods.iter().filter(|pod| pod.has_device);
        let by_ifindex: BTreeMap<u32, PodRecord> = with_device.map(|pod| (pod.record.ifindex, pod.record)).collect();
        self.pods_by_ifindex.upsert(&maps.pods_by_ifindex, &by_ifindex)?;
        self.pods.upsert(&maps.pods, &by_cookie)?;
        self.pods.prune(&maps.pods, &by_cookie)?;
        self.pods_by_ifindex.prune(&maps.pods_by_ifindex, &by_ifindex)?;
        Ok(())
    }

    /// Reads the maps again, so that what something else changed is found and repaired by the next `apply`.
    pub(crate) fn refresh(&mut self, maps: &Maps) -> Result<(), l4_loader::Error> {
        self.policy = Mirror::read(&maps.policy)?;
        self.identities = Mirror::read(&maps.identities)?;
        self.services = Mirror::read(&maps.services)?;
        self.backends = Mirror::read(&maps.backends)?;
        self.pods = Mirror::read(&maps.pods)?;
        self.pods_by_ifindex = Mirror::read(&maps.pods_by_ifindex)?;
        Ok(())
    }

    /// Entries by map, for status.
    pub(crate) fn counts(&self) -> [(&'static str, usize); 6] {
        [
            ("pods", self.pods.content.len()),
            ("pods_by_ifindex", self.pods_by_ifindex.content.len()),
            ("identities", self.identities.content.len()),
            ("services", self.services.content.len()),
            ("backends", self.backends.content.len()),
            ("policy", self.policy.content.len()),
        ]
    }
}
