//! Istio's objects, field by field as its CRDs have them (istio/api, July 2026).
//!
//! Fields left out read as their default, as in the protobuf messages the CRDs come from; what Istio calls a
//! `oneof` is a set of `Option`s here, and [`crate::validate`] refuses more than one.
mod common;
mod destination_rule;
mod security;
mod service_entry;
mod sidecar;
mod telemetry;
mod virtual_service;

pub use common::*;
pub use destination_rule::*;
pub use security::*;
pub use service_entry::*;
pub use sidecar::*;
pub use telemetry::*;
pub use virtual_service::*;

use crate::resource::Resource;

/// `networking.istio.io` VirtualService.
pub type VirtualService = Resource<VirtualServiceSpec>;
/// `networking.istio.io` DestinationRule.
pub type DestinationRule = Resource<DestinationRuleSpec>;
/// `networking.istio.io` ServiceEntry.
pub type ServiceEntry = Resource<ServiceEntrySpec>;
/// `networking.istio.io` WorkloadEntry.
pub type WorkloadEntry = Resource<WorkloadEntrySpec>;
/// `networking.istio.io` Sidecar.
pub type Sidecar = Resource<SidecarSpec>;
/// `networking.istio.io` EnvoyFilter, kept as read.
pub type EnvoyFilter = Resource<EnvoyFilterSpec>;
/// `extensions.istio.io` WasmPlugin, kept as read.
pub type WasmPlugin = Resource<WasmPluginSpec>;
/// `security.istio.io` AuthorizationPolicy.
pub type AuthorizationPolicy = Resource<AuthorizationPolicySpec>;
/// `security.istio.io` RequestAuthentication.
pub type RequestAuthentication = Resource<RequestAuthenticationSpec>;
/// `security.istio.io` PeerAuthentication.
pub type PeerAuthentication = Resource<PeerAuthenticationSpec>;
/// `telemetry.istio.io` Telemetry.
pub type Telemetry = Resource<TelemetrySpec>;
