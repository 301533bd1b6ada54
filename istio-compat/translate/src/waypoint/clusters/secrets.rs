//! Secrets and ConfigMaps that TLS to services refers to, sent by name as istiod does (xds-contract 5.9):
//! `kubernetes://NAME` is a certificate with its key, `kubernetes://NAME-cacert` and `configmap://NAMESPACE/NAME-cacert`
//! are roots. What is missing is told and not sent, which keeps the destination closed.
use std::collections::{BTreeMap, BTreeSet};

use compat_objects::core::{ConfigMap, Secret};
use compat_objects::{Kind, ObjectKey};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use xds_proto::type_url;

use super::Builder;
use crate::pb::{core, ext};
use crate::{Resources, wire};
use ext::transport_sockets::tls::v3 as tls;

/// What the clusters of a waypoint refer to.
#[derive(Debug, Default)]
pub(crate) struct Referred {
    /// Whether they are there or not.
    pub(crate) objects: BTreeSet<ObjectKey>,
    pub(crate) roots: Resources,
    pub(crate) certificates: Resources,
}

/// Keys under which roots are found, with those of their revocations, and the same for a certificate and its key: the first
/// that holds something counts (istiod's `credentials/kube`).
const ROOTS: [(&str, &str); 2] = [("cacert", "crl"), ("ca.crt", "ca.crl")];
const CERTIFICATE: [(&str, &str); 2] = [("cert", "key"), ("tls.crt", "tls.key")];
const ROOTS_SUFFIX: &str = "-cacert";

/// Values by key, without empty ones.
type Data<'d> = BTreeMap<&'d str, &'d [u8]>;

/// PEM.
#[derive(Default)]
struct Roots {
    certificates: Vec<u8>,
    revocations: Vec<u8>,
}

impl Builder<'_, '_> {
    /// The name by which the roots in a Secret of the waypoint's namespace are sent. `asked` is the object and field that
    /// want them.
    pub(super) fn roots_of_secret(&self, name: &str, asked: (&ObjectKey, &str)) -> String {
        let sent = format!("kubernetes://{name}{ROOTS_SUFFIX}");
        // Roots may have a Secret of their own, which counts before the one with the key.
        let own = self.known(Kind::Secret, &self.waypoint.key.namespace, &format!("{name}{ROOTS_SUFFIX}"));
        let found = own.or_else(|| self.found(Kind::Secret, &self.waypoint.key.namespace, name, asked));
        if let Some(roots) = found.and_then(|(key, data)| self.usable(&key, roots(&data))) {
            self.send_roots(&sent, roots);
        }
        sent
    }

