//! Authorization of requests and connections by Envoy's RBAC, as istiod sends it to waypoints.
//!
//! What could not be understood counts as *unknown* in a three-valued logic, and an unknown outcome fails closed:
//! a DENY policy matches, an ALLOW policy does not.

pub mod matcher;
pub mod request;

use std::fmt;
use std::ops::Not;

use ipnet::IpNet;
use regex::bytes::Regex;
use xds_model::envoy::rbac;

use self::matcher::{ClaimMatch, HeaderMatch, MatcherError, StringMatch, template_regex};
pub use self::request::{AuthzRequest, HeaderKey, RequestView};
pub use xds_model::envoy::rbac::RbacAction;

/// One compiled RBAC filter.
#[derive(Debug, Clone)]
pub struct Rbac {
    rules: Option<Rules>,
    shadow: Option<Rules>,
    shadow_prefix: Box<str>,
}

#[derive(Debug, Clone)]
struct Rules {
    action: RbacAction,
    policies: Box<[Policy]>,
}

#[derive(Debug, Clone)]
struct Policy {
    name: PolicyName,
    permission: Permission,
    principal: Principal,
}

/// The name of a policy's rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyName {
    /// As configured: `ns[NAMESPACE]-policy[NAME]-rule[INDEX]` for Istio's.
    pub id: Box<str>,
    /// For people: `NAMESPACE/NAME rule INDEX`, or the name as it is.
    pub human: Box<str>,
}

impl PolicyName {
    fn new(id: &str) -> Self {
        let human = (|| {
            let rest = &id[id.find("ns[")? + 3..];
            let (namespace, rest) = rest.split_once("]-policy[")?;
            let (name, rest) = rest.split_once("]-rule[")?;
            let (rule, _) = rest.split_once(']')?;
            Some(format!("{namespace}/{name} rule {rule}"))
        })();
        Self { id: id.into(), human: human.unwrap_or_else(|| id.to_owned()).into() }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.human)
    }
}

/// What an RBAC filter says to a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome<'a> {
    pub allowed: bool,
    /// The policy that matched; a denial without one means that no ALLOW policy matched.
    pub policy: Option<&'a PolicyName>,
    /// `None`: the filter enforces nothing.
    pub action: Option<RbacAction>,
    pub shadow: Option<Shadow<'a>>,
}

/// What shadow rules would have said.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shadow<'a> {
    /// `istio_ext_authz_`, `istio_dry_run_allow_`, ...
    pub prefix: &'a str,
    pub allowed: bool,
    pub policy: Option<&'a PolicyName>,
    pub action: RbacAction,
}

/// Yes, no, or not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    No,
    Unknown,
    Yes,
}

impl From<bool> for Truth {
    fn from(value: bool) -> Self {
        if value { Self::Yes } else { Self::No }
    }
}

impl Not for Truth {
    type Output = Self;
    fn not(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Unknown => Self::Unknown,
            Self::Yes => Self::No,
        }
    }
}

impl Truth {
    fn all(values: impl Iterator<Item = Self>) -> Self {
        let mut out = Self::Yes;
        for value in values {
            match value {
                Self::No => return Self::No,
                Self::Unknown => out = Self::Unknown,
                Self::Yes => {}
            }
        }
        out
    }

    fn any(values: impl Iterator<Item = Self>) -> Self {
        !Self::all(values.map(Not::not))
    }
}

#[derive(Debug, Clone)]
enum Permission {
    And(Box<[Permission]>),
    Or(Box<[Permission]>),
    Not(Box<Permission>),
    Any,
    Header(HeaderMatch),
    UrlPath(StringMatch),
    Template(Regex),
    DestinationIp(IpNet),
    /// `start <= port < end`.
    DestinationPort {
        start: u32,
        end: u32,
    },
    ServerName(StringMatch),
    Claim(ClaimMatch),
    Unknown,
}

#[derive(Debug, Clone)]
enum Principal {
    And(Box<[Principal]>),
    Or(Box<[Principal]>),
    Not(Box<Principal>),
    Any,
    Peer(Option<StringMatch>),
    DirectRemoteIp(IpNet),
    RemoteIp(IpNet),
    Header(HeaderMatch),
    UrlPath(StringMatch),
    Claim(ClaimMatch),
    Unknown,
}

