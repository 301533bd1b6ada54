//! Counters of external authorization, named as Envoy names them.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// What asking the service came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtAuthzOutcome {
    Ok,
    Denied,
    /// It could not be asked, or its answer could not be read.
    Error,
    /// After an error: the configuration lets the request pass.
    FailureModeAllowed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    cluster_name: Arc<str>,
}

/// One family an outcome, by the cluster the request would go to.
#[derive(Default)]
pub(crate) struct ExtAuthz {
    ok: Family<Labels, Counter>,
    denied: Family<Labels, Counter>,
    error: Family<Labels, Counter>,
    failure_mode_allowed: Family<Labels, Counter>,
}

impl ExtAuthz {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let all = Self::default();
        let families = [
            ("ok", "Requests external authorization let pass", &all.ok),
            ("denied", "Requests external authorization refused", &all.denied),
            ("error", "Requests external authorization gave no answer for", &all.error),
            ("failure_mode_allowed", "Requests let pass without an answer", &all.failure_mode_allowed),
        ];
        for (name, help, family) in families {
            registry.register(format!("envoy_cluster_ext_authz_{name}"), help, family.clone());
        }
        all
    }

    pub(crate) fn count(&self, cluster: &Arc<str>, outcome: ExtAuthzOutcome) {
        let family = match outcome {
            ExtAuthzOutcome::Ok => &self.ok,
            ExtAuthzOutcome::Denied => &self.denied,
            ExtAuthzOutcome::Error => &self.error,
            ExtAuthzOutcome::FailureModeAllowed => &self.failure_mode_allowed,
        };
        family.get_or_create(&Labels { cluster_name: cluster.clone() }).inc();
    }
}
