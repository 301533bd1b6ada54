//! A certificate authority, servers that tell what they saw, and the client under test.
#[path = "../../../identity/tests/support/ca.rs"]
mod ca;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ca::Authority;
use l7_identity::{CaClient, CaConfig, IdentityManager, peer_identity};
use l7_origination::{Origination, Secrets};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};
use xds_model::envoy::cluster::{CertSource, UpstreamTls};
use xds_model::envoy::matcher::StringMatcher;
use xds_model::spiffe::SpiffeId;
use xds_proto::envoy::envoy::config::core::v3::{DataSource, data_source::Specifier};
use xds_proto::envoy::envoy::extensions::transport_sockets::tls::v3 as wire;

pub(crate) fn tls(roots: Option<CertSource>) -> UpstreamTls {
    UpstreamTls {
        sni: None,
        auto_sni: false,
        alpn: Vec::new(),
        roots,
        sans: Vec::new(),
        auto_san: false,
        client_cert: None,
        crl: None,
    }
}

pub(crate) fn named(tls: UpstreamTls, sni: &str) -> UpstreamTls {
    UpstreamTls { sni: Some(sni.to_owned()), ..tls }
}

pub(crate) fn exact(text: &str) -> StringMatcher {
    StringMatcher::exact(text)
}

/// What a server saw of a client.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) sni: Option<String>,
    pub(crate) alpn: Option<String>,
    pub(crate) version: String,
    /// First name in the client's certificate.
    pub(crate) client: Option<String>,
}

pub(crate) struct Server {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    serial: Vec<u8>,
    roots: Arc<RootCertStore>,
    /// Who may sign clients' certificates; `None`: none is asked for.
    clients: Option<Arc<RootCertStore>>,
    tls12: bool,
    ready: Option<Arc<ServerConfig>>,
}

impl Server {
    pub(crate) fn asking_for_certificates(self) -> Server {
        Server { clients: Some(self.roots.clone()), ..self }
    }

    pub(crate) fn with_tls12_only(self) -> Server {
        Server { tls12: true, ..self }
    }

    fn config(&self) -> Arc<ServerConfig> {
        if let Some(ready) = &self.ready {
            return ready.clone();
        }
        let versions = if self.tls12 {
            vec![&rustls::version::TLS12]
        } else {
            vec![&rustls::version::TLS13, &rustls::version::TLS12]
        };
        let builder = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&versions)
            .unwrap();
        let builder = match &self.clients {
            Some(roots) => {
                let provider = Arc::new(aws_lc_rs::default_provider());
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider);
                builder.with_client_cert_verifier(verifier.allow_unauthenticated().build().unwrap())
            }
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(self.chain.clone(), self.key.clone_key()).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Arc::new(config)
    }
}

pub(crate) struct Setup {
    authority: Authority,
    pub(crate) ca_pem: String,
    folder: tempfile::TempDir,
    identities: IdentityManager,
    origination: Origination,
}

impl Setup {
    /// The mesh's own CA is not there.
    pub(crate) fn new() -> Setup {
        Setup::with_mesh("http://127.0.0.1:9".to_owned())
    }

    pub(crate) async fn in_mesh() -> Setup {
        let address = ca::TestCa::new().serve().await;
        Setup::with_mesh(format!("http://{address}"))
    }

    fn with_mesh(address: String) -> Setup {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new("roots of services");
        let ca_pem = authority.root.pem();
        let token = folder.path().join("token");
        std::fs::write(&token, ca::TOKEN).unwrap();
        let config = CaConfig {
            address,
            root_ca: None,
            server_name: None,
            token: Some(token),
            cluster_id: "Kubernetes".to_owned(),
            impersonate: true,
            ttl: Duration::from_secs(3600),
        };
        let identities = IdentityManager::new(CaClient::new(config), tokio::runtime::Handle::current());
        let own = SpiffeId::new("cluster.local", "shop", "waypoint").unwrap();
        let origination = Origination::new(identities.clone(), own);
        Setup { authority, ca_pem, folder, identities, origination }
    }

    pub(crate) fn secrets(&self) -> &Secrets {
        self.origination.secrets()
    }

    pub(crate) fn roots(&self) -> Option<CertSource> {
        Some(CertSource::Inline(self.ca_pem.clone().into_bytes()))
    }

    /// Writes a file; its modification time differs from the one before.
    pub(crate) fn write(&self, name: &str, content: &str) -> String {
        let path = self.folder.path().join(name);
        let before = std::fs::metadata(&path).and_then(|data| data.modified()).ok();
        std::fs::write(&path, content).unwrap();
        if let Some(before) = before {
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(before.max(SystemTime::now()) + Duration::from_millis(10)).unwrap();
        }
        path.display().to_string()
    }

