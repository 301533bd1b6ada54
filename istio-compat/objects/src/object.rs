//! Typed objects and the set of all of them.
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Secret, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::fault::{Fault, Location};
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

/// The objects of one kind.
type OfKind = BTreeMap<Arc<ObjectKey>, Stored>;

/// All objects of one moment; cloning costs one reference count, a change copies the references of one kind.
#[derive(Clone, Debug)]
pub struct ObjectSet {
    /// By number of the kind.
    kinds: Arc<Vec<Arc<OfKind>>>,
}

impl Default for ObjectSet {
    fn default() -> ObjectSet {
        ObjectSet { kinds: Arc::new(vec![Arc::default(); Kind::ALL.len()]) }
    }
}

impl ObjectSet {
    pub fn len(&self) -> usize {
        self.kinds.iter().map(|kind| kind.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.kinds.iter().all(|kind| kind.is_empty())
    }

    /// Every object, by kind, namespace, name.
    pub fn iter(&self) -> impl Iterator<Item = (&ObjectKey, &Object)> {
        self.kinds.iter().flat_map(|kind| kind.iter().map(|(key, stored)| (&**key, &stored.object)))
    }

    pub fn get(&self, key: &ObjectKey) -> Option<&Object> {
        self.all(key.kind).get(key).map(|stored| &stored.object)
    }

    /// File and line of the object's document (of the first of several merged ones).
    pub fn location(&self, key: &ObjectKey) -> Option<&Location> {
        self.all(key.kind).get(key)?.location.as_ref()
    }

    /// The fault with the place of the object it is about, if that is known.
    #[must_use]
    pub fn located(&self, fault: Fault, key: &ObjectKey) -> Fault {
        match self.location(key) {
            Some(location) => fault.at(location),
            None => fault,
        }
    }

    /// Adds or replaces; copies the kind's map if other clones of this set live.
    pub fn insert(&mut self, object: Object, location: Option<Location>) {
        self.all_mut(object.kind()).insert(Arc::new(object.key()), Stored { object, location });
    }

    pub fn remove(&mut self, key: &ObjectKey) -> Option<Object> {
        if !self.all(key.kind).contains_key(key) {
            return None;
        }
        self.all_mut(key.kind).remove(key).map(|stored| stored.object)
    }

    /// Whether nothing of this kind differs, found without looking at the objects: true only for sets of which one
    /// was made from the other (or both from a third) without a change of the kind.
    pub fn same_of_kind(&self, other: &ObjectSet, kind: Kind) -> bool {
        let (ours, theirs) = (self.all(kind), other.all(kind));
        std::ptr::eq(ours, theirs) || (ours.is_empty() && theirs.is_empty())
    }

    /// Takes all objects of a kind over from another set, in place of its own.
    pub fn take_kind(&mut self, other: &ObjectSet, kind: Kind) {
        if !self.same_of_kind(other, kind) {
            Arc::make_mut(&mut self.kinds)[kind as usize] = other.kinds[kind as usize].clone();
        }
    }

    fn all(&self, kind: Kind) -> &OfKind {
        &self.kinds[kind as usize]
    }

    fn all_mut(&mut self, kind: Kind) -> &mut OfKind {
        Arc::make_mut(&mut Arc::make_mut(&mut self.kinds)[kind as usize])
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Object> {
        self.all(kind).values().map(|stored| &stored.object)
    }

    fn of_kind_in<'a>(&'a self, kind: Kind, namespace: &'a str) -> impl Iterator<Item = &'a Object> {
        let first = ObjectKey::new(kind, namespace, "");
        self.all(kind)
            .range::<ObjectKey, _>(first..)
            .take_while(move |(key, _)| key.namespace == namespace)
            .map(|(_, stored)| &stored.object)
    }
}

impl FromIterator<Object> for ObjectSet {
    fn from_iter<I: IntoIterator<Item = Object>>(objects: I) -> ObjectSet {
        let mut set = ObjectSet::default();
        objects.into_iter().for_each(|object| set.insert(object, None));
        set
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

            /// Whether both say the same.
            pub fn alike(&self, other: &Object) -> bool {
                match (self, other) {
                    $((Object::$kind(a), Object::$kind(b)) => Arc::ptr_eq(a, b) || a == b,)*
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
