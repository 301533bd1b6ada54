//! Numbers of the source against a real API server.
//!
//! `measure fill KUBECONFIG PODS SERVICES` makes objects as a cluster of a hundred nodes has them, without kubelets.
//! `measure watch KUBECONFIG SECONDS` prints what the agent of node `n1` pays: memory, time to sync, one change, and
//! every list that is taken again within these seconds (restart the API server meanwhile).
use std::error::Error;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use compat_kubernetes::{Access, ApiServer, Counters, KubernetesSource, Scope};
use compat_objects::HasMeta as _;
use compat_objects::core::{EndpointSlice, Namespace, Node, Pod, Service, ServiceAccount};
use futures::StreamExt as _;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

type Fallible<T> = Result<T, Box<dyn Error>>;

const NODES: usize = 100;
const NAMESPACES: usize = 50;
const AT_ONCE: usize = 32;
const CHANGES: u32 = 20;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Fallible<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["fill", kubeconfig, pods, services] => fill(kubeconfig, pods.parse()?, services.parse()?).await,
        ["watch", kubeconfig, seconds] => watch(kubeconfig, Duration::from_secs(seconds.parse()?)).await,
        _ => Err("measure fill KUBECONFIG PODS SERVICES, or measure watch KUBECONFIG SECONDS".into()),
    }
}

async fn client(kubeconfig: &str) -> Fallible<kube::Client> {
    let file = kube::config::Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await?;
    Ok(kube::Client::try_from(config)?)
}

/// A line of /proc/self/status in MiB.
fn memory(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or_default() / 1024
}

/// CPU time of this process in milliseconds (clock ticks of 10 ms, proc_pid_stat(5)).
fn cpu() -> u64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after = text.rsplit_once(") ").map(|(_, rest)| rest.to_owned()).unwrap_or_default();
    let ticks: u64 = after.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    ticks * 10
}

async fn watch(kubeconfig: &str, follow: Duration) -> Fallible<()> {
    let client = client(kubeconfig).await?;
    let api = ApiServer::connect(&Access::Kubeconfig(Path::new(kubeconfig).to_owned())).await?;
    println!("before: RSS {} MiB", memory("VmRSS"));
    let (start, cpu_before) = (Instant::now(), cpu());
    let source = KubernetesSource::new(api, Scope::node("n1"));
    let counters = source.counters();
    let mut snapshots = source.watch();
    let first = snapshots.wait_for(|snapshot| snapshot.synced).await?.clone();
    println!(
        "synced: {:?}, {} ms of CPU, {} objects, {} faults, RSS {} MiB (at most {} MiB)",
        start.elapsed(),
        cpu() - cpu_before,
        first.objects.len(),
        first.faults.len(),
        memory("VmRSS"),
        memory("VmHWM"),
    );
    let elsewhere =
        first.objects.pods().find(|pod| pod.spec.as_ref().is_some_and(|s| s.node_name.as_deref() != Some("n1")));
    if let Some(pod) = elsewhere {
        changes(&client, &mut snapshots, pod.namespace(), pod.name()).await?;
    }
    drop(first);
    relists(&counters, &mut snapshots, follow).await;
    Ok(())
}

async fn changes(
    client: &kube::Client,
    snapshots: &mut tokio::sync::watch::Receiver<std::sync::Arc<compat_objects::source::Snapshot>>,
    namespace: &str,
    name: &str,
) -> Fallible<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let (mut waited, cpu_before) = (Duration::ZERO, cpu());
    for number in 0..CHANGES {
        let value = format!("{}-{number}", std::process::id());
        let patch = json!({"metadata": {"labels": {"strata.io/measure": value}}});
        let start = Instant::now();
        pods.patch_metadata(name, &PatchParams::default(), &Patch::Merge(patch)).await?;
        let shown = |snapshot: &std::sync::Arc<compat_objects::source::Snapshot>| {
            snapshot.objects.pod(namespace, name).and_then(|pod| pod.label("strata.io/measure")) == Some(value.as_str())
        };
        snapshots.wait_for(shown).await?;
        waited += start.elapsed();
    }
    let each = |total: u64| total as f64 / f64::from(CHANGES);
    println!("one change: {:?} from request to snapshot, {} ms of CPU", waited / CHANGES, each(cpu() - cpu_before));
    Ok(())
}

async fn relists(
    counters: &Counters,
    snapshots: &mut tokio::sync::watch::Receiver<std::sync::Arc<compat_objects::source::Snapshot>>,
    follow: Duration,
) {
    let end = Instant::now() + follow;
    let (mut lists, mut busy) = (counters.lists.load(Ordering::Relaxed), cpu());
    println!("lists taken again in the next {follow:?}:");
    while Instant::now() < end {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (now_lists, now_busy) = (counters.lists.load(Ordering::Relaxed), cpu());
        if now_lists != lists {
            println!(
                "{} lists: {} ms of CPU, {} objects received so far, {} of them no news, {} snapshots, changed: {}, RSS {} MiB",
                now_lists - lists,
                now_busy - busy,
                counters.objects.load(Ordering::Relaxed),
                counters.unchanged.load(Ordering::Relaxed),
                counters.snapshots.load(Ordering::Relaxed),
                snapshots.has_changed().unwrap_or_default(),
                memory("VmRSS"),
            );
        }
        (lists, busy) = (now_lists, now_busy);
    }
}

