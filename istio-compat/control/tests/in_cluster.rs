//! In istiod's place in a cluster, before a real etcd and kube-apiserver.
#![allow(dead_code, reason = "support modules are shared by tests")]
#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/stream.rs"]
mod stream;
#[path = "../../kubernetes/tests/cluster/support.rs"]
mod support;

use std::fmt::Debug;
use std::path::Path;
use std::time::Duration;

use certificates::{certificate, identity_of};
use compat_control::{Access, ClusterConfig, Config, Control, Objects, State, WaypointConfig};
use compat_objects::core::{ConfigMap, Namespace, Pod, Secret, Service, ServiceAccount};
use compat_objects::k8s_openapi::api::apps::v1::Deployment;
use compat_objects::k8s_openapi::api::policy::v1::PodDisruptionBudget;
use compat_objects::k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use compat_translate::MeshOptions;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use stream::Stream;
use support::Cluster;
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use xds_proto::type_url;

/// Longer than anything here takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(30);
const SYSTEM: &str = "istio-system";
const ROOT: &str = "istio-ca-root-cert";

/// Asks until there is an answer.
async fn until<T>(what: &str, ask: impl AsyncFn() -> Option<T>) -> T {
    let asked = async {
        loop {
            if let Some(found) = ask().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

async fn start(cluster: &Cluster, folder: &Path) -> Control {
    let any: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
    let waypoint = WaypointConfig {
        image: "registry/proxy:1".to_owned(),
        pull_policy: "IfNotPresent".to_owned(),
        pull_secrets: vec!["registry".to_owned()],
        address: format!("https://strata-control.{SYSTEM}.svc:15012"),
        trust_domain: "cluster.local".to_owned(),
        cluster_id: "Kubernetes".to_owned(),
        network: String::new(),
    };
    let config = Config {
        objects: Objects::Kubernetes(Access::Kubeconfig(cluster.kubeconfig())),
        state: State::Cluster(ClusterConfig { namespace: SYSTEM.to_owned(), deploy_waypoints: true, waypoint }),
        xds_addr: None,
        secure_addr: any,
        run_dir: folder.to_owned(),
        admin_addr: None,
        status_addr: None,
        mesh: MeshOptions::default(),
    };
    let control = Control::start(config).await.unwrap();
    until("ready", async || control.pending().is_empty().then_some(())).await;
    control
}

/// A cluster with two nodes' pods, and the kinds of Gateway API.
struct World {
    cluster: Cluster,
    client: kube::Client,
}

impl World {
    async fn new() -> World {
        let cluster = Cluster::start().await;
        let client = cluster.client().await.unwrap();
        let world = World { cluster, client };
        for kind in ["gatewayclasses", "gateways", "httproutes"] {
            let file = world.cluster.gateway_crds().join(format!("gateway.networking.k8s.io_{kind}.yaml"));
            world.crd(&file, &format!("{kind}.gateway.networking.k8s.io")).await;
        }
        world.crd(&world.cluster.istio_crds(), "destinationrules.networking.istio.io").await;
        for namespace in [SYSTEM, "shop"] {
            world.create(&Api::<Namespace>::all(world.client.clone()), json!({"metadata": {"name": namespace}})).await;
        }
        for (namespace, account) in [(SYSTEM, "ztunnel"), ("shop", "cart"), ("shop", "ledger")] {
            world.create(&world.api::<ServiceAccount>(namespace), json!({"metadata": {"name": account}})).await;
        }
        let running = [
            (SYSTEM, "ztunnel-a", "ztunnel", "a"),
            ("shop", "cart-1", "cart", "a"),
            ("shop", "ledger-1", "ledger", "b"),
        ];
        for (namespace, pod, account, node) in running {
            world.create(&world.api::<Pod>(namespace), pod_of(pod, account, node)).await;
        }
        world
    }

    fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<Scope = compat_objects::k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    async fn create<K: Clone + DeserializeOwned + Serialize + Debug>(&self, api: &Api<K>, value: Value) -> K {
        let object: K = serde_json::from_value(value).unwrap();
        api.create(&PostParams::default(), &object).await.unwrap()
    }

    /// Installs the one of this name.
    async fn crd(&self, file: &Path, name: &str) {
        let text = std::fs::read_to_string(file).unwrap();
        let objects = serde_saphyr::from_multiple::<Value>(&text).unwrap();
        let resource =
            ApiResource::from_gvk(&GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition"));
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        for object in objects.into_iter().filter(|object| object["metadata"]["name"] == name) {
            self.create(&api, object).await;
        }
    }

    fn gateways(&self) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "Gateway");
        Api::namespaced_with(self.client.clone(), "shop", &ApiResource::from_gvk(&kind))
    }

    /// A token as the kubelet asks for it.
    async fn token(&self, namespace: &str, account: &str, pod: Option<&str>, audience: &str) -> String {
        let mut spec = json!({"audiences": [audience], "expirationSeconds": 3600});
        if let Some(name) = pod {
            let pod = self.api::<Pod>(namespace).get(name).await.unwrap();
            spec["boundObjectRef"] = json!({"kind": "Pod", "apiVersion": "v1", "name": name, "uid": pod.metadata.uid});
        }
        let request = serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
        let accounts = self.api::<ServiceAccount>(namespace);
        let made = accounts.create_token_request(account, &PostParams::default(), &request).await;
        made.unwrap().status.unwrap().token.unwrap()
    }

    async fn root_in(&self, namespace: &str) -> Option<String> {
        let found = self.api::<ConfigMap>(namespace).get_opt(ROOT).await.unwrap()?;
        found.data?.remove("root-cert.pem")
    }
}

fn pod_of(name: &str, account: &str, node: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {
        "nodeName": node, "serviceAccountName": account, "automountServiceAccountToken": false,
        "containers": [{"name": "c", "image": "x"}],
    }})
}