    /// Chain and key, PEM. Names with a scheme are URIs.
    pub(crate) fn certificate(&self, names: &[&str]) -> (String, String) {
        let (certificate, key) = self.authority.leaf(names);
        (certificate.pem(), key.serialize_pem())
    }

    pub(crate) fn server(&self, names: &[&str]) -> Server {
        let (chain, key) = self.certificate(names);
        let chain: Vec<_> = CertificateDer::pem_slice_iter(chain.as_bytes()).map(Result::unwrap).collect();
        let serial = X509Certificate::from_der(&chain[0]).unwrap().1.raw_serial().to_vec();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(self.authority.root.der().clone()).unwrap();
        Server { chain, key, serial, roots: Arc::new(roots), clients: None, tls12: false, ready: None }
    }

    /// A workload with a certificate of the mesh.
    pub(crate) async fn sidecar(&self, identity: &str) -> Server {
        let certificate = self.identities.certificate(&identity.parse().unwrap()).await.unwrap();
        Server { ready: Some(certificate.server_config()), ..self.server(&[]) }
    }

    pub(crate) fn revocations(&self, servers: &[&Server]) -> String {
        self.authority.revocations(servers.iter().map(|server| server.serial.clone()))
    }

    pub(crate) fn send_roots(&self, name: &str, pem: &str) {
        let context = wire::CertificateValidationContext { trusted_ca: Some(inline(pem)), ..Default::default() };
        self.send(name, wire::secret::Type::ValidationContext(context)).unwrap();
    }

    pub(crate) fn send_certificate(&self, name: &str, client: &str) -> Result<(), String> {
        let (chain, key) = self.certificate(&[client]);
        self.send_pair(name, &chain, &key)
    }

    /// A certificate with a key that is none.
    pub(crate) fn send_certificate_of(&self, name: &str, key: &str) -> Result<(), String> {
        let (chain, _) = self.certificate(&["client.example"]);
        self.send_pair(name, &chain, key)
    }

    fn send_pair(&self, name: &str, chain: &str, key: &str) -> Result<(), String> {
        let certificate = wire::TlsCertificate {
            certificate_chain: Some(inline(chain)),
            private_key: Some(inline(key)),
            ..Default::default()
        };
        self.send(name, wire::secret::Type::TlsCertificate(certificate))
    }

    fn send(&self, name: &str, content: wire::secret::Type) -> Result<(), String> {
        self.secrets().insert(name, wire::Secret { name: name.to_owned(), r#type: Some(content) })
    }

    /// One connection with one exchange.
    pub(crate) async fn connect(&self, tls: &UpstreamTls, host: Option<&str>, server: &Server) -> Result<Seen, String> {
        let (near, far) = duplex(16 * 1024);
        let acceptor = TlsAcceptor::from(server.config());
        let serving = tokio::spawn(async move {
            let mut stream = acceptor.accept(far).await.ok()?;
            let byte = stream.read_u8().await.ok()?;
            stream.write_u8(byte).await.ok()?;
            let (_, session) = stream.get_ref();
            let client = session.peer_certificates().map(first_name);
            Some(Seen {
                sni: session.server_name().map(str::to_owned),
                alpn: session.alpn_protocol().map(|alpn| String::from_utf8_lossy(alpn).into_owned()),
                version: format!("{:?}", session.protocol_version().unwrap()),
                client,
            })
        });
        let mut stream =
            self.origination.connect("outbound", tls, host, near).await.map_err(|error| error.to_string())?;
        stream.write_u8(7).await.map_err(|error| error.to_string())?;
        assert_eq!(stream.read_u8().await.map_err(|error| error.to_string())?, 7);
        Ok(serving.await.unwrap().unwrap())
    }
}

fn first_name(chain: &[CertificateDer<'_>]) -> String {
    if let Ok(identity) = peer_identity(Some(chain)) {
        return identity.to_string();
    }
    let (_, certificate) = X509Certificate::from_der(&chain[0]).unwrap();
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    match &names.value.general_names[0] {
        x509_parser::extensions::GeneralName::DNSName(name) => (*name).to_owned(),
        other => panic!("{other:?}"),
    }
}

fn inline(text: &str) -> DataSource {
    DataSource { specifier: Some(Specifier::InlineString(text.to_owned())), ..Default::default() }
}
