//! What is spoken on the way to a service below HTTP: TLS, as a DestinationRule or a BackendTLSPolicy asks for it, and the
//! PROXY protocol's header.
use std::borrow::Cow;

use compat_objects::gateway::{BackendSubjectAltName, BackendTlsValidation, SubjectAltNameType};
use compat_objects::istio::{ClientTlsSettings, ProxyProtocolVersion, TlsMode, TrafficPolicy};
use compat_objects::{HasMeta, Kind, ObjectKey};

use super::fixed::{sds_files, sds_sent, set_upstream_options};
use super::{Builder, close};
use crate::mesh::{Service, ServicePort};
use crate::pb::{any, cluster, core, exact, ext, raw_buffer, transport_socket};
use ext::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use ext::transport_sockets::tls::v3 as tls;

/// The machine's own roots, in istiod's words.
const SYSTEM_ROOTS: &str = "system";

/// Before a Secret's name, where somebody writes it.
const SECRET_SCHEME: &str = "kubernetes://";

/// Where key material is.
enum Place<'a> {
    /// In the waypoint's own files: a path, for a certificate `CHAIN~KEY`; or [`SYSTEM_ROOTS`].
    File(Cow<'a, str>),
    /// Sent by this control plane under a name.
    Sent(String),
}

/// TLS to a service, whoever asked for it.
struct Tls<'a> {
    sni: &'a str,
    /// `None`: whoever answers is taken.
    roots: Option<Place<'a>>,
    /// A path.
    revocations: Option<&'a str>,
    client: Option<Place<'a>>,
    names: Vec<&'a str>,
}

/// Whether a policy asks for TLS that is the application's own.
pub(super) fn asks_for_tls(policy: Option<&TrafficPolicy>) -> Option<&ClientTlsSettings> {
    policy?.tls.as_ref().filter(|tls| matches!(tls.mode, TlsMode::Simple | TlsMode::Mutual))
}

impl Builder<'_, '_> {
    /// The innermost socket towards a service's endpoints. What cannot be sent closes the destination: going on in
    /// plaintext would quietly drop what was asked for.
    pub(super) fn upstream_socket(
        &self,
        built: &mut cluster::Cluster,
        service: &Service,
        port: &ServicePort,
        policy: Option<&TrafficPolicy>,
        rule: Option<&ObjectKey>,
    ) -> core::TransportSocket {
        let backend = self.backend_tls(service, port);
        let asked = match (&backend, asks_for_tls(policy), rule) {
            (Some((object, validation)), _, _) => Some((object, self.by_backend_policy(object, validation))),
            (None, Some(settings), Some(object)) => Some((object, self.by_rule(object, settings))),
            _ => None,
        };
        let socket = match asked {
            None => raw_buffer("raw_buffer"),
            Some((_, Ok(asked))) => {
                names_from_requests(built, &asked);
                transport_socket("envoy.transport_sockets.tls", any(&context(&asked, port)))
            }
            Some((object, Err((field, reason)))) => {
                self.error(object, field, format!("{reason}: the destination is closed"));
                close(built);
                raw_buffer("raw_buffer")
            }
        };
        match policy.and_then(|policy| policy.proxy_protocol) {
            None => socket,
            Some(wanted) => {
                let version = match wanted.version {
                    ProxyProtocolVersion::V1 => core::proxy_protocol_config::Version::V1,
                    ProxyProtocolVersion::V2 => core::proxy_protocol_config::Version::V2,
                };
                let header = ProxyProtocolUpstreamTransport {
                    config: Some(core::ProxyProtocolConfig { version: version as i32, ..Default::default() }),
                    transport_socket: Some(socket),
                    ..Default::default()
                };
                transport_socket("envoy.transport_sockets.upstream_proxy_protocol", any(&header))
            }
        }
    }

