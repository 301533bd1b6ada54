//! Pieces several Istio objects share, and the two kept as raw JSON.
use std::collections::BTreeMap;

use serde::Deserialize;

/// Selects workloads by labels (`istio.type.v1beta1.WorkloadSelector`); empty selects all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadSelector {
    pub match_labels: BTreeMap<String, String>,
}

/// Attaches a policy to an object (`istio.type.v1beta1.PolicyTargetReference`).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyTargetReference {
    /// Empty for the core group.
    pub group: String,
    pub kind: String,
    pub name: String,
    /// Empty: the policy's own; Istio allows no other.
    pub namespace: String,
}

/// A string condition: exactly one of the three is set, or none, which means "present" for headers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct StringMatch {
    pub exact: Option<String>,
    pub prefix: Option<String>,
    /// RE2, matched against the whole value.
    pub regex: Option<String>,
}

/// A port by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortSelector {
    pub number: u16,
}

/// Per cent, 0.0 to 100.0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Percent {
    pub value: f64,
}

/// Where traffic goes: a host of the registry, optionally one of its subsets and ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Destination {
    pub host: String,
    /// Empty: the whole host.
    pub subset: String,
    pub port: Option<PortSelector>,
}

/// An EnvoyFilter's spec; only its attachment is looked at.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvoyFilterSpec {
    pub workload_selector: Option<LabelsSelector>,
    pub target_refs: Vec<PolicyTargetReference>,
    pub priority: i32,
    /// The patches, as written.
    pub config_patches: Vec<serde_json::Value>,
}

/// A WasmPlugin's spec; only its attachment, phase and source are typed.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WasmPluginSpec {
    pub selector: Option<WorkloadSelector>,
    pub target_ref: Option<PolicyTargetReference>,
    pub target_refs: Vec<PolicyTargetReference>,
    pub url: String,
    pub sha256: String,
    pub image_pull_policy: String,
    pub image_pull_secret: String,
    pub verification_key: String,
    pub plugin_config: Option<serde_json::Value>,
    pub plugin_name: String,
    pub phase: String,
    pub fail_strategy: String,
    pub priority: Option<i32>,
    pub vm_config: Option<serde_json::Value>,
    #[serde(rename = "match")]
    pub matches: Vec<serde_json::Value>,
    #[serde(rename = "type")]
    pub plugin_type: String,
}

/// Selects workloads by labels, in the form the networking API writes (`labels:`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelsSelector {
    pub labels: BTreeMap<String, String>,
}
