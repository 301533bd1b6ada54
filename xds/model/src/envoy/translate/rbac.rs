//! RBAC filters.
use std::mem::take;

use xds_proto::envoy::envoy::config::rbac::v3 as wire;
use xds_proto::envoy::envoy::extensions::filters::http::rbac::v3 as http;
use xds_proto::envoy::envoy::extensions::filters::network::rbac::v3 as network;
use xds_proto::envoy::envoy::r#type::matcher::v3 as matcher;

use super::common::{cidr, header, metadata, string};
use super::report::{At, Refusable, Refusal, Report, refuse_rest};
use super::route::template;
use crate::envoy::matcher::StringMatcher;
use crate::envoy::rbac::{Permission, Principal, Rbac, RbacAction, RbacPolicy, RbacRules};

/// Filter state key that holds the peer's SPIFFE URI.
const PEER_PRINCIPAL: &str = "io.istio.peer_principal";

/// An HTTP RBAC filter.
pub(super) fn http_filter(mut message: http::Rbac, report: &mut Report) -> Refusable<Rbac> {
    take(&mut message.rules_stat_prefix);
    take(&mut message.track_per_rule_stats);
    let rbac = Rbac {
        rules: message.rules.take().map(|message| rules(message, report)).transpose()?,
        shadow_rules: message.shadow_rules.take().map(|message| rules(message, report)).transpose()?,
        shadow_prefix: take(&mut message.shadow_rules_stat_prefix),
    };
    refuse_rest(&message)?;
    Ok(rbac)
}

/// A network RBAC filter.
pub(super) fn network_filter(mut message: network::Rbac, report: &mut Report) -> Refusable<Rbac> {
    take(&mut message.stat_prefix);
    let rbac = Rbac {
        rules: message.rules.take().map(|message| rules(message, report)).transpose()?,
        shadow_rules: message.shadow_rules.take().map(|message| rules(message, report)).transpose()?,
        shadow_prefix: take(&mut message.shadow_rules_stat_prefix),
    };
    refuse_rest(&message)?;
    Ok(rbac)
}

fn rules(message: wire::Rbac, report: &mut Report) -> Refusable<RbacRules> {
    use wire::rbac::Action;
    let wire::Rbac { action, policies, audit_logging_options } = message;
    if audit_logging_options.is_some() {
        report.ignored("rbac.audit_logging_options", "has no effect in Strata");
    }
    let action = match Action::try_from(action) {
        Ok(Action::Allow) => RbacAction::Allow,
        Ok(Action::Deny) => RbacAction::Deny,
        Ok(Action::Log) => RbacAction::Log,
        Err(_) => return Err(Refusal::new("action", "unknown")),
    };
    let mut policies: Vec<_> =
        policies.into_iter().map(|(name, message)| policy(name, message, report)).collect::<Refusable<_>>()?;
    policies.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(RbacRules { action, policies })
}

fn policy(name: String, mut message: wire::Policy, report: &mut Report) -> Refusable<RbacPolicy> {
    let mut reader = Reader { policy: &name, report };
    let mut permissions: Vec<_> =
        take(&mut message.permissions).into_iter().map(|one| reader.permission(one)).collect();
    let principals = take(&mut message.principals).into_iter().map(|one| reader.principal(one)).collect();
    if let Err(Refusal(reason)) = refuse_rest(&message) {
        // A condition narrows the policy in a way that is not understood.
        let whole = Permission::Or(permissions);
        permissions = vec![Permission::And(vec![whole, reader.unsupported(reason, Permission::Unsupported)])];
    }
    Ok(RbacPolicy { name, permissions, principals })
}

/// Reads one policy; what is not understood becomes `Unsupported` and is reported.
struct Reader<'a> {
    policy: &'a str,
    report: &'a mut Report,
}

