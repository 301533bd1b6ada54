//! A real certificate service for tests: checks the token, signs what is asked for. Shared by the tests of
//! several crates through `#[path]`.
#![allow(unreachable_pub, dead_code, reason = "included by several test crates, each uses a part")]
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    DnType, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use tonic::{Request, Response, Status};
use xds_proto::istio::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use xds_proto::istio::ca::{IstioCertificateRequest, IstioCertificateResponse};

pub const TOKEN: &str = "the-node-token";

/// A root that signs.
pub struct Authority {
    pub issuer: Issuer<'static, KeyPair>,
    pub root: Certificate,
}

impl Authority {
    pub fn new(name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let root = params.self_signed(&key).unwrap();
        Authority { issuer: Issuer::new(params, key), root }
    }

    /// A certificate with its key. Names with a scheme are URIs.
    pub fn leaf(&self, names: &[&str]) -> (Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let (uris, plain): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| name.contains("://"));
        let mut params = CertificateParams::new(plain.into_iter().map(str::to_owned).collect::<Vec<_>>()).unwrap();
        params.subject_alt_names.extend(uris.into_iter().map(|uri| SanType::URI(uri.try_into().unwrap())));
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    /// PEM list of revoked serial numbers.
    pub fn revocations(&self, serials: impl IntoIterator<Item = Vec<u8>>) -> String {
        let now = std::time::SystemTime::now();
        let revoked = |serial: Vec<u8>| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_secs(3600)).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.into_iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

pub struct TestCa {
    authority: Mutex<Authority>,
    pub ttl: Mutex<Duration>,
    pub issued: AtomicU64,
    pub refuse: AtomicBool,
    /// Names this identity instead of the one asked for.
    pub lie: Mutex<Option<String>>,
}

#[derive(Clone)]
pub struct Service(pub Arc<TestCa>);

impl TestCa {
    pub fn new() -> Arc<TestCa> {
        Arc::new(TestCa {
            authority: Mutex::new(Authority::new("test CA")),
            ttl: Mutex::new(Duration::from_secs(3600)),
            issued: AtomicU64::new(0),
            refuse: AtomicBool::new(false),
            lie: Mutex::new(None),
        })
    }

    /// PEM of the root that signs now.
    pub fn root(&self) -> String {
        self.authority.lock().unwrap().root.pem()
    }

    /// Signs by a new root from now on.
    pub fn rotate(&self) {
        *self.authority.lock().unwrap() = Authority::new("test CA after rotation");
    }

    /// PEM list of revoked serial numbers (hexadecimal), signed by the present root.
    pub fn revocations(&self, serials: &[&str]) -> String {
        let bytes = |hex: &&str| -> Vec<u8> {
            (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap()).collect()
        };
        self.authority.lock().unwrap().revocations(serials.iter().map(bytes))
    }

    /// Serves on a loopback port of the current network namespace; returns the address.
    pub async fn serve(self: &Arc<TestCa>) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = IstioCertificateServiceServer::new(Service(self.clone()));
        tokio::spawn(async move {
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
        addr
    }

    fn sign(&self, request: &IstioCertificateRequest) -> Result<Vec<String>, Status> {
        let bad = |error: rcgen::Error| Status::invalid_argument(error.to_string());
        let mut csr = CertificateSigningRequestParams::from_pem(&request.csr).map_err(bad)?;
        let asked = request.metadata.as_ref().and_then(|metadata| metadata.fields.get("ImpersonatedIdentity"));
        let mut name = match asked.and_then(|value| value.kind.clone()) {
            Some(prost_types::value::Kind::StringValue(name)) => name,
            _ => match csr.params.subject_alt_names.as_slice() {
                [SanType::URI(uri)] => uri.to_string(),
                other => return Err(Status::invalid_argument(format!("names {other:?}"))),
            },
        };
        if let Some(lie) = &*self.lie.lock().unwrap() {
            name = lie.clone();
        }
        csr.params.subject_alt_names = vec![SanType::URI(name.try_into().map_err(bad)?)];
        let now = std::time::SystemTime::now();
        csr.params.not_before = now.into();
        csr.params.not_after = (now + *self.ttl.lock().unwrap()).into();
        let authority = self.authority.lock().unwrap();
        let leaf = csr.signed_by(&authority.issuer).map_err(bad)?;
        self.issued.fetch_add(1, Ordering::Relaxed);
        Ok(vec![leaf.pem(), authority.root.pem()])
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        if self.0.refuse.load(Ordering::Relaxed) {
            return Err(Status::unavailable("told to refuse"));
        }
        let expected = format!("Bearer {TOKEN}");
        if request.metadata().get("authorization").map(|value| value.as_bytes()) != Some(expected.as_bytes()) {
            return Err(Status::unauthenticated("wrong token"));
        }
        if request.metadata().get("clusterid").is_none() {
            return Err(Status::unauthenticated("no clusterid"));
        }
        let cert_chain = self.0.sign(request.get_ref())?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}
