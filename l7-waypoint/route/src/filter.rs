//! Compiled configuration of single filters.
use std::time::Duration;

use l7_authz::l7::matcher::{HeaderMatch, StringMatch};
use l7_authz::l7::{RequestView, Shadow};
use xds_model::envoy::ext_authz;
use xds_model::envoy::filter::{AbortWith, CorsPolicy};
use xds_model::envoy::matcher::ValueMatcher;
use xds_model::envoy::{filter as config, route};

use crate::{CompileError, draw};

/// Salts of the draws made here; see [`crate::draw`].
const SALT_DELAY: u64 = 0xd1;
const SALT_ABORT: u64 = 0xab;
const SALT_CORS: u64 = 0xc0;

/// A CORS policy.
#[derive(Debug, Clone)]
pub struct Cors {
    pub policy: CorsPolicy,
    origins: Box<[StringMatch]>,
}

impl Cors {
    pub(crate) fn compile(policy: &CorsPolicy) -> Result<Self, CompileError> {
        Ok(Self { origins: StringMatch::compile_all(&policy.allow_origins)?, policy: policy.clone() })
    }

    /// Whether an origin is allowed.
    pub fn allows(&self, origin: &[u8]) -> bool {
        self.origins.iter().any(|test| test.matches(origin))
    }

    /// Whether the policy is in force for a request.
    pub fn enabled(&self, seed: u64) -> bool {
        self.policy.enabled.hit(draw(seed, SALT_CORS))
    }
}

/// Faults to inject.
#[derive(Debug, Clone)]
pub struct Fault {
    config: config::Fault,
    headers: Box<[HeaderMatch]>,
}

/// The faults one request gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Injected {
    pub delay: Option<Duration>,
    /// After the delay.
    pub abort: Option<AbortWith>,
}

impl Fault {
    pub(crate) fn compile(config: &config::Fault) -> Result<Self, CompileError> {
        Ok(Self { headers: HeaderMatch::compile_all(&config.headers)?, config: config.clone() })
    }

    /// Faults active at one time at most.
    pub fn max_active(&self) -> Option<u32> {
        self.config.max_active
    }

    /// Draws the faults of one request; delay and abort are drawn independently.
    pub fn inject(&self, request: &RequestView<'_>, seed: u64) -> Injected {
        if !self.headers.iter().all(|test| test.matches(request)) {
            return Injected::default();
        }
        let delay = self.config.delay.filter(|delay| delay.fraction.hit(draw(seed, SALT_DELAY)));
        let abort = self.config.abort.filter(|abort| abort.fraction.hit(draw(seed, SALT_ABORT)));
        Injected { delay: delay.map(|delay| delay.duration), abort: abort.map(|abort| abort.with) }
    }
}

/// `typed_per_filter_config` of one scope.
#[derive(Debug, Clone, Default)]
pub struct RouteFilters {
    pub cors: Option<Cors>,
    pub fault: Option<Fault>,
}

impl RouteFilters {
    pub(crate) fn compile(config: &route::RouteFilters) -> Result<Self, CompileError> {
        Ok(Self {
            cors: config.cors.as_ref().map(Cors::compile).transpose()?,
            fault: config.fault.as_ref().map(Fault::compile).transpose()?,
        })
    }
}

/// External authorization.
#[derive(Debug, Clone)]
pub struct ExtAuthz {
    pub config: ext_authz::ExtAuthz,
    enabled: Enabled,
    allowed_headers: Option<Box<[StringMatch]>>,
    disallowed_headers: Box<[StringMatch]>,
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
        let enabled = match &config.enabled {
            None => Enabled::Always,
            Some(matcher) => match (matcher.path.as_slice(), &matcher.value) {
                ([key], ValueMatcher::String(policy)) if matcher.filter == RBAC && !matcher.invert => {
                    match key.strip_suffix(POLICY_ID) {
                        Some(prefix) => {
                            Enabled::Shadow { prefix: prefix.into(), policy: StringMatch::compile(policy)? }
                        }
                        None => Enabled::Always,
                    }
                }
                _ => Enabled::Always,
            },
        };
        Ok(Self {
            enabled,
            allowed_headers: config.allowed_headers.as_deref().map(StringMatch::compile_all).transpose()?,
            disallowed_headers: StringMatch::compile_all(&config.disallowed_headers)?,
            config: config.clone(),
        })
    }

    /// Whether the service is asked, given what the shadow rules of the RBAC filters before said.
    pub fn applies(&self, shadows: &[Shadow<'_>]) -> bool {
        match &self.enabled {
            Enabled::Always => true,
            Enabled::Shadow { prefix, policy } => shadows
                .iter()
                .filter(|shadow| *shadow.prefix == **prefix)
                .any(|shadow| shadow.policy.is_some_and(|name| policy.matches(name.id.as_bytes()))),
        }
    }

    /// Whether a request header is sent to the service. `None`: the service's built-in set decides.
    pub fn sends(&self, name: &http::HeaderName) -> Option<bool> {
        let name = name.as_str().as_bytes();
        if self.disallowed_headers.iter().any(|test| test.matches(name)) {
            return Some(false);
        }
        self.allowed_headers.as_ref().map(|allowed| allowed.iter().any(|test| test.matches(name)))
    }
}
