//! `istio.security.Authorization` as a plain type. `l7-authz` evaluates it.
//!
//! A value that cannot be read must not widen what a policy permits: it makes its match *unreadable*, which
//! never matches in an ALLOW and always matches in a DENY. A policy that cannot be read at all and has no
//! previous version is replaced by one that denies its scope ([`Policy::unreadable`]).
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Serialize, Serializer};
use xds_proto::istio::security as wire;

use super::decode::{DecodeError, ip, known};

/// One L4 policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// `namespace/name`.
    #[serde(skip)]
    pub key: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub scope: Scope,
    pub action: Action,
    /// Evaluated and logged, never enforced.
    pub dry_run: bool,
    /// Any.
    pub rules: Vec<Rule>,
    /// Why parts of it fail closed; empty for a policy that was read whole.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<Unreadable>,
}

/// A part of a policy that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    pub field: &'static str,
    pub reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Scope {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Action {
    Allow,
    Deny,
}

/// All of its clauses must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Rule {
    pub clauses: Vec<Clause>,
}

/// Any of its matches must hold; none at all holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Clause {
    pub matches: Vec<Match>,
}

/// All of its fields must hold; a list holds if any value does, a `not_` list if none does.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Match {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<StringMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_namespaces: Vec<StringMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<ServiceAccountMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<StringMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<StringMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_ips: Vec<IpNet>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_source_ips: Vec<IpNet>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ips: Vec<IpNet>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ips: Vec<IpNet>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ports: Vec<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ports: Vec<u16>,
    /// A value of it could not be read.
    #[serde(skip)]
    pub unreadable: bool,
}

impl Match {
    /// Whether no field is set. Such a match is skipped, not matched: Istio leaves them behind when it
    /// takes L7 attributes out of a DENY rule.
    pub fn is_empty(&self) -> bool {
        let Match {
            namespaces,
            not_namespaces,
            service_accounts,
            not_service_accounts,
            principals,
            not_principals,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
            unreadable,
        } = self;
        !unreadable
            && namespaces.is_empty()
            && not_namespaces.is_empty()
            && service_accounts.is_empty()
            && not_service_accounts.is_empty()
            && principals.is_empty()
            && not_principals.is_empty()
            && source_ips.is_empty()
            && not_source_ips.is_empty()
            && destination_ips.is_empty()
            && not_destination_ips.is_empty()
            && destination_ports.is_empty()
            && not_destination_ports.is_empty()
    }
}

/// Serialized as istioctl reads it: `{"Exact": "x"}`, presence as `{"Presence": []}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StringMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    Presence,
}

impl StringMatch {
    /// Whether `text` matches; presence is any text but the empty one.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            StringMatch::Exact(value) => text == &**value,
            StringMatch::Prefix(value) => text.starts_with(&**value),
            StringMatch::Suffix(value) => text.ends_with(&**value),
            StringMatch::Presence => !text.is_empty(),
        }
    }
}

impl Serialize for StringMatch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let mut map = serializer.serialize_map(Some(1))?;
        match self {
            StringMatch::Exact(value) => map.serialize_entry("Exact", value)?,
            StringMatch::Prefix(value) => map.serialize_entry("Prefix", value)?,
            StringMatch::Suffix(value) => map.serialize_entry("Suffix", value)?,
            StringMatch::Presence => map.serialize_entry("Presence", &[(); 0])?,
        }
        map.end()
    }
}

/// A service account in whatever trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceAccountMatch {
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

impl Policy {
    /// A policy that denies everything in the scope its name suggests: stands in for one that could not be
    /// read and has no previous version.
    pub(super) fn deny_all(resource_name: &str, reason: String) -> Policy {
        let (namespace, name) = resource_name.split_once('/').unwrap_or(("", resource_name));
        Policy {
            key: resource_name.into(),
            name: name.into(),
            namespace: namespace.into(),
            scope: if namespace.is_empty() { Scope::Global } else { Scope::Namespace },
            action: Action::Deny,
            dry_run: false,
            rules: vec![Rule { clauses: Vec::new() }],
            unreadable: vec![Unreadable { field: "policy", reason }],
        }
    }

