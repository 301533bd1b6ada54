//! Verification of peers: a chain to the mesh's roots, and exactly one SPIFFE identity.
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::KeyUsage;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use xds_model::spiffe::SpiffeId;

use crate::provider;
use crate::trust::Revocations;

/// Why a certificate names no peer of this mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    #[error("the peer presented no certificate")]
    NoCertificate,
    #[error("certificate cannot be parsed: {0}")]
    Parse(String),
    #[error("certificate has {0} URI names, a SPIFFE certificate has exactly one")]
    UriNames(usize),
    #[error("certificate's identity: {0}")]
    Identity(#[from] xds_model::spiffe::SpiffeError),
    #[error("peer {found} is not of trust domain {expected}")]
    TrustDomain { found: SpiffeId, expected: String },
    #[error("peer is {found}, expected {expected}")]
    Unexpected { found: SpiffeId, expected: String },
}

impl From<PeerError> for Error {
    fn from(error: PeerError) -> Error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
    }
}

/// The identity in a verified peer's leaf certificate.
///
/// # Errors
/// If there is none, or not exactly one.
pub fn peer_identity(chain: Option<&[CertificateDer<'_>]>) -> Result<SpiffeId, PeerError> {
    let leaf = chain.and_then(<[_]>::first).ok_or(PeerError::NoCertificate)?;
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|error| PeerError::Parse(error.to_string()))?;
    let names = certificate.subject_alternative_name().map_err(|error| PeerError::Parse(error.to_string()))?;
    let mut uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (Some(uri), 0) => Ok(uri.parse()?),
        (first, more) => Err(PeerError::UriNames(usize::from(first.is_some()) + more)),
    }
}

/// A server's check of its clients: chain, revocation and trust domain.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    roots: Arc<RootCertStore>,
    revocations: Revocations,
    trust_domain: String,
}

impl ClientVerifier {
    pub(crate) fn new(
        roots: Arc<RootCertStore>,
        revocations: Revocations,
        trust_domain: &str,
    ) -> Result<ClientVerifier, Error> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        Ok(ClientVerifier { chain, roots, revocations, trust_domain: trust_domain.to_owned() })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Mesh peers hold one certificate; hints would only reveal the CA.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        self.revocations.check(&self.roots, end_entity, intermediates, KeyUsage::client_auth(), now)?;
        let peer = peer_identity(Some(std::slice::from_ref(end_entity)))?;
        if peer.trust_domain() != self.trust_domain {
            return Err(PeerError::TrustDomain { found: peer, expected: self.trust_domain.clone() }.into());
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Who a server has to prove to be.
pub trait ServerCheck: std::fmt::Debug + Send + Sync + 'static {
    /// Looks at what the server presents; its possession of the key is checked elsewhere.
    ///
    /// # Errors
    /// If it is not who is expected.
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error>;
}

/// A client's verifier: a check, and rustls' own of signatures.
#[derive(Debug)]
pub struct ServerVerifier<C> {
    algorithms: WebPkiSupportedAlgorithms,
    check: C,
}

impl<C: ServerCheck> ServerVerifier<C> {
    pub fn new(check: C, provider: &CryptoProvider) -> ServerVerifier<C> {
        ServerVerifier { algorithms: provider.signature_verification_algorithms, check }
    }
}

/// A client's check of its server in the mesh: chain, revocation and an exact set of identities. The server's address
/// plays no part.
#[derive(Debug)]
pub(crate) struct MeshServer {
    pub(crate) roots: Arc<RootCertStore>,
    pub(crate) revocations: Revocations,
    /// Empty accepts nobody.
    pub(crate) expected: Vec<SpiffeId>,
}

/// Checks that a chain leads to one of the roots now.
pub(crate) fn verify_chain(
    roots: &RootCertStore,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), Error> {
    let parsed = rustls::server::ParsedCertificate::try_from(end_entity)?;
    let algorithms = provider().signature_verification_algorithms;
    verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms.all)
}

impl ServerCheck for MeshServer {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        verify_chain(&self.roots, end_entity, intermediates, now)?;
        self.revocations.check(&self.roots, end_entity, intermediates, KeyUsage::server_auth(), now)?;
        let found = peer_identity(Some(std::slice::from_ref(end_entity)))?;
        if !self.expected.contains(&found) {
            let expected = self.expected.iter().map(SpiffeId::as_str).collect::<Vec<_>>().join(" or ");
            return Err(PeerError::Unexpected { found, expected }.into());
        }
        Ok(())
    }
}

impl<C: ServerCheck> ServerCertVerifier for ServerVerifier<C> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check.check(end_entity, intermediates, server_name, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
