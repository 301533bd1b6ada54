//! What peers are trusted by besides the CA's own answers: the mesh's file of root certificates and its file of
//! revocation lists (Istio mounts both from ConfigMaps: `istio-ca-root-cert` and `istio-ca-crl`).
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::{CertificateError as TlsCertificateError, Error, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

use crate::provider;

/// Files that add to trust or take from it; both are read again when they change.
#[derive(Debug, Clone, Default)]
pub struct TrustFiles {
    /// PEM roots of the mesh, trusted beside those in the CA's answers. When they change, every certificate is asked
    /// for anew.
    pub roots: Option<PathBuf>,
    /// PEM or DER revocation lists.
    pub revocations: Option<PathBuf>,
}

impl TrustFiles {
    /// The roots in the file; none where there is no file, or a file that holds none.
    pub(crate) async fn read_roots(&self) -> Vec<CertificateDer<'static>> {
        let Some(path) = &self.roots else { return Vec::new() };
        let read = match tokio::fs::read(path).await {
            Ok(text) => CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        read.unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), error, "no roots from this file, only the CA's own are trusted");
            Vec::new()
        })
    }
}

/// The revocation lists in force, shared by every TLS configuration; the last good ones stay.
///
/// As ztunnel: the whole chain is checked, a certificate no list speaks of is accepted, and a list that has expired
/// goes on counting, since a late list must not let revoked peers in.
#[derive(Debug, Clone, Default)]
pub(crate) struct Revocations {
    lists: Arc<RwLock<Arc<Vec<CertRevocationList<'static>>>>>,
}

impl Revocations {
    /// Takes a file's content; returns how many lists it holds.
    ///
    /// # Errors
    /// If any list cannot be read; nothing changes then.
    pub(crate) fn replace(&self, content: &[u8]) -> Result<usize, String> {
        let lists = if content.starts_with(b"0") {
            vec![CertificateRevocationListDer::from(content.to_vec())]
        } else {
            CertificateRevocationListDer::pem_slice_iter(content)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| format!("not PEM: {error}"))?
        };
        if lists.is_empty() {
            return Err("no revocation list in it".to_owned());
        }
        let parse = |list: &CertificateRevocationListDer<'_>| {
            OwnedCertRevocationList::from_der(list).map(Into::into).map_err(|error| format!("not a list: {error}"))
        };
        let lists = lists.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        let count = lists.len();
        *self.lists.write() = Arc::new(lists);
        Ok(count)
    }

    /// Whether a chain that leads to `roots` is free of revoked certificates.
    ///
    /// # Errors
    /// If one is revoked, or a list that speaks of one is not its issuer's.
    pub(crate) fn check(
        &self,
        roots: &RootCertStore,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        usage: KeyUsage,
        now: UnixTime,
    ) -> Result<(), Error> {
        let lists = self.lists.read().clone();
        if lists.is_empty() {
            return Ok(());
        }
        let lists: Vec<&CertRevocationList<'_>> = lists.iter().collect();
        let failed = |error: webpki::Error| match error {
            webpki::Error::CertRevoked => Error::InvalidCertificate(TlsCertificateError::Revoked),
            other => Error::General(format!("revocation check: {other}")),
        };
        let options = RevocationOptionsBuilder::new(&lists)
            .map_err(|_| Error::General("no revocation lists".to_owned()))?
            .with_depth(RevocationCheckDepth::Chain)
            .with_status_policy(UnknownStatusPolicy::Allow)
            .with_expiration_policy(ExpirationPolicy::Ignore)
            .build();
        let algorithms = provider().signature_verification_algorithms;
        let certificate = EndEntityCert::try_from(end_entity).map_err(failed)?;
        certificate
            .verify_for_usage(algorithms.all, &roots.roots, intermediates, now, usage, Some(options), None)
            .map(drop)
            .map_err(failed)
    }
}
