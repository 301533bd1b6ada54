//! `Sidecar`: read so that it is known to exist; the ambient mode has no use for it.
use serde::Deserialize;

use super::{ConnectionPoolSettings, Destination, LabelsSelector};

/// `networking.istio.io/Sidecar.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SidecarSpec {
    pub workload_selector: Option<LabelsSelector>,
    pub ingress: Vec<IngressListener>,
    pub egress: Vec<EgressListener>,
    pub inbound_connection_pool: Option<ConnectionPoolSettings>,
    pub outbound_traffic_policy: Option<OutboundTrafficPolicy>,
}

/// One inbound listener.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressListener {
    pub port: Option<SidecarPort>,
    pub bind: String,
    pub capture_mode: String,
    pub default_endpoint: String,
    pub tls: Option<serde_json::Value>,
    pub connection_pool: Option<ConnectionPoolSettings>,
}

/// One outbound listener.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressListener {
    pub port: Option<SidecarPort>,
    pub bind: String,
    pub capture_mode: String,
    pub hosts: Vec<String>,
}

/// A listener's port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SidecarPort {
    pub number: u16,
    pub protocol: String,
    pub name: String,
    pub target_port: u16,
}

/// What happens to destinations outside the registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OutboundTrafficPolicy {
    pub mode: String,
    pub egress_proxy: Option<Destination>,
}
