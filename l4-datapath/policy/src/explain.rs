//! One question answered straight from the objects, rule by rule. Shares no code with the compiler of the tables
//! except what reads a pod's own fields.
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use compat_objects::core::{IntOrString, LabelSelector, NetworkPolicyPeer, NetworkPolicyPort, Pod};
use compat_objects::{HasMeta as _, ObjectSet};
use ipnet::IpNet;
use strata_abi::{direction, proto};

use crate::network::{addresses, is_subject, named_ports, namespace_labels};
use crate::rules::RuleRef;

/// One side of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Party {
    Pod {
        namespace: String,
        name: String,
    },
    /// An address; if it is a pod's, the pod is meant.
    Address(IpAddr),
}

/// What the policies of one side say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// No policy isolates this side in this direction, or it is no pod.
    NotIsolated,
    /// The first rule that allows.
    Allowed(RuleRef),
    /// Isolated by these policies, and no rule allows.
    Denied(RuleRef),
    /// The pod does not exist: nothing is allowed.
    Missing(String),
}

impl Side {
    pub fn allows(&self) -> bool {
        matches!(self, Side::NotIsolated | Side::Allowed(_))
    }
}

/// The answer: a connection needs the egress of the source and the ingress of the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    pub egress: Side,
    pub ingress: Side,
}

impl Explanation {
    pub fn allows(&self) -> bool {
        self.egress.allows() && self.ingress.allows()
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Side::NotIsolated => f.write_str("allowed: no policy isolates it"),
            Side::Allowed(rule) => write!(f, "allowed by {rule}"),
            Side::Denied(rule) => write!(f, "denied by {rule}"),
            Side::Missing(what) => write!(f, "denied: {what} does not exist"),
        }
    }
}

/// May `from` open a connection (or send a first packet) of protocol `proto` to `port` of `to`? `port` is the one
/// the destination listens on, not a service's.
pub fn explain(objects: &ObjectSet, from: &Party, to: &Party, proto: u8, port: u16) -> Explanation {
    let (source, destination) = (resolve(objects, from), resolve(objects, to));
    let question = Question { objects, proto, port };
    let missing = |party: &Resolved<'_>| match party {
        Resolved::Missing(what) => Some(what.clone()),
        _ => None,
    };
    if let Some(what) = missing(&source).or_else(|| missing(&destination)) {
        return Explanation { egress: Side::Missing(what.clone()), ingress: Side::Missing(what) };
    }
    Explanation {
        egress: question.side(&source, &destination, direction::EGRESS),
        ingress: question.side(&destination, &source, direction::INGRESS),
    }
}

enum Resolved<'a> {
    Pod(&'a Pod),
    Address(IpAddr),
    Missing(String),
}

impl Resolved<'_> {
    fn addresses(&self) -> BTreeSet<IpAddr> {
        match self {
            Resolved::Pod(pod) => addresses(pod),
            Resolved::Address(address) => BTreeSet::from([*address]),
            Resolved::Missing(_) => BTreeSet::new(),
        }
    }
}

fn resolve<'a>(objects: &'a ObjectSet, party: &Party) -> Resolved<'a> {
    match party {
        Party::Pod { namespace, name } => match objects.pod(namespace, name) {
            Some(pod) if is_subject(pod) => Resolved::Pod(pod),
            // A pod on the host's network is its node.
            Some(pod) => addresses(pod).first().map_or_else(
                || Resolved::Missing(format!("an address of pod {namespace}/{name}")),
                |address| Resolved::Address(*address),
            ),
            None => Resolved::Missing(format!("pod {namespace}/{name}")),
        },
        Party::Address(address) => {
            let owner = objects.pods().find(|pod| is_subject(pod) && addresses(pod).contains(address));
            owner.map_or(Resolved::Address(*address), |pod| Resolved::Pod(pod))
        }
    }
}

struct Question<'a> {
    objects: &'a ObjectSet,
    proto: u8,
    port: u16,
}