    fn by_backend_policy<'b>(
        &self,
        policy: &ObjectKey,
        validation: &'b BackendTlsValidation,
    ) -> Result<Tls<'b>, Unsent> {
        fn name(name: &BackendSubjectAltName) -> Option<&str> {
            match name.kind {
                SubjectAltNameType::Hostname => name.hostname.as_deref(),
                SubjectAltNameType::Uri => name.uri.as_deref(),
            }
        }
        const FIELD: &str = "spec.validation.caCertificateRefs";
        let mut maps = Vec::new();
        for reference in &validation.ca_certificate_refs {
            let (kind, name) = (reference.kind.as_deref().unwrap_or_default(), reference.name.as_str());
            if kind != "ConfigMap" {
                return Err((FIELD, format!("{kind} {name}: only ConfigMaps are read")));
            }
            maps.push(name);
        }
        let roots = if maps.is_empty() {
            Place::File(SYSTEM_ROOTS.into())
        } else {
            Place::Sent(self.roots_of_config_maps(&policy.namespace, &maps, (policy, FIELD)))
        };
        Ok(Tls {
            sni: &validation.hostname,
            roots: Some(roots),
            revocations: None,
            client: None,
            names: validation.subject_alt_names.iter().filter_map(name).collect(),
        })
    }

    fn by_rule<'b>(&self, rule: &ObjectKey, settings: &'b ClientTlsSettings) -> Result<Tls<'b>, Unsent> {
        const CREDENTIAL: &str = "spec.trafficPolicy.tls.credentialName";
        fn given(text: &str) -> Option<&str> {
            Some(text).filter(|text| !text.is_empty())
        }
        let (anybody, mutual) = (settings.insecure_skip_verify == Some(true), settings.mode == TlsMode::Mutual);
        let asked = (rule, CREDENTIAL);
        let credential = given(&settings.credential_name).map(|name| name.strip_prefix(SECRET_SCHEME).unwrap_or(name));
        let (roots, client) = match credential {
            Some(name) if name.contains("://") => {
                return Err((CREDENTIAL, format!("{name}: only names of Secrets are understood")));
            }
            Some(name) => (
                (!anybody).then(|| Place::Sent(self.roots_of_secret(name, asked))),
                mutual.then(|| Place::Sent(self.certificate_of_secret(name, asked))),
            ),
            None => (
                (!anybody).then(|| Place::File(given(&settings.ca_certificates).unwrap_or(SYSTEM_ROOTS).into())),
                mutual.then(|| Place::File(format!("{}~{}", settings.client_certificate, settings.private_key).into())),
            ),
        };
        Ok(Tls {
            sni: &settings.sni,
            roots,
            revocations: given(&settings.ca_crl).filter(|_| !anybody),
            client,
            names: if anybody { Vec::new() } else { settings.subject_alt_names.iter().map(String::as_str).collect() },
        })
    }

    /// The policy for a service's port; one that names the port comes before one for all ports.
    fn backend_tls<'b>(
        &'b self,
        service: &'b Service,
        port: &ServicePort,
    ) -> Option<(ObjectKey, &'b BackendTlsValidation)> {
        // ServiceEntries may have a Service's name.
        if service.object.kind != Kind::Service {
            return None;
        }
        let concerns = |section: Option<&str>| {
            self.mesh.objects.backend_tls_policies_in(&service.namespace).find(|policy| {
                policy.spec.target_refs.iter().any(|target| {
                    target.kind == "Service" && target.name == service.name && target.section_name.as_deref() == section
                })
            })
        };
        let found = concerns(Some(&port.name)).or_else(|| concerns(None))?;
        let key = ObjectKey::new(Kind::BackendTLSPolicy, service.namespace.as_str(), found.name());
        Some((key, &found.spec.validation))
    }
}

/// A field and what is wrong with it.
type Unsent = (&'static str, String);

/// Where no name is given, that of the request counts, as SNI and in the certificate.
fn names_from_requests(built: &mut cluster::Cluster, tls: &Tls<'_>) {
    if tls.sni.is_empty() {
        let names = core::UpstreamHttpProtocolOptions {
            auto_sni: true,
            auto_san_validation: tls.names.is_empty() && tls.roots.is_some(),
            ..Default::default()
        };
        set_upstream_options(built, names);
    }
}

fn context(asked: &Tls<'_>, port: &ServicePort) -> tls::UpstreamTlsContext {
    let common = tls::CommonTlsContext {
        tls_params: Some(tls::TlsParameters {
            tls_minimum_protocol_version: tls::tls_parameters::TlsProtocol::TlSv12 as i32,
            tls_maximum_protocol_version: tls::tls_parameters::TlsProtocol::TlSv13 as i32,
            ..Default::default()
        }),
        alpn_protocols: if port.protocol.is_http2() { vec!["h2".to_owned()] } else { Vec::new() },
        tls_certificate_sds_secret_configs: asked.client.iter().map(|place| sds("file-cert", place)).collect(),
        validation_context_type: asked.roots.as_ref().map(|roots| validation(asked, roots)),
        ..Default::default()
    };
    tls::UpstreamTlsContext { common_tls_context: Some(common), sni: asked.sni.to_owned(), ..Default::default() }
}

fn validation(asked: &Tls<'_>, roots: &Place<'_>) -> tls::common_tls_context::ValidationContextType {
    use tls::common_tls_context::{CombinedCertificateValidationContext, ValidationContextType};
    let data = |specifier| core::DataSource { specifier: Some(specifier), ..Default::default() };
    #[allow(deprecated, reason = "what istiod sends")]
    let context = tls::CertificateValidationContext {
        match_subject_alt_names: asked.names.iter().map(|name| exact(name)).collect(),
        crl: asked.revocations.map(|path| data(core::data_source::Specifier::Filename(path.to_owned()))),
        ..Default::default()
    };
    ValidationContextType::CombinedValidationContext(CombinedCertificateValidationContext {
        default_validation_context: Some(context),
        validation_context_sds_secret_config: Some(sds("file-root", roots)),
        ..Default::default()
    })
}

/// Where a waypoint asks for key material; `files` is what istiod calls this kind of it in files.
fn sds(files: &str, place: &Place<'_>) -> tls::SdsSecretConfig {
    match place {
        Place::File(path) => sds_files(&format!("{files}:{path}")),
        Place::Sent(name) => sds_sent(name),
    }
}