impl Reader<'_> {
    fn unsupported<T>(&mut self, reason: String, make: impl FnOnce(String) -> T) -> T {
        self.report.fails_closed(format!("rbac.policies.{}", self.policy), reason.clone());
        make(reason)
    }

    fn or_unsupported<T>(&mut self, result: Refusable<T>, make: impl FnOnce(String) -> T) -> T {
        result.unwrap_or_else(|Refusal(reason)| self.unsupported(reason, make))
    }

    fn permission(&mut self, message: wire::Permission) -> Permission {
        let result = self.try_permission(message);
        self.or_unsupported(result, Permission::Unsupported)
    }

    fn permissions(&mut self, set: wire::permission::Set) -> Vec<Permission> {
        set.rules.into_iter().map(|rule| self.permission(rule)).collect()
    }

    fn try_permission(&mut self, message: wire::Permission) -> Refusable<Permission> {
        use wire::permission::Rule;
        Ok(match message.rule {
            Some(Rule::AndRules(set)) => Permission::And(self.permissions(set)),
            Some(Rule::OrRules(set)) => Permission::Or(self.permissions(set)),
            Some(Rule::NotRule(rule)) => Permission::Not(Box::new(self.permission(*rule))),
            Some(Rule::Any(true)) => Permission::Any,
            Some(Rule::Any(false)) => return Err(Refusal::new("any", "must be true")),
            Some(Rule::Header(test)) => Permission::Header(header(test).at("header")?),
            Some(Rule::UrlPath(path)) => Permission::UrlPath(path_rule(path)?),
            Some(Rule::UriTemplate(extension)) => Permission::UriTemplate(template(extension)?),
            Some(Rule::DestinationIp(range)) => Permission::DestinationIp(cidr(range)?),
            Some(Rule::DestinationPort(port)) => Permission::DestinationPort(
                u16::try_from(port).map_err(|_| Refusal::new("destination_port", format!("{port} is no port")))?,
            ),
            Some(Rule::DestinationPortRange(range)) => {
                let bound = |n| u32::try_from(n).map_err(|_| Refusal::new("destination_port_range", "negative"));
                Permission::DestinationPortRange { start: bound(range.start)?, end: bound(range.end)? }
            }
            Some(Rule::RequestedServerName(name)) => Permission::RequestedServerName(string(name)?),
            Some(Rule::Metadata(test)) => Permission::Metadata(jwt_metadata(test)?),
            Some(Rule::Matcher(extension)) => return Err(extension_refusal("matcher", &extension.name)),
            Some(Rule::SourcedMetadata(sourced)) => {
                let wire::SourcedMetadata { metadata_matcher, metadata_source } = sourced;
                match (metadata_matcher, metadata_source) {
                    (Some(test), 0) => Permission::Metadata(jwt_metadata(test)?),
                    _ => return Err(Refusal::new("sourced_metadata", "only dynamic metadata is supported")),
                }
            }
            None => return Err(Refusal::new("rule", "missing")),
        })
    }

    fn principal(&mut self, message: wire::Principal) -> Principal {
        let result = self.try_principal(message);
        self.or_unsupported(result, Principal::Unsupported)
    }

    fn principals(&mut self, set: wire::principal::Set) -> Vec<Principal> {
        set.ids.into_iter().map(|id| self.principal(id)).collect()
    }

    fn try_principal(&mut self, message: wire::Principal) -> Refusable<Principal> {
        use wire::principal::Identifier;
        Ok(match message.identifier {
            Some(Identifier::AndIds(set)) => Principal::And(self.principals(set)),
            Some(Identifier::OrIds(set)) => Principal::Or(self.principals(set)),
            Some(Identifier::NotId(id)) => Principal::Not(Box::new(self.principal(*id))),
            Some(Identifier::Any(true)) => Principal::Any,
            Some(Identifier::Any(false)) => return Err(Refusal::new("any", "must be true")),
            Some(Identifier::Authenticated(wire::principal::Authenticated { principal_name })) => {
                Principal::Peer(principal_name.map(string).transpose()?)
            }
            Some(Identifier::FilterState(state)) => {
                let matcher::FilterStateMatcher { key, matcher } = state;
                match matcher {
                    Some(matcher::filter_state_matcher::Matcher::StringMatch(text)) if key == PEER_PRINCIPAL => {
                        Principal::Peer(Some(string(text)?))
                    }
                    _ => return Err(Refusal::new("filter_state", format!("{key} is not supported"))),
                }
            }
            Some(Identifier::DirectRemoteIp(range)) => Principal::DirectRemoteIp(cidr(range)?),
            Some(Identifier::RemoteIp(range)) => Principal::RemoteIp(cidr(range)?),
            // The obsolete name of what is the connection's address.
            Some(Identifier::SourceIp(range)) => Principal::DirectRemoteIp(cidr(range)?),
            Some(Identifier::Header(test)) => Principal::Header(header(test).at("header")?),
            Some(Identifier::UrlPath(path)) => Principal::UrlPath(path_rule(path)?),
            Some(Identifier::Metadata(test)) => Principal::Metadata(jwt_metadata(test)?),
            Some(Identifier::SourcedMetadata(sourced)) => {
                let wire::SourcedMetadata { metadata_matcher, metadata_source } = sourced;
                match (metadata_matcher, metadata_source) {
                    (Some(test), 0) => Principal::Metadata(jwt_metadata(test)?),
                    _ => return Err(Refusal::new("sourced_metadata", "only dynamic metadata is supported")),
                }
            }
            Some(Identifier::Custom(extension)) => return Err(extension_refusal("custom", &extension.name)),
            None => return Err(Refusal::new("identifier", "missing")),
        })
    }
}

fn extension_refusal(field: &str, name: &str) -> Refusal {
    Refusal::new(field, format!("{name} is not supported"))
}

fn jwt_metadata(message: matcher::MetadataMatcher) -> Refusable<crate::envoy::matcher::MetadataMatcher> {
    let test = metadata(message).at("metadata")?;
    if test.filter == super::JWT_AUTHN {
        Ok(test)
    } else {
        Err(Refusal::new("metadata", format!("namespace {} is not supported", test.filter)))
    }
}

fn path_rule(message: matcher::PathMatcher) -> Refusable<StringMatcher> {
    match message.rule {
        Some(matcher::path_matcher::Rule::Path(text)) => string(text).at("url_path"),
        None => Err(Refusal::new("url_path", "missing")),
    }
}
