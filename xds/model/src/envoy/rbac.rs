//! Role-based access control, at network and HTTP level, as configured.
use ipnet::IpNet;
use serde::Serialize;

use super::matcher::{HeaderMatcher, MetadataMatcher, StringMatcher};

/// One RBAC filter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rbac {
    /// `None`: nothing is enforced.
    pub rules: Option<RbacRules>,
    /// Evaluated and reported only.
    pub shadow_rules: Option<RbacRules>,
    /// `istio_ext_authz_`, `istio_dry_run_allow_`, `istio_dry_run_deny_` or empty.
    pub shadow_prefix: String,
}

/// Policies under one action.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RbacRules {
    pub action: RbacAction,
    /// In the order of their names, which is the order they are tried in.
    pub policies: Vec<RbacPolicy>,
}

/// What a match means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum RbacAction {
    /// Allowed if and only if a policy matches.
    Allow,
    /// Denied if and only if a policy matches.
    Deny,
    /// Always allowed; a match is logged.
    Log,
}

/// One policy: matches if any permission and any principal match.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RbacPolicy {
    /// `ns[NAMESPACE]-policy[NAME]-rule[INDEX]` for Istio's.
    pub name: String,
    pub permissions: Vec<Permission>,
    pub principals: Vec<Principal>,
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Permission {
    And(Vec<Permission>),
    Or(Vec<Permission>),
    Not(Box<Permission>),
    Any,
    Header(HeaderMatcher),
    /// The path without query.
    UrlPath(StringMatcher),
    UriTemplate(String),
    DestinationIp(IpNet),
    DestinationPort(u16),
    /// `start <= port < end`.
    DestinationPortRange {
        start: u32,
        end: u32,
    },
    RequestedServerName(StringMatcher),
    Metadata(MetadataMatcher),
    /// Not understood. In what follows it counts as *unknown*, and an unknown outcome fails closed:
    /// it matches under DENY, does not match under ALLOW.
    Unsupported(String),
}

/// Who does it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Principal {
    And(Vec<Principal>),
    Or(Vec<Principal>),
    Not(Box<Principal>),
    Any,
    /// The peer's SPIFFE URI (`filter_state` `io.istio.peer_principal`, or `authenticated`).
    /// `None`: any authenticated peer.
    Peer(Option<StringMatcher>),
    /// The address of the connection's peer.
    DirectRemoteIp(IpNet),
    /// The address after `x-forwarded-for` handling; the same on a waypoint.
    RemoteIp(IpNet),
    Header(HeaderMatcher),
    UrlPath(StringMatcher),
    Metadata(MetadataMatcher),
    /// See [`Permission::Unsupported`].
    Unsupported(String),
}