async fn fill(kubeconfig: &str, pods: usize, services: usize) -> Fallible<()> {
    let client = client(kubeconfig).await?;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    for number in 0..NAMESPACES {
        create(&namespaces, json!({"metadata": {"name": format!("ns-{number}")}})).await?;
    }
    // Without its account a namespace takes no pods.
    let accounts: Api<ServiceAccount> = Api::all(client.clone());
    let named = ListParams::default().fields("metadata.name=default");
    while accounts.list_metadata(&named).await?.items.len() < NAMESPACES {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let nodes: Api<Node> = Api::all(client.clone());
    for number in 0..NODES {
        create(
            &nodes,
            json!({"metadata": {"name": format!("n{number}")}, "spec": {"podCIDRs": [format!("10.64.{number}.0/24")]}}),
        )
        .await?;
    }
    let start = Instant::now();
    let tasks = futures::stream::iter(0..pods).map(|number| one_pod(client.clone(), number));
    report("pods", tasks.buffer_unordered(AT_ONCE).collect().await, start)?;
    let start = Instant::now();
    let tasks = futures::stream::iter(0..services).map(|number| one_service(client.clone(), number));
    report("services with slices", tasks.buffer_unordered(AT_ONCE).collect().await, start)
}

fn report(what: &str, results: Vec<Result<(), String>>, start: Instant) -> Fallible<()> {
    let made = results.iter().filter(|result| result.is_ok()).count();
    println!("{made} {what} in {:?}", start.elapsed());
    results.into_iter().collect::<Result<(), String>>().map_err(Into::into)
}

async fn create<K>(api: &Api<K>, value: Value) -> Result<(), String>
where
    K: Clone + serde::de::DeserializeOwned + serde::Serialize + std::fmt::Debug,
{
    let object: K = serde_json::from_value(value).map_err(|error| error.to_string())?;
    match api.create(&PostParams::default(), &object).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        made => made.map(drop).map_err(|error| error.to_string()),
    }
}

fn address(number: usize) -> String {
    format!("10.{}.{}.{}", 64 + number / 62_500, number / 250 % 250, number % 250 + 1)
}

async fn one_pod(client: kube::Client, number: usize) -> Result<(), String> {
    let (namespace, name) =
        (format!("ns-{}", number % NAMESPACES), format!("app-{}-6d4cf56db6-{number:05}", number % 500));
    let env: Vec<Value> =
        (0..12).map(|n| json!({"name": format!("SETTING_{n}"), "value": "some value of a setting"})).collect();
    let probe = json!({"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 10});
    let pod = json!({
        "metadata": {"name": name, "labels": {"app": format!("app-{}", number % 500), "version": "v1", "pod-template-hash": "6d4cf56db6"},
            "annotations": {"example.com/checksum": "0123456789abcdef0123456789abcdef", "example.com/team": "payments"}},
        "spec": {"nodeName": format!("n{}", number % NODES), "volumes": [{"name": "data", "emptyDir": {}}],
            "containers": [{"name": "app", "image": "registry.example/app:1", "env": env, "livenessProbe": probe, "readinessProbe": probe,
                "ports": [{"name": "http", "containerPort": 8080}], "volumeMounts": [{"name": "data", "mountPath": "/data"}]}]},
    });
    let pods: Api<Pod> = Api::namespaced(client, &namespace);
    create(&pods, pod).await?;
    let ip = address(number);
    let conditions: Vec<Value> = ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
        .iter()
        .map(|kind| json!({"type": kind, "status": "True"}))
        .collect();
    let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions}});
    pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
        .await
        .map(drop)
        .map_err(|error| error.to_string())
}

async fn one_service(client: kube::Client, number: usize) -> Result<(), String> {
    let (namespace, name) = (format!("ns-{}", number % NAMESPACES), format!("svc-{number}"));
    let services: Api<Service> = Api::namespaced(client.clone(), &namespace);
    create(
        &services,
        json!({"metadata": {"name": name}, "spec": {"ports": [{"name": "http", "port": 80, "targetPort": 8080}]}}),
    )
    .await?;
    let slices: Api<EndpointSlice> = Api::namespaced(client, &namespace);
    let endpoint = |pod: usize| json!({"addresses": [address(pod)], "nodeName": format!("n{}", pod % NODES), "conditions": {"ready": true}});
    let slice = json!({
        "metadata": {"name": format!("{name}-1"), "labels": {"kubernetes.io/service-name": name}}, "addressType": "IPv4",
        "endpoints": [endpoint(number * 2), endpoint(number * 2 + 1)], "ports": [{"name": "http", "port": 8080}],
    });
    create(&slices, slice).await
}
