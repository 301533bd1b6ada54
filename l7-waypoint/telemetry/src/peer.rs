//! Who is at either end, as telemetry names them.

use std::net::IpAddr;
use std::sync::Arc;

/// A workload at one end of a request. Unknown parts are `unknown`, as in Istio's labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Peer {
    pub workload: Arc<str>,
    pub namespace: Arc<str>,
    /// `spiffe://…`, or `unknown`.
    pub principal: Arc<str>,
    /// Label `app`.
    pub app: Arc<str>,
    /// Label `version`.
    pub version: Arc<str>,
    pub canonical_service: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub cluster: Arc<str>,
}

impl Default for Peer {
    fn default() -> Self {
        let unknown: Arc<str> = "unknown".into();
        Self {
            workload: unknown.clone(),
            namespace: unknown.clone(),
            principal: unknown.clone(),
            app: unknown.clone(),
            version: unknown.clone(),
            canonical_service: unknown.clone(),
            canonical_revision: unknown.clone(),
            cluster: unknown,
        }
    }
}

/// Finds workloads by address, from the workloads the control plane sent.
pub trait Peers: Send + Sync {
    /// The workload at `address`. Called per connection and per new endpoint, not per request; the same workload
    /// should come back as the same `Arc` while nothing changed.
    fn by_address(&self, address: IpAddr) -> Option<Arc<Peer>>;
}

/// The service a request was for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServiceInfo {
    /// Fully qualified host.
    pub host: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
}

impl Default for ServiceInfo {
    fn default() -> Self {
        let unknown: Arc<str> = "unknown".into();
        Self { host: unknown.clone(), name: unknown.clone(), namespace: unknown }
    }
}
