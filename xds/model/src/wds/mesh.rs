//! The view and its one writer.
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use ipnet::IpNet;
use prost::Message;
use smallvec::SmallVec;
use tokio::sync::watch;
use xds_proto::istio::{security as security_wire, workload as wire};
use xds_proto::type_url;

use super::decode::{self, Address, DecodeError};
use super::policy::{Policy, Scope};
use super::types::*;

/// What this node takes for granted.
#[derive(Debug, Clone)]
pub struct MeshConfig {
    /// Trust domain of workloads that do not name theirs.
    pub trust_domain: Arc<str>,
    /// Network of this node's pods.
    pub network: Arc<str>,
}

impl Default for MeshConfig {
    fn default() -> MeshConfig {
        MeshConfig { trust_domain: "cluster.local".into(), network: "".into() }
    }
}

/// One workload behind a service.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub workload: Arc<Workload>,
    /// Overrides of the service's target ports.
    pub ports: SmallVec<[Port; 4]>,
}

type ByAddress<T> = HashMap<Arc<str>, HashMap<IpAddr, SmallVec<[Arc<T>; 1]>>>;

/// Immutable view of workloads, services and policies with its indexes.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    generation: u64,
    /// The control plane has said what workloads and services there are.
    addresses_known: bool,
    config: MeshConfig,
    workloads: HashMap<Arc<str>, Arc<Workload>>,
    /// Best first where several share one address: pod with HBONE, pod, HBONE, other.
    by_address: ByAddress<Workload>,
    services: HashMap<ServiceKey, Arc<Service>>,
    by_vip: ByAddress<Service>,
    /// Address ranges of services, longest prefix first.
    ranges: Vec<(Arc<str>, IpNet, Arc<Service>)>,
    by_hostname: HashMap<Arc<str>, SmallVec<[Arc<Service>; 1]>>,
    /// Also of services not known yet: workloads may arrive first.
    endpoints: HashMap<ServiceKey, Arc<Vec<Endpoint>>>,
    policies: HashMap<Arc<str>, Arc<Policy>>,
    global_policies: Vec<Arc<Policy>>,
    namespace_policies: HashMap<Arc<str>, Vec<Arc<Policy>>>,
}

