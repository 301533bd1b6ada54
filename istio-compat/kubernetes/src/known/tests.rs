use compat_objects::HasMeta as _;
use serde_json::json;

use super::*;
use crate::scope::Scope;

fn policy(name: &str, uid: &str, version: u64, port: i64) -> Raw {
    let value = json!({
        "metadata": {"name": name, "namespace": "shop", "uid": uid},
        "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": port}]}]},
    });
    let key = ObjectKey::new(Kind::NetworkPolicy, "shop", name);
    Raw { key, uid: uid.into(), version: version.to_string(), value }
}

fn pod(node: &str, uid: &str, version: u64, second: u32) -> Raw {
    let created = format!("2026-01-02T03:04:{second:02}Z");
    let value = json!({
        "metadata": {"name": "db-0", "namespace": "shop", "uid": uid, "creationTimestamp": created},
        "spec": {"nodeName": node, "containers": []},
    });
    Raw { key: ObjectKey::new(Kind::Pod, "shop", "db-0"), uid: uid.into(), version: version.to_string(), value }
}

fn policies() -> Known {
    Known::new(&[Stream::all(Kind::NetworkPolicy)])
}

fn list(known: &mut Known, stream: usize, raws: &[Raw]) {
    known.take(stream, Change::Listing);
    for raw in raws {
        known.take(stream, Change::Seen(raw.clone()));
    }
    known.take(stream, Change::Listed);
}

#[test]
fn nothing_is_known_before_every_stream_was_listed() {
    let mut known = Known::new(&[Stream::all(Kind::NetworkPolicy), Stream::all(Kind::Pod)]);
    list(&mut known, 0, &[policy("a", "u", 1, 80)]);
    let early = known.snapshot();
    assert_eq!((early.synced, early.generation, early.objects.len()), (false, 0, 0));
    assert_eq!(early.faults[0].to_string(), "warning: every Pod: not listed yet");
    list(&mut known, 1, &[]);
    assert!(known.is_dirty());
    let first = known.snapshot();
    assert_eq!((first.synced, first.generation, first.objects.len(), first.faults.len()), (true, 1, 1, 0));
}

#[test]
fn a_relist_keeps_what_did_not_change_and_is_no_news() {
    let mut known = policies();
    list(&mut known, 0, &[policy("a", "u1", 1, 80), policy("b", "u2", 2, 80)]);
    let first = known.snapshot();
    // The second object has a new version that says the same: a managed field, say.
    list(&mut known, 0, &[policy("a", "u1", 1, 80), policy("b", "u2", 3, 80)]);
    assert!(!known.is_dirty());
    let second = known.snapshot();
    assert!(first.objects.same_of_kind(&second.objects, Kind::NetworkPolicy));

    list(&mut known, 0, &[policy("b", "u2", 4, 81), policy("c", "u3", 5, 80)]);
    assert!(known.is_dirty());
    let third = known.snapshot();
    let names: Vec<_> = third.objects.network_policies().map(|policy| policy.name().to_owned()).collect();
    assert_eq!(names, ["b", "c"]);
}

#[test]
fn during_a_relist_nothing_is_missing() {
    let mut known = policies();
    list(&mut known, 0, &[policy("a", "u1", 1, 80), policy("b", "u2", 2, 80)]);
    known.snapshot();
    known.take(0, Change::Listing);
    known.take(0, Change::Seen(policy("b", "u2", 2, 80)));
    // The API server goes away, and the list begins again.
    known.take(0, Change::Trouble(Some("connection refused".into())));
    let during = known.snapshot();
    assert_eq!(during.objects.len(), 2);
    let outage = "warning: every NetworkPolicy: connection refused; what was listed stays in force";
    assert_eq!(during.faults[0].to_string(), outage);
    list(&mut known, 0, &[policy("a", "u1", 1, 80), policy("b", "u2", 2, 80)]);
    known.take(0, Change::Trouble(None));
    let after = known.snapshot();
    assert_eq!((after.objects.len(), after.faults.len()), (2, 0));
    assert!(during.objects.same_of_kind(&after.objects, Kind::NetworkPolicy));
}

