//! Asks for certificates as clients do.
use tonic::transport::Channel;
use tonic::{Request, Status};
use xds_proto::istio::ca::IstioCertificateRequest;
use xds_proto::istio::ca::istio_certificate_service_client::IstioCertificateServiceClient;

fn csr() -> String {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

pub(crate) async fn certificate(channel: Channel, token: &str, identity: Option<&str>) -> Result<Vec<String>, Status> {
    let metadata = identity.map(|identity| prost_types::Struct {
        fields: [(
            "ImpersonatedIdentity".to_owned(),
            prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(identity.to_owned())) },
        )]
        .into(),
    });
    let mut request = Request::new(IstioCertificateRequest { csr: csr(), validity_duration: 3600, metadata });
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    let answer = IstioCertificateServiceClient::new(channel).create_certificate(request).await?;
    Ok(answer.into_inner().cert_chain)
}

pub(crate) fn identity_of(pem: &str) -> String {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
    let certificate = pem.parse_x509().unwrap();
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    match &names.value.general_names[0] {
        x509_parser::extensions::GeneralName::URI(uri) => (*uri).to_owned(),
        other => panic!("{other}"),
    }
}
