use std::fs;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::HasMeta as _;

fn pod(name: &str, app: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: shop\n  labels: {{app: {app}}}\n\
         spec:\n  containers: [{{name: app, image: echo}}]\n"
    )
}

fn write(dir: &Path, name: &str, text: &str) {
    // As our writers do: whole or not at all.
    let hidden = dir.join(format!(".{name}"));
    fs::write(&hidden, text).unwrap();
    fs::rename(hidden, dir.join(name)).unwrap();
}

fn app<'a>(snapshot: &'a Snapshot, name: &str) -> Option<&'a str> {
    snapshot.objects.pod("shop", name)?.label("app")
}

#[test]
fn later_sources_overlay_earlier_ones() {
    let (base, status) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(base.path(), "a.yaml", &pod("web", "front"));
    let overlay = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\n  namespace: shop\n  annotations: {x: y}\n\
                   status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}]}\n\
                   ---\napiVersion: v1\nkind: Pod\nmetadata: {name: gone, namespace: shop}\nstatus: {podIP: 10.0.0.9}\n";
    write(status.path(), "pods-node-a.yaml", overlay);
    let mut source = DirectorySource::new(vec![base.path().into(), status.path().into()]);
    let snapshot = source.load();
    assert_eq!(snapshot.faults, vec![]);
    let web = snapshot.objects.pod("shop", "web").unwrap();
    assert_eq!(web.label("app"), Some("front"));
    assert_eq!(web.annotation("x"), Some("y"));
    assert_eq!(web.status.as_ref().unwrap().pod_ip.as_deref(), Some("10.0.0.1"));
    assert!(snapshot.objects.pod("shop", "gone").is_none(), "a status alone is no pod");
}

#[test]
fn what_was_good_stays() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "a.yaml", &pod("a", "one"));
    write(dir.path(), "b.yaml", &format!("{}---\n{}", pod("b", "one"), pod("c", "one")));
    let mut source = DirectorySource::new(vec![dir.path().into()]);
    let first = source.load();
    assert_eq!(first.generation, 1);

    // A file that does not parse: all its objects stay.
    write(dir.path(), "b.yaml", "apiVersion: v1\nkind: [Pod\n");
    let second = source.load();
    assert_eq!((app(&second, "b"), app(&second, "c")), (Some("one"), Some("one")));
    assert!(
        second.faults[0].reason.contains("last good version of this file (2 objects) stays"),
        "{}",
        second.faults[0]
    );
    assert!(second.faults[0].line >= 2);

    // One bad object in a good file: only that one stays as it was.
    let bad = "apiVersion: v1\nkind: Pod\nmetadata: {name: c, namespace: shop}\nspec:\n  containers: 7\n";
    write(dir.path(), "b.yaml", &format!("{}---\n{bad}", pod("b", "two")));
    let third = source.load();
    assert_eq!((app(&third, "b"), app(&third, "c")), (Some("two"), Some("one")));
    let fault = &third.faults[0];
    assert_eq!((fault.object.as_str(), fault.field.as_str()), ("Pod shop/c", "spec.containers"));
    assert_eq!(fault.line, 14, "{fault}");
    assert!(
        first
            .objects
            .get(&crate::ObjectKey::new(crate::Kind::Pod, "shop", "a"))
            .unwrap()
            .same(third.objects.get(&crate::ObjectKey::new(crate::Kind::Pod, "shop", "a")).unwrap())
    );

    // A removed file: its objects go, also the one that stayed.
    fs::remove_file(dir.path().join("b.yaml")).unwrap();
    let fourth = source.load();
    assert_eq!(fourth.objects.len(), 1);
    assert_eq!(fourth.faults, vec![]);
    assert_eq!(fourth.generation, 4);
    assert!(Arc::ptr_eq(&fourth, &source.load()), "nothing changed");
}

#[test]
fn the_same_object_twice_is_told() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "a.yaml", &pod("a", "one"));
    write(dir.path(), "b.yaml", &pod("a", "two"));
    let snapshot = DirectorySource::new(vec![dir.path().into()]).load();
    assert_eq!(app(&snapshot, "a"), Some("two"));
    assert_eq!(snapshot.faults.len(), 1);
    assert!(snapshot.faults[0].to_string().contains("a.yaml:1: warning: Pod shop/a: defined again at"));
}

#[tokio::test]
async fn changes_are_followed() {
    let root = tempfile::tempdir().unwrap();
    let late = root.path().join("later/deep");
    let mut snapshots = DirectorySource::new(vec![late.clone()]).watch().unwrap();
    assert!(snapshots.borrow_and_update().objects.is_empty());
    let patience = Duration::from_secs(20);

    fs::create_dir_all(&late).unwrap();
    write(&late, "a.yaml", &pod("a", "one"));
    tokio::time::timeout(patience, snapshots.wait_for(|s| app(s, "a") == Some("one"))).await.unwrap().unwrap();

    write(&late, "a.yaml", &pod("a", "two"));
    tokio::time::timeout(patience, snapshots.wait_for(|s| app(s, "a") == Some("two"))).await.unwrap().unwrap();

    fs::create_dir(late.join("sub")).unwrap();
    write(&late.join("sub"), "b.json", r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}}"#);
    tokio::time::timeout(patience, snapshots.wait_for(|s| s.objects.namespace("", "n").is_some()))
        .await
        .unwrap()
        .unwrap();

    fs::remove_dir_all(&late).unwrap();
    tokio::time::timeout(patience, snapshots.wait_for(|s| s.objects.is_empty())).await.unwrap().unwrap();

    fs::create_dir_all(&late).unwrap();
    write(&late, "a.yaml", &pod("a", "three"));
    tokio::time::timeout(patience, snapshots.wait_for(|s| app(s, "a") == Some("three"))).await.unwrap().unwrap();
}
