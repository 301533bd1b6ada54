//! Kubernetes, Istio and Gateway API objects in, the xDS resources istiod would send for them out.
//!
//! Pure: no clock, no files, no network. Equal objects give byte-equal resources. What an object asks for and
//! cannot get becomes a [`TranslationFault`] that names object, field and reason; a security object that cannot be
//! honoured becomes a denial of its target. Must not depend on either layer.
mod mesh;
mod node;
mod pb;
mod unsupported;
mod waypoint;
mod wire;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;

pub use compat_objects::{Fault, ObjectKey, ObjectSet, Severity};
use serde::Serialize;
use xds_proto::envoy::google::protobuf::Any;

/// Resources of one type by name.
pub type Resources = BTreeMap<String, Any>;

/// What holds for the whole mesh.
#[derive(Debug, Clone)]
pub struct MeshOptions {
    pub trust_domain: String,
    /// Where mesh-wide policies live.
    pub root_namespace: String,
    pub cluster_id: String,
    /// What came of fetching each `jwksUri`; a URI without keys gets a key set that accepts no token.
    pub jwks: BTreeMap<String, Jwks>,
}

/// The keys behind one `jwksUri`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Jwks {
    /// As last fetched.
    pub keys: Option<String>,
    /// Why the last attempt failed, if it did.
    pub error: Option<String>,
}

impl Default for MeshOptions {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            cluster_id: "Kubernetes".into(),
            jwks: BTreeMap::new(),
        }
    }
}

/// Everything the data plane is to know.
#[derive(Debug, Clone, Default)]
pub struct MeshOutput {
    /// `istio.workload.Address`, for node proxies.
    pub addresses: Resources,
    /// `istio.security.Authorization`, for node proxies.
    pub authorizations: Resources,
    /// `istio.workload.Workload`, for waypoints: the workloads among `addresses`.
    pub workloads: Resources,
    /// By `namespace/name` of the Gateway.
    pub waypoints: BTreeMap<String, WaypointOutput>,
    pub statuses: Vec<ObjectStatus>,
    /// Virtual addresses drawn for hosts of ServiceEntries, to be kept in their status (`addresses`: host and value).
    pub drawn_addresses: BTreeMap<ObjectKey, Vec<(String, IpAddr)>>,
    pub faults: Vec<TranslationFault>,
    /// Every `jwksUri` in use; whoever calls fetches them for [`MeshOptions::jwks`].
    pub jwks_uris: BTreeSet<String>,
    /// Every Secret and ConfigMap that some waypoint is to be sent a part of, whether it is there or not.
    pub referred: BTreeSet<ObjectKey>,
}

/// What one waypoint is to know.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WaypointOutput {
    pub listeners: Resources,
    pub clusters: Resources,
    pub endpoints: Resources,
    pub extensions: Resources,
    /// Secrets (SDS) with roots of other servers: public.
    pub roots: Resources,
    /// Secrets (SDS) with certificates and their private keys.
    pub certificates: Resources,
}

/// One mistake in one object.
#[derive(Debug, Clone, PartialEq)]
pub struct TranslationFault {
    pub key: ObjectKey,
    pub fault: Fault,
}

impl fmt::Display for TranslationFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fault.fmt(f)
    }
}

/// What became of an object.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectStatus {
    pub key: ObjectKey,
    pub conditions: Vec<Condition>,
}

/// A Kubernetes condition without its time, which whoever writes it knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    #[serde(rename = "type")]
    pub kind: String,
    /// `True` or `False`.
    pub status: String,
    pub reason: String,
    pub message: String,
}

/// Collects faults during one translation.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    all: Vec<TranslationFault>,
    /// Places in `all`.
    of: HashMap<ObjectKey, Vec<usize>>,
}

impl Faults {
    fn push(&mut self, objects: &ObjectSet, key: &ObjectKey, fault: Fault) {
        let found = TranslationFault { key: key.clone(), fault: objects.located(fault, key) };
        let known = self.of.entry(key.clone()).or_default();
        // The same object is looked at once for every waypoint and port.
        if !known.iter().any(|place| self.all[*place] == found) {
            known.push(self.all.len());
            self.all.push(found);
        }
    }

    pub(crate) fn error(&mut self, objects: &ObjectSet, key: &ObjectKey, field: &str, reason: impl Into<String>) {
        self.push(objects, key, Fault::error(key.to_string(), field, reason));
    }

    pub(crate) fn warning(&mut self, objects: &ObjectSet, key: &ObjectKey, field: &str, reason: impl Into<String>) {
        self.push(objects, key, Fault::warning(key.to_string(), field, reason));
    }
}

/// Translates all objects at once.
pub fn translate(objects: &ObjectSet, options: &MeshOptions) -> MeshOutput {
    let mut faults = Faults::default();
    let mesh = mesh::Mesh::build(objects, options, &mut faults);
    let mut output = MeshOutput::default();
    node::build(&mesh, &mut output, &mut faults);
    waypoint::build(&mesh, &mut output, &mut faults);
    unsupported::build(&mesh, &mut faults);
    output.drawn_addresses = mesh.drawn.0;
    output.faults = faults.all;
    output
}
