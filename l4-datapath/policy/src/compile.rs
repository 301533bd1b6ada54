//! NetworkPolicies -> entries of the policy map.
use std::collections::{BTreeMap, BTreeSet};

use compat_objects::core::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicySpec};
use compat_objects::{Fault, HasMeta as _, Kind, ObjectKey, ObjectSet};
use strata_abi::identity::UNMANAGED;
use strata_abi::{Addr, Identity, PolicyEntry, PolicyKey, direction, policy_verdict};

use crate::cidr::Cidr;
use crate::identity::{IdentityAllocator, IdentityInfo, PodTraits};
use crate::network::Network;
use crate::ports::{PortPrefix, Ports};
use crate::rules::{RuleNumbers, RuleRef};
use crate::selector::Selector;

/// What the identity and policy maps of one node should hold, and what the numbers in them mean.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compiled {
    /// By number, reserved ones included.
    pub identities: Vec<IdentityInfo>,
    /// Contents of `IDENTITIES`: (network address, prefix length of 128).
    pub by_address: BTreeMap<(Addr, u32), Identity>,
    /// Contents of `POLICY`: (key, prefix length). Bits after the prefix are zero.
    pub policy: BTreeMap<(PolicyKey, u32), PolicyEntry>,
    /// By [`PolicyEntry::rule`]; 0 is no rule. Freed numbers hold the default value.
    pub rules: Vec<RuleRef>,
    /// Pod uid ([`crate::pod_uid`]) -> identity, for every pod with an address of its own, wherever it runs.
    pub pod_identity: BTreeMap<String, u32>,
    /// Policies or parts of them that are not in force as written. What is unclear never allows anything.
    pub faults: Vec<Fault>,
}

/// Why there is no table at all; what was in force should stay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not even the default entries fit: isolation could not be enforced.
    #[error("{isolated} isolated (identity, direction) pairs need one policy map entry each, the map holds {capacity}")]
    TooManyIsolated { isolated: usize, capacity: usize },
    #[error("the range of security identities is used up")]
    OutOfIdentities,
}

/// Compiles what `node` needs: ingress of every identity (a caller's connect hook asks for the destination too),
/// egress of the identities with a pod on `node`. `capacity` is the number of entries the policy map holds.
///
/// # Errors
/// See [`Error`]. Everything smaller is in [`Compiled::faults`].
pub fn compile(
    objects: &ObjectSet,
    node: &str,
    capacity: usize,
    allocator: &mut IdentityAllocator,
) -> Result<Compiled, Error> {
    let mut network = Network::build(objects, node, allocator)?;
    let mut faults = std::mem::take(&mut network.faults);
    let policies: Vec<Policy> =
        objects.network_policies().map(|policy| Policy::compile(policy, &network, &mut faults)).collect();
    let mut tables: Vec<Table> = Vec::new();
    for (traits, id) in &network.pods {
        for direction in [direction::INGRESS, direction::EGRESS] {
            if direction == direction::INGRESS || network.local.contains(id) {
                tables.extend(Table::compile(traits, *id, direction, &policies, &network));
            }
        }
    }
    if tables.len() + usize::from(network.clash) > capacity {
        return Err(Error::TooManyIsolated { isolated: tables.len(), capacity });
    }
    let mut numbers = allocator.rules.begin();
    let mut policy = fill(&mut tables, capacity - usize::from(network.clash), &mut numbers, &mut faults);
    if network.clash {
        // Which pod would be reached cannot be told, so whose policy counts neither: nobody reaches it.
        let any = PolicyKey { subject: UNMANAGED, peer: 0, direction: direction::INGRESS, proto: 0, port_be: [0, 0] };
        let deny = PolicyEntry { verdict: policy_verdict::DENY, _pad: [0; 3], rule: 0 };
        policy.insert((any, PolicyKey::PREFIX_ANY_PROTO), deny);
    }
    for fault in &mut faults {
        locate(fault, objects);
    }
    Ok(Compiled {
        policy,
        rules: allocator.rules.finish(numbers),
        identities: network.identities,
        by_address: network.by_address,
        pod_identity: network.pod_identity,
        faults,
    })
}

