//! From sources of keys and roots to rustls' configuration.
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::SystemTime;

use l7_identity::{ServerVerifier, WorkloadCertificate};
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use xds_model::envoy::cluster::{CertSource, UpstreamTls};

use crate::TlsError;
use crate::secrets::{Secret, Secrets};
use crate::verify::{Anybody, Trust, checks_name};

/// istiod's names for the mesh's own certificate and roots.
const OWN: [&str; 2] = ["default", "ROOTCA"];

fn is_own(source: &CertSource) -> bool {
    matches!(source, CertSource::Sds(name) if OWN.contains(&name.as_str()))
}

fn sources(tls: &UpstreamTls) -> impl Iterator<Item = &CertSource> {
    [&tls.roots, &tls.client_cert, &tls.crl].into_iter().flatten()
}

pub(crate) fn needs_own(tls: &UpstreamTls) -> bool {
    sources(tls).any(is_own)
}

/// Names of secrets that a control plane is asked for: all but the mesh's own.
pub(crate) fn secret_names(tls: &UpstreamTls) -> impl Iterator<Item = &str> {
    sources(tls).filter(|source| !is_own(source)).filter_map(|source| match source {
        CertSource::Sds(name) => Some(name.as_str()),
        _ => None,
    })
}

/// What tells one content of a source from the next, cheaply.
#[derive(Debug)]
pub(crate) enum Version {
    File(Option<(SystemTime, u64)>),
    Secret(Option<Arc<Secret>>),
    Own(Option<String>),
    Fixed,
}

impl PartialEq for Version {
    fn eq(&self, other: &Version) -> bool {
        match (self, other) {
            (Version::File(a), Version::File(b)) => a == b,
            // A secret that comes anew is another.
            (Version::Secret(a), Version::Secret(b)) => a.as_ref().map(Arc::as_ptr) == b.as_ref().map(Arc::as_ptr),
            (Version::Own(a), Version::Own(b)) => a == b,
            (Version::Fixed, Version::Fixed) => true,
            _ => false,
        }
    }
}

fn file_version(path: &str) -> Version {
    let read = |path: &Path| std::fs::metadata(path).and_then(|data| Ok((data.modified()?, data.len())));
    Version::File(read(Path::new(path)).ok())
}

/// Where key material comes from.
pub(crate) struct Sources<'s> {
    pub(crate) secrets: &'s Secrets,
    pub(crate) own: Option<Arc<WorkloadCertificate>>,
}

