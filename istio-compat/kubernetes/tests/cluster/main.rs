//! The source and the writers against a real etcd and kube-apiserver.
#[allow(dead_code, reason = "shared with other tests")]
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use compat_kubernetes::{About, EventWriter, KubernetesSource, Note, PodId, PodWriter, Presence, REDIRECTION, Scope};
use compat_objects::core::{Namespace, NetworkPolicy, Pod};
use compat_objects::k8s_openapi::api::apps::v1::DaemonSet;
use compat_objects::k8s_openapi::api::events::v1::Event;
use compat_objects::k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use compat_objects::source::Snapshot;
use compat_objects::{HasMeta as _, Kind, Severity};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::core::DynamicObject;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use support::Cluster;
use tokio::sync::watch;

const WAIT: Duration = Duration::from_secs(30);

type Snapshots = watch::Receiver<Arc<Snapshot>>;

/// The first snapshot for which the condition holds.
async fn until(snapshots: &mut Snapshots, what: &str, condition: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
    let found = snapshots.wait_for(|snapshot| condition(snapshot));
    let found = tokio::time::timeout(WAIT, async { found.await.map(|found| found.clone()) }).await;
    match found {
        Ok(Ok(found)) => found,
        Ok(Err(_)) => panic!("{what}: the source ended"),
        Err(_) => panic!("{what}: not within {WAIT:?}; faults: {:?}", snapshots.borrow().faults),
    }
}

async fn create<K>(api: &Api<K>, value: Value) -> K
where
    K: Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    let object: K = serde_json::from_value(value).unwrap();
    api.create(&PostParams::default(), &object).await.unwrap()
}

fn pod(name: &str, node: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0, "volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [{"name": "c", "image": "x", "env": [{"name": "A", "value": "b"}]}]},
    })
}

fn policy(name: &str, cidr: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": cidr}}]}]},
    })
}

async fn source(cluster: &Cluster, scope: Scope) -> (Snapshots, Arc<compat_kubernetes::Counters>) {
    let source = KubernetesSource::new(cluster.api().await, scope);
    let counters = source.counters();
    (source.watch(), counters)
}

/// Everything in one test: one API server serves them all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn against_a_real_api_server() {
    let mut cluster = Cluster::start().await;
    follows_the_api(&cluster).await;
    pages_and_prunes(&cluster).await;
    refuses_one_object_alone(&cluster).await;
    takes_crds_as_they_come(&cluster).await;
    writes_annotations(&cluster).await;
    tells_events(&cluster).await;
    knows_its_daemon_set(&cluster).await;
    survives_outage_and_relist(&mut cluster).await;
}

/// What a new API server makes for itself is made.
async fn settled(cluster: &Cluster) {
    let (mut snapshots, _) = source(cluster, Scope::node("n1")).await;
    let own = ["default", "kube-system", "kube-public", "kube-node-lease"];
    until(&mut snapshots, "the server's own objects", |s| {
        own.iter().all(|name| s.objects.namespace("", name).is_some())
            && s.objects.service("default", "kubernetes").is_some()
            && s.objects.endpoint_slice("default", "kubernetes").is_some()
    })
    .await;
}