fn locate(fault: &mut Fault, objects: &ObjectSet) {
    let Some((kind, rest)) = fault.object.split_once(' ') else { return };
    let Some((namespace, name)) = rest.split_once('/') else { return };
    let kind = if kind == "Pod" { Kind::Pod } else { Kind::NetworkPolicy };
    *fault = objects.located(fault.clone(), &ObjectKey::new(kind, namespace, name));
}

/// A policy with its selectors resolved to identities.
struct Policy {
    namespace: String,
    name: String,
    subjects: Selector,
    /// By direction; None: the policy says nothing about it.
    ingress: Option<Vec<Rule>>,
    egress: Option<Vec<Rule>>,
}

struct Rule {
    /// None: everybody.
    peers: Option<BTreeSet<u32>>,
    ports: Ports,
}

impl Policy {
    fn compile(policy: &NetworkPolicy, network: &Network, faults: &mut Vec<Fault>) -> Policy {
        let object = ObjectKey::new(Kind::NetworkPolicy, policy.namespace(), policy.name()).to_string();
        let mut fault = |field: String, reason: String| faults.push(Fault::error(&object, field, reason));
        let spec = policy.spec.clone().unwrap_or_default();
        let subjects = spec.pod_selector.as_ref().map_or(Ok(Selector::default()), Selector::compile);
        let subjects = subjects.unwrap_or_else(|(field, reason)| {
            // Which pods are meant is unclear: all of the namespace are isolated.
            fault(
                format!("spec.podSelector.{field}"),
                format!("{reason}; the policy isolates every pod of its namespace"),
            );
            Selector::default()
        });
        let (ingress, egress) = directions(&spec);
        let namespace = policy.namespace();
        let ingress = ingress.then(|| {
            let rules = spec.ingress.iter().flatten().enumerate().map(|(i, rule)| {
                let field = format!("spec.ingress[{i}]");
                Rule {
                    peers: peers(rule.from.as_deref(), &format!("{field}.from"), namespace, network, &mut fault),
                    ports: Ports::compile(rule.ports.as_deref(), &mut |f, reason| {
                        fault(format!("{field}.{f}"), reason)
                    }),
                }
            });
            rules.collect()
        });
        let egress = egress.then(|| {
            let rules = spec.egress.iter().flatten().enumerate().map(|(i, rule)| {
                let field = format!("spec.egress[{i}]");
                Rule {
                    peers: peers(rule.to.as_deref(), &format!("{field}.to"), namespace, network, &mut fault),
                    ports: Ports::compile(rule.ports.as_deref(), &mut |f, reason| {
                        fault(format!("{field}.{f}"), reason)
                    }),
                }
            });
            rules.collect()
        });
        Policy { namespace: namespace.to_owned(), name: policy.name().to_owned(), subjects, ingress, egress }
    }

    fn rules(&self, direction: u8) -> Option<&Vec<Rule>> {
        if direction == direction::EGRESS { self.egress.as_ref() } else { self.ingress.as_ref() }
    }
}

/// Which directions the policy is about: without `policyTypes` ingress always, egress if it has rules.
fn directions(spec: &NetworkPolicySpec) -> (bool, bool) {
    match spec.policy_types.as_deref() {
        Some(types) if !types.is_empty() => (types.iter().any(|t| t == "Ingress"), types.iter().any(|t| t == "Egress")),
        _ => (true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty())),
    }
}

/// Identities a rule's peers mean; None: everybody. What is malformed means nobody.
fn peers(
    peers: Option<&[NetworkPolicyPeer]>,
    field: &str,
    namespace: &str,
    network: &Network,
    fault: &mut dyn FnMut(String, String),
) -> Option<BTreeSet<u32>> {
    let peers = peers.filter(|peers| !peers.is_empty())?;
    let mut identities = BTreeSet::new();
    for (i, peer) in peers.iter().enumerate() {
        match one_peer(peer, namespace, network) {
            Ok(found) => identities.extend(found),
            Err((below, reason)) => fault(format!("{field}[{i}].{below}"), format!("{reason}; it allows nobody")),
        }
    }
    Some(identities)
}