/// Everything in one test: one API server serves them all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_istiods_place() {
    let world = World::new().await;
    let folder = tempfile::tempdir().unwrap();
    let control = start(&world.cluster, folder.path()).await;
    let root = the_root_is_everywhere(&world).await;
    tokens_are_the_api_servers(&world, &control, &root).await;
    waypoints_are_deployed(&world).await;
    parameters_are_added(&world).await;
    what_is_somebody_elses_stays(&world).await;
    secrets_are_for_those_who_may_read_them(&world, &control, &root).await;
    control.stop().await;
    // The next one signs with the same root.
    let control = start(&world.cluster, folder.path()).await;
    assert_eq!(world.root_in("shop").await, Some(root));
    control.stop().await;
    a_ca_is_plugged_in(&world, folder.path()).await;
}

/// A root and an intermediate, as `openssl` makes them by default: RSA.
async fn a_ca_is_plugged_in(world: &World, folder: &Path) {
    let script = "
        openssl req -x509 -newkey rsa:2048 -nodes -keyout root.key -out root.pem -days 9 -subj /O=plugged/CN=root 2> /dev/null
        openssl req -newkey rsa:2048 -nodes -keyout ca.key -out ca.csr -subj /O=plugged/CN=intermediate 2> /dev/null
        printf 'basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash' > ext
        openssl x509 -req -in ca.csr -CA root.pem -CAkey root.key -out ca.pem -days 9 -extfile ext 2> /dev/null
        openssl rsa -in ca.key -traditional -out ca.key 2> /dev/null; cat ca.pem root.pem > chain.pem";
    let made = std::process::Command::new("sh").args(["-ec", script]).current_dir(folder).status().unwrap();
    assert!(made.success());
    let file = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let root = file("root.pem");
    let data = json!({"ca-key.pem": file("ca.key"), "ca-cert.pem": file("ca.pem"), "cert-chain.pem": file("chain.pem"), "root-cert.pem": root});
    world.create(&world.api::<Secret>(SYSTEM), json!({"metadata": {"name": "cacerts"}, "stringData": data})).await;
    let control = start(&world.cluster, folder).await;
    until("the root", async || world.root_in("shop").await.filter(|found| *found == root)).await;
    let channel = connect(&control, &root).await;
    let own = world.token("shop", "cart", Some("cart-1"), "istio-ca").await;
    let chain = certificate(channel, &own, None).await.unwrap();
    assert_eq!((chain.len(), &chain[1], &chain[2]), (3, &file("chain.pem"), &root));
    std::fs::write(folder.join("leaf.pem"), &chain[0]).unwrap();
    let verify = ["verify", "-CAfile", "root.pem", "-untrusted", "ca.pem", "leaf.pem"];
    let verified = std::process::Command::new("openssl").args(verify).current_dir(folder).output().unwrap();
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    a_root_is_replaced(world, &control, &root).await;
    control.stop().await;
}

