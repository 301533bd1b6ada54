//! The waypoint role with what a real istiod sent for a canary by header and weight: HBONE in, HBONE out, all in
//! one network namespace that owns the pods' addresses. Needs root.
#![allow(unreachable_pub, dead_code, reason = "support modules are shared by tests")]
#[path = "support/bpf.rs"]
mod bpf;
#[path = "../../identity/tests/support/ca.rs"]
mod ca;
#[path = "support/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use ca::TOKEN;
use http::{HeaderMap, StatusCode};
use l7_hbone::{ConnectError, ConnectRequest, Pool, PoolConfig, PoolKey, Server, Tunnel, accept_tls};
use l7_identity::{CaClient, CaConfig, IdentityManager};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::rustls;
use world::{Control, NodeProxy, Pod, Process, link, run, workload};
use xds_model::spiffe::SpiffeId;
use xds_proto::envoy::envoy::config::core::v3::{DataSource, data_source::Specifier};
use xds_proto::envoy::envoy::extensions::transport_sockets::tls::v3 as wire;
use xds_proto::envoy::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use xds_proto::type_url;

const WAYPOINT: &str = "10.8.1.60:15008";
/// reviews.shop in the recorded cluster.
const REVIEWS: &str = "10.96.1.13:80";
const ENDPOINTS: [(&str, &str); 6] = [
    ("10.8.0.13", "v1"),
    ("fd00:8::d", "v1"),
    ("10.8.1.13", "v2"),
    ("fd00:8:1::d", "v2"),
    ("10.8.2.13", "v3"),
    ("fd00:8:2::d", "v3"),
];

fn recorded(case: &str, file: &str) -> Vec<(String, Vec<u8>)> {
    recorded_for("waypoint-shop-waypoint", case, file)
}

fn recorded_for(client: &str, case: &str, file: &str) -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/testdata/istiod/recorded");
    let path = |case: &str| -> PathBuf { root.join(case).join(client).join(file) };
    let bytes = std::fs::read(path(case)).or_else(|_| std::fs::read(path("00-base"))).unwrap();
    let response = DeltaDiscoveryResponse::decode(bytes.as_slice()).unwrap();
    response.resources.into_iter().map(|r| (r.name, r.resource.unwrap().value)).collect()
}

fn id(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", namespace, account).unwrap()
}

struct Mesh {
    control: Control,
    identities: IdentityManager,
    run_dir: tempfile::TempDir,
    _waypoint: Process,
}

impl Mesh {
    async fn start(case: &str) -> Mesh {
        let control = Control::start().await;
        serve_recorded(&control, case);
        for (name, body) in recorded(case, "workloads.binpb") {
            control.put(type_url::WORKLOAD, name, body);
        }
        let run_dir = tempfile::tempdir().unwrap();
        let token = run_dir.path().join("token");
        std::fs::write(&token, TOKEN).unwrap();
        let identities = identities(&control, &token);
        let child = Command::new(env!("CARGO_BIN_EXE_strata-proxy"))
            .args(["--role", "waypoint", "--gateway", "waypoint", "--namespace", "shop", "--name", "waypoint-b"])
            .args(["--service-account", "waypoint", "--instance-ip", "10.8.1.60", "--hbone-ip", "10.8.1.60"])
            .args(["--xds-address", &format!("http://{}", control.addr), "--token-path"])
            .arg(&token)
            .arg("--run-dir")
            .arg(run_dir.path())
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()))
            .spawn()
            .unwrap();
        let mesh = Mesh { control, identities, run_dir, _waypoint: Process(child) };
        mesh.wait_ready().await;
        mesh
    }

    async fn wait_ready(&self) {
        let socket = self.run_dir.path().join("proxy.sock");
        for _ in 0..200 {
            if let Ok(status) = strata_runtime::client::get_json(&socket, "/status").await
                && status["ready"] == true
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the waypoint did not become ready");
    }

    async fn connect(&self, pool: &Pool, authority: &str) -> Result<Tunnel, ConnectError> {
        let addr: SocketAddr = WAYPOINT.parse().unwrap();
        let client = IpAddr::from([10, 8, 0, 11]);
        let key = PoolKey::new(id("shop", "checkout"), vec![id("shop", "waypoint")], addr, Some(client));
        let request = ConnectRequest { key, authority: authority.into(), headers: HeaderMap::new() };
        pool.connect(request, move || async move {
            let socket = tokio::net::TcpSocket::new_v4()?;
            socket.bind(SocketAddr::new(client, 0))?;
            socket.connect(addr).await
        })
        .await
    }
}