impl Rbac {
    /// Compiles. Parts that don't compile count as unknown, and are returned as texts naming policy and reason.
    pub fn compile(config: &rbac::Rbac) -> (Self, Vec<String>) {
        let mut errors = Vec::new();
        let mut rules = |rules: &Option<rbac::RbacRules>| {
            rules.as_ref().map(|rules| Rules {
                action: rules.action,
                policies: rules.policies.iter().map(|one| policy(one, &mut errors)).collect(),
            })
        };
        let compiled = Self {
            rules: rules(&config.rules),
            shadow: rules(&config.shadow_rules),
            shadow_prefix: config.shadow_prefix.as_str().into(),
        };
        (compiled, errors)
    }

    /// Decides.
    pub fn evaluate(&self, request: &AuthzRequest<'_>) -> Outcome<'_> {
        let shadow = self.shadow.as_ref().map(|rules| {
            let (allowed, policy) = rules.evaluate(request);
            Shadow { prefix: &self.shadow_prefix, allowed, policy, action: rules.action }
        });
        match &self.rules {
            Some(rules) => {
                let (allowed, policy) = rules.evaluate(request);
                Outcome { allowed, policy, action: Some(rules.action), shadow }
            }
            None => Outcome { allowed: true, policy: None, action: None, shadow },
        }
    }
}

impl Rules {
    fn evaluate(&self, request: &AuthzRequest<'_>) -> (bool, Option<&PolicyName>) {
        // What an unknown outcome counts as.
        let closed = self.action == RbacAction::Deny;
        let matched = self.policies.iter().find(|policy| match policy.evaluate(request) {
            Truth::Yes => true,
            Truth::No => false,
            Truth::Unknown => closed,
        });
        let allowed = match self.action {
            RbacAction::Allow => matched.is_some(),
            RbacAction::Deny => matched.is_none(),
            RbacAction::Log => true,
        };
        (allowed, matched.map(|policy| &policy.name))
    }
}

impl Policy {
    fn evaluate(&self, request: &AuthzRequest<'_>) -> Truth {
        // Principals are asked only if the permission is not a plain no.
        match self.permission.evaluate(request) {
            Truth::No => Truth::No,
            permission => Truth::all([permission, self.principal.evaluate(request)].into_iter()),
        }
    }
}

fn header(test: &HeaderMatch, request: &AuthzRequest<'_>) -> Truth {
    request.http.is_some_and(|http| test.matches(http)).into()
}

fn path(test: &StringMatch, request: &AuthzRequest<'_>) -> Truth {
    request.http.is_some_and(|http| test.matches(http.path.as_bytes())).into()
}

fn claim(test: &ClaimMatch, request: &AuthzRequest<'_>) -> Truth {
    test.matches(request.http.and_then(|http| http.claims)).into()
}

impl Permission {
    fn evaluate(&self, request: &AuthzRequest<'_>) -> Truth {
        match self {
            Self::And(list) => Truth::all(list.iter().map(|one| one.evaluate(request))),
            Self::Or(list) => Truth::any(list.iter().map(|one| one.evaluate(request))),
            Self::Not(one) => !one.evaluate(request),
            Self::Any => Truth::Yes,
            Self::Header(test) => header(test, request),
            Self::UrlPath(test) => path(test, request),
            Self::Template(regex) => request.http.is_some_and(|http| regex.is_match(http.path.as_bytes())).into(),
            Self::DestinationIp(network) => network.contains(&request.destination.ip()).into(),
            Self::DestinationPort { start, end } => {
                (*start..*end).contains(&u32::from(request.destination.port())).into()
            }
            // A client that sent no name has the empty one.
            Self::ServerName(test) => test.matches(request.server_name.unwrap_or_default().as_bytes()).into(),
            Self::Claim(test) => claim(test, request),
            Self::Unknown => Truth::Unknown,
        }
    }
}

impl Principal {
    fn evaluate(&self, request: &AuthzRequest<'_>) -> Truth {
        match self {
            Self::And(list) => Truth::all(list.iter().map(|one| one.evaluate(request))),
            Self::Or(list) => Truth::any(list.iter().map(|one| one.evaluate(request))),
            Self::Not(one) => !one.evaluate(request),
            Self::Any => Truth::Yes,
            Self::Peer(None) => request.peer.is_some().into(),
            Self::Peer(Some(test)) => request.peer.is_some_and(|peer| test.matches(peer.as_bytes())).into(),
            Self::DirectRemoteIp(network) => network.contains(&request.direct_remote_ip).into(),
            Self::RemoteIp(network) => network.contains(&request.remote_ip).into(),
            Self::Header(test) => header(test, request),
            Self::UrlPath(test) => path(test, request),
            Self::Claim(test) => claim(test, request),
            Self::Unknown => Truth::Unknown,
        }
    }
}

fn policy(config: &rbac::RbacPolicy, errors: &mut Vec<String>) -> Policy {
    let mut compiler = Compiler { policy: &config.name, errors };
    let permissions = config.permissions.iter().map(|one| compiler.permission(one)).collect();
    let principals = config.principals.iter().map(|one| compiler.principal(one)).collect();
    Policy {
        name: PolicyName::new(&config.name),
        permission: Permission::Or(permissions),
        principal: Principal::Or(principals),
    }
}

struct Compiler<'a> {
    policy: &'a str,
    errors: &'a mut Vec<String>,
}

