//! The certificate authority: one root, kept in the state folder, and short-lived workload certificates.
mod service;

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
pub(crate) use service::CaService;
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::tokens::write_private;

/// What a certificate lives if nobody asks for less (istiod's `DEFAULT_WORKLOAD_CERT_TTL`).
pub const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);
/// What nobody gets more than (istiod's `MAX_WORKLOAD_CERT_TTL`).
pub const MAX_TTL: Duration = Duration::from_secs(90 * 24 * 3600);
const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Certificates count from a little before now, for clocks that lag.
const BACKDATE: Duration = Duration::from_secs(120);

/// Why the authority cannot be set up or refuses to sign.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{what}: {source}")]
    Certificate { what: &'static str, source: rcgen::Error },
    #[error("Secret {secret}: {reason}")]
    Secret { secret: String, reason: String },
    #[error("certificate request refused: {0}")]
    Request(String),
}

/// The authority in force, whatever it is by then.
pub(crate) type Current = watch::Receiver<Arc<Authority>>;

/// Signs.
pub struct Authority {
    /// What is trusted; several certificates while a root is replaced.
    root_pem: String,
    /// Between a leaf and the root, PEM.
    intermediates: Option<String>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Loads the root from `folder` (`root-key.pem`, `root-cert.pem`), or makes it there.
    ///
    /// # Errors
    /// If the files cannot be read or written, or hold something else. A half-written root (one file of two) is an
    /// error too: making a new one would cut every running workload off.
    pub fn open(folder: &Path) -> Result<Self, CaError> {
        let (key_path, cert_path) = (folder.join("root-key.pem"), folder.join("root-cert.pem"));
        let (key, cert) = (read(&key_path)?, read(&cert_path)?);
        let (key_pem, root_pem) = match (key, cert) {
            (Some(key), Some(cert)) => (key, cert),
            (Some(key), None) => {
                // The key is written first; a crash between the two left it alone. The same key gives a root that
                // is as good as the one never seen.
                let cert = self_signed(&key)?;
                store(&cert_path, &cert)?;
                (key, cert)
            }
            (None, Some(_)) => {
                let source = io::Error::new(io::ErrorKind::NotFound, "the root certificate is there, its key is not");
                return Err(CaError::File { path: key_path, source });
            }
            (None, None) => {
                let (key, cert) = Self::generate()?;
                store(&key_path, &key)?;
                store(&cert_path, &cert)?;
                (key, cert)
            }
        };
        Self::new(&key_pem, &root_pem, None, root_pem.clone())
    }

    /// Signs with a key that is kept elsewhere and its certificate. `intermediates` lead from that certificate (inclusive)
    /// to the root; None: it is a root itself. All PEM.
    ///
    /// # Errors
    /// If they are no key and certificate.
    pub fn new(
        key_pem: &str,
        certificate_pem: &str,
        intermediates: Option<String>,
        root_pem: String,
    ) -> Result<Self, CaError> {
        let failed = |source| CaError::Certificate { what: "CA", source };
        let key = KeyPair::from_pem(key_pem).map_err(failed)?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key).map_err(failed)?;
        Ok(Self { root_pem, intermediates, issuer })
    }

    /// A new root: key and certificate, PEM.
    ///
    /// # Errors
    /// If the machine gives no key.
    pub fn generate() -> Result<(String, String), CaError> {
        let key = KeyPair::generate().map_err(|source| CaError::Certificate { what: "root key", source })?;
        let key = key.serialize_pem();
        let cert = self_signed(&key)?;
        Ok((key, cert))
    }

    /// The root certificate, PEM.
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// What goes along with a leaf, up to the root, each PEM.
    pub fn above(&self) -> impl Iterator<Item = &str> {
        self.intermediates.as_deref().into_iter().chain([self.root_pem()])
    }

    /// A leaf for `identity` over the request's key: nothing else of the request is used. PEM.
    ///
    /// # Errors
    /// If the request is malformed or its signature is wrong.
    pub fn sign(&self, csr_pem: &str, identity: &str, ttl: Duration) -> Result<String, CaError> {
        let request =
            CertificateSigningRequestParams::from_pem(csr_pem).map_err(|error| CaError::Request(error.to_string()))?;
        let uri = identity.try_into().map_err(|_| CaError::Request(format!("{identity} is not an URI")))?;
        let mut params = leaf(ttl.min(MAX_TTL));
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params
            .signed_by(&request.public_key, &self.issuer)
            .map_err(|source| CaError::Certificate { what: "workload certificate", source })?;
        Ok(certificate.pem())
    }

    /// Certificate and key (PEM) for the control plane's own TLS port.
    ///
    /// # Errors
    /// If signing fails.
    pub fn serving(&self, names: &[String], addresses: &[IpAddr]) -> Result<(String, String), CaError> {
        let failed = |source| CaError::Certificate { what: "serving certificate", source };
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = leaf(MAX_TTL);
        for name in names {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into().map_err(failed)?));
        }
        params.subject_alt_names.extend(addresses.iter().map(|ip| SanType::IpAddress(*ip)));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

/// No subject, so that rcgen marks the names critical, as SPIFFE and RFC 5280 want.
fn leaf(ttl: Duration) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = now - BACKDATE;
    params.not_after = now + ttl;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.use_authority_key_identifier_extension = true;
    params
}

fn self_signed(key_pem: &str) -> Result<String, CaError> {
    let failed = |source| CaError::Certificate { what: "root certificate", source };
    let key = KeyPair::from_pem(key_pem).map_err(failed)?;
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "strata");
    params.distinguished_name.push(DnType::CommonName, "strata root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = now - BACKDATE;
    params.not_after = now + ROOT_TTL;
    Ok(params.self_signed(&key).map_err(failed)?.pem())
}

fn read(path: &Path) -> Result<Option<String>, CaError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CaError::File { path: path.to_owned(), source }),
    }
}

fn store(path: &Path, text: &str) -> Result<(), CaError> {
    write_private(path, text.as_bytes()).map_err(|source| CaError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;