/// The configuration of waypoint shop/waypoint.
fn serve_recorded(control: &Control, case: &str) {
    for (url, file) in [
        (type_url::CLUSTER, "clusters.binpb"),
        (type_url::ENDPOINT, "endpoints.binpb"),
        (type_url::LISTENER, "listeners.binpb"),
    ] {
        for (name, body) in recorded(case, file) {
            control.put(url, name, body);
        }
    }
}

fn identities(control: &Control, token: &Path) -> IdentityManager {
    let ca = CaConfig {
        address: format!("http://{}", control.addr),
        root_ca: None,
        server_name: None,
        token: Some(token.to_owned()),
        cluster_id: "Kubernetes".to_owned(),
        impersonate: true,
        ttl: Duration::from_secs(3600),
    };
    IdentityManager::new(CaClient::new(ca), tokio::runtime::Handle::current())
}

/// A workload's node proxy and application in one: HBONE in; what comes through a tunnel is `application`'s.
async fn endpoint<F: Future<Output = ()> + Send + 'static>(
    identities: &IdentityManager,
    ip: &str,
    application: impl Fn(Tunnel) -> F + Clone + Send + 'static,
) {
    let addr = SocketAddr::new(ip.parse().unwrap(), 15008);
    let listener = tokio::net::TcpListener::bind(addr).await.unwrap();
    let identities = identities.clone();
    tokio::spawn(async move {
        loop {
            let (tcp, peer_addr) = listener.accept().await.unwrap();
            let certificate = identities.certificate(&id("shop", "reviews")).await.unwrap();
            let application = application.clone();
            tokio::spawn(async move {
                let (tls, peer) = accept_tls(tcp, &certificate).await.unwrap();
                assert_eq!(peer, id("shop", "waypoint"), "the waypoint speaks for itself");
                let mut server = Server::handshake(tls, peer, peer_addr).await.unwrap();
                while let Ok(Some(inbound)) = server.accept().await {
                    tokio::spawn(application(inbound.accept(HeaderMap::new()).unwrap()));
                }
            });
        }
    });
}

/// The pods of reviews answer HTTP/1.1 with their version.
async fn reviews(identities: &IdentityManager) {
    for (ip, version) in ENDPOINTS {
        endpoint(identities, ip, move |tunnel| answer(tunnel, version)).await;
    }
}

async fn read_head(tunnel: &mut Tunnel) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match tunnel.read(&mut byte).await {
            Ok(1) => head.push(byte[0]),
            _ => return None,
        }
    }
    Some(String::from_utf8(head).unwrap().to_ascii_lowercase())
}