impl Mesh {
    /// Raised with every published change.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn config(&self) -> &MeshConfig {
        &self.config
    }

    /// Whether the control plane has named workloads and services yet: before, that one is missing says nothing.
    pub fn addresses_known(&self) -> bool {
        self.addresses_known
    }

    /// A workload by its uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload that owns an address of this node's network.
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.workload_by_address(&self.config.network, ip)
    }

    /// The workload that owns an address of a network.
    pub fn workload_by_address(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(network)?.get(&ip.to_canonical())?.first()
    }

    /// A service by `namespace/hostname`.
    pub fn service(&self, key: &str) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service behind a virtual address of this node's network, as a client of `namespace` sees it:
    /// an exact address before the longest range; then the client's own namespace, then canonical ones.
    pub fn service_by_vip(&self, ip: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        self.service_by_address(&self.config.network, ip, namespace)
    }

    /// [`Mesh::service_by_vip`] in a network.
    pub fn service_by_address(&self, network: &str, ip: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        let ip = ip.to_canonical();
        let visible = |service: &&Arc<Service>| !service.private || *service.namespace == *namespace;
        let rank = |service: &Arc<Service>| (*service.namespace == *namespace, service.canonical);
        let exact = self.by_vip.get(network).and_then(|vips| vips.get(&ip)).into_iter().flatten();
        if let Some(found) = exact.filter(visible).max_by_key(|service| rank(service)) {
            return Some(found);
        }
        self.ranges
            .iter()
            .filter(|(range_network, prefix, _)| **range_network == *network && prefix.contains(&ip))
            .filter(|(_, _, service)| visible(&service))
            .max_by_key(|(_, prefix, service)| {
                (*service.namespace == *namespace, prefix.prefix_len(), service.canonical)
            })
            .map(|(_, _, service)| service)
    }

    /// The service a client of `namespace` means by a host name.
    pub fn service_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        self.by_hostname
            .get(hostname)?
            .iter()
            .filter(|service| !service.private || *service.namespace == *namespace)
            .max_by_key(|service| (*service.namespace == *namespace, service.canonical))
    }

    /// The endpoints of a service, known or not yet known.
    pub fn endpoints(&self, service: &str) -> &[Endpoint] {
        self.endpoints.get(service).map(|endpoints| endpoints.as_slice()).unwrap_or_default()
    }

    /// A policy by `namespace/name`.
    pub fn policy(&self, key: &str) -> Option<&Arc<Policy>> {
        self.policies.get(key)
    }

    /// Policies that apply to every workload.
    pub fn global_policies(&self) -> &[Arc<Policy>] {
        &self.global_policies
    }

    /// Policies that apply to every workload of a namespace.
    pub fn namespace_policies(&self, namespace: &str) -> &[Arc<Policy>] {
        self.namespace_policies.get(namespace).map(Vec::as_slice).unwrap_or_default()
    }

    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn policies(&self) -> impl ExactSizeIterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// Services that have endpoints but are not known themselves.
    pub fn staged_services(&self) -> impl Iterator<Item = (&ServiceKey, &[Endpoint])> {
        self.endpoints
            .iter()
            .filter(|(key, _)| !self.services.contains_key(*key))
            .map(|(key, endpoints)| (key, endpoints.as_slice()))
    }

    fn insert_workload(&mut self, workload: Workload) {
        self.remove_workload(&workload.uid.clone());
        let workload = Arc::new(workload);
        if !workload.host_network {
            for ip in &workload.addresses {
                let slot = self.by_address.entry(workload.network.clone()).or_default().entry(*ip).or_default();
                slot.push(workload.clone());
                slot.sort_by_key(|w| (!w.uid.contains("//Pod/"), w.tunnel != Tunnel::Hbone, w.uid.clone()));
            }
        }
        for (key, ports) in &workload.services {
            let endpoint = Endpoint { workload: workload.clone(), ports: ports.iter().copied().collect() };
            Arc::make_mut(self.endpoints.entry(key.clone()).or_default()).push(endpoint);
        }
        self.workloads.insert(workload.uid.clone(), workload);
    }

    fn remove_workload(&mut self, uid: &str) -> bool {
        let Some(old) = self.workloads.remove(uid) else { return false };
        if !old.host_network {
            remove_addresses(&mut self.by_address, old.addresses.iter().map(|ip| (&old.network, *ip)), |w| {
                w.uid == old.uid
            });
        }
        for key in old.services.keys() {
            if let Some(endpoints) = self.endpoints.get_mut(key) {
                Arc::make_mut(endpoints).retain(|endpoint| endpoint.workload.uid != old.uid);
                if endpoints.is_empty() {
                    self.endpoints.remove(key);
                }
            }
        }
        true
    }

    fn insert_service(&mut self, service: Service) {
        self.remove_service(&service.key.clone());
        let service = Arc::new(service);
        for VirtualAddress { network, prefix } in &service.addresses {
            if prefix.prefix_len() == prefix.max_prefix_len() {
                let vips = self.by_vip.entry(network.clone()).or_default();
                vips.entry(prefix.addr()).or_default().push(service.clone());
            } else {
                self.ranges.push((network.clone(), *prefix, service.clone()));
            }
        }
        self.by_hostname.entry(service.hostname.clone()).or_default().push(service.clone());
        self.services.insert(service.key.clone(), service);
    }

    fn remove_service(&mut self, key: &str) -> bool {
        let Some(old) = self.services.remove(key) else { return false };
        let vips = old.addresses.iter().map(|vip| (&vip.network, vip.prefix.addr()));
        remove_addresses(&mut self.by_vip, vips, |service| service.key == old.key);
        self.ranges.retain(|(_, _, service)| service.key != old.key);
        if let Some(named) = self.by_hostname.get_mut(&old.hostname) {
            named.retain(|service| service.key != old.key);
            if named.is_empty() {
                self.by_hostname.remove(&old.hostname);
            }
        }
        true
    }

    fn insert_policy(&mut self, policy: Policy) {
        self.remove_policy(&policy.key.clone());
        let policy = Arc::new(policy);
        match policy.scope {
            Scope::Global => self.global_policies.push(policy.clone()),
            Scope::Namespace => {
                self.namespace_policies.entry(policy.namespace.clone()).or_default().push(policy.clone());
            }
            Scope::WorkloadSelector => {}
        }
        self.policies.insert(policy.key.clone(), policy);
    }

    fn remove_policy(&mut self, key: &str) -> bool {
        let Some(old) = self.policies.remove(key) else { return false };
        self.global_policies.retain(|policy| policy.key != old.key);
        if let Some(policies) = self.namespace_policies.get_mut(&old.namespace) {
            policies.retain(|policy| policy.key != old.key);
        }
        true
    }
}

fn remove_addresses<'a, T>(
    index: &mut ByAddress<T>,
    addresses: impl Iterator<Item = (&'a Arc<str>, IpAddr)>,
    gone: impl Fn(&T) -> bool,
) {
    for (network, ip) in addresses {
        let Some(network) = index.get_mut(network) else { continue };
        if let Some(slot) = network.get_mut(&ip) {
            slot.retain(|item| !gone(item));
            if slot.is_empty() {
                network.remove(&ip);
            }
        }
    }
}

/// A resource that was not taken, and why; its previous version stays in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    pub name: String,
    pub reason: String,
}

/// The one writer of the view.
pub struct MeshBuilder {
    next: Mesh,
    current: Arc<ArcSwap<Mesh>>,
    generation: watch::Sender<u64>,
}

/// A reader's handle; cheap to clone.
#[derive(Clone)]
pub struct MeshView {
    current: Arc<ArcSwap<Mesh>>,
    generation: watch::Receiver<u64>,
}