#[test]
fn a_refused_version_leaves_the_last_good_one_and_names_the_object() {
    let mut known = policies();
    list(&mut known, 0, &[policy("a", "u1", 1, 80)]);
    let good = known.snapshot();
    known.take(0, Change::Seen(policy("a", "u1", 2, 99_999)));
    let refused = known.snapshot();
    assert!(good.objects.same_of_kind(&refused.objects, Kind::NetworkPolicy));
    let told = refused.faults[0].to_string();
    assert!(told.starts_with("error: NetworkPolicy shop/a: spec.ingress[0].ports[0].port: 99999 is no port"), "{told}");
    assert!(told.ends_with("; the last good version stays in force"), "{told}");
    // A successor of that name has no last good version.
    known.take(0, Change::Seen(policy("a", "u9", 3, 99_999)));
    let successor = known.snapshot();
    assert!(successor.objects.is_empty());
    assert!(successor.faults[0].reason.ends_with("; it is not in force"));
    known.take(0, Change::Seen(policy("a", "u9", 4, 80)));
    let corrected = known.snapshot();
    assert_eq!((corrected.objects.len(), corrected.faults.len()), (1, 0));
}

#[test]
fn the_deletion_of_a_predecessor_does_not_hit_its_successor() {
    let mut known = policies();
    list(&mut known, 0, &[policy("a", "new", 7, 80)]);
    known.snapshot();
    let key = ObjectKey::new(Kind::NetworkPolicy, "shop", "a");
    known.take(0, Change::Deleted { key: key.clone(), uid: "old".into() });
    assert!(!known.is_dirty());
    known.take(0, Change::Deleted { key, uid: "new".into() });
    assert!(known.snapshot().objects.is_empty());
}

#[test]
fn a_pod_that_moves_between_streams_is_the_newer_one_in_any_order() {
    let node_of = |snapshot: &Snapshot| snapshot.objects.pod("shop", "db-0").unwrap().spec.clone().unwrap().node_name;
    for new_first in [true, false] {
        let mut known = Known::new(&Scope::node("n1").streams[..2]);
        list(&mut known, 0, &[pod("n1", "old", 5, 1)]);
        list(&mut known, 1, &[]);
        let key = ObjectKey::new(Kind::Pod, "shop", "db-0");
        let gone = Change::Deleted { key, uid: "old".into() };
        let came = Change::Seen(pod("n2", "new", 9, 2));
        if new_first {
            known.take(1, came);
            assert_eq!(node_of(&known.snapshot()).as_deref(), Some("n2"));
            known.take(0, gone);
        } else {
            known.take(0, gone);
            known.take(1, came);
        }
        assert_eq!(node_of(&known.snapshot()).as_deref(), Some("n2"), "new first: {new_first}");
    }
}

#[test]
fn a_kind_that_is_not_installed_is_known_to_have_no_objects() {
    let mut known = Known::new(&[Stream::all(Kind::VirtualService)]);
    known.take(0, Change::Missing);
    let snapshot = known.snapshot();
    assert!(snapshot.synced && snapshot.objects.is_empty() && snapshot.faults.is_empty());
}

#[test]
fn a_named_object_is_waited_for_by_nobody_and_gone_when_it_is_not_named_any_more() {
    let mut known = policies();
    list(&mut known, 0, &[]);
    let key = policy("a", "u1", 1, 80).key;
    let number = known.add(&key);
    let first = known.snapshot();
    assert!(first.synced && first.faults.is_empty(), "{:?}", first.faults);
    known.take(number, Change::Trouble(Some("forbidden".to_owned())));
    let told = known.snapshot();
    assert_eq!(told.faults[0].to_string(), "warning: NetworkPolicy shop/a: not listed yet: forbidden");
    known.take(number, Change::Trouble(None));
    list(&mut known, number, &[policy("a", "u1", 1, 80)]);
    assert_eq!(known.snapshot().objects.len(), 1);
    known.remove(number);
    assert_eq!(known.snapshot().objects.len(), 0);
    // What was still under way.
    known.take(number, Change::Seen(policy("a", "u1", 2, 80)));
    assert!(!known.is_dirty());
}