async fn answer(mut tunnel: Tunnel, version: &str) {
    assert!(tunnel.authority().ends_with(":8080"), "{}", tunnel.authority());
    while read_head(&mut tunnel).await.is_some() {
        let text = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{version}", version.len());
        if tunnel.write_all(text.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// One request on an open tunnel: status and body.
async fn get(tunnel: &mut Tunnel, headers: &str) -> (u16, String) {
    let request = format!("GET /reviews HTTP/1.1\r\nhost: reviews.shop\r\n{headers}\r\n");
    tunnel.write_all(request.as_bytes()).await.unwrap();
    let head = read_head(tunnel).await.expect("an answer");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0").parse().unwrap();
    let mut body = vec![0; length];
    tunnel.read_exact(&mut body).await.unwrap();
    (status, String::from_utf8(body).unwrap())
}

/// The namespace gets the addresses of the pods of reviews.
fn endpoints_in(namespace: &str) {
    for (ip, _) in ENDPOINTS {
        let length = if ip.contains(':') { 128 } else { 32 };
        run(&format!("ip -n {namespace} address add {ip}/{length} dev lo nodad"));
    }
}

/// The waypoint's pod, with a client's address and those of reviews.
fn waypoints_pod(name: &str) -> Pod {
    let pod = Pod::new(name, [10, 8, 1, 60].into());
    run(&format!("ip -n {name} address add 10.8.1.60/32 dev lo; ip -n {name} address add 10.8.0.11/32 dev lo"));
    endpoints_in(name);
    pod
}

/// Runs a scene in a pod to its end.
fn play<F: Future<Output = ()>>(pod: &Pod, scene: impl FnOnce() -> F + Send + 'static) {
    let scene = pod.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(scene());
    });
    scene.join().unwrap();
}

#[test]
fn istiods_canary_is_served_over_hbone() {
    play(&waypoints_pod("h3-w"), canary);
}

async fn canary() {
    let mesh = Arc::new(Mesh::start("03-header-canary").await);
    reviews(&mesh.identities).await;
    let pool = Pool::new(mesh.identities.clone(), PoolConfig::default());
    let mut tunnel = mesh.connect(&pool, REVIEWS).await.unwrap();
    for _ in 0..20 {
        assert_eq!(get(&mut tunnel, "x-user: jason\r\n").await, (200, "v2".to_owned()));
    }
    let mut seen = BTreeMap::<String, u32>::new();
    for _ in 0..400 {
        let (status, version) = get(&mut tunnel, "").await;
        assert_eq!(status, 200, "{version}");
        *seen.entry(version).or_default() += 1;
    }
    let count = |version: &str| seen.get(version).copied().unwrap_or_default();
    assert_eq!((count("v3"), count("v1") + count("v2")), (0, 400), "{seen:?}");
    assert!((320..=395).contains(&count("v1")), "90 of 100 go to v1: {seen:?}");

    // A destination the waypoint does not serve.
    let outcome = mesh.connect(&pool, "10.99.99.99:80").await;
    match outcome {
        Err(ConnectError::Refused { status, .. }) => assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE),
        Ok(mut tunnel) => assert!(!matches!(tunnel.read(&mut [0; 1]).await, Ok(1)), "served an unknown destination"),
        Err(error) => panic!("{error}"),
    }
    let metrics = strata_runtime::client::get_text(&mesh.run_dir.path().join("proxy.sock"), "/metrics").await.unwrap();
    let counted = metrics.lines().any(|line| {
        line.starts_with("istio_requests_total")
            && line.contains("source_principal=\"spiffe://cluster.local/ns/shop/sa/checkout\"")
            && line.contains("destination_service=\"reviews.shop.svc.cluster.local\"")
            && line.contains("response_code=\"200\"")
    });
    assert!(counted, "{metrics}");
}

/// What istiod sends for a BackendTLSPolicy: TLS inside HBONE, roots by name from the control plane.
#[test]
fn a_service_that_speaks_tls_is_reached_by_tls_inside_hbone() {
    play(&waypoints_pod("h4-w"), backend_tls);
}

/// A server's certificate by an authority of its own, and the authority's certificate.
struct Backend {
    root: String,
    server: Arc<rustls::ServerConfig>,
}

impl Backend {
    fn new(name: &str) -> Backend {
        let authority = ca::Authority::new("roots of services");
        let (leaf, key) = authority.leaf(&[name]);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.into()], key.into())
            .unwrap();
        Backend { root: authority.root.pem(), server: Arc::new(server) }
    }
}

/// An application that speaks TLS, and answers with the name it was asked by.
async fn answer_by_tls(tunnel: Tunnel, server: Arc<rustls::ServerConfig>) {
    let Ok(mut stream) = tokio_rustls::TlsAcceptor::from(server).accept(tunnel).await else { return };
    let name = stream.get_ref().1.server_name().unwrap_or("no name").to_owned();
    let mut request = [0; 4096];
    while stream.read(&mut request).await.is_ok_and(|length| length > 0) {
        let text = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len());
        stream.write_all(text.as_bytes()).await.unwrap();
    }
}

