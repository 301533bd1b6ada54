//! One identity's certificate and the TLS configurations made from it.
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore, ServerConfig, version::TLS13};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use x509_parser::prelude::{FromDer, X509Certificate};
use xds_model::spiffe::SpiffeId;

use crate::provider;
use crate::trust::Revocations;
use crate::verify::{ClientVerifier, MeshServer, PeerError, ServerVerifier, peer_identity, verify_chain};

const ALPN_H2: &[u8] = b"h2";

/// Why a CA's answer is not taken.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("the chain has {0} elements; a leaf and at least one root are needed")]
    TooShort(usize),
    #[error("element {index} of the chain holds no PEM certificate: {reason}")]
    Pem { index: usize, reason: String },
    #[error("issued for {found}, asked for {wanted}")]
    WrongIdentity { found: SpiffeId, wanted: SpiffeId },
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error("certificate cannot be parsed: {0}")]
    Parse(String),
    #[error("certificate cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

/// A workload's certificate with its key, roots and ready-made TLS parts. Immutable; rotation makes a new one.
#[derive(Debug)]
pub struct WorkloadCertificate {
    identity: SpiffeId,
    /// Leaf first, without roots.
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    root_store: Arc<RootCertStore>,
    revocations: Revocations,
    not_before: SystemTime,
    not_after: SystemTime,
    serial: String,
    server: Arc<ServerConfig>,
    client_auth: Arc<dyn ResolvesClientCert>,
}

impl WorkloadCertificate {
    /// Takes a CA's answer (PEM elements, leaf first, roots in the last) for `identity`.
    ///
    /// # Errors
    /// If it is incomplete, for somebody else, does not fit the key or does not chain to its own roots.
    pub fn new(
        identity: &SpiffeId,
        key: PrivateKeyDer<'static>,
        chain_pem: &[String],
    ) -> Result<WorkloadCertificate, CertificateError> {
        WorkloadCertificate::with_trust(identity, key, chain_pem, Vec::new(), Revocations::default())
    }

    /// As [`WorkloadCertificate::new`]; peers may also chain to `further` roots, and are checked against `revocations`.
    pub(crate) fn with_trust(
        identity: &SpiffeId,
        key: PrivateKeyDer<'static>,
        chain_pem: &[String],
        further: Vec<CertificateDer<'static>>,
        revocations: Revocations,
    ) -> Result<WorkloadCertificate, CertificateError> {
        let [first, middle @ .., last] = chain_pem else { return Err(CertificateError::TooShort(chain_pem.len())) };
        let mut chain = parse_pem(0, first)?;
        for (index, element) in middle.iter().enumerate() {
            chain.extend(parse_pem(index + 1, element)?);
        }
        let mut roots = parse_pem(chain_pem.len() - 1, last)?;
        for root in further {
            if !roots.contains(&root) {
                roots.push(root);
            }
        }
        let mut root_store = RootCertStore::empty();
        for root in &roots {
            root_store.add(root.clone())?;
        }
        let root_store = Arc::new(root_store);
        let found = peer_identity(Some(&chain))?;
        if found != *identity {
            return Err(CertificateError::WrongIdentity { found, wanted: identity.clone() });
        }
        verify_chain(&root_store, &chain[0], &chain[1..], UnixTime::now())?;
        let (_, leaf) =
            X509Certificate::from_der(&chain[0]).map_err(|error| CertificateError::Parse(error.to_string()))?;
        let time = |at: x509_parser::time::ASN1Time| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(at.timestamp()).unwrap_or(0))
        };
        let (not_before, not_after) = (time(leaf.validity().not_before), time(leaf.validity().not_after));
        let serial = leaf.raw_serial_as_string().replace(':', "");
        let signing = provider().key_provider.load_private_key(key)?;
        let certified = CertifiedKey::new(chain.clone(), signing);
        certified.keys_match()?;
        let client_auth = Arc::new(SingleCertAndKey::from(certified));
        let server = server_config(identity, &root_store, &revocations, client_auth.clone())?;
        Ok(WorkloadCertificate {
            identity: identity.clone(),
            chain,
            roots,
            root_store,
            revocations,
            not_before,
            not_after,
            serial,
            server,
            client_auth,
        })
    }

    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// For the HBONE server: clients must present a certificate of this trust domain.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For an HBONE client: the server must be one of `expected`.
    ///
    /// # Errors
    /// If rustls refuses the combination of versions and suites.
    pub fn client_config(&self, expected: &[SpiffeId]) -> Result<Arc<ClientConfig>, rustls::Error> {
        let provider = provider();
        let check = MeshServer {
            roots: self.root_store.clone(),
            revocations: self.revocations.clone(),
            expected: expected.to_vec(),
        };
        let verifier = Arc::new(ServerVerifier::new(check, &provider));
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .dangerous() // rustls' word for any verifier but its own; ours checks chain and identity
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(self.client_auth.clone());
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// What a client presents.
    pub fn client_auth(&self) -> Arc<dyn ResolvesClientCert> {
        self.client_auth.clone()
    }

    /// Leaf and intermediates, DER.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Trust anchors: those the CA sent along and those of the mesh's file, DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Serial number, hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Whether the certificate can be presented now.
    pub fn is_valid(&self, now: SystemTime) -> bool {
        now < self.not_after
    }

    /// Half of the lifetime: when the next one shall be asked for (Istio).
    pub fn refresh_at(&self) -> SystemTime {
        let lifetime = self.not_after.duration_since(self.not_before).unwrap_or_default();
        self.not_before + lifetime / 2
    }
}

fn server_config(
    identity: &SpiffeId,
    roots: &Arc<RootCertStore>,
    revocations: &Revocations,
    certificate: Arc<SingleCertAndKey>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let verifier = Arc::new(ClientVerifier::new(roots.clone(), revocations.clone(), identity.trust_domain())?);
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

fn parse_pem(index: usize, text: &str) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let certificates = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| CertificateError::Pem { index, reason: error.to_string() })?;
    if certificates.is_empty() {
        return Err(CertificateError::Pem { index, reason: "no certificate in it".to_owned() });
    }
    Ok(certificates)
}
