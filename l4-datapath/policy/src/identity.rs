//! Numeric security identities: which exist, and their stable numbers.
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use strata_abi::identity;

use crate::cidr::Cidr;
use crate::ports::NamedPorts;
use crate::rules::RuleTable;
use crate::selector::Labels;

/// Everything policy can ask of a pod. Pods that agree in all of it share an identity.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct PodTraits {
    pub(crate) namespace: String,
    pub(crate) labels: Labels,
    pub(crate) namespace_labels: Labels,
    /// Named ports differ between pods of equal labels only in odd clusters; policy can tell them apart, so must we.
    #[serde(with = "pairs")]
    pub(crate) named_ports: NamedPorts,
    /// Of the blocks that policies name, those that one of its addresses is in.
    #[serde(default)]
    pub(crate) blocks: BTreeSet<Cidr>,
}

impl PodTraits {
    pub(crate) fn is_in(&self, block: &Cidr, except: &[Cidr]) -> bool {
        self.blocks.contains(block) && !except.iter().any(|except| self.blocks.contains(except))
    }
}

/// A map with structured keys as a list of pairs: JSON has only text as keys.
mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<K: Serialize, V: Serialize, S: Serializer>(
        map: &BTreeMap<K, V>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        s.collect_seq(map)
    }

    pub(super) fn deserialize<'de, K, V, D>(d: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        Vec::<(K, V)>::deserialize(d).map(|pairs| pairs.into_iter().collect())
    }
}

/// What an identity stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentitySource {
    /// Pods of these labels.
    Pods,
    /// Addresses of a block that a policy names and no more specific one covers.
    Cidr(String),
    /// A node whose address a policy's block covers.
    Node(String),
    /// One of [`strata_abi::identity`].
    Reserved(&'static str),
}

/// An identity in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityInfo {
    pub id: u32,
    pub source: IdentitySource,
    /// Empty for all but pods.
    pub namespace: String,
    pub labels: BTreeMap<String, String>,
    pub namespace_labels: BTreeMap<String, String>,
}

/// Gives numbers to identities and rules, the same ones as long as they are in use. Kept by the caller from one
/// compilation to the next, and, serialised, from one run to the next.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct IdentityAllocator {
    #[serde(with = "pairs")]
    pods: BTreeMap<PodTraits, u32>,
    #[serde(with = "pairs")]
    cidrs: BTreeMap<Cidr, u32>,
    /// The number given last, so that a freed number rests as long as possible.
    last_pod: u32,
    last_cidr: u32,
    pub(crate) rules: RuleTable,
}

impl IdentityAllocator {
    /// Forgets what is not wanted any more, and numbers what is. None: the range is used up.
    pub(crate) fn assign(
        &mut self,
        pods: BTreeSet<PodTraits>,
        cidrs: &BTreeSet<Cidr>,
    ) -> Option<(BTreeMap<PodTraits, u32>, BTreeMap<Cidr, u32>)> {
        const PODS: (u32, u32) = (identity::FIRST_POD, identity::FIRST_CIDR - 1);
        const CIDRS: (u32, u32) = (identity::FIRST_CIDR, u32::MAX);
        self.pods.retain(|traits, _| pods.contains(traits));
        self.cidrs.retain(|cidr, _| cidrs.contains(cidr));
        number(&mut self.pods, pods, &mut self.last_pod, PODS)?;
        number(&mut self.cidrs, cidrs.iter().copied(), &mut self.last_cidr, CIDRS)?;
        Some((self.pods.clone(), self.cidrs.clone()))
    }
}

fn number<K: Ord>(
    numbers: &mut BTreeMap<K, u32>,
    wanted: impl IntoIterator<Item = K>,
    last: &mut u32,
    (first, end): (u32, u32),
) -> Option<()> {
    let mut taken: BTreeSet<u32> = numbers.values().copied().collect();
    for key in wanted {
        if numbers.contains_key(&key) {
            continue;
        }
        if taken.len() > (end - first) as usize {
            return None;
        }
        loop {
            *last = if *last < first || *last >= end { first } else { *last + 1 };
            if taken.insert(*last) {
                break;
            }
        }
        numbers.insert(key, *last);
    }
    Some(())
}

/// The uid under which a pod is known in [`crate::Compiled::pod_identity`] and to the proxy.
pub fn pod_uid(namespace: &str, name: &str) -> String {
    format!("Kubernetes//Pod/{namespace}/{name}")
}