async fn backend_tls() {
    // Ready before the roots have come: other services are not to wait for them.
    let mesh = Mesh::start("17-backend-tls-policy").await;
    let (expected, stranger) = (Backend::new("alt.example"), Backend::new("alt.example"));
    let server = Arc::new(ArcSwap::from(stranger.server.clone()));
    for (ip, _) in ENDPOINTS {
        let server = server.clone();
        endpoint(&mesh.identities, ip, move |tunnel| answer_by_tls(tunnel, server.load_full())).await;
    }
    let pool = Pool::new(mesh.identities.clone(), PoolConfig::default());
    let mut tunnel = mesh.connect(&pool, REVIEWS).await.unwrap();
    let (status, text) = get(&mut tunnel, "").await;
    assert_eq!(status, 503, "{text}");
    assert!(text.contains("secret configmap://shop/reviews-ca-cacert has not come"), "{text}");

    let root = DataSource { specifier: Some(Specifier::InlineString(expected.root)), ..Default::default() };
    let context = wire::CertificateValidationContext { trusted_ca: Some(root), ..Default::default() };
    let name = "configmap://shop/reviews-ca-cacert".to_owned();
    let secret = wire::Secret { name: name.clone(), r#type: Some(wire::secret::Type::ValidationContext(context)) };
    mesh.control.put(type_url::SECRET, name.clone(), secret.encode_to_vec());
    let mut answer = get(&mut tunnel, "").await;
    for _ in 0..100 {
        if !answer.1.contains("has not come") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        answer = get(&mut tunnel, "").await;
    }
    assert_eq!(answer.0, 503, "the right name by an authority nobody trusts");
    assert!(answer.1.contains("invalid peer certificate"), "{}", answer.1);
    server.store(expected.server);
    let answer = get(&mut tunnel, "").await;
    assert_eq!(answer, (200, "reviews.example".to_owned()), "the policy's hostname is the name in SNI");
    let dump = strata_runtime::client::get_json(&mesh.run_dir.path().join("proxy.sock"), "/config_dump/strata").await;
    let dump = dump.unwrap();
    assert_eq!(dump["secrets"], serde_json::json!([{ "name": name, "kind": "roots", "certificates": 1 }]));
}

/// A node proxy with the waypoint in it, no pod of the waypoint anywhere.
#[test]
fn a_waypoint_placed_on_the_node_governs_captured_connections() {
    let node = Pod::new("k1-n", [10, 8, 0, 250].into());
    let client = Pod::new("k1-c", [10, 8, 0, 99].into());
    link(&client, &node, "eth0");
    client.rules();
    endpoints_in("k1-n");
    play(&node, || placed(Arc::new(client)));
}

/// One request of an application in `pod`; what comes back until the connection ends.
async fn captured_get(pod: &Arc<Pod>, header: &'static str) -> String {
    let pod = pod.clone();
    let work = move || -> std::io::Result<String> {
        let mut stream = pod.connect(REVIEWS, true)?;
        let request = format!("GET /reviews HTTP/1.1\r\nhost: reviews.shop\r\nconnection: close\r\n{header}\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    tokio::task::spawn_blocking(work).await.unwrap().unwrap_or_default()
}

async fn placed(client: Arc<Pod>) {
    let control = Control::start().await;
    for (name, body) in recorded_for("node", "00-base", "address.binpb") {
        control.put(type_url::ADDRESS, name, body);
    }
    control.workload(workload(&client, "checkout"));
    let flags = ["--placed-waypoint", "shop/waypoint"];
    let proxy = NodeProxy::start_with(&control, &[(&*client, "checkout")], &flags).await;
    let identities = identities(&control, &proxy.run_dir.path().join("token"));
    reviews(&identities).await;

    // Without its configuration nothing passes.
    assert_eq!(captured_get(&client, "x-user: jason\r\n").await, "");

    serve_recorded(&control, "03-header-canary");
    let mut status = serde_json::Value::Null;
    for _ in 0..200 {
        status = strata_runtime::client::get_json(&proxy.socket(), "/status").await.unwrap();
        if status["placed_waypoints"][0]["configured"] == true {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let shown = &status["placed_waypoints"][0];
    assert_eq!((&shown["gateway"], &shown["configured"]), (&"waypoint".into(), &true.into()), "{status}");
    // Endpoints come after the listeners that need them.
    for _ in 0..200 {
        if captured_get(&client, "x-user: jason\r\n").await.starts_with("HTTP/1.1 200") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for _ in 0..20 {
        let answer = captured_get(&client, "x-user: jason\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("v2"), "{answer:?}");
    }
    let mut seen = BTreeMap::<String, u32>::new();
    for _ in 0..100 {
        let answer = captured_get(&client, "").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        *seen.entry(answer[answer.len() - 2..].to_owned()).or_default() += 1;
    }
    let count = |version: &str| seen.get(version).copied().unwrap_or_default();
    assert_eq!((count("v3"), count("v1") + count("v2")), (0, 100), "{seen:?}");
    assert!(count("v1") > count("v2"), "90 of 100 go to v1: {seen:?}");
}
