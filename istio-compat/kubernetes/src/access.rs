//! How to reach the API server, and as whom.
use std::env::VarError;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

/// Where kubelet puts a pod's token and the API server's root.
pub const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

const HOST: &str = "KUBERNETES_SERVICE_HOST";
const PORT: &str = "KUBERNETES_SERVICE_PORT";
/// A node whose API server does not answer tries again soon rather than waits long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where credentials come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Host and port from `KUBERNETES_SERVICE_HOST` and `KUBERNETES_SERVICE_PORT`, `token` and `ca.crt` from this
    /// folder ([`SERVICE_ACCOUNT`]); both files are read again as they change.
    InCluster(PathBuf),
    /// A kubeconfig file, its current context.
    Kubeconfig(PathBuf),
}

/// Why there is no access; the API server itself was not asked yet.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error("{HOST}: {0}: outside a pod, name a kubeconfig file")]
    Host(VarError),
    #[error("{PORT}: {0}")]
    Port(VarError),
    #[error("{HOST}={host} and {PORT}={port} make no address: {reason}")]
    Address { host: String, port: String, reason: String },
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("{}: it is empty", path.display())]
    Empty { path: PathBuf },
    #[error("{}: no certificates: {source}", path.display())]
    Roots { path: PathBuf, source: rustls_pki_types::pem::Error },
    #[error("{}: {source}", path.display())]
    Kubeconfig { path: PathBuf, source: Box<kube::config::KubeconfigError> },
    #[error("{what}: {source}")]
    Client { what: String, source: Box<kube::Error> },
}

/// The API server, with credentials; cloning shares the connections.
#[derive(Clone)]
pub struct ApiServer {
    pub(crate) client: kube::Client,
    address: String,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiServer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl ApiServer {
    /// Reads the credentials. Nothing is sent yet: whether the server answers shows in the snapshots. Call it inside
    /// a tokio runtime.
    ///
    /// # Errors
    /// A variable or file is missing or makes no sense.
    pub async fn connect(access: &Access) -> Result<ApiServer, AccessError> {
        let (mut config, what) = match access {
            Access::InCluster(folder) => (in_cluster(folder)?, folder.display().to_string()),
            Access::Kubeconfig(path) => (kubeconfig(path).await?, path.display().to_string()),
        };
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        let address = config.cluster_url.to_string();
        let client =
            kube::Client::try_from(config).map_err(|source| AccessError::Client { what, source: Box::new(source) })?;
        Ok(ApiServer { client, address })
    }

    /// URL of the server.
    pub fn address(&self) -> &str {
        &self.address
    }
}

fn in_cluster(folder: &Path) -> Result<kube::Config, AccessError> {
    let host = std::env::var(HOST).map_err(AccessError::Host)?;
    let port = std::env::var(PORT).map_err(AccessError::Port)?;
    let (token, root) = (folder.join("token"), folder.join("ca.crt"));
    for path in [&token, &root] {
        let content = std::fs::read(path).map_err(|source| AccessError::File { path: path.clone(), source })?;
        if content.trim_ascii().is_empty() {
            return Err(AccessError::Empty { path: path.clone() });
        }
    }
    let mut config = kube::Config::new(url(&host, &port)?);
    // Read here too: without any root kube would ask for the operating system's, which an image of ours does not have.
    let roots = CertificateDer::pem_file_iter(&root).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let roots = roots.map_err(|source| AccessError::Roots { path: root.clone(), source })?;
    config.root_cert = Some(roots.iter().map(|root| root.to_vec()).collect());
    config.root_cert_file = Some(root);
    config.auth_info.token_file = Some(token.display().to_string());
    Ok(config)
}

fn url(host: &str, port: &str) -> Result<http::Uri, AccessError> {
    let wrong = |reason: String| AccessError::Address { host: host.to_owned(), port: port.to_owned(), reason };
    let number: u16 = port.parse().map_err(|_| wrong("the port is not between 0 and 65535".to_owned()))?;
    let host = if host.parse::<std::net::Ipv6Addr>().is_ok() { format!("[{host}]") } else { host.to_owned() };
    format!("https://{host}:{number}").parse().map_err(|error: http::uri::InvalidUri| wrong(error.to_string()))
}

async fn kubeconfig(path: &Path) -> Result<kube::Config, AccessError> {
    let failed = |source| AccessError::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
    let file = Kubeconfig::read_from(path).map_err(failed)?;
    kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_and_names_make_urls() {
        assert_eq!(url("10.99.0.1", "7443").unwrap().to_string(), "https://10.99.0.1:7443/");
        assert_eq!(url("fd00::1", "443").unwrap().to_string(), "https://[fd00::1]:443/");
        assert_eq!(url("api.example", "6443").unwrap().to_string(), "https://api.example:6443/");
        let error = url("10.99.0.1", "tcp://10.99.0.1:443").unwrap_err().to_string();
        assert!(error.contains(PORT) && error.contains("tcp://10.99.0.1:443"), "{error}");
    }

    #[tokio::test]
    async fn a_missing_kubeconfig_is_named() {
        let path = PathBuf::from("/nowhere/kubeconfig");
        let error = ApiServer::connect(&Access::Kubeconfig(path)).await.unwrap_err().to_string();
        assert!(error.starts_with("/nowhere/kubeconfig: "), "{error}");
    }
}