impl Sources<'_> {
    pub(crate) fn versions(&self, tls: &UpstreamTls) -> Vec<Version> {
        let version = |source: &CertSource| match source {
            CertSource::Sds(_) if is_own(source) => {
                vec![Version::Own(self.own.as_ref().map(|own| own.serial().to_owned()))]
            }
            CertSource::Sds(name) => vec![Version::Secret(self.secrets.get(name))],
            CertSource::File(path) => vec![file_version(path)],
            CertSource::Files { cert, key } => vec![file_version(cert), file_version(key)],
            CertSource::Inline(_) | CertSource::System => vec![Version::Fixed],
        };
        sources(tls).flat_map(version).collect()
    }

    pub(crate) fn config(&self, tls: &UpstreamTls) -> Result<ClientConfig, TlsError> {
        let provider = provider();
        let verifier: Arc<dyn ServerCertVerifier> = match &tls.roots {
            Some(source) => {
                let (roots, mut revocations) = self.roots(source)?;
                if let Some(source) = &tls.crl {
                    revocations.extend(self.revocations(source)?);
                }
                let trust = Trust::new(roots, revocations, tls, provider.clone())?;
                Arc::new(ServerVerifier::new(trust, &provider))
            }
            None if checks_name(tls) || !tls.sans.is_empty() => return Err(TlsError::NamesWithoutRoots),
            None => Arc::new(ServerVerifier::new(Anybody, &provider)),
        };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous() // rustls' word for any verifier but its own
            .with_custom_certificate_verifier(verifier);
        let mut config = match &tls.client_cert {
            Some(source) if is_own(source) => builder.with_client_cert_resolver(self.own()?.client_auth()),
            Some(source) => {
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(self.certificate(source)?)))
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = tls.alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        Ok(config)
    }

    fn own(&self) -> Result<&WorkloadCertificate, TlsError> {
        self.own.as_deref().ok_or_else(|| TlsError::Own("there is none".to_owned()))
    }

    fn roots(
        &self,
        source: &CertSource,
    ) -> Result<(RootCertStore, Vec<CertificateRevocationListDer<'static>>), TlsError> {
        let (certificates, revocations) = match source {
            CertSource::Sds(_) if is_own(source) => (self.own()?.roots().to_vec(), Vec::new()),
            CertSource::Sds(name) => match &*self.secret(name)? {
                Secret::Trust { roots, revocations } => (roots.clone(), revocations.clone()),
                Secret::Certificate(_) => {
                    return Err(TlsError::WrongSecret { name: name.clone(), wanted: "root certificates" });
                }
            },
            CertSource::File(path) => (from_file(path, certificates)?, Vec::new()),
            CertSource::Inline(bytes) => (certificates(bytes).map_err(inline("root certificates"))?, Vec::new()),
            CertSource::System => return Ok((system_roots()?, Vec::new())),
            CertSource::Files { cert, .. } => {
                return Err(TlsError::File { path: cert.clone(), reason: "a key pair is no root".to_owned() });
            }
        };
        let mut store = RootCertStore::empty();
        for certificate in certificates {
            store.add(certificate)?;
        }
        Ok((store, revocations))
    }

    fn certificate(&self, source: &CertSource) -> Result<CertifiedKey, TlsError> {
        let certified = match source {
            CertSource::Sds(name) => match &*self.secret(name)? {
                Secret::Certificate(certified) => certified.clone(),
                Secret::Trust { .. } => {
                    return Err(TlsError::WrongSecret { name: name.clone(), wanted: "certificate with its key" });
                }
            },
            CertSource::Files { cert, key } => {
                let key_pem = from_file(key, |text| Ok(text.to_vec()))?;
                from_file(cert, |chain| certified(chain, &key_pem))?
            }
            CertSource::File(_) | CertSource::Inline(_) | CertSource::System => {
                let reason = "no key pair".to_owned();
                return Err(TlsError::Material { what: "client certificate".into(), reason });
            }
        };
        Ok(CertifiedKey::clone(&certified))
    }

    fn revocations(&self, source: &CertSource) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        match source {
            CertSource::File(path) => from_file(path, revocations),
            CertSource::Inline(bytes) => revocations(bytes).map_err(inline("revocation list")),
            CertSource::Sds(name) => match &*self.secret(name)? {
                Secret::Trust { revocations, .. } if !revocations.is_empty() => Ok(revocations.clone()),
                _ => Err(TlsError::WrongSecret { name: name.clone(), wanted: "revocation list" }),
            },
            CertSource::Files { .. } | CertSource::System => {
                Err(TlsError::Material { what: "revocation list".into(), reason: "not one".to_owned() })
            }
        }
    }

    fn secret(&self, name: &str) -> Result<Arc<Secret>, TlsError> {
        self.secrets.get(name).ok_or_else(|| TlsError::NoSecret(name.to_owned()))
    }
}

fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));
    PROVIDER.clone()
}

fn inline(what: &'static str) -> impl FnOnce(String) -> TlsError {
    move |reason| TlsError::Material { what: what.to_owned(), reason }
}

/// Read in place: files of a few kilobytes in memory or on the node's disk, and only when they changed.
fn from_file<T>(path: &str, parse: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<T, TlsError> {
    let read = std::fs::read(path).map_err(|error| error.to_string()).and_then(|text| parse(&text));
    read.map_err(|reason| TlsError::File { path: path.to_owned(), reason })
}

/// The machine's roots, once: an image's do not change while it runs.
fn system_roots() -> Result<RootCertStore, TlsError> {
    static ROOTS: LazyLock<Result<RootCertStore, String>> = LazyLock::new(|| {
        let found = rustls_native_certs::load_native_certs();
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(found.certs);
        if store.is_empty() {
            let errors: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
            return Err(if errors.is_empty() { "no file of them was found".to_owned() } else { errors.join("; ") });
        }
        Ok(store)
    });
    ROOTS.clone().map_err(TlsError::NoSystemRoots)
}

pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found =
        CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    if found.is_empty() { Err("no PEM certificate in it".to_owned()) } else { Ok(found) }
}

pub(crate) fn revocations(pem: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let found = CertificateRevocationListDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| error.to_string())?;
    if found.is_empty() { Err("no PEM revocation list in it".to_owned()) } else { Ok(found) }
}

/// A chain with the key that fits.
pub(crate) fn certified(chain: &[u8], key: &[u8]) -> Result<Arc<CertifiedKey>, String> {
    let chain = certificates(chain)?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| format!("private key: {error}"))?;
    let certified = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| error.to_string())?;
    Ok(Arc::new(certified))
}
