//! Where the control plane is and how a client proves who it is.
use std::path::PathBuf;
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig};

/// Address of the control plane and what is needed to trust it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// `http://HOST:PORT` (plaintext) or `https://HOST:PORT`.
    pub address: String,
    /// PEM roots; re-read at each connection, so that a rotated root needs no restart. Needed for https.
    pub root_ca: Option<PathBuf>,
    /// Name the server's certificate must carry, if it is not the address's host.
    pub server_name: Option<String>,
    pub token: Token,
    /// Sent as `clusterid`.
    pub cluster_id: String,
}

/// The bearer token of a client.
#[derive(Debug, Clone)]
pub enum Token {
    None,
    /// Re-read for each connection: projected tokens are replaced in place.
    File(PathBuf),
}

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("address {address} is not a URI: {source}")]
    Uri { address: String, source: http::uri::InvalidUri },
    #[error("address {address}: {source}")]
    Address { address: String, source: tonic::transport::Error },
    #[error("{what} {}: {source}", path.display())]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("token in {} is empty or not ASCII", path.display())]
    Token { path: PathBuf },
    #[error("{address}: https needs a file of root certificates, and none is given")]
    NoRoots { address: String },
    #[error("root certificate {}: no PEM certificate in it", path.display())]
    Roots { path: PathBuf },
    #[error("connecting to {address}{trust}: {}", chain(source))]
    Connect { address: String, trust: String, source: tonic::transport::Error },
}

/// A connection and the root certificates it was verified by.
pub(crate) struct Connected {
    pub(crate) channel: Channel,
    pub(crate) roots: Option<String>,
}

impl Endpoint {
    /// Connects; the address is resolved anew.
    ///
    /// # Errors
    /// If the address is malformed, a file cannot be read, or the server cannot be reached or trusted.
    pub(crate) async fn connect(&self) -> Result<Connected, ConnectError> {
        let address = || self.address.clone();
        let mut endpoint = Channel::from_shared(self.address.clone().into_bytes())
            .map_err(|source| ConnectError::Uri { address: address(), source })?
            .connect_timeout(Duration::from_secs(5))
            .tcp_keepalive(Some(Duration::from_secs(300)))
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .tcp_nodelay(true);
        let roots = self.roots().await?;
        if let Some(pem) = &roots {
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
            if let Some(name) = &self.server_name {
                tls = tls.domain_name(name);
            }
            endpoint =
                endpoint.tls_config(tls).map_err(|source| ConnectError::Address { address: address(), source })?;
        }
        let channel = endpoint.connect().await.map_err(|source| ConnectError::Connect {
            address: address(),
            trust: self.trust(),
            source,
        })?;
        Ok(Connected { channel, roots })
    }

    async fn roots(&self) -> Result<Option<String>, ConnectError> {
        if !self.address.starts_with("https://") {
            return Ok(None);
        }
        let path = self.root_ca.as_ref().ok_or_else(|| ConnectError::NoRoots { address: self.address.clone() })?;
        let pem = read("root certificate", path).await?;
        if !pem.contains("-----BEGIN CERTIFICATE-----") {
            return Err(ConnectError::Roots { path: path.clone() });
        }
        Ok(Some(pem))
    }

    /// What the server is expected to prove, for error messages.
    fn trust(&self) -> String {
        let Some(path) = self.root_ca.as_ref().filter(|_| self.address.starts_with("https://")) else {
            return String::new();
        };
        match &self.server_name {
            Some(name) => format!(" as {name}, trusting {}", path.display()),
            None => format!(", trusting {}", path.display()),
        }
    }

    /// What the server was shown, for error messages.
    pub(crate) fn shown(&self) -> String {
        match &self.token {
            Token::None => "no token".to_owned(),
            Token::File(path) => format!("the token in {}", path.display()),
        }
    }

    /// Puts in who is asking.
    ///
    /// # Errors
    /// If the token file cannot be read or holds something that is not a header value.
    pub(crate) async fn authorize<T>(&self, request: &mut tonic::Request<T>) -> Result<(), ConnectError> {
        if let Ok(cluster) = MetadataValue::<Ascii>::try_from(self.cluster_id.as_str()) {
            request.metadata_mut().insert("clusterid", cluster);
        }
        if let Token::File(path) = &self.token {
            let text = read("token", path).await?;
            let bad = || ConnectError::Token { path: path.clone() };
            let token = Some(text.trim()).filter(|token| !token.is_empty()).ok_or_else(bad)?;
            let mut value = MetadataValue::<Ascii>::try_from(format!("Bearer {token}")).map_err(|_| bad())?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        Ok(())
    }
}

async fn read(what: &'static str, path: &PathBuf) -> Result<String, ConnectError> {
    tokio::fs::read_to_string(path).await.map_err(|source| ConnectError::File { what, path: path.clone(), source })
}

/// tonic's transport error says only "transport error"; what helps is further down.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
