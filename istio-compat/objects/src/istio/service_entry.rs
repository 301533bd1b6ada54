//! `ServiceEntry` and `WorkloadEntry`: services and workloads Kubernetes does not know.
use std::collections::BTreeMap;

use serde::Deserialize;

use super::LabelsSelector;

/// `networking.istio.io/ServiceEntry.spec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceEntrySpec {
    pub hosts: Vec<String>,
    /// Virtual addresses or CIDR blocks.
    pub addresses: Vec<String>,
    pub ports: Vec<ServicePort>,
    pub location: ServiceLocation,
    pub resolution: Resolution,
    pub endpoints: Vec<WorkloadEntrySpec>,
    pub workload_selector: Option<LabelsSelector>,
    pub export_to: Vec<String>,
    pub subject_alt_names: Vec<String>,
}

/// Whether the service is part of the mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ServiceLocation {
    #[default]
    MeshExternal,
    MeshInternal,
}

/// How the service's endpoints are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Resolution {
    #[default]
    None,
    Static,
    Dns,
    DnsRoundRobin,
    DynamicDns,
}

/// One port of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    pub number: u16,
    /// `HTTP`, `HTTPS`, `GRPC`, `HTTP2`, `MONGO`, `TCP`, `TLS`, ...; empty: Istio detects.
    pub protocol: String,
    pub name: String,
    /// 0: as `number`.
    pub target_port: u16,
}

/// `networking.istio.io/WorkloadEntry.spec`, also an endpoint of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadEntrySpec {
    /// IP address, DNS name (with resolution DNS) or `unix:///path`.
    pub address: String,
    pub ports: BTreeMap<String, u16>,
    pub labels: BTreeMap<String, String>,
    pub network: String,
    /// `region/zone/subzone`.
    pub locality: String,
    /// 0: 1.
    pub weight: u32,
    pub service_account: String,
}