    /// The name by which the certificate and key in a Secret of the waypoint's namespace are sent.
    pub(super) fn certificate_of_secret(&self, name: &str, asked: (&ObjectKey, &str)) -> String {
        let sent = format!("kubernetes://{name}");
        let found = self.found(Kind::Secret, &self.waypoint.key.namespace, name, asked);
        if let Some(certificate) = found.and_then(|(key, data)| self.usable(&key, certificate(&data))) {
            let secret =
                tls::Secret { name: sent.clone(), r#type: Some(tls::secret::Type::TlsCertificate(certificate)) };
            let packed = wire::pack(type_url::SECRET, &secret);
            self.referred.borrow_mut().certificates.insert(sent.clone(), packed);
        }
        sent
    }

    /// The name by which the roots in all of these ConfigMaps are sent.
    pub(super) fn roots_of_config_maps(&self, namespace: &str, names: &[&str], asked: (&ObjectKey, &str)) -> String {
        let sent = format!("configmap://{namespace}/{}{ROOTS_SUFFIX}", names.join(","));
        let mut all = Roots::default();
        for name in names {
            let found = self.found(Kind::ConfigMap, namespace, name, asked);
            let Some(roots) = found.and_then(|(key, data)| self.usable(&key, roots(&data))) else { return sent };
            for (all, more) in [(&mut all.certificates, roots.certificates), (&mut all.revocations, roots.revocations)]
            {
                all.extend(more);
                all.push(b'\n');
            }
        }
        self.send_roots(&sent, all);
        sent
    }

    fn send_roots(&self, name: &str, roots: Roots) {
        let revocations = Some(roots.revocations).filter(|pem| !pem.trim_ascii().is_empty());
        let context = tls::CertificateValidationContext {
            trusted_ca: Some(inline(roots.certificates)),
            crl: revocations.map(inline),
            ..Default::default()
        };
        let secret = tls::Secret { name: name.to_owned(), r#type: Some(tls::secret::Type::ValidationContext(context)) };
        let packed = wire::pack(type_url::SECRET, &secret);
        self.referred.borrow_mut().roots.insert(name.to_owned(), packed);
    }

    /// A Secret or ConfigMap; it is remembered as referred to either way.
    fn known(&self, kind: Kind, namespace: &str, name: &str) -> Option<(ObjectKey, Data<'_>)> {
        let key = ObjectKey::new(kind, namespace, name);
        self.referred.borrow_mut().objects.insert(key.clone());
        let mut data = match kind {
            Kind::ConfigMap => of_config_map(self.mesh.objects.config_map(namespace, name)?),
            _ => of_secret(self.mesh.objects.secret(namespace, name)?),
        };
        data.retain(|_, value| !value.is_empty());
        Some((key, data))
    }

    /// The same; that it is missing is the fault of who asked.
    fn found(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        asked: (&ObjectKey, &str),
    ) -> Option<(ObjectKey, Data<'_>)> {
        let found = self.known(kind, namespace, name);
        if found.is_none() {
            self.error(asked.0, asked.1, format!("{kind} {namespace}/{name} is not known: the destination is closed"));
        }
        found
    }

    /// What an object holds; that it is no good is its own fault, so that what it held before stays in force.
    fn usable<T>(&self, key: &ObjectKey, content: Result<T, String>) -> Option<T> {
        content.map_err(|reason| self.error(key, "data", format!("{reason}: it is of no use for TLS"))).ok()
    }
}

fn of_config_map(map: &ConfigMap) -> Data<'_> {
    map.data.iter().flatten().map(|(key, text)| (key.as_str(), text.as_bytes())).collect()
}

/// Of an API server only `data` comes; in a file `stringData` counts as it would there.
fn of_secret(secret: &Secret) -> Data<'_> {
    let mut data: Data<'_> = secret.data.iter().flatten().map(|(key, bytes)| (key.as_str(), &*bytes.0)).collect();
    data.extend(secret.string_data.iter().flatten().map(|(key, text)| (key.as_str(), text.as_bytes())));
    data
}

fn roots(data: &Data<'_>) -> Result<Roots, String> {
    let [(first, _), (second, _)] = ROOTS;
    let found = ROOTS.iter().find_map(|(key, revoked)| Some((*key, *data.get(key)?, *revoked)));
    let (key, pem, revoked) = found.ok_or_else(|| format!("there is neither {first} nor {second}"))?;
    if CertificateDer::from_pem_slice(pem).is_err() {
        return Err(format!("{key} is no certificate in PEM"));
    }
    let revocations = data.get(revoked).copied().unwrap_or_default();
    if !revocations.is_empty() && CertificateRevocationListDer::from_pem_slice(revocations).is_err() {
        return Err(format!("{revoked} is no revocation list in PEM"));
    }
    Ok(Roots { certificates: pem.to_vec(), revocations: revocations.to_vec() })
}

fn certificate(data: &Data<'_>) -> Result<tls::TlsCertificate, String> {
    let found =
        CERTIFICATE.iter().find_map(|(chain, key)| Some(((*chain, *data.get(chain)?), (*key, *data.get(key)?))));
    let [first, second] = CERTIFICATE.map(|(chain, key)| format!("{chain} and {key}"));
    let (chain, key) = found.ok_or_else(|| format!("there are neither {first} nor {second}"))?;
    if CertificateDer::from_pem_slice(chain.1).is_err() {
        return Err(format!("{} is no certificate in PEM", chain.0));
    }
    if PrivateKeyDer::from_pem_slice(key.1).is_err() {
        return Err(format!("{} is no private key in PEM", key.0));
    }
    Ok(tls::TlsCertificate {
        certificate_chain: Some(inline(chain.1.to_vec())),
        private_key: Some(inline(key.1.to_vec())),
        ..Default::default()
    })
}

fn inline(bytes: Vec<u8>) -> core::DataSource {
    core::DataSource { specifier: Some(core::data_source::Specifier::InlineBytes(bytes)), ..Default::default() }
}