impl Question<'_> {
    fn side(&self, subject: &Resolved<'_>, peer: &Resolved<'_>, direction: u8) -> Side {
        let Resolved::Pod(pod) = subject else { return Side::NotIsolated };
        let namespace = pod.namespace();
        // Named ports are the destination's, whichever side is asked.
        let destination = match (direction, peer) {
            (direction::INGRESS, _) => Some(*pod),
            (_, Resolved::Pod(peer)) => Some(*peer),
            _ => None,
        };
        let mut isolating = Vec::new();
        let mut allowing = None;
        for policy in self.objects.network_policies_in(namespace) {
            let Some(spec) = &policy.spec else { continue };
            if !spec.pod_selector.as_ref().is_none_or(|selector| selects(selector, pod.metadata.labels.as_ref())) {
                continue;
            }
            let types = spec.policy_types.clone().unwrap_or_default();
            let about = match direction {
                direction::INGRESS => types.is_empty() || types.contains(&"Ingress".to_owned()),
                _ if types.is_empty() => spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()),
                _ => types.contains(&"Egress".to_owned()),
            };
            if !about {
                continue;
            }
            isolating.push(policy.name().to_owned());
            let fits = |peers: &Option<Vec<NetworkPolicyPeer>>, ports: &Option<Vec<NetworkPolicyPort>>| {
                let (peers, ports) = (peers.as_deref().unwrap_or_default(), ports.as_deref().unwrap_or_default());
                let who = peers.is_empty() || peers.iter().any(|wanted| self.is_peer(wanted, peer, namespace));
                who && (ports.is_empty() || ports.iter().any(|wanted| self.is_port(wanted, destination)))
            };
            let hit = match direction {
                direction::INGRESS => spec.ingress.iter().flatten().position(|rule| fits(&rule.from, &rule.ports)),
                _ => spec.egress.iter().flatten().position(|rule| fits(&rule.to, &rule.ports)),
            };
            if let (Some(index), None) = (hit, &allowing) {
                allowing = Some(RuleRef {
                    namespace: namespace.to_owned(),
                    policies: vec![policy.name().to_owned()],
                    direction,
                    index: Some(index),
                });
            }
        }
        match (allowing, isolating.is_empty()) {
            (Some(rule), _) => Side::Allowed(rule),
            (None, true) => Side::NotIsolated,
            (None, false) => {
                Side::Denied(RuleRef { namespace: namespace.to_owned(), policies: isolating, direction, index: None })
            }
        }
    }

    fn is_peer(&self, wanted: &NetworkPolicyPeer, peer: &Resolved<'_>, namespace: &str) -> bool {
        match (peer, &wanted.ip_block) {
            (_, Some(block)) => {
                let addresses = peer.addresses();
                let any_in = |net: &IpNet| addresses.iter().any(|address| net.contains(address));
                let holds = |text: &String| text.parse::<IpNet>().is_ok_and(|net| any_in(&net));
                wanted.pod_selector.is_none()
                    && wanted.namespace_selector.is_none()
                    && holds(&block.cidr)
                    && !block.except.iter().flatten().any(holds)
            }
            (Resolved::Pod(pod), None) => {
                let there = match &wanted.namespace_selector {
                    Some(selector) => selects(selector, Some(&namespace_labels(self.objects, pod.namespace()))),
                    None => wanted.pod_selector.is_some() && pod.namespace() == namespace,
                };
                let labels = pod.metadata.labels.as_ref();
                there && wanted.pod_selector.as_ref().is_none_or(|selector| selects(selector, labels))
            }
            _ => false,
        }
    }

    fn is_port(&self, wanted: &NetworkPolicyPort, destination: Option<&Pod>) -> bool {
        let protocol = match wanted.protocol.as_deref() {
            None | Some("TCP") => proto::TCP,
            Some("UDP") => proto::UDP,
            Some("SCTP") => proto::SCTP,
            Some(_) => return false,
        };
        protocol == self.proto
            && match (&wanted.port, wanted.end_port) {
                (None, None) => true,
                (Some(IntOrString::Int(first)), last) => {
                    (*first..=last.unwrap_or(*first)).contains(&i32::from(self.port)) && *first > 0
                }
                (Some(IntOrString::String(name)), None) => destination
                    .and_then(|pod| named_ports(pod).get(&(name.clone(), protocol)).copied())
                    .is_some_and(|number| number == self.port),
                (_, Some(_)) => false,
            }
    }
}

fn selects(selector: &LabelSelector, labels: Option<&BTreeMap<String, String>>) -> bool {
    let get = |key: &str| labels.and_then(|labels| labels.get(key));
    selector.match_labels.iter().flatten().all(|(key, value)| get(key) == Some(value))
        && selector.match_expressions.iter().flatten().all(|expression| {
            let values = expression.values.as_deref().unwrap_or_default();
            let value = get(&expression.key);
            match expression.operator.as_str() {
                "In" => value.is_some_and(|value| values.contains(value)),
                "NotIn" => !value.is_some_and(|value| values.contains(value)),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}
