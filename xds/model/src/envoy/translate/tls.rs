//! Transport sockets.
use std::mem::take;

use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::extensions::transport_sockets::internal_upstream::v3 as internal;
use xds_proto::envoy::envoy::extensions::transport_sockets::proxy_protocol::v3 as proxy;
use xds_proto::envoy::envoy::extensions::transport_sockets::tls::v3 as wire;
use xds_proto::envoy::google::protobuf as wkt;

use super::common::{string, strings, type_name, unpack};
use super::report::{At, Refusable, Refusal, Report, refuse_rest};
use crate::envoy::cluster::{CertSource, UpstreamTls};
use crate::envoy::matcher::StringMatcher;

/// What is spoken under the application protocol.
#[derive(Default)]
pub(super) struct Transport {
    pub(super) tls: Option<UpstreamTls>,
    pub(super) proxy_protocol: Option<u8>,
}

/// The configuration of a transport socket.
pub(super) fn typed(message: core::TransportSocket) -> Refusable<wkt::Any> {
    match message.config_type {
        Some(core::transport_socket::ConfigType::TypedConfig(any)) => Ok(any),
        None => Err(Refusal::new(message.name, "no configuration")),
    }
}

/// A cluster's transport socket: internal hops are peeled off, TLS and PROXY protocol stay.
pub(super) fn upstream(message: core::TransportSocket, report: &mut Report) -> Refusable<Transport> {
    let any = typed(message)?;
    match type_name(&any.type_url) {
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => Ok(Transport::default()),
        "envoy.extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport" => {
            // The metadata passed on is the endpoint's own, which Strata's endpoints carry.
            let internal::InternalUpstreamTransport { passthrough_metadata: _, transport_socket } = unpack(&any)?;
            transport_socket.map_or_else(|| Ok(Transport::default()), |inner| upstream(inner, report))
        }
        "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport" => {
            let mut outer: proxy::ProxyProtocolUpstreamTransport = unpack(&any)?;
            let mut config = outer.config.take().unwrap_or_default();
            let version = take(&mut config.version);
            refuse_rest(&config).at("proxy_protocol")?;
            let inner = outer.transport_socket.take();
            report.ignore_rest("proxy_protocol", &outer);
            let inner = inner.map(|inner| upstream(inner, report)).transpose()?.unwrap_or_default();
            // core.ProxyProtocolConfig.Version: V1 = 0, V2 = 1.
            Ok(Transport { proxy_protocol: Some(if version == 0 { 1 } else { 2 }), ..inner })
        }
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => {
            Ok(Transport { tls: Some(upstream_tls(unpack(&any)?, report).at("tls")?), proxy_protocol: None })
        }
        other => Err(Refusal::new("transport_socket", format!("{other} is not supported"))),
    }
}

fn upstream_tls(mut message: wire::UpstreamTlsContext, report: &mut Report) -> Refusable<UpstreamTls> {
    let mut common = message.common_tls_context.take().unwrap_or_default();
    let validation = validation(common.validation_context_type.take(), report)?;
    let client_cert = match (
        take(&mut common.tls_certificates).into_iter().next(),
        take(&mut common.tls_certificate_sds_secret_configs).into_iter().next(),
    ) {
        (Some(certificate), None) => Some(files(certificate)?),
        (None, Some(secret)) => Some(secret_name(&secret.name)),
        (None, None) => None,
        (Some(_), Some(_)) => return Err(Refusal::new("tls_certificates", "given twice")),
    };
    if let Some(params) = common.tls_params.take() {
        tls_params(params, report);
    }
    let tls = UpstreamTls {
        sni: Some(take(&mut message.sni)).filter(|sni| !sni.is_empty()),
        auto_sni: take(&mut message.auto_host_sni),
        alpn: take(&mut common.alpn_protocols),
        roots: validation.roots,
        sans: validation.sans,
        auto_san: take(&mut message.auto_sni_san_validation),
        client_cert,
        crl: validation.crl,
    };
    refuse_rest(&common)?;
    report.ignore_rest("tls", &message);
    Ok(tls)
}

/// Versions and ciphers: rustls offers TLS 1.2 and 1.3 with its own safe set, which is never weaker.
fn tls_params(mut params: wire::TlsParameters, report: &mut Report) {
    take(&mut params.tls_minimum_protocol_version);
    take(&mut params.tls_maximum_protocol_version);
    report.ignore_rest("tls_params", &params);
}

#[derive(Default)]
struct Validation {
    roots: Option<CertSource>,
    sans: Vec<StringMatcher>,
    crl: Option<CertSource>,
}

