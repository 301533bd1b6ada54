//! The TLS port: a certificate of the own root, issued anew long before it ends.
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use strata_runtime::{drain, task};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use crate::ca::{Authority, CaError, Current};

/// A certificate is issued anew after this time.
const RENEW_AFTER: Duration = Duration::from_secs(24 * 3600);
/// For the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes under way at a time; further connections wait.
const HANDSHAKES: usize = 256;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("serving certificate: {0}")]
    Pem(#[from] rustls_pki_types::pem::Error),
    #[error("serving certificate: {0}")]
    Tls(#[from] rustls::Error),
}

/// The certificate in use.
#[derive(Debug)]
struct Serving(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for Serving {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

/// Connections to `listener` that are through their handshake, until the drain.
///
/// # Errors
/// If there is no first certificate for `names` and this host's addresses.
pub(crate) fn incoming(
    listener: TcpListener,
    authority: &Current,
    names: Vec<String>,
    mut drain: drain::Watch,
) -> Result<ReceiverStream<io::Result<TlsStream<TcpStream>>>, ServingError> {
    let serving = Arc::new(Serving(ArcSwap::from_pointee(issue(&authority.borrow(), &names)?)));
    task::spawn("serving-certificate", renew(serving.clone(), authority.clone(), names, drain.clone()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = config.with_no_client_auth().with_cert_resolver(serving);
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (ready, streams) = mpsc::channel(16);
    let room = Arc::new(Semaphore::new(HANDSHAKES));
    task::spawn("tls-accept", async move {
        loop {
            let Ok(place) = room.clone().acquire_owned().await else { return };
            let accepted = tokio::select! {
                _ = drain.signaled() => return,
                accepted = listener.accept() => accepted,
            };
            let (tcp, client) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors or the like: accepting again at once would only burn CPU.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let (acceptor, ready) = (acceptor.clone(), ready.clone());
            task::spawn("tls-handshake", async move {
                let _ = tcp.set_nodelay(true); // Only makes small messages slower.
                match tokio::time::timeout(HANDSHAKE, acceptor.accept(tcp)).await {
                    // Nobody takes it: the server has ended.
                    Ok(Ok(stream)) => drop(ready.send(Ok(stream)).await),
                    Ok(Err(error)) => tracing::debug!(%client, %error, "TLS handshake failed"),
                    Err(_) => tracing::debug!(%client, "TLS handshake took too long"),
                }
                drop(place);
            });
        }
    });
    Ok(ReceiverStream::new(streams))
}

async fn renew(serving: Arc<Serving>, mut authority: Current, names: Vec<String>, mut drain: drain::Watch) {
    loop {
        tokio::select! {
            _ = drain.signaled() => return,
            () = tokio::time::sleep(RENEW_AFTER) => {}
            Ok(()) = authority.changed() => {}
        }
        let issued = issue(&authority.borrow_and_update(), &names);
        match issued {
            Ok(next) => serving.0.store(Arc::new(next)),
            Err(error) => tracing::error!(%error, "the serving certificate could not be renewed; it is tried again"),
        }
    }
}

fn issue(authority: &Authority, names: &[String]) -> Result<CertifiedKey, ServingError> {
    let (certificate, key) = authority.serving(names, &own_addresses())?;
    let chain = authority.above().fold(certificate, |chain, above| chain + "\n" + above);
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())?;
    Ok(CertifiedKey::from_der(chain, key, &rustls::crypto::aws_lc_rs::default_provider())?)
}

/// Every address of this host.
fn own_addresses() -> Vec<IpAddr> {
    let mut found = vec![IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1_u16])];
    let interfaces = match nix::ifaddrs::getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            tracing::warn!(%error, "own addresses are unknown: the secure port answers to its names only");
            return found;
        }
    };
    for address in interfaces.filter_map(|interface| interface.address) {
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        let v6 = address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip()));
        found.extend(v4.or(v6).filter(|ip| !found.contains(ip)));
    }
    found
}
