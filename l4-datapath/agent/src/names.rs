//! Names for addresses and numbers in flows: one immutable table, replaced when objects change.
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use compat_objects::{HasMeta as _, ObjectSet};
use l4_flow::{Endpoint, PolicyName, Resolver};
use l4_policy::{IdentitySource, RuleRef};
use strata_abi::ServiceKey;

use crate::objects;
use crate::tables::InForce;

/// The table in force, shared by the flow reader and the agent.
pub(crate) type SharedNames = Arc<ArcSwap<Names>>;

#[derive(Debug)]
struct PodName {
    namespace: String,
    name: String,
    workload: String,
    labels: BTreeMap<String, String>,
    identity: u32,
}

/// The table.
#[derive(Debug, Default)]
pub(crate) struct Names {
    pods: HashMap<IpAddr, PodName>,
    /// Words for identities that are no pods'.
    kinds: HashMap<u32, String>,
    services: BTreeMap<ServiceKey, String>,
    rules: Vec<RuleRef>,
    nodes: BTreeMap<IpAddr, String>,
}

impl Names {
    /// Reads the names out of what is in force, or about to be.
    pub(crate) fn build(objects: &ObjectSet, in_force: &InForce, nodes: BTreeMap<IpAddr, String>) -> Names {
        let mut pods = HashMap::new();
        for pod in objects.pods() {
            let uid = l4_policy::pod_uid(pod.namespace(), pod.name());
            let identity = in_force.policy.pod_identity.get(&uid).copied().unwrap_or_default();
            for ip in pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten()) {
                let Ok(address) = ip.ip.parse::<IpAddr>() else { continue };
                let name = PodName {
                    namespace: pod.namespace().to_owned(),
                    name: pod.name().to_owned(),
                    workload: objects::workload(pod).to_owned(),
                    labels: pod.metadata.labels.clone().unwrap_or_default(),
                    identity,
                };
                pods.insert(address, name);
            }
        }
        let kinds = in_force.policy.identities.iter().filter_map(|info| {
            let word = match &info.source {
                IdentitySource::Pods => return None,
                IdentitySource::Cidr(block) => format!("cidr:{block}"),
                IdentitySource::Node(name) => format!("node:{name}"),
                IdentitySource::Reserved(word) => (*word).to_owned(),
            };
            Some((info.id, word))
        });
        Names {
            pods,
            kinds: kinds.collect(),
            services: in_force.services.names.clone(),
            rules: in_force.policy.rules.clone(),
            nodes,
        }
    }
}

impl Resolver for Names {
    fn endpoint(&self, ip: IpAddr, port: u16, identity: u32) -> Endpoint {
        let unknown = Endpoint::unknown(ip, port, identity);
        if let Some(pod) = self.pods.get(&ip) {
            return Endpoint {
                identity: if identity == 0 { pod.identity } else { identity },
                namespace: pod.namespace.clone(),
                pod: pod.name.clone(),
                workload: pod.workload.clone(),
                labels: pod.labels.clone(),
                ..unknown
            };
        }
        if let Some(node) = self.nodes.get(&ip) {
            return Endpoint { kind: "node".into(), workload: node.clone(), ..unknown };
        }
        let address = ServiceKey { addr: ip.into(), port: 0, proto: 0, _pad: 0 };
        if self.services.contains_key(&address) {
            return Endpoint { kind: "service".into(), ..unknown };
        }
        Endpoint { kind: self.kinds.get(&identity).cloned().unwrap_or_default(), ..unknown }
    }

    fn service(&self, ip: IpAddr, port: u16, proto: u8) -> Option<String> {
        self.services.get(&ServiceKey { addr: ip.into(), port, proto, _pad: 0 }).cloned()
    }

    fn rule(&self, rule: u32) -> Option<PolicyName> {
        let found = self.rules.get(rule as usize).filter(|found| !found.policies.is_empty())?;
        Some(PolicyName {
            namespace: found.namespace.clone(),
            names: found.policies.clone(),
            direction: found.direction_name().to_owned(),
            rule: found.index,
            text: found.to_string(),
        })
    }
}