fn validation(
    message: Option<wire::common_tls_context::ValidationContextType>,
    report: &mut Report,
) -> Refusable<Validation> {
    use wire::common_tls_context::{CombinedCertificateValidationContext, ValidationContextType};
    match message {
        None => Ok(Validation::default()),
        Some(ValidationContextType::ValidationContext(context)) => context_of(context, report),
        Some(ValidationContextType::ValidationContextSdsSecretConfig(secret)) => {
            Ok(Validation { roots: Some(secret_name(&secret.name)), ..Validation::default() })
        }
        Some(ValidationContextType::CombinedValidationContext(CombinedCertificateValidationContext {
            default_validation_context,
            validation_context_sds_secret_config,
            validation_context_certificate_provider: None,
            validation_context_certificate_provider_instance: None,
        })) => {
            let mut out =
                default_validation_context.map(|context| context_of(context, report)).transpose()?.unwrap_or_default();
            if let Some(secret) = validation_context_sds_secret_config {
                out.roots = Some(secret_name(&secret.name));
            }
            Ok(out)
        }
        Some(_) => Err(Refusal::new("validation_context", "certificate providers are not supported")),
    }
}

fn context_of(mut context: wire::CertificateValidationContext, report: &mut Report) -> Refusable<Validation> {
    let mut out = Validation::default();
    for typed in take(&mut context.match_typed_subject_alt_names) {
        let matcher = typed.matcher.ok_or_else(|| Refusal::new("match_typed_subject_alt_names", "no matcher"))?;
        out.sans.push(string(matcher)?);
    }
    out.sans.extend(strings(take(&mut context.match_subject_alt_names))?);
    if let Some(source) = context.trusted_ca.take() {
        out.roots = Some(data_source(source)?);
    }
    if context.system_root_certs.take().is_some() {
        out.roots = Some(CertSource::System);
    }
    out.crl = context.crl.take().map(data_source).transpose()?;
    take(&mut context.only_verify_leaf_cert_crl);
    context.watched_directory.take();
    if context.allow_expired_certificate {
        report.ignored("allow_expired_certificate", "expired certificates are refused");
        context.allow_expired_certificate = false;
    }
    refuse_rest(&context)?;
    Ok(out)
}

fn data_source(source: core::DataSource) -> Refusable<CertSource> {
    use core::data_source::Specifier;
    match source.specifier {
        Some(Specifier::Filename(path)) => Ok(CertSource::File(path)),
        Some(Specifier::InlineBytes(bytes)) => Ok(CertSource::Inline(bytes)),
        Some(Specifier::InlineString(text)) => Ok(CertSource::Inline(text.into_bytes())),
        Some(Specifier::EnvironmentVariable(_)) | None => Err(Refusal::new("data_source", "not supported")),
    }
}

fn files(mut certificate: wire::TlsCertificate) -> Refusable<CertSource> {
    let chain = certificate.certificate_chain.take().map(data_source).transpose()?;
    let key = certificate.private_key.take().map(data_source).transpose()?;
    refuse_rest(&certificate)?;
    match (chain, key) {
        (Some(CertSource::File(cert)), Some(CertSource::File(key))) => Ok(CertSource::Files { cert, key }),
        _ => Err(Refusal::new("tls_certificates", "only a chain and key on disk are supported")),
    }
}

/// istiod's names for files: `file-root:PATH` and `file-cert:CERT~KEY`.
fn secret_name(name: &str) -> CertSource {
    if name == "system" || name == "file-root:system" {
        return CertSource::System;
    }
    if let Some(path) = name.strip_prefix("file-root:") {
        return CertSource::File(path.to_owned());
    }
    match name.strip_prefix("file-cert:").and_then(|pair| pair.split_once('~')) {
        Some((cert, key)) => CertSource::Files { cert: cert.to_owned(), key: key.to_owned() },
        None => CertSource::Sds(name.to_owned()),
    }
}

/// The context of mesh TLS (HBONE): own certificate `default`, roots `ROOTCA`; gives the peers' SAN matchers.
pub(super) fn mesh_peer(mut common: wire::CommonTlsContext, report: &mut Report) -> Refusable<Vec<StringMatcher>> {
    let validation = validation(common.validation_context_type.take(), report)?;
    match validation.roots {
        Some(CertSource::Sds(name)) if name == "ROOTCA" => {}
        other => return Err(Refusal::new("validation_context", format!("roots are {other:?} instead of ROOTCA"))),
    }
    let own = take(&mut common.tls_certificate_sds_secret_configs);
    if own.len() != 1 || own.iter().any(|secret| secret.name != "default") {
        return Err(Refusal::new("tls_certificate_sds_secret_configs", "not the one named default"));
    }
    if let Some(params) = common.tls_params.take() {
        tls_params(params, report);
    }
    take(&mut common.alpn_protocols);
    refuse_rest(&common)?;
    Ok(validation.sans)
}