/// While the process runs, in Istio's three steps; what is no CA changes nothing.
async fn a_root_is_replaced(world: &World, control: &Control, old: &str) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "next root");
    let next = params.self_signed(&key).unwrap().pem();
    let secrets = world.api::<Secret>(SYSTEM);
    let write = async |data: Value| {
        let change = Patch::Merge(json!({"stringData": data}));
        secrets.patch("cacerts", &PatchParams::default(), &change).await.unwrap();
    };
    let trusted = async |root: &str| {
        until("the roots", async || world.root_in("shop").await.filter(|found| *found == root)).await;
    };
    let own = world.token("shop", "cart", Some("cart-1"), "istio-ca").await;
    let both = format!("{old}{next}");
    write(json!({"root-cert.pem": both})).await;
    trusted(&both).await;
    write(json!({"ca-key.pem": "no key"})).await;
    let new =
        json!({"ca-key.pem": key.serialize_pem(), "ca-cert.pem": next, "cert-chain.pem": "", "root-cert.pem": both});
    let channel = connect(control, old).await;
    let chain = certificate(channel.clone(), &own, None).await.unwrap();
    assert_eq!(chain.len(), 3, "the old CA signs: {chain:?}");
    write(new).await;
    let signed = async || certificate(channel.clone(), &own, None).await.ok().filter(|chain| chain.len() == 2);
    assert_eq!(until("the next CA to sign", signed).await[1], both);
    write(json!({"root-cert.pem": next})).await;
    trusted(&next).await;
    // The port's own certificate is the next CA's as well.
    certificate(connect(control, &next).await, &own, None).await.unwrap();
}

/// Over TLS, trusting the mesh's root.
async fn connect(control: &Control, root: &str) -> Channel {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(root))
        .domain_name(format!("strata-control.{SYSTEM}.svc"));
    let endpoint = Channel::from_shared(format!("https://{}", control.secure_addr)).unwrap();
    endpoint.tls_config(tls).unwrap().connect().await.unwrap()
}

async fn the_root_is_everywhere(world: &World) -> String {
    let secret = world.api::<Secret>(SYSTEM).get("istio-ca-secret").await.unwrap();
    let root = String::from_utf8(secret.data.unwrap()["ca-cert.pem"].0.clone()).unwrap();
    let shown = async |namespace: &str| {
        until(namespace, async || world.root_in(namespace).await.filter(|found| *found == root)).await
    };
    for namespace in ["default", "kube-system", SYSTEM, "shop"] {
        shown(namespace).await;
    }
    world.create(&Api::<Namespace>::all(world.client.clone()), json!({"metadata": {"name": "late"}})).await;
    shown("late").await;
    // Deleted or changed, it is put right.
    let maps = world.api::<ConfigMap>("shop");
    maps.delete(ROOT, &DeleteParams::default()).await.unwrap();
    shown("shop").await;
    let forged = json!({"data": {"root-cert.pem": "of somebody else"}});
    maps.patch(ROOT, &PatchParams::default(), &Patch::Merge(forged)).await.unwrap();
    shown("shop").await;
    root
}