    pub(super) fn decode(message: wire::Authorization) -> Result<Policy, DecodeError> {
        let wire::Authorization { name, namespace, scope, action, rules, dry_run, extensions } = message;
        if name.is_empty() {
            return Err(DecodeError::Missing { field: "name" });
        }
        let scope = match known("scope", scope)? {
            wire::Scope::Global => Scope::Global,
            wire::Scope::Namespace => Scope::Namespace,
            wire::Scope::WorkloadSelector => Scope::WorkloadSelector,
        };
        let action = match known("action", action)? {
            wire::Action::Allow => Action::Allow,
            wire::Action::Deny => Action::Deny,
        };
        let mut unreadable = Vec::new();
        let rules = rules
            .into_iter()
            .map(|wire::Rule { clauses }| Rule {
                clauses: clauses
                    .into_iter()
                    .map(|wire::Clause { matches }| Clause {
                        matches: matches.into_iter().map(|m| decode_match(m, &mut unreadable)).collect(),
                    })
                    .collect(),
            })
            .collect();
        for extension in extensions {
            tracing::warn!(policy = %format_args!("{namespace}/{name}"), extension = extension.name, "extension of an L4 policy ignored");
        }
        let key = format!("{namespace}/{name}").into();
        Ok(Policy { key, name: name.into(), namespace: namespace.into(), scope, action, dry_run, rules, unreadable })
    }
}

fn decode_match(message: wire::Match, unreadable: &mut Vec<Unreadable>) -> Match {
    let before = unreadable.len();
    let wire::Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
        service_accounts,
        not_service_accounts,
        extensions,
    } = message;
    let mut out = Match {
        namespaces: strings("namespaces", namespaces, unreadable),
        not_namespaces: strings("not_namespaces", not_namespaces, unreadable),
        principals: strings("principals", principals, unreadable),
        not_principals: strings("not_principals", not_principals, unreadable),
        source_ips: prefixes("source_ips", source_ips, unreadable),
        not_source_ips: prefixes("not_source_ips", not_source_ips, unreadable),
        destination_ips: prefixes("destination_ips", destination_ips, unreadable),
        not_destination_ips: prefixes("not_destination_ips", not_destination_ips, unreadable),
        destination_ports: ports("destination_ports", destination_ports, unreadable),
        not_destination_ports: ports("not_destination_ports", not_destination_ports, unreadable),
        service_accounts: accounts(service_accounts),
        not_service_accounts: accounts(not_service_accounts),
        unreadable: false,
    };
    for extension in extensions {
        // A condition nobody here can test: the match must not become wider for it.
        unreadable.push(Unreadable { field: "extensions", reason: format!("extension {} is unknown", extension.name) });
    }
    out.unreadable = unreadable.len() > before;
    out
}

fn strings(field: &'static str, list: Vec<wire::StringMatch>, unreadable: &mut Vec<Unreadable>) -> Vec<StringMatch> {
    use wire::string_match::MatchType;
    let mut out = Vec::with_capacity(list.len());
    for wire::StringMatch { match_type } in list {
        match match_type {
            Some(MatchType::Exact(value)) => out.push(StringMatch::Exact(value.into())),
            Some(MatchType::Prefix(value)) => out.push(StringMatch::Prefix(value.into())),
            Some(MatchType::Suffix(value)) => out.push(StringMatch::Suffix(value.into())),
            Some(MatchType::Presence(_)) => out.push(StringMatch::Presence),
            None => unreadable.push(Unreadable { field, reason: "string match without a kind".to_owned() }),
        }
    }
    out
}

fn prefixes(field: &'static str, list: Vec<wire::Address>, unreadable: &mut Vec<Unreadable>) -> Vec<IpNet> {
    let mut out = Vec::with_capacity(list.len());
    for wire::Address { address, length } in list {
        let prefix = ip(field, &address).and_then(|ip| {
            u8::try_from(length).ok().and_then(|length| IpNet::new(ip, length).ok()).ok_or(DecodeError::PrefixLength {
                field,
                ip,
                length,
            })
        });
        match prefix {
            Ok(prefix) => out.push(prefix),
            Err(error) => unreadable.push(Unreadable { field, reason: error.to_string() }),
        }
    }
    out
}

fn ports(field: &'static str, list: Vec<u32>, unreadable: &mut Vec<Unreadable>) -> Vec<u16> {
    let mut out = Vec::with_capacity(list.len());
    for value in list {
        match u16::try_from(value) {
            Ok(port) => out.push(port),
            Err(_) => unreadable.push(Unreadable { field, reason: format!("port {value} is out of range") }),
        }
    }
    out
}

fn accounts(list: Vec<wire::ServiceAccountMatch>) -> Vec<ServiceAccountMatch> {
    list.into_iter()
        .map(|wire::ServiceAccountMatch { namespace, service_account }| ServiceAccountMatch {
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
        .collect()
}
