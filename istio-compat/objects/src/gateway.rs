//! Gateway API objects (v1.5 with the experimental fields Istio reads), shared pieces once.
mod gateways;
mod http;
mod policy;
mod routes;

pub use gateways::*;
pub use http::*;
pub use policy::*;
pub use routes::*;

use crate::resource::Resource;

/// `gateway.networking.k8s.io` GatewayClass.
pub type GatewayClass = Resource<GatewayClassSpec>;
/// `gateway.networking.k8s.io` Gateway.
pub type Gateway = Resource<GatewaySpec>;
/// `gateway.networking.k8s.io` HTTPRoute.
pub type HTTPRoute = Resource<HttpRouteSpec>;
/// `gateway.networking.k8s.io` GRPCRoute.
pub type GRPCRoute = Resource<GrpcRouteSpec>;
/// `gateway.networking.k8s.io` TCPRoute.
pub type TCPRoute = Resource<TcpRouteSpec>;
/// `gateway.networking.k8s.io` TLSRoute.
pub type TLSRoute = Resource<TlsRouteSpec>;
/// `gateway.networking.k8s.io` ReferenceGrant.
pub type ReferenceGrant = Resource<ReferenceGrantSpec>;
/// `gateway.networking.k8s.io` BackendTLSPolicy.
pub type BackendTLSPolicy = Resource<BackendTlsPolicySpec>;
