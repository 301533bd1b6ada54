//! Which kinds exist, under which API versions, and how strictly they are read.
use std::fmt;

/// What happens to a field nobody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// Refuse the object: a misspelt field of a security or routing object would quietly loosen it.
    Refuse,
    /// Take the object and warn, as the API server does by default.
    Warn,
}

macro_rules! kinds {
    ($($kind:ident { $group:literal, [$($version:literal),+], $scope:ident, $strict:ident })*) => {
        /// A kind this crate reads. The order is the order of dependence: what others refer to comes first.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind { $($kind),* }

        impl Kind {
            /// Every kind, in order.
            pub const ALL: &[Kind] = &[$(Kind::$kind),*];

            /// As written in `kind:`.
            pub const fn name(self) -> &'static str {
                match self { $(Kind::$kind => stringify!($kind)),* }
            }

            /// API group; empty for the core group.
            pub const fn group(self) -> &'static str {
                match self { $(Kind::$kind => $group),* }
            }

            /// Versions read, the preferred one first.
            pub const fn versions(self) -> &'static [&'static str] {
                match self { $(Kind::$kind => &[$($version),+]),* }
            }

            /// Whether objects of this kind live in a namespace.
            pub const fn namespaced(self) -> bool {
                match self { $(Kind::$kind => kinds!(@scope $scope)),* }
            }

            pub const fn strictness(self) -> Strictness {
                match self { $(Kind::$kind => Strictness::$strict),* }
            }
        }
    };
    (@scope Namespaced) => { true };
    (@scope Cluster) => { false };
}

kinds! {
    Namespace { "", ["v1"], Cluster, Warn }
    Node { "", ["v1"], Cluster, Warn }
    ServiceAccount { "", ["v1"], Namespaced, Warn }
    ConfigMap { "", ["v1"], Namespaced, Warn }
    Secret { "", ["v1"], Namespaced, Warn }
    Pod { "", ["v1"], Namespaced, Warn }
    Service { "", ["v1"], Namespaced, Warn }
    EndpointSlice { "discovery.k8s.io", ["v1"], Namespaced, Warn }
    NetworkPolicy { "networking.k8s.io", ["v1"], Namespaced, Refuse }
    GatewayClass { "gateway.networking.k8s.io", ["v1", "v1beta1"], Cluster, Warn }
    Gateway { "gateway.networking.k8s.io", ["v1", "v1beta1"], Namespaced, Warn }
    HTTPRoute { "gateway.networking.k8s.io", ["v1", "v1beta1"], Namespaced, Refuse }
    GRPCRoute { "gateway.networking.k8s.io", ["v1", "v1alpha2"], Namespaced, Refuse }
    TCPRoute { "gateway.networking.k8s.io", ["v1", "v1alpha2"], Namespaced, Refuse }
    TLSRoute { "gateway.networking.k8s.io", ["v1", "v1alpha3", "v1alpha2"], Namespaced, Refuse }
    ReferenceGrant { "gateway.networking.k8s.io", ["v1", "v1beta1", "v1alpha2"], Namespaced, Refuse }
    BackendTLSPolicy { "gateway.networking.k8s.io", ["v1", "v1alpha3"], Namespaced, Refuse }
    ServiceEntry { "networking.istio.io", ["v1", "v1beta1", "v1alpha3"], Namespaced, Refuse }
    WorkloadEntry { "networking.istio.io", ["v1", "v1beta1", "v1alpha3"], Namespaced, Refuse }
    VirtualService { "networking.istio.io", ["v1", "v1beta1", "v1alpha3"], Namespaced, Refuse }
    DestinationRule { "networking.istio.io", ["v1", "v1beta1", "v1alpha3"], Namespaced, Refuse }
    Sidecar { "networking.istio.io", ["v1", "v1beta1", "v1alpha3"], Namespaced, Warn }
    EnvoyFilter { "networking.istio.io", ["v1alpha3"], Namespaced, Warn }
    WasmPlugin { "extensions.istio.io", ["v1alpha1"], Namespaced, Warn }
    AuthorizationPolicy { "security.istio.io", ["v1", "v1beta1"], Namespaced, Refuse }
    RequestAuthentication { "security.istio.io", ["v1", "v1beta1"], Namespaced, Refuse }
    PeerAuthentication { "security.istio.io", ["v1", "v1beta1"], Namespaced, Refuse }
    Telemetry { "telemetry.istio.io", ["v1", "v1alpha1"], Namespaced, Warn }
}

/// Why an `apiVersion` and `kind` name no kind read here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KindError {
    /// Not ours: other controllers' objects in the same folder are no mistake.
    #[error("kind {kind} of {api_version} is not read by Strata and has no effect")]
    Unknown { api_version: String, kind: String },
    #[error("{api_version} does not serve {kind}; use {preferred}")]
    Version { api_version: String, kind: &'static str, preferred: String },
}

impl Kind {
    /// The kind that `apiVersion` and `kind` of an object name.
    pub fn resolve(api_version: &str, kind: &str) -> Result<Kind, KindError> {
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let found = Kind::ALL.iter().find(|k| k.name() == kind && k.group() == group);
        let Some(found) = found else {
            return Err(KindError::Unknown { api_version: api_version.to_owned(), kind: kind.to_owned() });
        };
        if !found.versions().contains(&version) {
            return Err(KindError::Version {
                api_version: api_version.to_owned(),
                kind: found.name(),
                preferred: found.api_version(),
            });
        }
        Ok(*found)
    }

    /// As in the API server's paths: lower case, plural.
    pub fn plural(self) -> String {
        let name = self.name().to_lowercase();
        match name.strip_suffix('y').filter(|stem| !stem.ends_with(['a', 'e', 'o', 'u'])) {
            Some(stem) => format!("{stem}ies"),
            None if name.ends_with('s') => format!("{name}es"),
            None => format!("{name}s"),
        }
    }

    /// The preferred `apiVersion`.
    pub fn api_version(self) -> String {
        match self.group() {
            "" => self.versions()[0].to_owned(),
            group => format!("{group}/{}", self.versions()[0]),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::Kind;

    #[test]
    fn plurals_are_the_api_servers() {
        let all = [
            (Kind::NetworkPolicy, "networkpolicies"),
            (Kind::GatewayClass, "gatewayclasses"),
            (Kind::Gateway, "gateways"),
            (Kind::ServiceEntry, "serviceentries"),
            (Kind::Telemetry, "telemetries"),
            (Kind::EndpointSlice, "endpointslices"),
            (Kind::BackendTLSPolicy, "backendtlspolicies"),
        ];
        for (kind, plural) in all {
            assert_eq!(kind.plural(), plural);
        }
    }
}
