//! What is watched.
use compat_objects::{Kind, ObjectKey};

/// One list and watch: a kind, perhaps only some of its objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    pub kind: Kind,
    /// As in `fieldSelector`; empty: all.
    pub fields: String,
    /// As in `labelSelector`; empty: all.
    pub labels: String,
    /// None: all namespaces.
    pub namespace: Option<String>,
    /// The kind may be missing (its CRD is not installed): that is no error and not waited for.
    pub optional: bool,
    /// Its events never wait behind those of other streams.
    pub urgent: bool,
}

impl Stream {
    /// Every object of a kind.
    pub fn all(kind: Kind) -> Stream {
        // What the API server brings along is always there; everything else is a CRD.
        let native = matches!(kind.group(), "" | "discovery.k8s.io" | "networking.k8s.io");
        Stream { kind, fields: String::new(), labels: String::new(), namespace: None, optional: !native, urgent: false }
    }

    /// One object of a namespace. Whoever may not read all may still be allowed to read this one.
    pub fn of(key: &ObjectKey) -> Stream {
        let fields = format!("metadata.name={}", escape(&key.name));
        Stream { fields, namespace: Some(key.namespace.clone()), ..Stream::all(key.kind) }
    }
}

/// All streams of a source. Streams of one kind are merged; where two show an object of one name, the newer one counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    pub streams: Vec<Stream>,
}

impl Scope {
    /// What the agent of a node reads. The node's own pods are a stream of their own, so that nothing that happens
    /// elsewhere delays them.
    pub fn node(node: &str) -> Scope {
        let node = escape(node);
        let own = Stream { fields: format!("spec.nodeName={node}"), urgent: true, ..Stream::all(Kind::Pod) };
        let others = format!("spec.nodeName!={node},spec.nodeName!=");
        let others = Stream { fields: others, ..Stream::all(Kind::Pod) };
        let rest = [Kind::Namespace, Kind::Node, Kind::Service, Kind::EndpointSlice, Kind::NetworkPolicy];
        let mut streams = vec![own, others];
        streams.extend(rest.map(Stream::all));
        Scope { streams }
    }

    /// What a control plane reads: every kind that means something to it. Of ConfigMaps that is only the mesh's, `istio` of
    /// its root namespace, and no Secret: those that are referred to are read by name ([`crate::Named`]). NetworkPolicies
    /// are the other layer's.
    pub fn control_plane(root_namespace: &str) -> Scope {
        let read = Kind::ALL.iter().filter(|kind| !matches!(kind, Kind::Secret | Kind::NetworkPolicy));
        let stream = |kind: &Kind| match kind {
            Kind::ConfigMap => Stream {
                fields: "metadata.name=istio".to_owned(),
                namespace: Some(root_namespace.to_owned()),
                ..Stream::all(*kind)
            },
            kind => Stream::all(*kind),
        };
        Scope { streams: read.map(stream).collect() }
    }
}

/// A value for a field selector (k8s.io/apimachinery/pkg/fields: these three are escaped).
fn escape(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for character in value.chars() {
        if matches!(character, '\\' | ',' | '=') {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_own_pods_are_urgent_and_the_two_streams_of_pods_are_all_placed_pods() {
        let scope = Scope::node("n,1");
        let pods: Vec<_> = scope.streams.iter().filter(|s| s.kind == Kind::Pod).collect();
        assert_eq!((pods[0].fields.as_str(), pods[0].urgent), ("spec.nodeName=n\\,1", true));
        assert_eq!((pods[1].fields.as_str(), pods[1].urgent), ("spec.nodeName!=n\\,1,spec.nodeName!=", false));
        assert!(scope.streams.iter().all(|s| !s.optional));
    }

    #[test]
    fn only_crds_may_be_missing() {
        let scope = Scope::control_plane("istio-system");
        let optional = |kind| scope.streams.iter().find(|s| s.kind == kind).map(|s| s.optional);
        assert_eq!(optional(Kind::VirtualService), Some(true));
        assert_eq!(optional(Kind::ServiceAccount), Some(false));
        assert_eq!((optional(Kind::Secret), optional(Kind::NetworkPolicy)), (None, None));
        let config_map = scope.streams.iter().find(|s| s.kind == Kind::ConfigMap).map(|s| s.namespace.as_deref());
        assert_eq!(config_map, Some(Some("istio-system")));
    }
}
