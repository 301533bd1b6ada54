//! AuthorizationPolicy -> what a node proxy can check: addresses, ports and identities.
//!
//! Istio's conversion (xds-contract 2.3): an ALLOW rule that asks for anything of HTTP goes away whole, a DENY rule
//! keeps what is left of it. A policy that cannot be read becomes a denial of everything it selects.
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use compat_objects::istio::{Action, AuthorizationPolicy, Condition, Operation, Rule, Source};
use compat_objects::{HasMeta, Kind, ObjectKey};
use ipnet::IpNet;
use xds_proto::istio::security as sec;
use xds_proto::type_url;

use crate::mesh::services::octets;
use crate::mesh::{Mesh, Workload};
use crate::{Condition as StatusCondition, Faults, MeshOutput, ObjectStatus, wire};

/// Policies that select workloads by label, to be named on them.
#[derive(Debug, Default)]
pub(super) struct Selecting {
    everywhere: Vec<Selector>,
    by_namespace: HashMap<String, Vec<Selector>>,
}

#[derive(Debug)]
struct Selector {
    /// Resource name.
    name: String,
    labels: BTreeMap<String, String>,
}

impl Selecting {
    pub(super) fn names_for(&self, workload: &Workload) -> Vec<String> {
        let own = self.by_namespace.get(&workload.namespace).into_iter().flatten();
        let fits = |s: &&Selector| crate::mesh::selects(&s.labels, &workload.labels);
        self.everywhere.iter().chain(own).filter(fits).map(|selector| selector.name.clone()).collect()
    }
}

/// Fills `authorizations`.
pub(super) fn build(mesh: &Mesh<'_>, output: &mut MeshOutput, faults: &mut Faults) -> Selecting {
    let mut selecting = Selecting::default();
    for policy in mesh.objects.authorization_policies() {
        let spec = &policy.spec;
        let attached = spec.target_ref.is_some() || !spec.target_refs.is_empty();
        // Those are the waypoint's business; AUDIT and CUSTOM need HTTP or an outside authorizer.
        if attached || !matches!(spec.action, Action::Allow | Action::Deny) {
            continue;
        }
        let key = ObjectKey::new(Kind::AuthorizationPolicy, policy.namespace(), policy.name());
        let labels = spec.selector.as_ref().map(|selector| selector.match_labels.clone()).unwrap_or_default();
        let in_root = policy.namespace() == mesh.options.root_namespace;
        let scope = match (labels.is_empty(), in_root) {
            (false, _) => sec::Scope::WorkloadSelector,
            (true, true) => sec::Scope::Global,
            (true, false) => sec::Scope::Namespace,
        };
        let name = format!("{}/{}", policy.namespace(), policy.name());
        if scope == sec::Scope::WorkloadSelector {
            let selectors = match in_root {
                true => &mut selecting.everywhere,
                false => selecting.by_namespace.entry(policy.namespace().to_owned()).or_default(),
            };
            selectors.push(Selector { name: name.clone(), labels });
        }
        let mut http = Vec::new();
        let (action, rules) = match rules(policy, &mut http) {
            Ok(rules) => (spec.action, rules),
            Err((field, reason)) => {
                let reason = format!("{reason}; everything this policy selects is denied until it is corrected");
                faults.error(mesh.objects, &key, &field, reason);
                (Action::Deny, vec![sec::Rule::default()])
            }
        };
        output.statuses.push(status(key, spec.action, http));
        let message = sec::Authorization {
            name: policy.name().to_owned(),
            namespace: policy.namespace().to_owned(),
            scope: scope as i32,
            action: if action == Action::Deny { sec::Action::Deny } else { sec::Action::Allow } as i32,
            rules,
            ..sec::Authorization::default()
        };
        output.authorizations.insert(name, wire::pack(type_url::AUTHORIZATION, &message));
    }
    selecting
}

