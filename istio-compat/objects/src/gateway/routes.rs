//! `GRPCRoute`, `TCPRoute`, `TLSRoute`, and references every route has.
use serde::Deserialize;

use super::{HttpHeaderMatch, RouteFilter, SessionPersistence, ValueMatchType};

/// What a route attaches to: a Gateway, or (GAMMA) a Service or ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ParentReference {
    /// Absent: `gateway.networking.k8s.io`; empty: the core group.
    pub group: Option<String>,
    /// Absent: `Gateway`.
    pub kind: Option<String>,
    pub namespace: Option<String>,
    pub name: String,
    pub section_name: Option<String>,
    pub port: Option<u16>,
}

/// A weighted backend.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendRef {
    /// Absent or empty: the core group.
    pub group: Option<String>,
    /// Absent: `Service`.
    pub kind: Option<String>,
    pub name: String,
    pub namespace: Option<String>,
    pub port: Option<u16>,
    /// Absent: 1.
    pub weight: Option<i32>,
    /// HTTP and gRPC only.
    pub filters: Vec<RouteFilter>,
}

/// `GRPCRoute.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GrpcRouteSpec {
    pub parent_refs: Vec<ParentReference>,
    pub use_default_gateways: Option<String>,
    pub hostnames: Vec<String>,
    pub rules: Vec<GrpcRouteRule>,
}

/// One rule; no match means every call.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GrpcRouteRule {
    pub name: Option<String>,
    pub matches: Vec<GrpcRouteMatch>,
    pub filters: Vec<RouteFilter>,
    pub backend_refs: Vec<BackendRef>,
    pub session_persistence: Option<SessionPersistence>,
}

/// Conditions that must all hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GrpcRouteMatch {
    pub method: Option<GrpcMethodMatch>,
    pub headers: Vec<HttpHeaderMatch>,
}

/// A condition on the called service and method.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GrpcMethodMatch {
    #[serde(rename = "type")]
    pub kind: ValueMatchType,
    pub service: Option<String>,
    pub method: Option<String>,
}

/// `TCPRoute.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpRouteSpec {
    pub parent_refs: Vec<ParentReference>,
    pub use_default_gateways: Option<String>,
    pub rules: Vec<L4RouteRule>,
}

/// `TLSRoute.spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TlsRouteSpec {
    pub parent_refs: Vec<ParentReference>,
    pub use_default_gateways: Option<String>,
    /// SNI names, a leading `*.` allowed.
    pub hostnames: Vec<String>,
    pub rules: Vec<L4RouteRule>,
}

/// A rule of a TCP or TLS route.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct L4RouteRule {
    pub name: Option<String>,
    pub backend_refs: Vec<BackendRef>,
}
