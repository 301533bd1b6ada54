//! A real etcd and kube-apiserver on loopback, in a folder of their own.
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use compat_kubernetes::{Access, ApiServer};
use kube::Client;

/// How long an API server may take to serve.
const START: Duration = Duration::from_secs(90);

pub(crate) struct Cluster {
    folder: tempfile::TempDir,
    etcd: Child,
    apiserver: Option<Child>,
    etcd_port: u16,
    port: u16,
}

/// What `make cluster` builds, below its folder.
fn built(below: &str) -> PathBuf {
    let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
    let own = std::env::var_os("STRATA_CLUSTER_DIR").map(PathBuf::from);
    let path = own.unwrap_or_else(|| home.join(".cache/strata-cluster")).join(below);
    assert!(path.exists(), "{} is missing: run `make cluster` first", path.display());
    path
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn log(folder: &Path, name: &str) -> (Stdio, Stdio) {
    let file = File::options().create(true).append(true).open(folder.join(name)).unwrap();
    (file.try_clone().unwrap().into(), file.into())
}

impl Cluster {
    pub(crate) async fn start() -> Cluster {
        let folder = tempfile::Builder::new().prefix("strata-api").tempdir().unwrap();
        let path = folder.path();
        run(Command::new("openssl").args(["genrsa", "-out", "sa.key", "2048"]).current_dir(path));
        run(Command::new("openssl").args(["rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"]).current_dir(path));
        fs::write(path.join("tokens.csv"), "admin-token,admin,1,\"system:masters\"\n").unwrap();
        let (etcd_port, peer, port) = (free_port(), free_port(), free_port());
        let (client_url, peer_url) = (format!("http://127.0.0.1:{etcd_port}"), format!("http://127.0.0.1:{peer}"));
        let (out, err) = log(path, "etcd.log");
        let etcd = Command::new(built("bin/etcd"))
            .args(["--data-dir", "etcd", "--log-level", "warn"])
            .args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("default={peer_url}"), "--unsafe-no-fsync"])
            .current_dir(path)
            .stdout(out)
            .stderr(err)
            .spawn()
            .expect("etcd runs");
        let mut cluster = Cluster { folder, etcd, apiserver: None, etcd_port, port };
        cluster.start_apiserver().await;
        cluster
    }

    pub(crate) async fn start_apiserver(&mut self) {
        let path = self.folder.path();
        let (out, err) = log(path, "apiserver.log");
        // One binary for all of Kubernetes' servers.
        let child = Command::new(built("bin/kube"))
            .arg("kube-apiserver")
            .arg(format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port))
            .args(["--service-account-key-file=sa.pub", "--service-account-signing-key-file=sa.key"])
            .args(["--service-account-issuer=https://kubernetes.default.svc", "--token-auth-file=tokens.csv"])
            .args(["--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=RBAC"])
            .args(["--bind-address=127.0.0.1", "--advertise-address=10.9.0.9", "--cert-dir=pki"])
            // Pods are written by hand, without a kubelet.
            .args(["--disable-admission-plugins=ServiceAccount", "--allow-privileged=true"])
            // Lets in blocks such as 10.0.0.0/008, which are none to us.
            .arg("--feature-gates=StrictIPCIDRValidation=false")
            .arg(format!("--secure-port={}", self.port))
            .current_dir(path)
            .stdout(out)
            .stderr(err)
            .spawn()
            .unwrap();
        self.apiserver = Some(child);
        self.write_kubeconfig();
        let end = Instant::now() + START;
        loop {
            let ready = match self.client().await {
                Ok(client) => {
                    let request = http::Request::get("/readyz").body(Vec::new()).unwrap();
                    client.request_text(request).await.is_ok()
                }
                Err(_) => false,
            };
            if ready {
                return;
            }
            assert!(Instant::now() < end, "no API server: {}", tail(&path.join("apiserver.log")));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    pub(crate) fn stop_apiserver(&mut self) {
        let mut child = self.apiserver.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Makes etcd forget its history: who watched before has to list anew.
    pub(crate) fn forget_history(&self) {
        let put = self.etcd("kv/put", r#"{"key": "Zm9v", "value": "YmFy"}"#);
        let revision = put["header"]["revision"].as_str().expect("a revision").to_owned();
        self.etcd("kv/compaction", &format!(r#"{{"revision": "{revision}", "physical": true}}"#));
    }

    /// A call of etcd's JSON gateway.
    fn etcd(&self, call: &str, body: &str) -> serde_json::Value {
        let url = format!("http://127.0.0.1:{}/v3/{call}", self.etcd_port);
        let output = Command::new("curl").args(["-sS", "--fail", "-d", body, &url]).output().expect("curl runs");
        assert!(output.status.success(), "{call}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn write_kubeconfig(&self) {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: 'https://127.0.0.1:{}', certificate-authority: {}}}}}]\n\
             users: [{{name: u, user: {{token: admin-token}}}}]\n",
            self.port,
            self.folder.path().join("pki/apiserver.crt").display()
        );
        fs::write(self.kubeconfig(), text).unwrap();
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// The CRDs of Istio.
    pub(crate) fn istio_crds(&self) -> PathBuf {
        built("istio/manifests/charts/base/files/crd-all.gen.yaml")
    }

    /// Where the CRDs of the Gateway API are.
    pub(crate) fn gateway_crds(&self) -> PathBuf {
        built("gateway-api/config/crd/experimental")
    }

    /// A client of the test's own.
    pub(crate) async fn client(&self) -> Result<Client, Box<dyn std::error::Error>> {
        let file = kube::config::Kubeconfig::read_from(self.kubeconfig())?;
        let config = kube::Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await?;
        Ok(Client::try_from(config)?)
    }

    pub(crate) async fn api(&self) -> ApiServer {
        ApiServer::connect(&Access::Kubeconfig(self.kubeconfig())).await.unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.apiserver.iter_mut().chain([&mut self.etcd]) {
            // It may have ended by itself.
            let _ended = child.kill();
            let _ended = child.wait();
        }
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