async fn tokens_are_the_api_servers(world: &World, control: &Control, root: &str) {
    let channel = connect(control, root).await;
    let (cart, ledger) = ("spiffe://cluster.local/ns/shop/sa/cart", "spiffe://cluster.local/ns/shop/sa/ledger");

    let node = world.token(SYSTEM, "ztunnel", Some("ztunnel-a"), "istio-ca").await;
    let own = world.token("shop", "cart", Some("cart-1"), "istio-ca").await;
    for (token, asked) in [(&node, Some(cart)), (&own, None)] {
        let chain = certificate(channel.clone(), token, asked).await.unwrap();
        assert_eq!((identity_of(&chain[0]).as_str(), chain[1].as_str()), (cart, root));
    }
    let elsewhere = world.token("shop", "cart", Some("cart-1"), "https://kubernetes.default.svc").await;
    let unbound = world.token(SYSTEM, "ztunnel", None, "istio-ca").await;
    for (token, asked, why) in [
        (&node, Some(ledger), "runs on node a"),
        (&own, Some(ledger), "own identity only"),
        (&elsewhere, None, "audience"),
        (&unbound, Some(cart), "bound to no pod"),
        (&"no.such.token".to_owned(), None, ""),
    ] {
        let refused = certificate(channel.clone(), token, asked).await.expect_err("refused");
        assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
        assert!(refused.message().contains(why), "{refused}");
    }
}

fn condition(gateway: &DynamicObject, kind: &str) -> Option<(String, String)> {
    let conditions = gateway.data["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|condition| condition["type"] == kind)?;
    Some((found["status"].as_str()?.to_owned(), found["message"].as_str()?.to_owned()))
}

async fn programmed(world: &World, name: &str, wanted: &str) -> String {
    let ask = async || {
        let gateway = world.gateways().get(name).await.unwrap();
        condition(&gateway, "Programmed").filter(|(status, _)| status == wanted).map(|(_, message)| message)
    };
    until(&format!("Programmed={wanted} of {name}"), ask).await
}

fn waypoint(name: &str) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": name}, "spec": {
        "gatewayClassName": "istio-waypoint",
        "infrastructure": {"labels": {"team": "shop"}},
        "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
    }})
}

async fn waypoints_are_deployed(world: &World) {
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "GatewayClass"));
    let classes: Api<DynamicObject> = Api::all_with(world.client.clone(), &kind);
    until("the class of waypoints", async || classes.get_opt("istio-waypoint").await.unwrap()).await;
    let gateway = world.create(&world.gateways(), waypoint("waypoint")).await;
    assert!(programmed(world, "waypoint", "False").await.contains("no pod"));
    let deployments = world.api::<Deployment>("shop");
    let made = async || deployments.get_opt("waypoint").await.unwrap();
    let deployment = until("the waypoint's Deployment", made).await;
    let owners = deployment.metadata.owner_references.unwrap();
    assert_eq!((owners.len(), Some(&owners[0].uid)), (1, gateway.metadata.uid.as_ref()));
    let pod = deployment.spec.unwrap().template;
    assert_eq!(pod.metadata.unwrap().labels.unwrap()["team"], "shop");
    let pod = pod.spec.unwrap();
    assert_eq!(pod.containers[0].image.as_deref(), Some("registry/proxy:1"));
    assert_eq!(pod.image_pull_secrets.unwrap()[0].name, "registry");
    until("its account", async || world.api::<ServiceAccount>("shop").get_opt("waypoint").await.unwrap()).await;
    let service = until("its Service", async || world.api::<Service>("shop").get_opt("waypoint").await.unwrap()).await;
    let address = service.spec.unwrap().cluster_ip.unwrap();

    // The user's number of replicas stays, what is ours comes back.
    let scaled = json!({"spec": {"replicas": 3, "strategy": {"rollingUpdate": {"maxUnavailable": 1}}}});
    deployments.patch("waypoint", &PatchParams::default(), &Patch::Merge(scaled)).await.unwrap();
    let healed = async || {
        let spec = deployments.get("waypoint").await.unwrap().spec.unwrap();
        let unavailable = serde_json::to_value(spec.strategy.unwrap().rolling_update.unwrap().max_unavailable).unwrap();
        (unavailable == 0).then_some(spec.replicas)
    };
    assert_eq!(until("the strategy to be put right", healed).await, Some(3));
    deployments.delete("waypoint", &DeleteParams::default()).await.unwrap();
    until("the Deployment to come back", made).await;

    let mut pod = pod_of("waypoint-1", "waypoint", "a");
    pod["metadata"]["labels"] = json!({"gateway.networking.k8s.io/gateway-name": "waypoint"});
    let pods = world.api::<Pod>("shop");
    world.create(&pods, pod).await;
    let ready = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    pods.patch_status("waypoint-1", &PatchParams::default(), &Patch::Merge(ready)).await.unwrap();
    assert!(programmed(world, "waypoint", "True").await.contains("waypoint.shop.svc.cluster.local:15008"));
    let gateway = world.gateways().get("waypoint").await.unwrap();
    assert_eq!(gateway.data["status"]["addresses"], json!([{"type": "IPAddress", "value": address}]));
    assert_eq!(gateway.data["status"]["listeners"][0]["name"], "mesh");
}

