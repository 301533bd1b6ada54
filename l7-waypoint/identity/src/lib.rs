//! SPIFFE identities, certificates from the CA, rotation; the only builder of the mesh's TLS configurations.
//!
//! [`CaClient`] asks for one certificate, [`IdentityManager`] keeps one per identity fresh, a
//! [`WorkloadCertificate`] makes rustls configurations: TLS 1.3 only, ALPN `h2`, both sides present a
//! certificate, no SNI, no resumption. Nothing here opens a data-plane connection.

mod ca;
mod certificate;
mod manager;
mod trust;
mod verify;

pub use ca::{CaClient, CaConfig, IssueError};
pub use certificate::{CertificateError, WorkloadCertificate};
pub use manager::{CertificateInfo, CertificateStatus, IdentityError, IdentityManager};
pub use trust::TrustFiles;
pub use verify::{PeerError, ServerCheck, ServerVerifier, peer_identity};

use std::sync::{Arc, OnceLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};

/// The one cryptographic provider: aws-lc-rs, TLS 1.3 suites only, AES-128-GCM first because it is the
/// fastest on hardware with AES and is in every peer's list (Istio: AES-256-GCM and AES-128-GCM).
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER
        .get_or_init(|| {
            use aws_lc_rs::cipher_suite as suite;
            Arc::new(CryptoProvider {
                cipher_suites: vec![
                    suite::TLS13_AES_128_GCM_SHA256,
                    suite::TLS13_AES_256_GCM_SHA384,
                    suite::TLS13_CHACHA20_POLY1305_SHA256,
                ],
                ..aws_lc_rs::default_provider()
            })
        })
        .clone()
}

/// Makes aws-lc-rs the process-wide default for libraries that ask for one (tonic). Call first in `main`.
pub fn install_provider() {
    // Err means that it is installed already, which is what is wanted.
    let _ = aws_lc_rs::default_provider().install_default();
}
