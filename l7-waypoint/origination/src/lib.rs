//! TLS that a waypoint originates to services that speak it themselves, as a DestinationRule (`trafficPolicy.tls`) or a
//! BackendTLSPolicy asks for: inside HBONE to pods of the mesh, directly to everything else.
//!
//! [`Origination`] makes one handshake from a cluster's [`UpstreamTls`]. Keys and roots come from files, from the
//! machine, from the mesh, or from [`Secrets`] that the control plane sends by name; what changed is read again at the
//! next connection. Whatever is missing closes the connection with a reason that names it.

mod material;
mod secrets;
mod verify;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use l7_identity::IdentityManager;
use parking_lot::Mutex;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use xds_model::envoy::cluster::UpstreamTls;
use xds_model::spiffe::SpiffeId;

use material::{Sources, Version};
pub use secrets::{SecretStatus, Secrets};

/// Names of the secrets a configuration needs from the control plane.
pub fn secret_names(tls: &UpstreamTls) -> impl Iterator<Item = &str> {
    material::secret_names(tls)
}

/// Why no TLS can be spoken to a service.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("secret {0} has not come from the control plane")]
    NoSecret(String),
    #[error("secret {name} holds no {wanted}")]
    WrongSecret { name: String, wanted: &'static str },
    #[error("{path}: {reason}")]
    File { path: String, reason: String },
    #[error("the machine has no root certificates: {0}")]
    NoSystemRoots(String),
    #[error("the waypoint's own certificate: {0}")]
    Own(String),
    #[error("{what}: {reason}")]
    Material { what: String, reason: String },
    #[error("subject names are to be checked, and there are no roots to check them by")]
    NamesWithoutRoots,
    #[error("nothing says which name the server's certificate must carry: sni or subjectAltNames is needed")]
    NoName,
    #[error("{0:?} is no server name")]
    Name(String),
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// Makes TLS connections for clusters. One for all workers.
pub struct Origination {
    secrets: Secrets,
    identities: IdentityManager,
    own: SpiffeId,
    /// By cluster.
    made: Mutex<HashMap<String, Made>>,
}

/// A configuration and what it was made from.
struct Made {
    tls: UpstreamTls,
    versions: Vec<Version>,
    config: Arc<ClientConfig>,
}

impl Origination {
    /// `own` is the identity presented where the mesh's own certificate is asked for.
    pub fn new(identities: IdentityManager, own: SpiffeId) -> Origination {
        Origination { secrets: Secrets::default(), identities, own, made: Mutex::default() }
    }

    /// Where secrets from the control plane go.
    #[must_use]
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// The handshake over `io`. `host` is the host of the request or of the endpoint; it counts where the configuration
    /// names none.
    ///
    /// # Errors
    /// If key material is missing, or the server does not prove to be who is expected.
    pub async fn connect<S>(
        &self,
        cluster: &str,
        tls: &UpstreamTls,
        host: Option<&str>,
        io: S,
    ) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let closed =
            |error: TlsError| io::Error::new(io::ErrorKind::PermissionDenied, format!("TLS of {cluster}: {error}"));
        let name = server_name(tls, host).map_err(closed)?;
        let config = self.config(cluster, tls).await.map_err(closed)?;
        let connecting = TlsConnector::from(config).connect(name, io).await;
        connecting.map_err(|error| io::Error::new(error.kind(), format!("TLS of {cluster}: {error}")))
    }

    async fn config(&self, cluster: &str, tls: &UpstreamTls) -> Result<Arc<ClientConfig>, TlsError> {
        let own = if material::needs_own(tls) {
            let certificate = self.identities.certificate(&self.own).await;
            Some(certificate.map_err(|error| TlsError::Own(error.to_string()))?)
        } else {
            None
        };
        let sources = Sources { secrets: &self.secrets, own };
        let versions = sources.versions(tls);
        if let Some(made) = self.made.lock().get(cluster)
            && made.tls == *tls
            && made.versions == versions
        {
            return Ok(made.config.clone());
        }
        let config = Arc::new(sources.config(tls)?);
        let made = Made { tls: tls.clone(), versions, config: config.clone() };
        self.made.lock().insert(cluster.to_owned(), made);
        Ok(config)
    }

    /// Forgets what was made for clusters that are gone.
    pub fn retain(&self, exists: impl Fn(&str) -> bool) {
        self.made.lock().retain(|cluster, _| exists(cluster));
    }
}

/// The name sent as SNI (an address is not sent) and perhaps looked for in the certificate.
fn server_name(tls: &UpstreamTls, host: Option<&str>) -> Result<ServerName<'static>, TlsError> {
    let host = host.filter(|_| tls.auto_sni || tls.auto_san);
    match tls.sni.as_deref().or(host) {
        Some(name) => ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned())),
        None if verify::checks_name(tls) => Err(TlsError::NoName),
        // Nobody looks at it.
        None => Ok(ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())),
    }
}