impl Compiler<'_> {
    fn or_unknown<T>(&mut self, result: Result<T, MatcherError>, unknown: T) -> T {
        result.unwrap_or_else(|error| {
            self.errors.push(format!("policy {}: {error}", self.policy));
            unknown
        })
    }

    fn permissions(&mut self, list: &[rbac::Permission]) -> Box<[Permission]> {
        list.iter().map(|one| self.permission(one)).collect()
    }

    fn permission(&mut self, config: &rbac::Permission) -> Permission {
        use rbac::Permission as Config;
        let compiled = match config {
            Config::And(list) => return Permission::And(self.permissions(list)),
            Config::Or(list) => return Permission::Or(self.permissions(list)),
            Config::Not(one) => return Permission::Not(Box::new(self.permission(one))),
            Config::Any => return Permission::Any,
            Config::DestinationIp(network) => return Permission::DestinationIp(*network),
            Config::DestinationPort(port) => {
                let start = u32::from(*port);
                return Permission::DestinationPort { start, end: start + 1 };
            }
            Config::DestinationPortRange { start, end } => {
                return Permission::DestinationPort { start: *start, end: *end };
            }
            Config::Unsupported(_) => return Permission::Unknown,
            Config::Header(test) => HeaderMatch::compile(test).map(Permission::Header),
            Config::UrlPath(test) => StringMatch::compile(test).map(Permission::UrlPath),
            Config::UriTemplate(template) => template_regex(template).map(Permission::Template),
            Config::RequestedServerName(test) => StringMatch::compile(test).map(Permission::ServerName),
            Config::Metadata(test) => ClaimMatch::compile(test).map(Permission::Claim),
        };
        self.or_unknown(compiled, Permission::Unknown)
    }

    fn principals(&mut self, list: &[rbac::Principal]) -> Box<[Principal]> {
        list.iter().map(|one| self.principal(one)).collect()
    }

    fn principal(&mut self, config: &rbac::Principal) -> Principal {
        use rbac::Principal as Config;
        let compiled = match config {
            Config::And(list) => return Principal::And(self.principals(list)),
            Config::Or(list) => return Principal::Or(self.principals(list)),
            Config::Not(one) => return Principal::Not(Box::new(self.principal(one))),
            Config::Any => return Principal::Any,
            Config::Peer(None) => return Principal::Peer(None),
            Config::DirectRemoteIp(network) => return Principal::DirectRemoteIp(*network),
            Config::RemoteIp(network) => return Principal::RemoteIp(*network),
            Config::Unsupported(_) => return Principal::Unknown,
            Config::Peer(Some(test)) => StringMatch::compile(test).map(|test| Principal::Peer(Some(test))),
            Config::Header(test) => HeaderMatch::compile(test).map(Principal::Header),
            Config::UrlPath(test) => StringMatch::compile(test).map(Principal::UrlPath),
            Config::Metadata(test) => ClaimMatch::compile(test).map(Principal::Claim),
        };
        self.or_unknown(compiled, Principal::Unknown)
    }
}

#[cfg(test)]
mod tests;
