//! Typed objects and the set of all of them.
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Secret, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::fault::Location;
use crate::gateway::{
    BackendTLSPolicy, GRPCRoute, Gateway, GatewayClass, HTTPRoute, ReferenceGrant, TCPRoute, TLSRoute,
};
use crate::istio::{
    AuthorizationPolicy, DestinationRule, EnvoyFilter, PeerAuthentication, RequestAuthentication, ServiceEntry,
    Sidecar, Telemetry, VirtualService, WasmPlugin, WorkloadEntry,
};
use crate::kind::Kind;
use crate::resource::HasMeta;

/// Names one object. `namespace` is empty for cluster-scoped kinds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    pub kind: Kind,
    pub namespace: String,
    pub name: String,
}

impl ObjectKey {
    pub fn new(kind: Kind, namespace: impl Into<String>, name: impl Into<String>) -> ObjectKey {
        ObjectKey { kind, namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

#[derive(Clone, Debug)]
struct Stored {
    object: Object,
    location: Option<Location>,
}

/// All objects of one moment; cloning costs one reference count.
#[derive(Clone, Debug, Default)]
pub struct ObjectSet {
    objects: Arc<BTreeMap<ObjectKey, Stored>>,
}

impl ObjectSet {
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Every object, by kind, namespace, name.
    pub fn iter(&self) -> impl Iterator<Item = (&ObjectKey, &Object)> {
        self.objects.iter().map(|(key, stored)| (key, &stored.object))
    }

    pub fn get(&self, key: &ObjectKey) -> Option<&Object> {
        self.objects.get(key).map(|stored| &stored.object)
    }

    /// File and line of the object's document (of the first of several merged ones).
    pub fn location(&self, key: &ObjectKey) -> Option<&Location> {
        self.objects.get(key)?.location.as_ref()
    }

    /// Adds or replaces; copies the map if other clones of this set live.
    pub fn insert(&mut self, object: Object, location: Option<Location>) {
        Arc::make_mut(&mut self.objects).insert(object.key(), Stored { object, location });
    }

    pub fn remove(&mut self, key: &ObjectKey) -> Option<Object> {
        Arc::make_mut(&mut self.objects).remove(key).map(|stored| stored.object)
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Object> {
        let first = ObjectKey::new(kind, "", "");
        self.objects.range(first..).take_while(move |(key, _)| key.kind == kind).map(|(_, stored)| &stored.object)
    }

    fn of_kind_in<'a>(&'a self, kind: Kind, namespace: &'a str) -> impl Iterator<Item = &'a Object> {
        let first = ObjectKey::new(kind, namespace, "");
        self.objects
            .range(first..)
            .take_while(move |(key, _)| key.kind == kind && key.namespace == namespace)
            .map(|(_, stored)| &stored.object)
    }
}

impl FromIterator<Object> for ObjectSet {
    fn from_iter<I: IntoIterator<Item = Object>>(objects: I) -> ObjectSet {
        let stored = objects.into_iter().map(|object| (object.key(), Stored { object, location: None }));
        ObjectSet { objects: Arc::new(stored.collect()) }
    }
}

macro_rules! objects {
    ($($kind:ident, $all:ident, $within:ident, $one:ident;)*) => {
        /// One typed object.
        #[derive(Clone, Debug)]
        pub enum Object { $($kind(Arc<$kind>)),* }

        impl Object {
            pub fn kind(&self) -> Kind {
                match self { $(Object::$kind(_) => Kind::$kind),* }
            }

            pub fn meta(&self) -> &ObjectMeta {
                match self { $(Object::$kind(object) => &object.metadata),* }
            }

            /// Types a JSON value whose `kind` was resolved to `kind`.
            pub(crate) fn read<'de, D: serde::Deserializer<'de>>(kind: Kind, value: D) -> Result<Object, D::Error> {
                use serde::Deserialize as _;
                match kind {
                    $(Kind::$kind => $kind::deserialize(value).map(|object| Object::$kind(Arc::new(object)))),*
                }
            }

            /// Whether both are the very same read object, not merely equal: unchanged objects stay identical
            /// between the snapshots of one source.
            pub fn same(&self, other: &Object) -> bool {
                match (self, other) {
                    $((Object::$kind(a), Object::$kind(b)) => Arc::ptr_eq(a, b),)*
                    _ => false,
                }
            }
        }

        $(impl From<$kind> for Object {
            fn from(object: $kind) -> Object { Object::$kind(Arc::new(object)) }
        })*

        /// Typed getters: all of a kind, those in a namespace, one by namespace and name.
        impl ObjectSet {
            $(
                pub fn $all(&self) -> impl Iterator<Item = &Arc<$kind>> {
                    self.of_kind(Kind::$kind).filter_map(|object| match object {
                        Object::$kind(object) => Some(object),
                        _ => None,
                    })
                }

                pub fn $within<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<$kind>> {
                    self.of_kind_in(Kind::$kind, namespace).filter_map(|object| match object {
                        Object::$kind(object) => Some(object),
                        _ => None,
                    })
                }

                /// `namespace` is empty for cluster-scoped kinds.
                pub fn $one(&self, namespace: &str, name: &str) -> Option<&Arc<$kind>> {
                    match self.get(&ObjectKey::new(Kind::$kind, namespace, name))? {
                        Object::$kind(object) => Some(object),
                        _ => None,
                    }
                }
            )*
        }
    };
}

objects! {
    Namespace, namespaces, namespaces_in, namespace;
    Node, nodes, nodes_in, node;
    ServiceAccount, service_accounts, service_accounts_in, service_account;
    ConfigMap, config_maps, config_maps_in, config_map;
    Secret, secrets, secrets_in, secret;
    Pod, pods, pods_in, pod;
    Service, services, services_in, service;
    EndpointSlice, endpoint_slices, endpoint_slices_in, endpoint_slice;
    NetworkPolicy, network_policies, network_policies_in, network_policy;
    GatewayClass, gateway_classes, gateway_classes_in, gateway_class;
    Gateway, gateways, gateways_in, gateway;
    HTTPRoute, http_routes, http_routes_in, http_route;
    GRPCRoute, grpc_routes, grpc_routes_in, grpc_route;
    TCPRoute, tcp_routes, tcp_routes_in, tcp_route;
    TLSRoute, tls_routes, tls_routes_in, tls_route;
    ReferenceGrant, reference_grants, reference_grants_in, reference_grant;
    BackendTLSPolicy, backend_tls_policies, backend_tls_policies_in, backend_tls_policy;
    ServiceEntry, service_entries, service_entries_in, service_entry;
    WorkloadEntry, workload_entries, workload_entries_in, workload_entry;
    VirtualService, virtual_services, virtual_services_in, virtual_service;
    DestinationRule, destination_rules, destination_rules_in, destination_rule;
    Sidecar, sidecars, sidecars_in, sidecar;
    EnvoyFilter, envoy_filters, envoy_filters_in, envoy_filter;
    WasmPlugin, wasm_plugins, wasm_plugins_in, wasm_plugin;
    AuthorizationPolicy, authorization_policies, authorization_policies_in, authorization_policy;
    RequestAuthentication, request_authentications, request_authentications_in, request_authentication;
    PeerAuthentication, peer_authentications, peer_authentications_in, peer_authentication;
    Telemetry, telemetries, telemetries_in, telemetry;
}

impl Object {
    pub fn key(&self) -> ObjectKey {
        ObjectKey::new(self.kind(), self.namespace(), self.name())
    }
}

impl HasMeta for Object {
    fn meta(&self) -> &ObjectMeta {
        Object::meta(self)
    }
}