fn one_peer(peer: &NetworkPolicyPeer, namespace: &str, network: &Network) -> Result<BTreeSet<u32>, (String, String)> {
    if let Some(block) = &peer.ip_block {
        if peer.pod_selector.is_some() || peer.namespace_selector.is_some() {
            return Err(("ipBlock".to_owned(), "stands alone, without selectors".to_owned()));
        }
        let parse = |field: String, text: &str| {
            Cidr::parse(text).map_err(|_| (field, format!("{text:?} is no CIDR block such as 10.0.0.0/8")))
        };
        let whole = parse("ipBlock.cidr".to_owned(), &block.cidr)?;
        let except = block.except.iter().flatten().enumerate();
        let except: Vec<Cidr> =
            except.map(|(i, text)| parse(format!("ipBlock.except[{i}]"), text)).collect::<Result<_, _>>()?;
        // Every block and exception has an identity, so an address's own one is in the block and no exception or not.
        let inside = network
            .cidrs
            .iter()
            .filter(|(cidr, _)| whole.contains(cidr) && !except.iter().any(|except| except.contains(cidr)));
        let pods = network.pods.iter().filter(|(traits, _)| traits.is_in(&whole, &except));
        return Ok(inside.map(|(_, id)| *id).chain(pods.map(|(_, id)| *id)).collect());
    }
    let at = |name: &'static str| move |(field, reason): (String, String)| (format!("{name}.{field}"), reason);
    let pods = peer.pod_selector.as_ref().map(Selector::compile).transpose().map_err(at("podSelector"))?;
    let namespaces =
        peer.namespace_selector.as_ref().map(Selector::compile).transpose().map_err(at("namespaceSelector"))?;
    if pods.is_none() && namespaces.is_none() {
        return Err(("".to_owned(), "names nobody: podSelector, namespaceSelector or ipBlock is needed".to_owned()));
    }
    let chosen = network.pods.iter().filter(|(traits, _)| {
        let in_scope = match &namespaces {
            Some(selector) => selector.matches(&traits.namespace_labels),
            None => traits.namespace == namespace,
        };
        in_scope && pods.as_ref().is_none_or(|selector| selector.matches(&traits.labels))
    });
    Ok(chosen.map(|(_, id)| *id).collect())
}

/// Entries of one isolated (identity, direction).
struct Table {
    subject: u32,
    default: RuleRef,
    allows: BTreeMap<(PolicyKey, u32), RuleRef>,
    /// How many entries each policy asked for.
    demand: BTreeMap<String, usize>,
}

impl Table {
    /// None: nothing isolates the identity in this direction.
    fn compile(
        traits: &PodTraits,
        subject: u32,
        direction: u8,
        policies: &[Policy],
        network: &Network,
    ) -> Option<Table> {
        let selecting: Vec<&Policy> = policies
            .iter()
            .filter(|p| {
                p.namespace == traits.namespace && p.rules(direction).is_some() && p.subjects.matches(&traits.labels)
            })
            .collect();
        if selecting.is_empty() {
            return None;
        }
        let names = selecting.iter().map(|policy| policy.name.clone()).collect();
        let default = RuleRef { namespace: traits.namespace.clone(), policies: names, direction, index: None };
        let mut table = Table { subject, default, allows: BTreeMap::new(), demand: BTreeMap::new() };
        for policy in selecting {
            for (index, rule) in policy.rules(direction).into_iter().flatten().enumerate() {
                let name = RuleRef {
                    namespace: policy.namespace.clone(),
                    policies: vec![policy.name.clone()],
                    direction,
                    index: Some(index),
                };
                table.add(rule, &name, traits, network);
            }
        }
        Some(table)
    }

