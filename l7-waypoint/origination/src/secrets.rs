//! Secrets the control plane sends by name (SDS over ADS): istiod's `kubernetes://NAME`, `kubernetes://NAME-cacert`,
//! `configmap://NAMESPACE/NAME-cacert`.
use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use serde::Serialize;
use xds_proto::envoy::envoy::config::core::v3::{DataSource, data_source::Specifier};
use xds_proto::envoy::envoy::extensions::transport_sockets::tls::v3 as wire;

use crate::material;

/// What a secret is good for.
#[derive(Debug)]
pub(crate) enum Secret {
    Certificate(Arc<CertifiedKey>),
    Trust { roots: Vec<CertificateDer<'static>>, revocations: Vec<CertificateRevocationListDer<'static>> },
}

/// The secrets held, shared by whoever hears of them and whoever needs them. Keys are never shown.
#[derive(Debug, Clone, Default)]
pub struct Secrets(Arc<ArcSwap<BTreeMap<String, Arc<Secret>>>>);

/// What may be told of a secret.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct SecretStatus {
    pub name: String,
    /// `certificate` or `roots`.
    pub kind: &'static str,
    pub certificates: usize,
}

impl Secrets {
    /// Takes a secret, in the place of the one of that name.
    ///
    /// # Errors
    /// If it cannot be used, with the reason; the one before stays.
    pub fn insert(&self, name: &str, message: wire::Secret) -> Result<(), String> {
        let secret = Arc::new(read(message)?);
        self.change(|secrets| drop(secrets.insert(name.to_owned(), secret.clone())));
        Ok(())
    }

    pub fn remove(&self, name: &str) {
        self.change(|secrets| drop(secrets.remove(name)));
    }

    /// What is held, without keys.
    #[must_use]
    pub fn status(&self) -> Vec<SecretStatus> {
        let status = |(name, secret): (&String, &Arc<Secret>)| {
            let (kind, certificates) = match &**secret {
                Secret::Certificate(certificate) => ("certificate", certificate.cert.len()),
                Secret::Trust { roots, .. } => ("roots", roots.len()),
            };
            SecretStatus { name: name.clone(), kind, certificates }
        };
        self.0.load().iter().map(status).collect()
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<Secret>> {
        self.0.load().get(name).cloned()
    }

    fn change(&self, change: impl Fn(&mut BTreeMap<String, Arc<Secret>>)) {
        self.0.rcu(|secrets| {
            let mut secrets = BTreeMap::clone(secrets);
            change(&mut secrets);
            secrets
        });
    }
}

fn read(message: wire::Secret) -> Result<Secret, String> {
    match message.r#type {
        Some(wire::secret::Type::TlsCertificate(certificate)) => {
            let chain = inline("certificate_chain", certificate.certificate_chain)?;
            let key = inline("private_key", certificate.private_key)?;
            Ok(Secret::Certificate(material::certified(&chain, &key)?))
        }
        Some(wire::secret::Type::ValidationContext(context)) => {
            let roots = material::certificates(&inline("trusted_ca", context.trusted_ca)?)?;
            let revocations = match context.crl {
                Some(source) => material::revocations(&inline("crl", Some(source))?)?,
                None => Vec::new(),
            };
            Ok(Secret::Trust { roots, revocations })
        }
        Some(_) => Err("neither a certificate nor roots".to_owned()),
        None => Err("empty".to_owned()),
    }
}

fn inline(field: &str, source: Option<DataSource>) -> Result<Vec<u8>, String> {
    match source.and_then(|source| source.specifier) {
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes),
        Some(Specifier::InlineString(text)) => Ok(text.into_bytes()),
        Some(_) => Err(format!("{field} is not inline")),
        None => Err(format!("{field} is missing")),
    }
}