async fn follows_the_api(cluster: &Cluster) {
    let client = cluster.client().await.unwrap();
    settled(cluster).await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let (mut snapshots, counters) = source(cluster, Scope::node("n1")).await;
    assert!(!snapshots.borrow().synced, "nothing is known before the first list");
    let first = until(&mut snapshots, "sync", |snapshot| snapshot.synced).await;
    assert_eq!((first.generation, first.faults.as_slice()), (1, &[][..]));
    assert!(first.objects.namespace("", "default").is_some());
    assert_eq!(
        first.objects.service("default", "kubernetes").unwrap().spec.as_ref().unwrap().cluster_ip.as_deref(),
        Some("10.96.0.1")
    );

    for (name, node) in [("own", "n1"), ("other", "n2")] {
        create(&pods, pod(name, node)).await;
        let snapshot = until(&mut snapshots, name, |s| s.objects.pod("default", name).is_some()).await;
        let found = snapshot.objects.pod("default", name).unwrap();
        assert_eq!(found.label("app"), Some(name));
        assert!(found.metadata.managed_fields.is_none() && found.spec.as_ref().unwrap().volumes.is_none());
    }
    // A pod without a node is nobody's yet.
    let mut unplaced = pod("unplaced", "");
    unplaced["spec"]["nodeName"].take();
    create(&pods, unplaced).await;
    let labels = json!({"metadata": {"labels": {"app": "changed"}}});
    pods.patch("own", &PatchParams::default(), &Patch::Merge(labels)).await.unwrap();
    let changed =
        until(&mut snapshots, "change", |s| s.objects.pod("default", "own").unwrap().label("app") == Some("changed"))
            .await;
    assert!(changed.objects.pod("default", "unplaced").is_none());
    let before = first.objects.namespace("", "default").unwrap();
    assert!(Arc::ptr_eq(before, changed.objects.namespace("", "default").unwrap()), "what did not change is the same");

    // A change of what is not kept is received and is no news.
    let published = counters.snapshots.load(Ordering::Relaxed);
    let unchanged = counters.unchanged.load(Ordering::Relaxed);
    let noise = json!({"metadata": {"annotations": {"example.com/heartbeat": "1"}}});
    pods.patch("other", &PatchParams::default(), &Patch::Merge(noise)).await.unwrap();
    let end = tokio::time::Instant::now() + WAIT;
    while counters.unchanged.load(Ordering::Relaxed) == unchanged {
        assert!(tokio::time::Instant::now() < end, "the change never came");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(counters.snapshots.load(Ordering::Relaxed), published);

    // One name, another node: the successor counts, whichever stream tells first.
    pods.delete("own", &DeleteParams::default().grace_period(0)).await.unwrap();
    create(&pods, pod("own", "n2")).await;
    let on = |s: &Snapshot, node: &str| {
        s.objects.pod("default", "own").is_some_and(|p| p.spec.as_ref().unwrap().node_name.as_deref() == Some(node))
    };
    until(&mut snapshots, "move", |s| on(s, "n2")).await;
    for name in ["own", "other", "unplaced"] {
        pods.delete(name, &DeleteParams::default().grace_period(0)).await.unwrap();
    }
    until(&mut snapshots, "deletion", |s| s.objects.pods().count() == 0).await;
}

async fn pages_and_prunes(cluster: &Cluster) {
    let client = cluster.client().await.unwrap();
    let namespaces: Api<Namespace> = Api::all(client);
    for number in 0..600 {
        create(&namespaces, json!({"metadata": {"name": format!("page-{number}")}})).await;
    }
    let (mut snapshots, _) = source(cluster, Scope::node("n1")).await;
    let first = until(&mut snapshots, "sync of two pages", |snapshot| snapshot.synced).await;
    assert_eq!(first.objects.namespaces().filter(|n| n.name().starts_with("page-")).count(), 600);
}

async fn refuses_one_object_alone(cluster: &Cluster) {
    let client = cluster.client().await.unwrap();
    let policies: Api<NetworkPolicy> = Api::namespaced(client, "default");
    create(&policies, policy("fine", "10.0.0.0/8")).await;
    create(&policies, policy("odd", "10.0.0.0/008")).await;
    let (mut snapshots, _) = source(cluster, Scope::node("n1")).await;
    let first = until(&mut snapshots, "sync", |snapshot| snapshot.synced).await;
    assert!(first.objects.network_policy("default", "fine").is_some());
    assert!(first.objects.network_policy("default", "odd").is_none());
    let told: Vec<String> = first.faults.iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].starts_with("error: NetworkPolicy default/odd: spec.ingress[0].from[0].ipBlock.cidr: "),
        "{told:?}"
    );
    // The watch goes on, and a version that is refused leaves the last good one.
    let breaks = json!({"spec": policy("", "10.1.0.0/016")["spec"].clone()});
    policies.patch("fine", &PatchParams::default(), &Patch::Merge(breaks)).await.unwrap();
    let broken = until(&mut snapshots, "fault", |s| s.faults.len() == 2).await;
    let good = first.objects.network_policy("default", "fine").unwrap();
    assert!(Arc::ptr_eq(good, broken.objects.network_policy("default", "fine").unwrap()));
    assert!(broken.faults.iter().any(|fault| fault.reason.ends_with("the last good version stays in force")));
    for name in ["fine", "odd"] {
        policies.delete(name, &DeleteParams::default()).await.unwrap();
    }
    until(&mut snapshots, "correction", |s| s.faults.is_empty() && s.objects.network_policies().count() == 0).await;
}

/// Gateways in an old version alone: the version that is there is the one that is read.
fn gateway_crd() -> Value {
    json!({
        "metadata": {
            "name": "tcproutes.gateway.networking.k8s.io",
            "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/gateway-api/pull/1"},
        },
        "spec": {
            "group": "gateway.networking.k8s.io", "scope": "Namespaced",
            "names": {"kind": "TCPRoute", "listKind": "TCPRouteList", "plural": "tcproutes", "singular": "tcproute"},
            "versions": [{"name": "v1alpha2", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}],
        },
    })
}

