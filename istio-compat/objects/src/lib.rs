//! Typed Kubernetes, Istio and Gateway API objects, read from YAML.
//!
//! Every mistake becomes a [`Fault`] that names file, line, object, field and reason. This crate knows no
//! cross references: whether a route's host exists is the translator's question. It must not depend on xDS
//! or on either layer.
mod fault;
pub mod gateway;
pub mod istio;
mod kind;
mod object;
mod path;
mod read;
mod resource;
mod scalar;
pub mod source;
pub mod validate;
mod yaml;

pub use fault::{Fault, Location, Severity};
pub use k8s_openapi;
pub use kind::{Kind, KindError, Strictness};
pub use object::{Object, ObjectKey, ObjectSet};
pub use path::{FieldPath, Segment};
pub use read::{read_object, read_str, read_value};
pub use resource::{HasMeta, Resource, has_ended, internal_addresses, is_ready};
pub use scalar::{Base64, Duration, DurationError};

/// Kubernetes' own types, under the names the rest of the code uses.
pub mod core {
    pub use k8s_openapi::api::core::v1::*;
    pub use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
    pub use k8s_openapi::api::networking::v1::{
        IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer,
        NetworkPolicyPort, NetworkPolicySpec,
    };
    pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement, ObjectMeta};
    pub use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
}
