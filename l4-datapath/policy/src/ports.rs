//! Ports of a policy rule -> prefixes of the policy map's key.
use std::collections::BTreeMap;

use compat_objects::core::{IntOrString, NetworkPolicyPort};
use strata_abi::{PolicyKey, proto};

/// What part of a key's protocol and port counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PortPrefix {
    pub(crate) proto: u8,
    pub(crate) port: u16,
    pub(crate) prefix_len: u32,
}

impl PortPrefix {
    /// Any protocol.
    pub(crate) const ANY: PortPrefix =
        PortPrefix { proto: proto::ANY, port: 0, prefix_len: PolicyKey::PREFIX_ANY_PROTO };
}

/// Named ports of a pod: (name, protocol) -> number.
pub(crate) type NamedPorts = BTreeMap<(String, u8), u16>;

/// One entry of a rule's `ports`, or all ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ports {
    All,
    AnyOf(Vec<Port>),
}

/// One port specification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    Protocol(u8),
    Range(u8, u16, u16),
    /// A container port's name, resolved at the destination.
    Named(u8, String),
}

/// IP protocol number of a Kubernetes protocol name (absent: TCP).
pub(crate) fn protocol(name: Option<&str>) -> Option<u8> {
    match name.unwrap_or("TCP") {
        "TCP" => Some(proto::TCP),
        "UDP" => Some(proto::UDP),
        "SCTP" => Some(proto::SCTP),
        _ => None,
    }
}

impl Ports {
    /// Unusable entries match nothing; each is told to `fault` with its field and reason.
    pub(crate) fn compile(ports: Option<&[NetworkPolicyPort]>, fault: &mut dyn FnMut(String, String)) -> Ports {
        let Some(ports) = ports.filter(|ports| !ports.is_empty()) else { return Ports::All };
        let compiled = ports.iter().enumerate().filter_map(|(i, port)| {
            let usable = Port::compile(port);
            usable.map_err(|(field, reason)| fault(format!("ports[{i}].{field}"), reason)).ok()
        });
        Ports::AnyOf(compiled.collect())
    }

    pub(crate) fn has_names(&self) -> bool {
        matches!(self, Ports::AnyOf(ports) if ports.iter().any(|port| matches!(port, Port::Named(..))))
    }

    /// The key prefixes, with names looked up in `named`; without it names match nothing.
    pub(crate) fn prefixes(&self, named: Option<&NamedPorts>) -> Vec<PortPrefix> {
        let Ports::AnyOf(ports) = self else { return vec![PortPrefix::ANY] };
        let mut prefixes = Vec::new();
        for port in ports {
            match port {
                Port::Protocol(proto) => {
                    prefixes.push(PortPrefix { proto: *proto, port: 0, prefix_len: PolicyKey::PREFIX_ANY_PORT });
                }
                Port::Range(proto, first, last) => split(*proto, *first, *last, &mut prefixes),
                Port::Named(proto, name) => {
                    let number = named.and_then(|named| named.get(&(name.clone(), *proto)));
                    prefixes.extend(number.map(|number| PortPrefix {
                        proto: *proto,
                        port: *number,
                        prefix_len: PolicyKey::PREFIX_FULL,
                    }));
                }
            }
        }
        prefixes
    }
}

impl Port {
    fn compile(port: &NetworkPolicyPort) -> Result<Port, (&'static str, String)> {
        let shown = port.protocol.as_deref();
        let proto = protocol(shown).ok_or_else(|| ("protocol", format!("{:?} is unknown", shown.unwrap_or(""))))?;
        let number = |field: &'static str, number: i32| {
            let usable = u16::try_from(number).ok().filter(|number| *number > 0);
            usable.ok_or_else(|| (field, format!("{number} is no port")))
        };
        match (&port.port, port.end_port) {
            (None, None) => Ok(Port::Protocol(proto)),
            (Some(IntOrString::String(name)), None) => Ok(Port::Named(proto, name.clone())),
            (Some(IntOrString::Int(first)), last) => {
                let first = number("port", *first)?;
                let last = last.map_or(Ok(first), |last| number("endPort", last))?;
                if last < first {
                    return Err(("endPort", format!("{last} is below port {first}")));
                }
                Ok(Port::Range(proto, first, last))
            }
            (_, Some(_)) => Err(("endPort", "needs a numeric port".to_owned())),
        }
    }
}

/// The fewest prefixes that cover `first..=last` exactly.
fn split(proto: u8, first: u16, last: u16, prefixes: &mut Vec<PortPrefix>) {
    let (mut next, last) = (u32::from(first), u32::from(last));
    while next <= last {
        // The largest block that starts at `next` (alignment) and ends by `last`.
        let mut bits = next.trailing_zeros().min(16);
        while next + (1 << bits) - 1 > last {
            bits -= 1;
        }
        // `next` never exceeds `last`, which was a u16.
        prefixes.push(PortPrefix { proto, port: next as u16, prefix_len: PolicyKey::PREFIX_FULL - bits });
        next += 1 << bits;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_covered_exactly() {
        for (first, last) in [(1, 65535), (80, 80), (8000, 8999), (1, 2), (32768, 65535), (65535, 65535), (1023, 1025)]
        {
            let mut prefixes = Vec::new();
            split(6, first, last, &mut prefixes);
            let covers = |port: u16| {
                prefixes
                    .iter()
                    .filter(|p| {
                        let bits = PolicyKey::PREFIX_FULL - p.prefix_len;
                        u32::from(port) >> bits == u32::from(p.port) >> bits
                    })
                    .count()
            };
            for port in 0..=65535 {
                assert_eq!(covers(port), usize::from((first..=last).contains(&port)), "{first}-{last}: {port}");
            }
            assert!(prefixes.len() <= 30);
        }
    }
}
