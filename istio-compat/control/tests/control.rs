//! The control plane as its clients see it: a real gRPC client over real ports, objects from a real folder.
#[path = "support/certificates.rs"]
mod certificates;
#[path = "support/stream.rs"]
mod stream;

use std::path::{Path, PathBuf};
use std::time::Duration;

use certificates::{certificate, identity_of};
use compat_control::{Config, Control, Objects, State};
use compat_translate::MeshOptions;
use prost::Message;
use stream::{Stream, waypoint, ztunnel};
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use xds_proto::envoy::envoy::config::core::v3::Node;
use xds_proto::envoy::envoy::config::listener::v3::Listener;
use xds_proto::type_url;

/// Longer than anything here takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(20);

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: waypoint}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: waypoint, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: reviews-1, namespace: shop, labels: {app: reviews}, annotations: {ambient.istio.io/redirection: enabled}}
spec: {nodeName: node-a, serviceAccountName: reviews, containers: [{name: app, image: echo}]}
status: {phase: Running, podIP: 10.1.0.5, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec: {clusterIP: 10.96.0.7, selector: {app: reviews}, ports: [{name: http, port: 80, targetPort: 8080}]}
";

const NODES: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-a}
---
apiVersion: v1
kind: Node
metadata: {name: node-b}
";

struct Lab {
    folder: tempfile::TempDir,
    control: Control,
}

impl Lab {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("objects")).unwrap();
        std::fs::write(folder.path().join("objects/nodes.yaml"), NODES).unwrap();
        std::fs::write(folder.path().join("objects/shop.yaml"), SHOP).unwrap();
        let control = start(folder.path()).await;
        Self { folder, control }
    }

    fn write(&self, file: &str, text: &str) {
        // By rename, as editors do.
        let path = self.folder.path().join("objects").join(file);
        let temporary = self.folder.path().join("next");
        std::fs::write(&temporary, text).unwrap();
        std::fs::rename(temporary, path).unwrap();
    }

    fn token(&self, path: &str) -> String {
        std::fs::read_to_string(self.folder.path().join("state/tokens").join(path)).unwrap()
    }

    async fn status(&self) -> serde_json::Value {
        let socket = self.folder.path().join("run/control.sock");
        strata_runtime::client::get_json(&socket, "/status").await.unwrap()
    }

    async fn plain(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.control.xds_addr.unwrap())).unwrap().connect().await.unwrap()
    }
}