    fn add(&mut self, rule: &Rule, name: &RuleRef, subject: &PodTraits, network: &Network) {
        let egress = name.direction == direction::EGRESS;
        let names_at_subject = (!egress).then_some(&subject.named_ports);
        // Names are looked up at the destination: for egress that is each peer pod.
        let by_peer = egress && rule.ports.has_names();
        match &rule.peers {
            None => self.allow(0, name, &rule.ports.prefixes(names_at_subject)),
            Some(peers) if !by_peer => {
                let prefixes = rule.ports.prefixes(names_at_subject);
                peers.iter().for_each(|peer| self.allow(*peer, name, &prefixes));
            }
            Some(peers) => {
                let blocks = network.cidrs.values().filter(|id| peers.contains(id));
                blocks.for_each(|peer| self.allow(*peer, name, &rule.ports.prefixes(None)));
            }
        }
        if by_peer {
            let wanted = |id: &u32| rule.peers.as_ref().is_none_or(|peers| peers.contains(id));
            for (traits, peer) in network.pods.iter().filter(|(_, id)| wanted(id)) {
                self.allow(*peer, name, &rule.ports.prefixes(Some(&traits.named_ports)));
            }
        }
    }

    fn allow(&mut self, peer: u32, name: &RuleRef, prefixes: &[PortPrefix]) {
        for prefix in prefixes {
            let key = PolicyKey {
                subject: self.subject,
                peer,
                direction: name.direction,
                proto: prefix.proto,
                port_be: prefix.port.to_be_bytes(),
            };
            self.allows.entry((key, prefix.prefix_len)).or_insert_with(|| name.clone());
            *self.demand.entry(name.policies.join(",")).or_default() += 1;
        }
    }
}

/// Fills the map: every default first, then allows as long as whole tables fit. An identity whose rules do not fit
/// keeps its default alone, and so is denied everything.
fn fill(
    tables: &mut [Table],
    capacity: usize,
    numbers: &mut RuleNumbers,
    faults: &mut Vec<Fault>,
) -> BTreeMap<(PolicyKey, u32), PolicyEntry> {
    let mut map = BTreeMap::new();
    for table in tables.iter() {
        let key = PolicyKey {
            subject: table.subject,
            peer: 0,
            direction: table.default.direction,
            proto: 0,
            port_be: [0, 0],
        };
        let rule = numbers.number(&table.default);
        let entry = PolicyEntry { verdict: policy_verdict::DENY_DEFAULT, _pad: [0; 3], rule };
        map.insert((key, PolicyKey::PREFIX_ANY_PROTO), entry);
    }
    // Small tables first: one policy gone wild does not take the others' room.
    tables.sort_by_key(|table| (table.allows.len(), table.subject, table.default.direction));
    for table in tables.iter() {
        let added = table.allows.keys().filter(|key| !map.contains_key(*key)).count();
        if map.len() + added > capacity {
            faults.push(overflow(table, capacity));
            continue;
        }
        for (key, name) in &table.allows {
            let rule = numbers.number(name);
            // An allow of everything replaces the default: same key.
            map.insert(*key, PolicyEntry { verdict: policy_verdict::ALLOW, _pad: [0; 3], rule });
        }
    }
    map
}

fn overflow(table: &Table, capacity: usize) -> Fault {
    let default = &table.default;
    let greedy = table.demand.iter().max_by_key(|(_, entries)| **entries).map(|(policy, _)| policy.clone());
    let policy = greedy.unwrap_or_else(|| default.policies.join(","));
    let object = ObjectKey::new(Kind::NetworkPolicy, default.namespace.clone(), policy).to_string();
    let direction = default.direction_name();
    let reason = format!(
        "its rules expand to {} entries and the policy map holds {capacity}: all {direction} of identity {} is denied",
        table.allows.len(),
        table.subject
    );
    Fault::error(object, format!("spec.{direction}"), reason)
}