/// Defaults of the class and `infrastructure.parametersRef`: what they say is in force; what cannot be used changes nothing, and
/// the Gateway says so.
async fn parameters_are_added(world: &World) {
    let patch = "spec: {template: {spec: {containers: [{name: istio-proxy, resources: {requests: {cpu: 250m}}}]}}}";
    let map = |deployment: &str| {
        json!({"metadata": {"name": "parameters"}, "data": {
            "deployment": deployment, "podDisruptionBudget": "spec: {minAvailable: 1}",
        }})
    };
    let maps = world.api::<ConfigMap>("shop");
    let reference = json!({"spec": {"infrastructure": {
        "parametersRef": {"group": "", "kind": "ConfigMap", "name": "parameters"},
    }}});
    world.gateways().patch("waypoint", &PatchParams::default(), &Patch::Merge(reference)).await.unwrap();
    let accepted = async |status: &str, part: &str| {
        let ask = async || {
            let gateway = world.gateways().get("waypoint").await.unwrap();
            condition(&gateway, "Accepted").filter(|(found, message)| found == status && message.contains(part))
        };
        until(&format!("Accepted={status}, {part}"), ask).await;
    };
    accepted("False", "ConfigMap shop/parameters is not known").await;
    let cpu = async || {
        let deployment = world.api::<Deployment>("shop").get("waypoint").await.unwrap();
        let container = deployment.spec.unwrap().template.spec.unwrap().containers.remove(0);
        container.resources.unwrap().requests.unwrap().remove("cpu").unwrap().0
    };
    assert_eq!(cpu().await, "100m");
    let defaults = json!({
        "metadata": {"name": "defaults", "labels": {"gateway.istio.io/defaults-for-class": "istio-waypoint"}},
        "data": {"deployment": "spec: {minReadySeconds: 7, template: {spec: {containers: [{name: istio-proxy, resources: {requests: {cpu: 50m}}}]}}}"},
    });
    world.create(&world.api::<ConfigMap>("istio-system"), defaults).await;
    world.create(&maps, map(patch)).await;
    accepted("True", "").await;
    until("the container's resources", async || (cpu().await == "250m").then_some(())).await;
    let deployment = world.api::<Deployment>("shop").get("waypoint").await.unwrap();
    assert_eq!(deployment.spec.unwrap().min_ready_seconds, Some(7), "what only the defaults say");
    let budgets = world.api::<PodDisruptionBudget>("shop");
    let made = until("the budget", async || budgets.get_opt("waypoint").await.unwrap()).await;
    let selected = made.spec.unwrap().selector.unwrap().match_labels.unwrap();
    assert_eq!(selected["gateway.networking.k8s.io/gateway-name"], "waypoint");
    let broken = Patch::Merge(map("spec: ["));
    maps.patch("parameters", &PatchParams::default(), &broken).await.unwrap();
    accepted("False", "ConfigMap shop/parameters: deployment: ").await;
    assert_eq!(cpu().await, "250m");
}

