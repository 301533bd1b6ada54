//! Wire messages: Envoy's from `envoy-types`, re-exported whole, and Istio's few, compiled from our own
//! `.proto` text. Nothing here interprets a message; `xds-model` does.

pub mod any;
pub mod json;

pub use envoy_types::pb as envoy;

/// Istio's own messages.
pub mod istio {
    /// `istio.workload`: workloads and services.
    #[allow(unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
    pub mod workload {
        tonic::include_proto!("istio.workload");
    }
    /// `istio.security`: L4 authorization.
    #[allow(unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
    pub mod security {
        tonic::include_proto!("istio.security");
    }
    /// `istio.v1.auth`: the certificate service.
    #[allow(unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
    pub mod ca {
        tonic::include_proto!("istio.v1.auth");
    }
    /// `stats`: what is to be reported as metrics.
    #[allow(unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
    pub mod stats {
        tonic::include_proto!("stats");
    }
    /// `istio.workload.zds`: a node's pods, told by istio-cni.
    #[allow(unreachable_pub, clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
    pub mod zds {
        tonic::include_proto!("istio.workload.zds");
    }
}

/// Type URLs of the discovery resources Strata serves or consumes.
pub mod type_url {
    pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
    pub const WORKLOAD: &str = "type.googleapis.com/istio.workload.Workload";
    pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
    pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    pub const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
    pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
    pub const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
    pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    pub const EXTENSION: &str = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig";
}