async fn takes_crds_as_they_come(cluster: &Cluster) {
    let client = cluster.client().await.unwrap();
    let (mut snapshots, _) = source(cluster, Scope::control_plane("istio-system")).await;
    let first = until(&mut snapshots, "sync without CRDs", |snapshot| snapshot.synced).await;
    assert_eq!(first.faults, [], "a kind that is not installed is no fault");
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    create(&crds, gateway_crd()).await;
    let kind = kube::core::GroupVersionKind::gvk("gateway.networking.k8s.io", "v1alpha2", "TCPRoute");
    let resource = kube::core::ApiResource::from_gvk(&kind);
    let routes: Api<DynamicObject> = Api::namespaced_with(client, "default", &resource);
    let route = json!({
        "apiVersion": "gateway.networking.k8s.io/v1alpha2", "kind": "TCPRoute", "metadata": {"name": "r"},
        "spec": {"parentRefs": [{"kind": "Service", "group": "", "name": "s"}], "rules": [{"backendRefs": [{"name": "s", "port": 80}]}]},
    });
    let end = tokio::time::Instant::now() + WAIT;
    loop {
        let object: DynamicObject = serde_json::from_value(route.clone()).unwrap();
        match routes.create(&PostParams::default(), &object).await {
            Ok(_) => break,
            Err(error) => assert!(tokio::time::Instant::now() < end, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    until(&mut snapshots, "the new kind's object", |s| s.objects.tcp_route("default", "r").is_some()).await;
    crds.delete("tcproutes.gateway.networking.k8s.io", &DeleteParams::default()).await.unwrap();
    until(&mut snapshots, "its end", |s| s.objects.tcp_routes().count() == 0).await;
}

async fn writes_annotations(cluster: &Cluster) {
    let client = cluster.client().await.unwrap();
    let pods: Api<Pod> = Api::namespaced(client, "default");
    let (mut snapshots, _) = source(cluster, Scope::node("n1")).await;
    until(&mut snapshots, "sync", |snapshot| snapshot.synced).await;
    let made = create(&pods, pod("captured", "n1")).await;
    let id = |uid: &str| PodId { namespace: "default".into(), name: "captured".into(), uid: uid.into() };
    let uid = made.metadata.uid.unwrap();
    let writer = PodWriter::start(&cluster.api().await, snapshots.clone());
    let annotated =
        |s: &Snapshot| s.objects.pod("default", "captured").and_then(|p| p.annotation(REDIRECTION).map(str::to_owned));

    // Asked for before the watch shows the pod; written when it does.
    writer.set(BTreeMap::from([(id(&uid), true)]));
    until(&mut snapshots, "annotation", |s| annotated(s).as_deref() == Some("enabled")).await;
    assert!(writer.settled(WAIT).await);
    // Somebody takes it away: it comes back.
    let away = json!({"metadata": {"annotations": {REDIRECTION: null}}});
    pods.patch("captured", &PatchParams::default(), &Patch::Merge(away)).await.unwrap();
    until(&mut snapshots, "annotation taken", |s| annotated(s).is_none()).await;
    until(&mut snapshots, "annotation again", |s| annotated(s).as_deref() == Some("enabled")).await;
    writer.set(BTreeMap::from([(id(&uid), false)]));
    until(&mut snapshots, "no annotation", |s| annotated(s).is_none()).await;

    // A successor of the same name is another pod: the patch carries the uid, and the API server refuses it.
    let stale =
        json!({"metadata": {"uid": "00000000-0000-0000-0000-000000000000", "annotations": {REDIRECTION: "enabled"}}});
    let refused = pods.patch_metadata("captured", &PatchParams::default(), &Patch::Merge(stale)).await.unwrap_err();
    assert!(refused.to_string().contains("metadata.uid"), "{refused:?}");
    writer.set(BTreeMap::from([(id("00000000-0000-0000-0000-000000000000"), true)]));
    assert!(writer.settled(WAIT).await, "a pod that is another one is nobody's business");
    assert_eq!(annotated(&snapshots.borrow()), None);
    pods.delete("captured", &DeleteParams::default().grace_period(0)).await.unwrap();
    until(&mut snapshots, "deletion", |s| s.objects.pod("default", "captured").is_none()).await;
}

async fn tells_events(cluster: &Cluster) {
    let events: Api<Event> = Api::namespaced(cluster.client().await.unwrap(), "default");
    let writer = EventWriter::start(&cluster.api().await, "strata-agent", "n1");
    let about = About {
        api_version: "v1".into(),
        kind: "Pod".into(),
        namespace: "default".into(),
        name: "troubled".into(),
        uid: "u".into(),
    };
    let note = |text: &str| Note { reason: "CaptureFailed", action: "Capture", text: text.into(), warning: true };
    for text in ["first", "first", "second"] {
        writer.tell(about.clone(), note(text));
    }
    let end = tokio::time::Instant::now() + WAIT;
    loop {
        let found = events.list(&kube::api::ListParams::default()).await.unwrap().items;
        let ours: Vec<&Event> =
            found.iter().filter(|e| e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some("troubled")).collect();
        // One reason is one series: the repeated text was told once, the other one counts it up.
        if ours.iter().any(|event| event.series.as_ref().is_some_and(|series| series.count == 2)) {
            assert_eq!(
                (ours.len(), ours[0].reason.as_deref(), ours[0].type_.as_deref()),
                (1, Some("CaptureFailed"), Some("Warning"))
            );
            assert_eq!(ours[0].reporting_controller.as_deref(), Some("strata.io/strata-agent"));
            return;
        }
        assert!(tokio::time::Instant::now() < end, "{ours:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn knows_its_daemon_set(cluster: &Cluster) {
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client().await.unwrap(), "default");
    let presence = Presence::of_daemon_set(&cluster.api().await, "default", "strata-agent");
    assert!(!presence.confirm_deleted(Duration::from_secs(1)).await, "what never was is not deleted");
    let labels = json!({"app": "a"});
    let set = json!({
        "metadata": {"name": "strata-agent"},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "x"}]}}},
    });
    create(&sets, set).await;
    let end = tokio::time::Instant::now() + WAIT;
    // Its first answer is that it is there: only then can it be seen to go.
    while !presence.is_present() {
        assert!(tokio::time::Instant::now() < end, "never seen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!presence.confirm_deleted(Duration::from_secs(5)).await);
    sets.delete("strata-agent", &DeleteParams::background()).await.unwrap();
    assert!(presence.confirm_deleted(WAIT).await);
    while !presence.is_deleted() {
        assert!(tokio::time::Instant::now() < end, "deletion never seen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn survives_outage_and_relist(cluster: &mut Cluster) {
    let client = cluster.client().await.unwrap();
    let policies: Api<NetworkPolicy> = Api::namespaced(client, "default");
    create(&policies, policy("kept", "10.0.0.0/8")).await;
    let (mut snapshots, counters) = source(cluster, Scope::node("n1")).await;
    let before = until(&mut snapshots, "sync", |snapshot| snapshot.synced).await;
    let lists = counters.lists.load(Ordering::Relaxed);
    cluster.stop_apiserver();
    let outage = until(&mut snapshots, "the outage is told", |s| !s.faults.is_empty()).await;
    assert!(outage.synced && outage.faults.iter().all(|fault| fault.severity == Severity::Warning));
    assert!(outage.faults[0].reason.ends_with("what was listed stays in force"), "{:?}", outage.faults);
    // A new agent meanwhile knows nothing, and says so.
    let (mut unlucky, _) = source(cluster, Scope::node("n1")).await;
    let told = until(&mut unlucky, "reasons", |s| s.faults.iter().all(|f| f.reason.contains("not listed yet: "))).await;
    assert!(!told.synced && told.objects.is_empty());

    cluster.forget_history();
    cluster.start_apiserver().await;
    until(&mut unlucky, "sync after the outage", |snapshot| snapshot.synced).await;
    let policies: Api<NetworkPolicy> = Api::namespaced(cluster.client().await.unwrap(), "default");
    create(&policies, policy("new", "10.0.0.0/8")).await;
    let after = until(&mut snapshots, "news after the outage", |s| {
        s.objects.network_policy("default", "new").is_some() && s.faults.is_empty()
    })
    .await;
    assert!(counters.lists.load(Ordering::Relaxed) > lists, "without the history everything is listed anew");
    let kinds = [Kind::Namespace, Kind::Node, Kind::Pod, Kind::NetworkPolicy];
    for (key, object) in before.objects.iter().filter(|(key, _)| kinds.contains(&key.kind)) {
        assert!(object.same(after.objects.get(key).unwrap()), "{key} is another object");
    }
    assert!(before.objects.len() > 600);
}