async fn what_is_somebody_elses_stays(world: &World) {
    let deployments = world.api::<Deployment>("shop");
    let theirs = json!({"metadata": {"name": "ledger"}, "spec": {
        "selector": {"matchLabels": {"app": "ledger"}},
        "template": {"metadata": {"labels": {"app": "ledger"}}, "spec": {"containers": [{"name": "c", "image": "theirs"}]}},
    }});
    world.create(&deployments, theirs).await;
    world.create(&world.gateways(), waypoint("ledger")).await;
    let said = async || {
        let gateway = world.gateways().get("ledger").await.unwrap();
        condition(&gateway, "Programmed").filter(|(_, message)| message.contains("somebody else's"))
    };
    let (status, message) = until("the Gateway to say so", said).await;
    assert_eq!(status, "False");
    assert!(message.starts_with("Deployment shop/ledger: "), "{message}");
    let kept = deployments.get("ledger").await.unwrap().spec.unwrap().template.spec.unwrap();
    assert_eq!(kept.containers[0].image.as_deref(), Some("theirs"));
}

async fn secrets_are_for_those_who_may_read_them(world: &World, control: &Control, root: &str) {
    let pem = |kind: &str, base64: &str| format!("-----BEGIN {kind}-----\n{base64}\n-----END {kind}-----\n");
    let (roots, key) = (pem("CERTIFICATE", "Uk9PVFM="), pem("PRIVATE KEY", "S0VZ"));
    let pair = json!({"tls.crt": roots, "tls.key": key, "ca.crt": roots});
    world.create(&world.api::<Secret>("shop"), json!({"metadata": {"name": "vault"}, "stringData": pair})).await;
    let service = json!({
        "metadata": {"name": "vault", "labels": {"istio.io/use-waypoint": "waypoint"}},
        "spec": {"ports": [{"name": "http", "port": 80}]},
    });
    world.create(&world.api::<Service>("shop"), service).await;
    let rule = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": {"name": "vault"},
        "spec": {"host": "vault", "trafficPolicy": {"tls": {"mode": "MUTUAL", "credentialName": "vault"}}},
    });
    let rules = GroupVersionKind::gvk("networking.istio.io", "v1", "DestinationRule");
    let rules: Api<DynamicObject> = Api::namespaced_with(world.client.clone(), "shop", &ApiResource::from_gvk(&rules));
    until("the kind to be served", async || rules.list(&ListParams::default()).await.ok()).await;
    world.create(&rules, rule).await;

    let token = world.token("shop", "waypoint", None, "istio-ca").await;
    let channel = connect(control, root).await;
    let node = stream::waypoint("shop", "waypoint");
    let mut stream = Stream::open(channel, Some(&token), node, type_url::SECRET).await.unwrap();
    while stream.held.is_empty() {
        stream.next().await.unwrap();
    }
    assert_eq!(stream.held.keys().collect::<Vec<_>>(), ["kubernetes://vault-cacert"], "nobody has allowed the key");
    let role = json!({"metadata": {"name": "secrets"}, "rules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["list"]}]});
    world.create(&world.api::<Role>("shop"), role).await;
    let binding = json!({
        "metadata": {"name": "secrets"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "secrets"},
        "subjects": [{"kind": "ServiceAccount", "name": "waypoint", "namespace": "shop"}],
    });
    world.create(&world.api::<RoleBinding>("shop"), binding).await;
    assert_eq!(stream.next().await.unwrap(), ["kubernetes://vault"]);
    // A new key reaches it as soon as it is there.
    let renewed = json!({"stringData": {"tls.key": pem("PRIVATE KEY", "TkVX")}});
    world.api::<Secret>("shop").patch("vault", &PatchParams::default(), &Patch::Merge(renewed)).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), ["kubernetes://vault"]);
    assert!(String::from_utf8_lossy(&stream.held["kubernetes://vault"]).contains("TkVX"));
    // Whoever takes over has both for it at once: what is missing in its first answer is taken from the waypoint.
    let folder = tempfile::tempdir().unwrap();
    let next = start(&world.cluster, folder.path()).await;
    let (channel, node) = (connect(&next, root).await, stream::waypoint("shop", "waypoint"));
    let taken_over = Stream::open(channel, Some(&token), node, type_url::SECRET).await.unwrap();
    assert_eq!(taken_over.held.len(), 2, "{:?}", taken_over.held.keys());
    next.stop().await;
    world.api::<Secret>("shop").delete("vault", &DeleteParams::default()).await.unwrap();
    stream.next().await.unwrap();
    assert!(stream.held.is_empty(), "{:?}", stream.held.keys());
}