/// What the node proxies make of the policy, in Istio's condition.
fn status(key: ObjectKey, action: Action, mut http: Vec<&'static str>) -> ObjectStatus {
    http.sort_unstable();
    http.dedup();
    let (status, reason, message) = if http.is_empty() {
        ("True", "Accepted", "attached to ztunnel".to_owned())
    } else {
        let effect = match action {
            Action::Deny => {
                "DENY policy with HTTP attributes is enforced without the HTTP rules. \
                 This will be more restrictive than requested."
            }
            _ => {
                "Within an ALLOW policy, rules matching HTTP attributes are omitted. \
                 This will be more restrictive than requested."
            }
        };
        let message = format!(
            "ztunnel does not support HTTP attributes (found: {}). \
             In ambient mode you must use a waypoint proxy to enforce HTTP rules. {effect}",
            http.join(", ")
        );
        ("False", "UnsupportedValue", message)
    };
    let condition =
        StatusCondition { kind: "ZtunnelAccepted".into(), status: status.into(), reason: reason.into(), message };
    ObjectStatus { key, conditions: vec![condition] }
}

/// Field and reason.
type Unreadable = (String, String);

fn rules(policy: &AuthorizationPolicy, http: &mut Vec<&'static str>) -> Result<Vec<sec::Rule>, Unreadable> {
    let mut out = Vec::new();
    for (index, rule) in policy.spec.rules.iter().enumerate() {
        let mut found = Vec::new();
        let converted = convert(rule, policy.namespace(), &mut found)
            .map_err(|(field, reason)| (format!("spec.rules[{index}].{field}"), reason))?;
        let drop = policy.spec.action == Action::Allow && !found.is_empty();
        http.extend(found);
        if !drop {
            out.push(converted);
        }
    }
    Ok(out)
}

fn convert(rule: &Rule, namespace: &str, http: &mut Vec<&'static str>) -> Result<sec::Rule, Unreadable> {
    let mut clauses = Vec::new();
    if !rule.to.is_empty() {
        let mut matches = Vec::new();
        for (index, to) in rule.to.iter().enumerate() {
            let operation = to.operation.as_ref().ok_or((format!("to[{index}]"), "operation is missing".to_owned()))?;
            let found = operation_match(operation, http);
            matches.push(found.map_err(|(field, reason)| (format!("to[{index}].operation.{field}"), reason))?);
        }
        clauses.push(sec::Clause { matches });
    }
    if !rule.from.is_empty() {
        let mut matches = Vec::new();
        for (index, from) in rule.from.iter().enumerate() {
            let source = from.source.as_ref().ok_or((format!("from[{index}]"), "source is missing".to_owned()))?;
            let found = source_match(source, namespace, http);
            matches.push(found.map_err(|(field, reason)| (format!("from[{index}].source.{field}"), reason))?);
        }
        clauses.push(sec::Clause { matches });
    }
    for (index, condition) in rule.when.iter().enumerate() {
        let found = condition_match(condition, namespace, http);
        if let Some(found) = found.map_err(|reason| (format!("when[{index}]"), reason))? {
            clauses.push(sec::Clause { matches: vec![found] });
        }
    }
    Ok(sec::Rule { clauses })
}

fn operation_match(operation: &Operation, http: &mut Vec<&'static str>) -> Result<sec::Match, Unreadable> {
    for (name, values) in [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ] {
        if !values.is_empty() {
            http.push(name);
        }
    }
    Ok(sec::Match {
        destination_ports: ports(&operation.ports).map_err(|reason| ("ports".to_owned(), reason))?,
        not_destination_ports: ports(&operation.not_ports).map_err(|reason| ("notPorts".to_owned(), reason))?,
        ..sec::Match::default()
    })
}

fn source_match(source: &Source, own: &str, http: &mut Vec<&'static str>) -> Result<sec::Match, Unreadable> {
    for (name, values) in [
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
    ] {
        if !values.is_empty() {
            http.push(name);
        }
    }
    if !source.trust_domains.is_empty() && !source.principals.is_empty() {
        let reason = "cannot be combined with principals where only the connection is seen";
        return Err(("trustDomains".to_owned(), reason.to_owned()));
    }
    let in_domain = |domains: &[String]| domains.iter().map(|domain| format!("{domain}/*")).collect::<Vec<String>>();
    let principals = [source.principals.clone(), in_domain(&source.trust_domains)].concat();
    let not_principals = [source.not_principals.clone(), in_domain(&source.not_trust_domains)].concat();
    let at = |field: &'static str| move |reason: String| (field.to_owned(), reason);
    Ok(sec::Match {
        namespaces: strings(&source.namespaces),
        not_namespaces: strings(&source.not_namespaces),
        principals: strings(&principals),
        not_principals: strings(&not_principals),
        source_ips: blocks(&source.ip_blocks).map_err(at("ipBlocks"))?,
        not_source_ips: blocks(&source.not_ip_blocks).map_err(at("notIpBlocks"))?,
        service_accounts: accounts(&source.service_accounts, own),
        not_service_accounts: accounts(&source.not_service_accounts, own),
        ..sec::Match::default()
    })
}

