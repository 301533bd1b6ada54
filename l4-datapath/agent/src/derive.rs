//! What follows from the objects for this node, worked out again only where they changed. Pure.
use compat_objects::core::{LabelSelector, NetworkPolicy, NetworkPolicySpec, ObjectMeta};
use compat_objects::{Fault, Kind, Object, ObjectKey, ObjectSet, Severity};

use crate::ipam::Lease;
use crate::objects::{LocalPod, NodeFacts, effective, node_facts};

/// Everything derived from one snapshot.
#[derive(Debug, Clone)]
pub(crate) struct Derived {
    /// The snapshot's objects.
    from: ObjectSet,
    /// This node's wired pods.
    local: Vec<(String, String, Lease)>,
    stand_ins: Vec<ObjectKey>,
    /// The objects as they are for this node.
    pub(crate) objects: ObjectSet,
    pub(crate) facts: NodeFacts,
}

/// What [`Derived::next`] works on.
pub(crate) struct Input<'a> {
    pub(crate) objects: &'a ObjectSet,
    pub(crate) node: &'a str,
    /// Index of the device towards the others, if one was named.
    pub(crate) uplink: Option<u32>,
    pub(crate) local: &'a [LocalPod<'a>],
    /// Policies that exist and cannot be read: see [`unread`].
    pub(crate) stand_ins: Vec<ObjectKey>,
}

impl Derived {
    /// Takes over from the last time what did not change.
    pub(crate) fn next(last: Option<&Derived>, input: Input<'_>) -> Derived {
        let Input { objects: from, node, uplink, local, stand_ins } = input;
        let same = |kind: Kind| last.filter(|last| last.from.same_of_kind(from, kind));
        let facts = match same(Kind::Node) {
            Some(last) => last.facts.clone(),
            None => node_facts(from, node, uplink),
        };
        let same_pods = same(Kind::Pod).filter(|last| {
            let before = last.local.iter().map(|(namespace, name, lease)| (namespace.as_str(), name.as_str(), lease));
            before.eq(local.iter().copied())
        });
        let mut objects = match same_pods {
            Some(last) => {
                let mut objects = from.clone();
                objects.take_kind(&last.objects, Kind::Pod);
                objects
            }
            None => effective(from, node, local),
        };
        match same(Kind::NetworkPolicy).filter(|last| last.stand_ins == stand_ins) {
            Some(last) => objects.take_kind(&last.objects, Kind::NetworkPolicy),
            None => stand_ins.iter().for_each(|key| objects.insert(isolates_everything(key), None)),
        }
        let owned = |(namespace, name, lease): &LocalPod<'_>| ((*namespace).to_owned(), (*name).to_owned(), **lease);
        Derived { from: from.clone(), local: local.iter().map(owned).collect(), stand_ins, objects, facts }
    }
}

/// NetworkPolicies that were refused and of which no good version is known.
pub(crate) fn unread(objects: &ObjectSet, faults: &[Fault]) -> Vec<ObjectKey> {
    let errors = faults.iter().filter(|fault| fault.severity == Severity::Error);
    let named = errors.filter_map(|fault| fault.object.strip_prefix("NetworkPolicy ")?.split_once('/'));
    let mut keys: Vec<ObjectKey> =
        named.map(|(namespace, name)| ObjectKey::new(Kind::NetworkPolicy, namespace, name)).collect();
    keys.retain(|key| objects.get(key).is_none());
    keys.dedup();
    keys
}

/// What a policy that cannot be read says: whom it means and what it allows is unclear, so everybody in its namespace
/// is isolated, and nobody let in or out by it.
fn isolates_everything(key: &ObjectKey) -> Object {
    let metadata =
        ObjectMeta { namespace: Some(key.namespace.clone()), name: Some(key.name.clone()), ..ObjectMeta::default() };
    let spec = NetworkPolicySpec {
        pod_selector: Some(LabelSelector::default()),
        policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
        ..NetworkPolicySpec::default()
    };
    Object::from(NetworkPolicy { metadata, spec: Some(spec) })
}

#[cfg(test)]
mod tests {
    use compat_objects::core::{Pod, PodIP, PodSpec, PodStatus};

    use super::*;

    fn pod(name: &str) -> Object {
        let meta = ObjectMeta { namespace: Some("shop".into()), name: Some(name.into()), ..ObjectMeta::default() };
        let spec = PodSpec { node_name: Some("n1".into()), ..PodSpec::default() };
        let status = PodStatus { pod_ips: Some(vec![PodIP { ip: "10.1.0.99".into() }]), ..PodStatus::default() };
        Object::from(Pod { metadata: meta, spec: Some(spec), status: Some(status) })
    }

    fn input<'a>(objects: &'a ObjectSet, local: &'a [LocalPod<'a>], stand_ins: Vec<ObjectKey>) -> Input<'a> {
        Input { objects, node: "n1", uplink: None, local, stand_ins }
    }

    #[test]
    fn what_did_not_change_is_taken_over() {
        let lease = Lease { v4: Some([10, 1, 0, 5].into()), v6: None };
        let local = [("shop", "a", &lease)];
        let mut objects: ObjectSet = [pod("a")].into_iter().collect();
        let first = Derived::next(None, input(&objects, &local, Vec::new()));
        let ips =
            |derived: &Derived| derived.objects.pod("shop", "a").unwrap().status.clone().unwrap().pod_ips.unwrap();
        assert_eq!(ips(&first)[0].ip, "10.1.0.5");
        objects.insert(isolates_everything(&ObjectKey::new(Kind::NetworkPolicy, "shop", "p")), None);
        let second = Derived::next(Some(&first), input(&objects, &local, Vec::new()));
        assert!(first.objects.same_of_kind(&second.objects, Kind::Pod));
        assert!(second.objects.network_policy("shop", "p").is_some());
        // The same pods, wired otherwise.
        let other = Lease { v4: Some([10, 1, 0, 6].into()), v6: None };
        let third = Derived::next(Some(&second), input(&objects, &[("shop", "a", &other)], Vec::new()));
        assert_eq!(ips(&third)[0].ip, "10.1.0.6");
        assert!(second.objects.same_of_kind(&third.objects, Kind::NetworkPolicy));
    }

    #[test]
    fn a_policy_nobody_can_read_isolates_its_namespace_until_it_can_be_read() {
        let objects: ObjectSet = [pod("a")].into_iter().collect();
        let faults = [
            Fault::error("NetworkPolicy shop/odd", "spec.x", "unknown field"),
            Fault::warning("NetworkPolicy shop/fine", "spec.y", "strange"),
            Fault::error("Service shop/s", "spec.ports", "missing"),
        ];
        let keys = unread(&objects, &faults);
        assert_eq!(keys, [ObjectKey::new(Kind::NetworkPolicy, "shop", "odd")]);
        let first = Derived::next(None, input(&objects, &[], keys.clone()));
        let policy = first.objects.network_policy("shop", "odd").unwrap();
        assert_eq!(policy.spec.as_ref().unwrap().policy_types.as_ref().unwrap().len(), 2);
        let second = Derived::next(Some(&first), input(&objects, &[], keys));
        assert!(first.objects.same_of_kind(&second.objects, Kind::NetworkPolicy));
        let third = Derived::next(Some(&second), input(&objects, &[], Vec::new()));
        assert!(third.objects.network_policy("shop", "odd").is_none());
    }
}
