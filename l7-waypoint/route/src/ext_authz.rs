//! External authorization, compiled: when the service is asked, what it is told, and which of its headers count.
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use http::header::{AUTHORIZATION, LOCATION, WWW_AUTHENTICATE};
use l7_authz::l7::matcher::StringMatch;
use l7_authz::l7::{PolicyName, Shadow};
use xds_model::envoy::ext_authz;
use xds_model::envoy::matcher::{StringMatcher, ValueMatcher};
use xds_model::envoy::route::{HeaderAdd, HeaderMutations};

use crate::CompileError;
use crate::headers::HeaderOps;

/// One `ext_authz` filter.
#[derive(Debug, Clone)]
pub struct ExtAuthz {
    pub config: ext_authz::ExtAuthz,
    /// Name of the cluster the service is in.
    pub cluster: Arc<str>,
    /// How long the service may take; zero: as long as it likes.
    pub timeout: Duration,
    pub kind: Kind,
    enabled: Enabled,
    allowed_headers: Option<Box<[StringMatch]>>,
    disallowed_headers: Box<[StringMatch]>,
}

/// How the service is asked.
#[derive(Debug, Clone)]
pub enum Kind {
    /// `envoy.service.auth.v3.Authorization/Check`.
    Grpc {
        /// The cluster's name where the configuration gives none.
        authority: Box<str>,
        metadata: HeaderOps,
    },
    /// The request's own head, with its body where configured.
    Http(Box<Http>),
}

/// What is particular to a service asked over HTTP.
#[derive(Debug, Clone)]
pub struct Http {
    pub path_prefix: Box<str>,
    /// Set on the request to the service.
    pub headers: HeaderOps,
    upstream: Box<[StringMatch]>,
    upstream_append: Box<[StringMatch]>,
    client: Box<[StringMatch]>,
    client_on_success: Box<[StringMatch]>,
}

#[derive(Debug, Clone)]
enum Enabled {
    Always,
    /// When the shadow rules of this prefix matched a policy whose name matches.
    Shadow {
        prefix: Box<str>,
        policy: StringMatch,
    },
}

/// Namespace and suffix of the metadata RBAC's shadow rules write.
const RBAC: &str = "envoy.filters.http.rbac";
const POLICY_ID: &str = "shadow_effective_policy_id";

impl ExtAuthz {
    /// Compiles; a condition that is not understood means that the service is always asked.
    pub(crate) fn compile(config: &ext_authz::ExtAuthz) -> Result<Self, CompileError> {
        use ext_authz::ExtAuthzService as Config;
        let tests = |list: &[StringMatcher]| StringMatch::compile_all(list);
        let (cluster, timeout, kind) = match &config.service {
            Config::Grpc { cluster, authority, timeout, initial_metadata } => {
                let authority = authority.as_deref().unwrap_or(cluster).into();
                (cluster, timeout, Kind::Grpc { authority, metadata: ops(initial_metadata)? })
            }
            Config::Http {
                uri: _,
                cluster,
                timeout,
                path_prefix,
                headers_to_add,
                allowed_upstream_headers,
                allowed_upstream_headers_to_append,
                allowed_client_headers,
                allowed_client_headers_on_success,
            } => {
                let http = Http {
                    path_prefix: path_prefix.as_str().into(),
                    headers: ops(headers_to_add)?,
                    upstream: tests(allowed_upstream_headers)?,
                    upstream_append: tests(allowed_upstream_headers_to_append)?,
                    client: tests(allowed_client_headers)?,
                    client_on_success: tests(allowed_client_headers_on_success)?,
                };
                (cluster, timeout, Kind::Http(Box::new(http)))
            }
        };
        Ok(Self {
            cluster: cluster.as_str().into(),
            timeout: *timeout,
            kind,
            enabled: Enabled::compile(config)?,
            allowed_headers: config.allowed_headers.as_deref().map(StringMatch::compile_all).transpose()?,
            disallowed_headers: StringMatch::compile_all(&config.disallowed_headers)?,
            config: config.clone(),
        })
    }

    /// Whether the service is asked, given what the shadow rules of the RBAC filters before said.
    pub fn applies(&self, shadows: &[Shadow<'_>]) -> bool {
        matches!(self.enabled, Enabled::Always) || self.policy(shadows).is_some()
    }

    /// The policy because of which the service is asked; `None`: there is none, or it is always asked.
    pub fn policy<'s>(&self, shadows: &[Shadow<'s>]) -> Option<&'s PolicyName> {
        let Enabled::Shadow { prefix, policy } = &self.enabled else { return None };
        let of_prefix = shadows.iter().filter(|shadow| *shadow.prefix == **prefix);
        of_prefix.filter_map(|shadow| shadow.policy).find(|name| policy.matches(name.id.as_bytes()))
    }

    /// Whether a request header is sent to the service. Where the configuration does not say which, a gRPC service
    /// gets all of them, an HTTP service only the caller's credentials (and what makes up a request's first line).
    pub fn sends(&self, name: &str) -> bool {
        let matches = |tests: &[StringMatch]| tests.iter().any(|test| test.matches(name.as_bytes()));
        if matches(&self.disallowed_headers) {
            return false;
        }
        let http = matches!(self.kind, Kind::Http(_));
        match &self.allowed_headers {
            Some(allowed) => (http && name == AUTHORIZATION.as_str()) || matches(allowed),
            None => !http || name == AUTHORIZATION.as_str(),
        }
    }
}

impl Enabled {
    fn compile(config: &ext_authz::ExtAuthz) -> Result<Self, CompileError> {
        let Some(matcher) = &config.enabled else { return Ok(Self::Always) };
        let ([key], ValueMatcher::String(policy)) = (matcher.path.as_slice(), &matcher.value) else {
            return Ok(Self::Always);
        };
        match key.strip_suffix(POLICY_ID) {
            Some(prefix) if matcher.filter == RBAC && !matcher.invert => {
                Ok(Self::Shadow { prefix: prefix.into(), policy: StringMatch::compile(policy)? })
            }
            _ => Ok(Self::Always),
        }
    }
}

impl Http {
    /// Whether a header of an allowing answer replaces the request's.
    pub fn sets_upstream(&self, name: &HeaderName) -> bool {
        any(&self.upstream, name)
    }

    /// Whether a header of an allowing answer is added to the request's.
    pub fn appends_upstream(&self, name: &HeaderName) -> bool {
        any(&self.upstream_append, name)
    }

    /// Whether a header of a refusing answer goes to the client: all, unless some are listed; what a client needs in
    /// order to do better goes in any case.
    pub fn sends_to_client(&self, name: &HeaderName) -> bool {
        self.client.is_empty() || name == LOCATION || name == WWW_AUTHENTICATE || any(&self.client, name)
    }

    /// Whether a header of an allowing answer goes to the client.
    pub fn sends_to_client_on_success(&self, name: &HeaderName) -> bool {
        any(&self.client_on_success, name)
    }
}

fn any(tests: &[StringMatch], name: &HeaderName) -> bool {
    tests.iter().any(|test| test.matches(name.as_str().as_bytes()))
}

fn ops(add: &[HeaderAdd]) -> Result<HeaderOps, CompileError> {
    HeaderOps::compile(&HeaderMutations { add: add.to_vec(), remove: Vec::new() })
}
