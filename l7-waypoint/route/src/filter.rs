//! Compiled configuration of single filters.
use std::time::Duration;

use l7_authz::l7::RequestView;
use l7_authz::l7::matcher::{HeaderMatch, StringMatch};
use xds_model::envoy::ext_authz::ExtAuthzPerRoute;
use xds_model::envoy::filter::{AbortWith, CorsPolicy};
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
    pub ext_authz: Option<ExtAuthzPerRoute>,
}

impl RouteFilters {
    pub(crate) fn compile(config: &route::RouteFilters) -> Result<Self, CompileError> {
        Ok(Self {
            cors: config.cors.as_ref().map(Cors::compile).transpose()?,
            fault: config.fault.as_ref().map(Fault::compile).transpose()?,
            ext_authz: config.ext_authz.clone(),
        })
    }
}
