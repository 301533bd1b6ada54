//! Client of Istio's certificate service (xds-contract section 3).
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::Mutex;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use xds_model::spiffe::SpiffeId;
use xds_proto::istio::ca::IstioCertificateRequest;
use xds_proto::istio::ca::istio_certificate_service_client::IstioCertificateServiceClient;

use crate::certificate::{CertificateError, WorkloadCertificate};
use crate::trust::{Revocations, TrustFiles};

/// How to reach the CA and as whom.
#[derive(Debug, Clone)]
pub struct CaConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub address: String,
    /// PEM roots for https; read again when the file changes.
    pub root_ca: Option<PathBuf>,
    /// Name the CA's certificate must carry if it is not the address's host.
    pub server_name: Option<String>,
    /// Bearer token; read again for every request.
    pub token: Option<PathBuf>,
    /// Sent as `clusterid`.
    pub cluster_id: String,
    /// A node proxy asks in the name of its pods; a waypoint for itself.
    pub impersonate: bool,
    /// Lifetime asked for.
    pub ttl: Duration,
}

/// Why no certificate came.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("{path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    #[error("{path}: the token is empty or not ASCII")]
    Token { path: PathBuf },
    #[error("CA address {address}: {source}")]
    Address { address: String, source: tonic::transport::Error },
    #[error("the signing request could not be made: {0}")]
    Request(#[from] rcgen::Error),
    #[error("the CA at {address} needs a file of root certificates for https, and none is given")]
    NoRoots { address: String },
    #[error("{path}: no PEM certificate in it")]
    Roots { path: PathBuf },
    #[error("the CA at {address} refused{shown}: {}", explain(status))]
    Refused { address: String, shown: String, status: Box<tonic::Status> },
    #[error("no answer from the CA at {address}{trust}: {}", explain(status))]
    Unreachable { address: String, trust: String, status: Box<tonic::Status> },
    #[error("the CA's answer: {0}")]
    Answer(#[from] CertificateError),
}

/// One CA. Requests are independent; the connection is shared.
pub struct CaClient {
    config: CaConfig,
    files: TrustFiles,
    revocations: Revocations,
    channel: Mutex<Option<(Vec<u8>, Channel)>>,
}

impl CaClient {
    pub fn new(config: CaConfig) -> CaClient {
        let (files, revocations) = Default::default();
        CaClient { config, files, revocations, channel: Mutex::new(None) }
    }

    /// Certificates made from now on also trust and distrust what is in `files`. The manager reads them again.
    pub fn with_files(self, files: TrustFiles) -> CaClient {
        CaClient { files, ..self }
    }

    /// The file of root certificates whose change calls for new certificates: the mesh's, or the CA's own.
    pub(crate) fn roots_file(&self) -> Option<&PathBuf> {
        self.files.roots.as_ref().or(self.config.root_ca.as_ref())
    }

    pub(crate) fn revocations(&self) -> (Option<&PathBuf>, &Revocations) {
        (self.files.revocations.as_ref(), &self.revocations)
    }

    /// Makes a fresh key, asks for a certificate and checks the answer.
    ///
    /// # Errors
    /// If the CA cannot be reached, refuses, or answers with something else than was asked for.
    pub async fn issue(&self, identity: &SpiffeId) -> Result<WorkloadCertificate, IssueError> {
        let (key, csr) = signing_request(identity)?;
        let mut request = tonic::Request::new(IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.config.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: self.config.impersonate.then(|| impersonate(identity)),
        });
        request.set_timeout(Duration::from_secs(10));
        if let Some(token) = self.token().await? {
            request.metadata_mut().insert("authorization", token);
        }
        if let Ok(cluster) = MetadataValue::try_from(&self.config.cluster_id) {
            request.metadata_mut().insert("clusterid", cluster);
        }
        let response = IstioCertificateServiceClient::new(self.channel().await?)
            .create_certificate(request)
            .await
            .map_err(|status| self.refused(Box::new(status)))?;
        let further = self.files.read_roots().await;
        let chain = response.into_inner().cert_chain;
        Ok(WorkloadCertificate::with_trust(identity, key, &chain, further, self.revocations.clone())?)
    }

    /// Says what was shown to a CA that did not like it, and what was expected of one that could not prove itself.
    fn refused(&self, status: Box<tonic::Status>) -> IssueError {
        let address = self.config.address.clone();
        // A transport error has a source; an answer has none.
        if std::error::Error::source(&*status).is_some() {
            let name = self.config.server_name.as_ref().map(|name| format!(" as {name}")).unwrap_or_default();
            let roots = self.config.root_ca.as_ref().map(|path| format!(", trusting {}", path.display()));
            return IssueError::Unreachable { address, trust: name + &roots.unwrap_or_default(), status };
        }
        let shown = match &self.config.token {
            Some(path) => format!(" the token in {}", path.display()),
            None => String::new(),
        };
        IssueError::Refused { address, shown, status }
    }

    async fn token(&self) -> Result<Option<MetadataValue<tonic::metadata::Ascii>>, IssueError> {
        let Some(path) = &self.config.token else { return Ok(None) };
        let text =
            tokio::fs::read_to_string(path).await.map_err(|source| IssueError::File { path: path.clone(), source })?;
        let bad = || IssueError::Token { path: path.clone() };
        let token = text.trim();
        if token.is_empty() {
            return Err(bad());
        }
        let mut value = MetadataValue::try_from(format!("Bearer {token}")).map_err(|_| bad())?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    async fn channel(&self) -> Result<Channel, IssueError> {
        let roots = self.roots().await?;
        let mut slot = self.channel.lock().await;
        if let Some((with, channel)) = &*slot
            && *with == roots
        {
            return Ok(channel.clone());
        }
        let channel = self
            .connect(&roots)
            .map_err(|source| IssueError::Address { address: self.config.address.clone(), source })?;
        *slot = Some((roots, channel.clone()));
        Ok(channel)
    }

    /// Roots for https, empty for http.
    async fn roots(&self) -> Result<Vec<u8>, IssueError> {
        if !self.config.address.starts_with("https") {
            return Ok(Vec::new());
        }
        let no_roots = || IssueError::NoRoots { address: self.config.address.clone() };
        let path = self.config.root_ca.as_ref().ok_or_else(no_roots)?;
        let roots = tokio::fs::read(path).await.map_err(|source| IssueError::File { path: path.clone(), source })?;
        match CertificateDer::pem_slice_iter(&roots).next() {
            Some(Ok(_)) => Ok(roots),
            _ => Err(IssueError::Roots { path: path.clone() }),
        }
    }

    fn connect(&self, roots: &[u8]) -> Result<Channel, tonic::transport::Error> {
        let mut endpoint = Endpoint::from_shared(self.config.address.clone())?
            .connect_timeout(Duration::from_secs(5))
            .tcp_keepalive(Some(Duration::from_secs(300)))
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10));
        if self.config.address.starts_with("https") {
            let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots));
            if let Some(name) = &self.config.server_name {
                tls = tls.domain_name(name.clone());
            }
            endpoint = endpoint.tls_config(tls)?;
        }
        Ok(endpoint.connect_lazy())
    }
}

/// P-256 key and PEM request: empty subject, one URI name, critical because the subject is empty (RFC 5280 4.2.1.6).
fn signing_request(identity: &SpiffeId) -> Result<(PrivateKeyDer<'static>, String), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
    let csr = params.serialize_request(&key)?.pem()?;
    Ok((PrivatePkcs8KeyDer::from(key.serialize_der()).into(), csr))
}

fn impersonate(identity: &SpiffeId) -> prost_types::Struct {
    let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(identity.to_string())) };
    prost_types::Struct { fields: BTreeMap::from([("ImpersonatedIdentity".to_owned(), value)]) }
}

/// tonic's transport errors say what happened further down only.
fn explain(status: &tonic::Status) -> String {
    let mut text = format!("{}: {}", status.code(), status.message());
    let mut source = std::error::Error::source(status);
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
