//! `GRPCRoute`, `TCPRoute`, `TLSRoute`, and references every route has.
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

use crate::{HasMeta, Kind, ObjectKey, ObjectSet, Resource};

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

/// What routes of all four kinds have in common.
#[derive(Clone, Copy, Debug)]
pub struct AnyRoute<'a> {
    pub kind: Kind,
    pub api_version: &'a str,
    pub metadata: &'a ObjectMeta,
    pub parent_refs: &'a [ParentReference],
    /// As read.
    pub status: Option<&'a serde_json::Value>,
}

impl HasMeta for AnyRoute<'_> {
    fn meta(&self) -> &ObjectMeta {
        self.metadata
    }
}

impl AnyRoute<'_> {
    pub fn key(&self) -> ObjectKey {
        ObjectKey::new(self.kind, self.namespace(), self.name())
    }
}

impl ObjectSet {
    /// Every HTTPRoute, GRPCRoute, TCPRoute and TLSRoute, in this order.
    pub fn routes(&self) -> impl Iterator<Item = AnyRoute<'_>> {
        let http = self.http_routes().map(|route| any(Kind::HTTPRoute, route, &route.spec.parent_refs));
        let grpc = self.grpc_routes().map(|route| any(Kind::GRPCRoute, route, &route.spec.parent_refs));
        let tcp = self.tcp_routes().map(|route| any(Kind::TCPRoute, route, &route.spec.parent_refs));
        let tls = self.tls_routes().map(|route| any(Kind::TLSRoute, route, &route.spec.parent_refs));
        http.chain(grpc).chain(tcp).chain(tls)
    }
}

fn any<'a, S>(kind: Kind, route: &'a Resource<S>, parent_refs: &'a [ParentReference]) -> AnyRoute<'a> {
    let Resource { api_version, metadata, status, .. } = route;
    AnyRoute { kind, api_version, metadata, parent_refs, status: status.as_ref() }
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
