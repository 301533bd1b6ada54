//! AuthorizationPolicies attached to what a waypoint fronts -> RBAC filters, in the order they decide: AUDIT, DENY,
//! ALLOW.
//!
//! A policy that cannot be expressed denies its target: a looser reading of it would be a hole.
pub(crate) mod conditions;

use std::collections::BTreeMap;

use compat_objects::istio::{Action, AuthorizationPolicy, PolicyTargetReference};
use compat_objects::{HasMeta, Kind, ObjectKey};

use super::Builder;
use crate::mesh::{Service, names};
use crate::pb::{any, ext, http_filter, listener, network_filter, rbac};
use conditions::{Layer, never, policy};
use ext::filters::network::http_connection_manager::v3 as hcm;

const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

/// What a chain leads to.
pub(crate) enum Target<'a> {
    Service(&'a Service),
    /// Pods addressed directly.
    Workloads,
}

/// Rules of one action, by name.
#[derive(Default)]
struct Rules {
    enforced: BTreeMap<String, rbac::Policy>,
    /// Dry run: what would have happened is recorded, nothing more.
    shadow: BTreeMap<String, rbac::Policy>,
    has_enforced: bool,
    has_shadow: bool,
}

impl Builder<'_, '_> {
    /// Whether a policy of `namespace` is attached to a target.
    pub(crate) fn attached(
        &self,
        namespace: &str,
        single: Option<&PolicyTargetReference>,
        several: &[PolicyTargetReference],
        target: &Target<'_>,
    ) -> bool {
        let waypoint = &self.waypoint.key;
        single.into_iter().chain(several).any(|reference| match (reference.group.as_str(), reference.kind.as_str()) {
            ("" | "core", "Service") => match target {
                Target::Service(service) => {
                    service.object.kind == Kind::Service
                        && service.namespace == namespace
                        && service.object.name == reference.name
                }
                Target::Workloads => false,
            },
            ("networking.istio.io", "ServiceEntry") => match target {
                Target::Service(service) => {
                    service.object.kind == Kind::ServiceEntry
                        && service.namespace == namespace
                        && service.object.name == reference.name
                }
                Target::Workloads => false,
            },
            (GATEWAY_GROUP, "Gateway") => waypoint.namespace == namespace && waypoint.name == reference.name,
            (GATEWAY_GROUP, "GatewayClass") => {
                namespace == self.mesh.options.root_namespace && reference.name == names::WAYPOINT_CLASS
            }
            _ => false,
        })
    }

    /// The policies of a target with some action.
    pub(crate) fn policies(&self, target: &Target<'_>) -> Vec<(ObjectKey, &AuthorizationPolicy)> {
        let all = self.mesh.objects.authorization_policies();
        let attached = all.filter(|policy| {
            let spec = &policy.spec;
            self.attached(policy.namespace(), spec.target_ref.as_ref(), &spec.target_refs, target)
        });
        attached
            .map(|policy| (ObjectKey::new(Kind::AuthorizationPolicy, policy.namespace(), policy.name()), &**policy))
            .collect()
    }

    fn rules(&self, target: &Target<'_>, layer: Layer) -> [(rbac::rbac::Action, Rules); 3] {
        let (mut audit, mut deny, mut allow) = (Rules::default(), Rules::default(), Rules::default());
        for (key, found) in self.policies(target) {
            let name = |rule: &str| format!("ns[{}]-policy[{}]-rule[{rule}]", key.namespace, key.name);
            let converted = match found.spec.action {
                Action::Custom => continue,
                action => self.convert(found, action, layer, &name),
            };
            match converted {
                Ok(rules) => {
                    let into = match found.spec.action {
                        Action::Deny => &mut deny,
                        Action::Audit => &mut audit,
                        _ => &mut allow,
                    };
                    if found.annotation("istio.io/dry-run") == Some("true") {
                        into.has_shadow = true;
                        into.shadow.extend(rules);
                    } else {
                        into.has_enforced = true;
                        into.enforced.extend(rules);
                    }
                }
                Err((field, reason)) => {
                    let reason =
                        format!("{reason}; everything this policy is attached to is denied until it is corrected");
                    self.error(&key, &field, reason);
                    deny.has_enforced = true;
                    deny.enforced.insert(name("invalid"), conditions::always());
                }
            }
        }
        [(rbac::rbac::Action::Log, audit), (rbac::rbac::Action::Deny, deny), (rbac::rbac::Action::Allow, allow)]
    }

    fn convert(
        &self,
        found: &AuthorizationPolicy,
        action: Action,
        layer: Layer,
        name: &dyn Fn(&str) -> String,
    ) -> Result<BTreeMap<String, rbac::Policy>, (String, String)> {
        let mut rules = BTreeMap::new();
        // An ALLOW policy without rules allows nothing.
        if found.spec.rules.is_empty() {
            rules.insert(name("0"), never());
        }
        for (index, rule) in found.spec.rules.iter().enumerate() {
            let at = |(field, reason): (String, String)| (format!("spec.rules[{index}]{field}"), reason);
            if let Some(found) = policy(rule, action, layer, found.namespace()).map_err(at)? {
                rules.insert(name(&index.to_string()), found);
            }
        }
        Ok(rules)
    }

    /// HTTP filters.
    pub(crate) fn http_access(&self, target: &Target<'_>) -> Vec<hcm::HttpFilter> {
        let mut filters = Vec::new();
        for (action, rules) in self.rules(target, Layer::Http) {
            let prefix = rules.prefix(action);
            let config = ext::filters::http::rbac::v3::Rbac {
                rules: rules.has_enforced.then(|| message(action, rules.enforced)),
                shadow_rules: rules.has_shadow.then(|| message(action, rules.shadow)),
                shadow_rules_stat_prefix: prefix,
                ..Default::default()
            };
            if config.rules.is_some() || config.shadow_rules.is_some() {
                filters.push(http_filter("envoy.filters.http.rbac", any(&config)));
            }
        }
        filters
    }

    /// Network filters, which also deny what only a request could have shown to be allowed.
    pub(crate) fn network_access(&self, target: &Target<'_>) -> Vec<listener::Filter> {
        let mut filters = Vec::new();
        if let Some(denied) = self.custom_network_access(target) {
            filters.push(denied);
        }
        for (action, rules) in self.rules(target, Layer::Tcp) {
            let prefix = rules.prefix(action);
            let config = ext::filters::network::rbac::v3::Rbac {
                rules: rules.has_enforced.then(|| message(action, rules.enforced)),
                shadow_rules: rules.has_shadow.then(|| message(action, rules.shadow)),
                shadow_rules_stat_prefix: prefix,
                stat_prefix: "tcp.".into(),
                ..Default::default()
            };
            if config.rules.is_some() || config.shadow_rules.is_some() {
                filters.push(network_filter("envoy.filters.network.rbac", any(&config)));
            }
        }
        filters
    }
}

impl Rules {
    fn prefix(&self, action: rbac::rbac::Action) -> String {
        let denied = action == rbac::rbac::Action::Deny && self.has_shadow;
        if denied { "istio_dry_run_deny_" } else { "istio_dry_run_allow_" }.to_owned()
    }
}

pub(crate) fn message(action: rbac::rbac::Action, policies: BTreeMap<String, rbac::Policy>) -> rbac::Rbac {
    rbac::Rbac { action: action as i32, policies: policies.into_iter().collect(), ..Default::default() }
}

/// Denies everybody, under a name.
pub(crate) fn deny_all(name: &str) -> rbac::Rbac {
    message(rbac::rbac::Action::Deny, [(name.to_owned(), conditions::always())].into())
}
