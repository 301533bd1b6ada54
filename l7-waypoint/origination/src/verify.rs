//! What a server must prove: a chain to the roots, the name it was asked by, one of the subject names.
use std::sync::Arc;

use l7_authz::l7::matcher::StringMatch;
use l7_identity::ServerCheck;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::crypto::CryptoProvider;
use rustls::{CertificateError, Error, OtherError, RootCertStore};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use xds_model::envoy::cluster::UpstreamTls;
use xds_model::envoy::matcher::{StringMatcher, StringPattern};

use crate::TlsError;

/// Whether the certificate must carry the name the server was asked by. So it is where the configuration says so
/// (Istio: where it names neither), and where it gives SNI and roots and no other names: Envoy would then take anybody
/// these roots vouch for; the Gateway API forbids that (BackendTLSPolicy, `validation.hostname`).
pub(crate) fn checks_name(tls: &UpstreamTls) -> bool {
    tls.auto_san || (tls.roots.is_some() && tls.sans.is_empty() && tls.sni.is_some())
}

/// A subject name the certificate must carry one of.
#[derive(Debug)]
struct Subject {
    matcher: StringMatch,
    /// As it was written, if it is compared whole: then a wildcard in the certificate counts.
    exact: Option<String>,
}

impl Subject {
    fn compile(matcher: &StringMatcher) -> Result<Subject, TlsError> {
        let exact = match &matcher.pattern {
            StringPattern::Exact(text) => Some(text.to_ascii_lowercase()),
            _ => None,
        };
        let matcher = StringMatch::compile(matcher)
            .map_err(|error| TlsError::Material { what: "subjectAltNames".into(), reason: error.to_string() })?;
        Ok(Subject { matcher, exact })
    }

    fn matches(&self, name: &GeneralName<'_>) -> bool {
        match name {
            GeneralName::DNSName(dns) => {
                let wildcard = self.exact.as_deref().is_some_and(|exact| covers(dns, exact));
                wildcard || self.matcher.matches(dns.as_bytes())
            }
            GeneralName::URI(text) | GeneralName::RFC822Name(text) => self.matcher.matches(text.as_bytes()),
            GeneralName::IPAddress(octets) => {
                address(octets).is_some_and(|address| self.matcher.matches(address.as_bytes()))
            }
            _ => false,
        }
    }
}

/// Whether a certificate's DNS name covers a host: itself, or by a wildcard that is the whole first label (RFC 9525 6.3).
fn covers(presented: &str, host: &str) -> bool {
    let presented = presented.to_ascii_lowercase();
    match (presented.strip_prefix("*."), host.split_once('.')) {
        (Some(parent), Some((label, rest))) => !label.is_empty() && parent == rest,
        _ => presented == host,
    }
}

fn address(octets: &[u8]) -> Option<String> {
    let v4 = <[u8; 4]>::try_from(octets).map(|octets| std::net::Ipv4Addr::from(octets).to_string());
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(|octets| std::net::Ipv6Addr::from(octets).to_string())).ok()
}

/// What proves who a service is.
#[derive(Debug)]
pub(crate) struct Trust {
    chain: Arc<WebPkiServerVerifier>,
    name: bool,
    subjects: Vec<Subject>,
}

impl Trust {
    pub(crate) fn new(
        roots: RootCertStore,
        revocations: Vec<CertificateRevocationListDer<'static>>,
        tls: &UpstreamTls,
        provider: Arc<CryptoProvider>,
    ) -> Result<Trust, TlsError> {
        let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .with_crls(revocations)
            .build()
            .map_err(|error| TlsError::Material { what: "roots".into(), reason: error.to_string() })?;
        let subjects = tls.sans.iter().map(Subject::compile).collect::<Result<_, _>>()?;
        Ok(Trust { chain, name: checks_name(tls), subjects })
    }

    fn check_subject(&self, end_entity: &CertificateDer<'_>) -> Result<(), Error> {
        if self.subjects.is_empty() {
            return Ok(());
        }
        let other =
            |text: String| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Names(text)))));
        let (_, certificate) = X509Certificate::from_der(end_entity).map_err(|error| other(error.to_string()))?;
        let names = certificate.subject_alternative_name().map_err(|error| other(error.to_string()))?;
        let names = names.as_ref().map_or(&[][..], |names| &names.value.general_names);
        if names.iter().any(|name| self.subjects.iter().any(|subject| subject.matches(name))) {
            return Ok(());
        }
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        Err(other(format!("none of its names is expected: {}", names.join(", "))))
    }
}

/// Why a certificate's names do not do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Names(String);

impl ServerCheck for Trust {
    fn check(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        // The name comes last in rustls' check: if it is what fails, the chain holds.
        match self.chain.verify_server_cert(end_entity, intermediates, server_name, &[], now) {
            Err(Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) if !self.name => {}
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        self.check_subject(end_entity)
    }
}

/// Anybody: `insecureSkipVerify`, as the user said. The server still has to own the key of what it shows.
#[derive(Debug)]
pub(crate) struct Anybody;

impl ServerCheck for Anybody {
    fn check(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _now: UnixTime,
    ) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::covers;

    #[test]
    fn a_wildcard_covers_one_label_and_nothing_else() {
        assert!(covers("a.example", "a.example") && covers("A.Example", "a.example"));
        assert!(covers("*.example", "a.example"));
        for (presented, host) in [
            ("*.example", "a.b.example"),
            ("*.example", "example"),
            ("*.example", ".example"),
            ("a*.example", "ab.example"),
            ("b.example", "a.example"),
        ] {
            assert!(!covers(presented, host), "{presented} covers {host}");
        }
    }
}
