//! L4 authorization of a connection to a workload, as a node proxy decides it (xds-contract 2.2).
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use xds_model::spiffe::SpiffeId;
use xds_model::wds::{Action, Clause, Match, Mesh, Policy, Rule, StringMatch, Workload};

/// The attributes L4 policy may speak of.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// Address of the real peer of this hop, never a forwarded one.
    pub source_ip: IpAddr,
    /// From this hop's mutual TLS, or attested by the kernel on one node; `None` for plaintext.
    pub identity: Option<&'a SpiffeId>,
    /// The pod's address and the *target* port.
    pub destination: SocketAddr,
}

/// What was decided and by what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    /// `namespace/name` of the policy that decided; `None` where no policy matched.
    pub policy: Option<Arc<str>>,
    pub reason: Reason,
}

/// Why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// No ALLOW policy applies to the workload, and no DENY matched.
    NoPolicy,
    /// An ALLOW policy matched.
    Allowed,
    /// A DENY policy matched.
    Denied,
    /// ALLOW policies apply to the workload and none matched.
    NotAllowed,
}

impl Reason {
    /// For logs and events.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::NoPolicy => "no policy applies",
            Reason::Allowed => "allowed by policy",
            Reason::Denied => "denied by policy",
            Reason::NotAllowed => "no ALLOW policy matched",
        }
    }
}

/// Decides whether `connection` may reach `destination`. DENY before ALLOW; dry-run policies are logged and
/// decide nothing. A policy the workload names but the view does not hold is skipped, as the control plane
/// sends the two in no order.
pub fn evaluate(mesh: &Mesh, destination: &Workload, connection: &Connection<'_>) -> Decision {
    let selected = destination.authorization_policies.iter().filter_map(|key| {
        let policy = mesh.policy(key);
        if policy.is_none() {
            tracing::warn!(policy = &**key, workload = &*destination.uid, "unknown L4 policy skipped");
        }
        policy
    });
    let policies = mesh.namespace_policies(&destination.namespace).iter().chain(mesh.global_policies()).chain(selected);
    let mut allowed_by = None;
    let mut has_allow = false;
    for policy in policies {
        let enforced_allow = policy.action == Action::Allow && !policy.dry_run;
        has_allow |= enforced_allow;
        if (enforced_allow && allowed_by.is_some()) || !matches_policy(policy, connection) {
            continue;
        }
        match (policy.action, policy.dry_run) {
            (_, true) => tracing::info!(
                policy = &*policy.key, action = ?policy.action, workload = &*destination.uid, source = %connection.source_ip,
                "dry-run L4 policy matched"
            ),
            (Action::Deny, false) => {
                return Decision { allowed: false, policy: Some(policy.key.clone()), reason: Reason::Denied };
            }
            (Action::Allow, false) => allowed_by = Some(policy.key.clone()),
        }
    }
    match (has_allow, allowed_by) {
        (false, _) => Decision { allowed: true, policy: None, reason: Reason::NoPolicy },
        (true, Some(policy)) => Decision { allowed: true, policy: Some(policy), reason: Reason::Allowed },
        (true, None) => Decision { allowed: false, policy: None, reason: Reason::NotAllowed },
    }
}

/// Whether any rule of the policy matches; one without rules never does.
pub fn matches_policy(policy: &Policy, connection: &Connection<'_>) -> bool {
    policy.rules.iter().any(|rule| matches_rule(rule, policy.action, connection))
}

fn matches_rule(rule: &Rule, action: Action, connection: &Connection<'_>) -> bool {
    rule.clauses.iter().all(|clause| matches_clause(clause, action, connection))
}

fn matches_clause(clause: &Clause, action: Action, connection: &Connection<'_>) -> bool {
    clause.matches.is_empty()
        || clause.matches.iter().any(|one| !one.is_empty() && matches_one(one, action, connection))
}

fn matches_one(one: &Match, action: Action, connection: &Connection<'_>) -> bool {
    if one.unreadable {
        // What the unreadable value would have said is unknown: fail closed, which is the action's own way.
        return action == Action::Deny;
    }
    let destination = connection.destination.ip().to_canonical();
    let source = connection.source_ip.to_canonical();
    let port = connection.destination.port();
    let namespace = connection.identity.map_or("", SpiffeId::namespace);
    let principal = |value: &StringMatch| connection.identity.is_some_and(|id| value.matches(id.principal()));
    holds(&one.destination_ips, &one.not_destination_ips, |prefix| prefix.contains(&destination))
        && holds(&one.source_ips, &one.not_source_ips, |prefix| prefix.contains(&source))
        && holds(&one.destination_ports, &one.not_destination_ports, |value| *value == port)
        && holds(&one.service_accounts, &one.not_service_accounts, |value| {
            connection.identity.is_some_and(|id| {
                *id.namespace() == *value.namespace && *id.service_account() == *value.service_account
            })
        })
        && holds(&one.principals, &one.not_principals, principal)
        && holds(&one.namespaces, &one.not_namespaces, |value| value.matches(namespace))
}

fn holds<T>(positive: &[T], negative: &[T], matches: impl Fn(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&matches)) && !negative.iter().any(&matches)
}

#[cfg(test)]
mod tests;