impl MeshView {
    /// The present view. Hold it for one decision, not across waits.
    pub fn load(&self) -> Guard<Arc<Mesh>> {
        self.current.load()
    }

    /// The present view, to keep.
    pub fn load_full(&self) -> Arc<Mesh> {
        self.current.load_full()
    }

    /// Signals every new generation.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.generation.clone()
    }
}

impl MeshBuilder {
    pub fn new(config: MeshConfig) -> (MeshBuilder, MeshView) {
        let mesh = Mesh { config, ..Mesh::default() };
        let current = Arc::new(ArcSwap::from_pointee(mesh.clone()));
        let (sender, receiver) = watch::channel(0);
        let view = MeshView { current: current.clone(), generation: receiver };
        (MeshBuilder { next: mesh, current, generation: sender }, view)
    }

    /// Applies one delta of `type_url` (`Address`, `Workload` or `Authorization`) and publishes the result.
    /// `resources` are name and message bytes. Good ones are applied, whatever happens to others.
    pub fn apply<'a>(
        &mut self,
        type_url: &str,
        resources: impl IntoIterator<Item = (&'a str, &'a [u8])>,
        removed: impl IntoIterator<Item = &'a str>,
    ) -> Vec<Rejected> {
        let mut rejected = Vec::new();
        // Removals first: a name in both lists is a replacement.
        for name in removed {
            let known = match type_url {
                type_url::AUTHORIZATION => self.next.remove_policy(name),
                _ => self.next.remove_workload(name) || self.next.remove_service(name),
            };
            if !known {
                tracing::debug!(type_url, name, "removal of an unknown resource");
            }
        }
        for (name, body) in resources {
            let outcome = match type_url {
                type_url::ADDRESS => self.apply_address(name, body),
                type_url::WORKLOAD => self.apply_workload(name, body),
                type_url::AUTHORIZATION => self.apply_policy(name, body),
                other => Err(format!("the mesh view takes no resource of type {other}")),
            };
            if let Err(reason) = outcome {
                rejected.push(Rejected { name: name.to_owned(), reason });
            }
        }
        self.next.addresses_known |= type_url == type_url::ADDRESS;
        self.publish();
        rejected
    }

    fn publish(&mut self) {
        self.next.generation += 1;
        self.current.store(Arc::new(self.next.clone()));
        self.generation.send_replace(self.next.generation);
    }

    fn apply_address(&mut self, name: &str, body: &[u8]) -> Result<(), String> {
        let decoded = wire::Address::decode(body)
            .map_err(DecodeError::from)
            .and_then(|message| decode::address(message, &self.next.config.trust_domain))
            .map_err(|error| error.to_string())?;
        match decoded {
            Address::Workload(workload) => {
                check_name(name, &workload.uid)?;
                self.next.insert_workload(workload);
            }
            Address::Service(service) => {
                check_name(name, &service.key)?;
                self.next.insert_service(service);
            }
        }
        Ok(())
    }

    fn apply_workload(&mut self, name: &str, body: &[u8]) -> Result<(), String> {
        let workload = wire::Workload::decode(body)
            .map_err(DecodeError::from)
            .and_then(|message| decode::workload(message, &self.next.config.trust_domain))
            .map_err(|error| error.to_string())?;
        check_name(name, &workload.uid)?;
        self.next.insert_workload(workload);
        Ok(())
    }

    fn apply_policy(&mut self, name: &str, body: &[u8]) -> Result<(), String> {
        let message = security_wire::Authorization::decode(body);
        let scope = message.as_ref().ok().and_then(|m| security_wire::Scope::try_from(m.scope).ok());
        let decoded = message
            .map_err(DecodeError::from)
            .and_then(Policy::decode)
            .map_err(|error| error.to_string())
            .and_then(|policy| check_name(name, &policy.key).map(|()| policy));
        match decoded {
            Ok(policy) => {
                for part in &policy.unreadable {
                    tracing::warn!(
                        policy = name,
                        field = part.field,
                        reason = part.reason,
                        "L4 policy fails closed in part"
                    );
                }
                self.next.insert_policy(policy);
                Ok(())
            }
            Err(reason) if self.next.policies.contains_key(name) => Err(reason),
            Err(reason) => {
                // No last good version to keep: what the policy wanted to restrict is unknown, so its scope is closed.
                let mut closed = Policy::deny_all(name, reason.clone());
                match scope {
                    Some(security_wire::Scope::Global) => closed.scope = Scope::Global,
                    Some(security_wire::Scope::WorkloadSelector) => closed.scope = Scope::WorkloadSelector,
                    Some(security_wire::Scope::Namespace) | None => {}
                }
                tracing::error!(policy = name, reason, scope = ?closed.scope, "L4 policy unreadable: its scope is denied");
                self.next.insert_policy(closed);
                Err(reason)
            }
        }
    }
}

fn check_name(resource: &str, content: &str) -> Result<(), String> {
    if resource == content {
        return Ok(());
    }
    Err(DecodeError::Name { resource: resource.to_owned(), content: content.to_owned() }.to_string())
}
