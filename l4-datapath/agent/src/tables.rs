//! Desired contents of the maps, and what is in them: work and writes are proportional to the change.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use compat_objects::{Fault, ObjectSet};
use l4_lb::BackendSets;
use l4_loader::{Maps, Table};
use l4_policy::IdentityAllocator;
use strata_abi::{
    Addr, Backend, BackendKey, Identity, Plain, PodRecord, PolicyEntry, PolicyKey, Prefix, Service, ServiceKey,
    identity, identity_flag,
};

use crate::compile::{Compiler, Output};

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
    pub(crate) policy: Arc<l4_policy::Compiled>,
    pub(crate) services: Arc<l4_lb::Compiled>,
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
    policy: Mirror<Prefix<PolicyKey>, PolicyEntry>,
    identities: Mirror<Prefix<Addr>, Identity>,
    services: Mirror<ServiceKey, Service>,
    backends: Mirror<BackendKey, Backend>,
    pods: Mirror<u64, PodRecord>,
    pods_by_ifindex: Mirror<u32, PodRecord>,
    compiler: Compiler,
    /// The numbers in force.
    allocator: Arc<IdentityAllocator>,
    /// Addresses of pods nothing describes, as in force.
    unmanaged: Vec<IpAddr>,
    /// What is in force may not be all in the maps: the next `apply` looks at everything.
    doubtful: bool,
    pub(crate) in_force: InForce,
}

impl Output {
    /// The numbers to keep, as JSON.
    pub(crate) fn numbers(&self) -> String {
        // Serialising to JSON fails only for maps with structured keys, which the allocator writes as lists.
        serde_json::to_string(&*self.allocator).unwrap_or_default()
    }

    /// What will be in force once it is applied.
    pub(crate) fn contents(&self) -> InForce {
        InForce { policy: self.policy.clone(), services: self.services.clone() }
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
            policy: Mirror::read(&maps.policy)?,
            identities: Mirror::read(&maps.identities)?,
            services: Mirror::read(&maps.services)?,
            backends,
            pods: Mirror::read(&maps.pods)?,
            pods_by_ifindex: Mirror::read(&maps.pods_by_ifindex)?,
            compiler: Compiler::new(node, BackendSets::after(last_set.unwrap_or_default())),
            allocator: Arc::new(allocator),
            unmanaged: Vec::new(),
            doubtful: true,
            in_force: InForce::default(),
        })
    }

    /// Compiles the objects; nothing is changed yet.
    pub(crate) fn compile(&mut self, maps: &Maps, objects: &ObjectSet) -> Result<Output, TablesError> {
        Ok(self.compiler.compile(objects, maps.policy.max_entries() as usize, &self.allocator)?)
    }

    /// Whether a compilation gives other numbers to identities and rules than those in force.
    pub(crate) fn renumbers(&self, next: &Output) -> bool {
        !Arc::ptr_eq(&self.allocator, &next.allocator)
    }

    /// Whether a compilation says something else than what is in force.
    pub(crate) fn differs(&self, next: &Output) -> bool {
        self.doubtful || !self.has_policy(next) || !self.has_services(next)
    }

    fn has_policy(&self, next: &Output) -> bool {
        Arc::ptr_eq(&self.in_force.policy, &next.policy)
    }

    fn has_services(&self, next: &Output) -> bool {
        Arc::ptr_eq(&self.in_force.services, &next.services)
    }

    /// Puts a compilation in force. Whatever the moment, nobody sees more allowed than before or after: policy comes
    /// before the identities and pods it is about, and goes after them. True if policy or identities changed.
    pub(crate) fn apply(
        &mut self,
        maps: &Maps,
        next: Output,
        pods: &[LocalRecord],
        unmanaged: Vec<IpAddr>,
    ) -> Result<bool, TablesError> {
        let whole = std::mem::replace(&mut self.doubtful, true);
        if whole || !self.has_services(&next) {
            self.apply_services(maps, &next.services)?;
        }
        let changed = if whole || !self.has_policy(&next) || self.unmanaged != unmanaged {
            self.apply_policy(maps, &next.policy, pods, &unmanaged)?
        } else {
            self.write_pods(maps, pods)?;
            false
        };
        self.unmanaged = unmanaged;
        self.in_force = next.contents();
        self.allocator = next.allocator;
        self.doubtful = false;
        Ok(changed)
    }

    fn apply_services(&mut self, maps: &Maps, next: &l4_lb::Compiled) -> Result<(), l4_loader::Error> {
        self.backends.upsert(&maps.backends, &next.backends)?;
        self.services.upsert(&maps.services, &next.services)?;
        self.services.prune(&maps.services, &next.services)?;
        self.backends.prune(&maps.backends, &next.backends)?;
        Ok(())
    }

    fn apply_policy(
        &mut self,
        maps: &Maps,
        next: &l4_policy::Compiled,
        pods: &[LocalRecord],
        unmanaged: &[IpAddr],
    ) -> Result<bool, l4_loader::Error> {
        let prefixed = next.policy.iter().map(|((key, length), entry)| (Prefix::new(*length, *key), *entry));
        let policy: BTreeMap<_, _> = prefixed.collect();
        let by_address = next.by_address.iter();
        let mut identities: BTreeMap<_, _> =
            by_address.map(|((address, length), identity)| (Prefix::new(*length, *address), *identity)).collect();
        for address in unmanaged {
            let entry = Identity { security_id: identity::UNMANAGED, flags: identity_flag::LOCAL_POD };
            identities.insert(Prefix::new(128, Addr::from(*address)), entry);
        }
        let mut changed = self.policy.upsert(&maps.policy, &policy)?;
        changed |= self.identities.upsert(&maps.identities, &identities)?;
        self.write_pods(maps, pods)?;
        changed |= self.identities.prune(&maps.identities, &identities)?;
        changed |= self.policy.prune(&maps.policy, &policy)?;
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
        self.doubtful = true;
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