fn condition_match(
    condition: &Condition,
    own: &str,
    http: &mut Vec<&'static str>,
) -> Result<Option<sec::Match>, String> {
    let (values, not) = (&condition.values, &condition.not_values);
    let empty = sec::Match::default();
    let found = match condition.key.as_str() {
        "source.ip" => sec::Match { source_ips: blocks(values)?, not_source_ips: blocks(not)?, ..empty },
        "source.namespace" => sec::Match { namespaces: strings(values), not_namespaces: strings(not), ..empty },
        "source.principal" => sec::Match { principals: strings(values), not_principals: strings(not), ..empty },
        "source.serviceAccount" => {
            sec::Match { service_accounts: accounts(values, own), not_service_accounts: accounts(not, own), ..empty }
        }
        "destination.ip" => sec::Match { destination_ips: blocks(values)?, not_destination_ips: blocks(not)?, ..empty },
        "destination.port" => {
            sec::Match { destination_ports: ports(values)?, not_destination_ports: ports(not)?, ..empty }
        }
        _ => {
            http.push("when");
            return Ok(None);
        }
    };
    Ok(Some(found))
}

fn ports(values: &[String]) -> Result<Vec<u32>, String> {
    let port = |value: &String| match value.parse::<u16>() {
        Ok(port) if port > 0 => Ok(u32::from(port)),
        _ => Err(format!("{value:?} is no port number")),
    };
    values.iter().map(port).collect()
}

/// An address block, or a single address.
pub(crate) fn block(value: &str) -> Result<IpNet, String> {
    let single = || value.parse::<IpAddr>().ok().map(IpNet::from);
    value
        .parse::<IpNet>()
        .ok()
        .or_else(single)
        .ok_or_else(|| format!("{value:?} is neither an IP address nor a CIDR block"))
}

fn blocks(values: &[String]) -> Result<Vec<sec::Address>, String> {
    let address = |value: &String| {
        let net = block(value)?;
        Ok(sec::Address { address: octets(net.addr()).into(), length: u32::from(net.prefix_len()) })
    };
    values.iter().map(address).collect()
}

/// `account` (of the policy's namespace) or `namespace/account`.
fn accounts(values: &[String], own: &str) -> Vec<sec::ServiceAccountMatch> {
    let account = |value: &String| {
        let (namespace, account) = value.split_once('/').unwrap_or((own, value));
        sec::ServiceAccountMatch { namespace: namespace.to_owned(), service_account: account.to_owned() }
    };
    values.iter().map(account).collect()
}

/// `*`, `*suffix`, `prefix*` or the whole text; a leading star wins.
fn strings(values: &[String]) -> Vec<sec::StringMatch> {
    use sec::string_match::MatchType;
    let string = |value: &String| {
        let match_type = match (value.as_str(), value.strip_prefix('*'), value.strip_suffix('*')) {
            ("*", _, _) => MatchType::Presence(()),
            (_, Some(suffix), _) => MatchType::Suffix(suffix.to_owned()),
            (_, _, Some(prefix)) => MatchType::Prefix(prefix.to_owned()),
            _ => MatchType::Exact(value.clone()),
        };
        sec::StringMatch { match_type: Some(match_type) }
    };
    values.iter().map(string).collect()
}

/// "Has no identity", as a match.
pub(super) fn no_identity() -> sec::Match {
    let any = sec::StringMatch { match_type: Some(sec::string_match::MatchType::Presence(())) };
    sec::Match { not_principals: vec![any], ..sec::Match::default() }
}