async fn start(folder: &Path) -> Control {
    let any: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
    let config = Config {
        objects: Objects::Folders(vec![folder.join("objects")]),
        state: State::Folder(folder.join("state")),
        xds_addr: Some(any),
        secure_addr: any,
        run_dir: folder.join("run"),
        admin_addr: None,
        status_addr: None,
        mesh: MeshOptions::default(),
    };
    let control = Control::start(config).await.unwrap();
    tokio::time::timeout(PATIENCE, async {
        while !control.pending().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("ready");
    control
}

/// The faults, once there is one with this text.
async fn until_status(lab: &Lab, text: &str) -> String {
    let faults = tokio::time::timeout(PATIENCE, async {
        loop {
            let faults = lab.status().await["faults"].to_string();
            if faults.contains(text) {
                return faults;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    faults.await.unwrap_or_else(|_| panic!("no fault has {text:?}"))
}

/// The text of a listener, good enough to see which clusters its routes name.
fn text_of(stream: &Stream) -> String {
    let listener = Listener::decode(stream.held["main_internal"].as_slice()).unwrap();
    String::from_utf8_lossy(&listener.encode_to_vec()).into_owned()
}

const CANARY: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec: {hosts: [reviews], http: [{match: [{headers: {x-user: {exact: jason}}}], directResponse: {status: 418}}, {route: [{destination: {host: reviews}}]}]}
";

#[tokio::test]
async fn a_node_gets_workloads_and_an_edit_reaches_it_alone() {
    let lab = Lab::start().await;
    let token = lab.token("node/node-a");
    let mut stream = Stream::open(lab.plain().await, Some(&token), ztunnel("node-a"), type_url::ADDRESS).await.unwrap();
    let names: Vec<&String> = stream.held.keys().collect();
    assert_eq!(names, ["Kubernetes//Pod/shop/reviews-1", "shop/reviews.shop.svc.cluster.local"]);
    // Another pod, of no service: only it is sent.
    lab.write(
        "more.yaml",
        &SHOP.split("---").nth(3).unwrap().replace("reviews", "other").replace("10.1.0.5", "10.1.0.6"),
    );
    assert_eq!(stream.next().await.unwrap(), ["Kubernetes//Pod/shop/other-1"]);
    lab.control.stop().await;
}

#[tokio::test]
async fn a_waypoint_gets_its_listeners_and_a_mistake_changes_nothing() {
    let lab = Lab::start().await;
    let token = lab.token("sa/shop/waypoint");
    let node = waypoint("shop", "waypoint");
    let mut stream = Stream::open(lab.plain().await, Some(&token), node, type_url::LISTENER).await.unwrap();
    assert!(stream.held.contains_key("connect_terminate"));
    assert!(!text_of(&stream).contains("jason"));

    lab.write("canary.yaml", CANARY);
    assert_eq!(stream.next().await.unwrap(), ["main_internal"]);
    assert!(text_of(&stream).contains("jason"));

    // A field that does not exist: the reader refuses the object. Then one the translator refuses.
    for (bad, field) in [
        (CANARY.replace("directResponse", "directAnswer"), "directAnswer"),
        (CANARY.replace("host: reviews", "host: nobody"), "spec.http[1].route[0].destination.host"),
    ] {
        lab.write("canary.yaml", &bad);
        let faults = until_status(&lab, field).await;
        assert!(faults.contains("VirtualService shop/reviews"), "{faults}");
        assert!(faults.contains("canary.yaml"), "{faults}");
    }
    // Corrected, with something new: the next push is this one, so nothing was pushed in between.
    lab.write("canary.yaml", &CANARY.replace("jason", "kim"));
    assert_eq!(stream.next().await.unwrap(), ["main_internal"]);
    assert!(text_of(&stream).contains("kim") && !text_of(&stream).contains("jason"));
    assert_eq!(lab.status().await["faults"].to_string(), "[]");
    lab.control.stop().await;
}

const TLS: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews, namespace: shop}
spec: {host: reviews, trafficPolicy: {tls: {mode: MUTUAL, credentialName: reviews}}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: cart, namespace: shop}
---
apiVersion: v1
kind: Secret
metadata: {name: unasked, namespace: shop}
stringData: {cacert: x}
---
apiVersion: v1
kind: Secret
metadata: {name: reviews, namespace: shop}
stringData:
  cacert: &pem |
    -----BEGIN CERTIFICATE-----
    Uk9PVFM=
    -----END CERTIFICATE-----
  cert: *pem
  key: |
    -----BEGIN PRIVATE KEY-----
    S0VZ
    -----END PRIVATE KEY-----
";

#[tokio::test]
async fn a_waypoint_gets_the_secrets_its_rules_name_and_only_its_own_account_gets_keys() {
    let lab = Lab::start().await;
    lab.write("tls.yaml", TLS);
    let (roots, pair) = ("kubernetes://reviews-cacert", "kubernetes://reviews");
    let open = async |account: &str| {
        let token = lab.token(&format!("sa/shop/{account}"));
        Stream::open(lab.plain().await, Some(&token), waypoint("shop", account), type_url::SECRET).await.unwrap()
    };
    let mut own = open("waypoint").await;
    if own.held.is_empty() {
        own.next().await.unwrap();
    }
    assert_eq!(own.held.keys().collect::<Vec<_>>(), [pair, roots]);
    // Somebody else of the namespace sees what is public.
    assert_eq!(open("cart").await.held.keys().collect::<Vec<_>>(), [roots]);
    let dump = strata_runtime::client::get_json(&lab.folder.path().join("run/control.sock"), "/config_dump").await;
    let dump = dump.unwrap().to_string();
    assert!(dump.contains(pair) && !dump.contains("S0VZ"), "{dump}");
    // A Secret that is spoilt stays in force as it was; one that is gone is gone.
    lab.write("tls.yaml", &TLS.replace("S0VZ", "%%"));
    until_status(&lab, "Secret shop/reviews: data: key is no private key in PEM").await;
    assert_eq!(open("waypoint").await.held.len(), 2);
    lab.write("tls.yaml", TLS.split("---\napiVersion: v1\nkind: Secret").next().unwrap());
    own.next().await.unwrap();
    assert!(own.held.is_empty(), "{:?}", own.held.keys());
    until_status(&lab, "DestinationRule shop/reviews: spec.trafficPolicy.tls.credentialName: Secret shop/reviews")
        .await;
    lab.control.stop().await;
}

#[tokio::test]
async fn the_wrong_token_gets_nothing() {
    let lab = Lab::start().await;
    let node = lab.token("node/node-a");
    let account = lab.token("sa/shop/waypoint");
    let refused = async |token: Option<&str>, node: Node| {
        let opened = Stream::open(lab.plain().await, token, node, type_url::ADDRESS).await;
        opened.err().map(|status| status.code())
    };
    assert_eq!(refused(None, ztunnel("node-a")).await, Some(Code::Unauthenticated));
    assert_eq!(refused(Some("0123456789abcdef0123456789abcdef"), ztunnel("node-a")).await, Some(Code::Unauthenticated));
    assert_eq!(refused(Some(&node), ztunnel("node-b")).await, Some(Code::PermissionDenied));
    assert_eq!(refused(Some(&account), ztunnel("node-a")).await, Some(Code::PermissionDenied));
    assert_eq!(refused(Some(&account), waypoint("bank", "waypoint")).await, Some(Code::PermissionDenied));
    assert_eq!(refused(Some(&account), waypoint("shop", "reviews")).await, Some(Code::PermissionDenied));
    assert_eq!(refused(Some(&node), waypoint("shop", "waypoint")).await, Some(Code::PermissionDenied));
    assert_eq!(refused(Some(&account), waypoint("shop", "waypoint")).await, None);
    lab.control.stop().await;
}

#[tokio::test]
async fn certificates_are_for_whoever_runs_there() {
    let lab = Lab::start().await;
    let root = std::fs::read_to_string(lab.folder.path().join("state/root-cert.pem")).unwrap();
    // Over TLS, trusting the root on disk.
    let tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&root)).domain_name("istiod.istio-system.svc");
    let endpoint = Channel::from_shared(format!("https://{}", lab.control.secure_addr)).unwrap();
    let channel = endpoint.tls_config(tls).unwrap().connect().await.unwrap();

    let reviews = "spiffe://cluster.local/ns/shop/sa/reviews";
    let (a, b) = (lab.token("node/node-a"), lab.token("node/node-b"));
    let own = lab.token("sa/shop/waypoint");
    let chain = certificate(channel.clone(), &a, Some(reviews)).await.unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!(identity_of(&chain[0]), reviews);
    assert_eq!(chain[1], root);
    let chain = certificate(channel.clone(), &own, None).await.unwrap();
    assert_eq!(identity_of(&chain[0]), "spiffe://cluster.local/ns/shop/sa/waypoint");

    for (token, identity) in [
        // No such pod on that node; nobody's account; not for accounts; no identity; no token at all.
        (&b, Some(reviews)),
        (&a, Some("spiffe://cluster.local/ns/shop/sa/frontend")),
        (&a, Some("spiffe://other.domain/ns/shop/sa/reviews")),
        (&own, Some(reviews)),
        (&a, None),
        (&"0123".to_owned(), Some(reviews)),
    ] {
        let refused = certificate(channel.clone(), token, identity).await.expect_err("refused");
        assert_eq!(refused.code(), Code::Unauthenticated, "{identity:?}");
    }
    lab.control.stop().await;
}

/// The process itself, so that it can be killed.
struct Process(std::process::Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Already dead is what the test wants.
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

fn spawn(folder: &Path) -> Process {
    let flag = |name: &str, path: PathBuf| format!("--{name}={}", path.display());
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_strata-control"))
        .arg(format!("--source=dir:{}", folder.join("objects").display()))
        .arg(flag("state-dir", folder.join("state")))
        .arg(flag("run-dir", folder.join("run")))
        .args(["--xds-addr=127.0.0.1:0", "--secure-addr=127.0.0.1:0"])
        .spawn()
        .unwrap();
    Process(child)
}

#[tokio::test]
async fn a_killed_control_plane_comes_back_the_same() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("objects")).unwrap();
    std::fs::write(folder.path().join("objects/all.yaml"), format!("{NODES}---{SHOP}")).unwrap();
    let socket = folder.path().join("run/control.sock");
    let read = |path: &str| std::fs::read_to_string(folder.path().join("state").join(path)).unwrap();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let process = spawn(folder.path());
        let dump = tokio::time::timeout(PATIENCE, async {
            loop {
                match strata_runtime::client::get_json(&socket, "/config_dump").await {
                    Ok(dump) if dump["addresses"].as_object().is_some_and(|all| !all.is_empty()) => return dump,
                    _ => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        });
        let dump = dump.await.expect("a translation");
        seen.push((read("root-cert.pem"), read("root-key.pem"), read("tokens/node/node-a"), dump));
        // SIGKILL, by drop.
        drop(process);
        std::fs::remove_file(&socket).unwrap();
    }
    // Root, key, tokens, and every resource's version.
    assert_eq!(seen[0], seen[1]);
}

const TOKENS: &str = "
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: shop}
spec: {targetRefs: [{kind: Service, group: '', name: reviews}], jwtRules: [{issuer: https://issuer.example, jwksUri: 'http://ADDRESS/keys'}]}
";

/// Answers every connection with this body.
async fn issuer(body: &'static str) -> std::net::SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0_u8; 1024];
            let _read = stream.read(&mut request).await;
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            let _written = stream.write_all(answer.as_bytes()).await;
        }
    });
    address
}

#[tokio::test]
async fn keys_are_fetched_and_a_silent_issuer_is_named() {
    let lab = Lab::start().await;
    let token = lab.token("sa/shop/waypoint");
    let node = waypoint("shop", "waypoint");
    let mut stream = Stream::open(lab.plain().await, Some(&token), node, type_url::LISTENER).await.unwrap();
    let address = issuer(r#"{"keys":[{"kty":"oct","kid":"the-key"}]}"#).await;
    lab.write("tokens.yaml", &TOKENS.replace("ADDRESS", &address.to_string()));
    // First without keys, which refuses all tokens, then with them.
    stream.next().await.unwrap();
    while !text_of(&stream).contains("the-key") {
        assert!(text_of(&stream).contains(r#""kid":"nobody""#));
        stream.next().await.unwrap();
    }
    // Port 1 of loopback: nobody.
    lab.write("tokens.yaml", &TOKENS.replace("ADDRESS", "127.0.0.1:1"));
    stream.next().await.unwrap();
    assert!(!text_of(&stream).contains("the-key"));
    tokio::time::timeout(PATIENCE, async {
        loop {
            let faults = lab.status().await["faults"].to_string();
            if faults.contains("RequestAuthentication shop/tokens") && faults.contains("spec.jwtRules[0].jwksUri") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("a fault");
    lab.control.stop().await;
}

#[tokio::test]
async fn a_node_is_the_waypoint_only_where_the_gateway_asks_for_it() {
    let lab = Lab::start().await;
    let token = lab.token("node/node-a");
    let identity = "spiffe://cluster.local/ns/shop/sa/waypoint";
    let refused = certificate(lab.plain().await, &token, Some(identity)).await.expect_err("not placed there yet");
    assert_eq!(refused.code(), Code::Unauthenticated);

    let placed = SHOP.replace(
        "metadata: {name: waypoint, namespace: shop}\nspec: {gatewayClassName",
        "metadata: {name: waypoint, namespace: shop, annotations: {strata.io/placement: node}}\nspec: {gatewayClassName",
    );
    assert_ne!(placed, SHOP);
    lab.write("shop.yaml", &placed);
    let chain = tokio::time::timeout(PATIENCE, async {
        loop {
            match certificate(lab.plain().await, &token, Some(identity)).await {
                Ok(chain) => return chain,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    });
    assert_eq!(identity_of(&chain.await.expect("a certificate")[0]), identity);
    let node = waypoint("shop", "waypoint");
    let stream = Stream::open(lab.plain().await, Some(&token), node, type_url::LISTENER).await.unwrap();
    assert!(stream.held.contains_key("main_internal"));
    lab.control.stop().await;
}
