//! The `ext_authz` filter, and what routes say about it.
use std::mem::take;
use std::time::Duration;

use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::extensions::filters::http::ext_authz::v3 as ext_authz;

use super::common::{http_uri, metadata, opt_duration, string_list};
use super::headers::plain;
use super::report::{At, Refusable, Refusal, Report, refuse_rest};
use crate::envoy::ext_authz::{ExtAuthz, ExtAuthzBody, ExtAuthzPerRoute, ExtAuthzService};

/// Statuses an answer of our own may have.
const STATUSES: std::ops::Range<u16> = 200..600;

/// The `ext_authz` filter.
pub(super) fn filter(mut message: ext_authz::ExtAuthz, report: &mut Report) -> Refusable<ExtAuthz> {
    use ext_authz::ext_authz::Services;
    let service = match message.services.take() {
        Some(Services::GrpcService(service)) => grpc(service).at("grpc_service")?,
        Some(Services::HttpService(service)) => http(service).at("http_service")?,
        None => return Err(Refusal::new("services", "missing")),
    };
    // Only version 3 exists.
    message.transport_api_version = 0;
    take(&mut message.stat_prefix);
    let status_on_error = message.status_on_error.take().map_or(Ok(403), |status| {
        let status = u16::try_from(status.code).ok().filter(|status| STATUSES.contains(status));
        status.ok_or_else(|| Refusal::new("status_on_error", "outside 200 to 599"))
    })?;
    let out = ExtAuthz {
        service,
        failure_mode_allow: take(&mut message.failure_mode_allow),
        failure_mode_allow_header: take(&mut message.failure_mode_allow_header_add),
        status_on_error,
        body: message.with_request_body.take().map(
            |ext_authz::BufferSettings { max_request_bytes, allow_partial_message, pack_as_bytes }| ExtAuthzBody {
                max_request_bytes,
                allow_partial: allow_partial_message,
                pack_as_bytes,
            },
        ),
        enabled: message.filter_enabled_metadata.take().map(metadata).transpose().at("filter_enabled_metadata")?,
        allowed_headers: string_list(message.allowed_headers.take())?,
        disallowed_headers: string_list(message.disallowed_headers.take())?.unwrap_or_default(),
        clear_route_cache: take(&mut message.clear_route_cache),
        encode_raw_headers: take(&mut message.encode_raw_headers),
    };
    ignored(&mut message, report);
    refuse_rest(&message)?;
    Ok(out)
}

/// What only tells the service or telemetry more, and so can't loosen anything when it is left out.
fn ignored(message: &mut ext_authz::ExtAuthz, report: &mut Report) {
    for namespace in take(&mut message.metadata_context_namespaces) {
        report.ignored(format!("ext_authz.metadata_context_namespaces {namespace}"), "not sent to the service");
    }
    if take(&mut message.include_peer_certificate) {
        report.ignored("ext_authz.include_peer_certificate", "the service gets the principal, not the certificate");
    }
    if take(&mut message.include_tls_session) {
        report.ignored("ext_authz.include_tls_session", "not sent to the service");
    }
    if take(&mut message.emit_filter_state_stats) {
        report.ignored("ext_authz.emit_filter_state_stats", "no log operator reads them");
    }
    message.charge_cluster_response_stats.take();
    // What the service adds to metadata is read by no filter that Strata knows.
    message.enable_dynamic_metadata_ingestion.take();
}

/// What a route says about the filter.
pub(super) fn per_route(message: ext_authz::ExtAuthzPerRoute) -> Refusable<ExtAuthzPerRoute> {
    use ext_authz::ext_authz_per_route::Override;
    match message.r#override {
        Some(Override::Disabled(true)) => Ok(ExtAuthzPerRoute::Disabled),
        Some(Override::Disabled(false)) => Err(Refusal::new("disabled", "must be true")),
        Some(Override::CheckSettings(mut settings)) => {
            let check = ExtAuthzPerRoute::Check {
                context_extensions: take(&mut settings.context_extensions).into_iter().collect(),
                no_body: take(&mut settings.disable_request_body_buffering),
            };
            refuse_rest(&settings)?;
            Ok(check)
        }
        None => Err(Refusal::new("override", "missing")),
    }
}

fn grpc(mut message: core::GrpcService) -> Refusable<ExtAuthzService> {
    use core::grpc_service::TargetSpecifier;
    let mut envoy = match message.target_specifier.take() {
        Some(TargetSpecifier::EnvoyGrpc(envoy)) => envoy,
        _ => return Err(Refusal::new("target_specifier", "only envoy_grpc is supported")),
    };
    let service = ExtAuthzService::Grpc {
        cluster: take(&mut envoy.cluster_name),
        authority: Some(take(&mut envoy.authority)).filter(|authority| !authority.is_empty()),
        timeout: opt_duration("timeout", message.timeout.take())?.unwrap_or(Duration::from_millis(200)),
        initial_metadata: plain(take(&mut message.initial_metadata)).at("initial_metadata")?,
    };
    refuse_rest(&envoy)?;
    refuse_rest(&message)?;
    Ok(service)
}

fn http(mut message: ext_authz::HttpService) -> Refusable<ExtAuthzService> {
    // The cluster says where the service is; the request's own host is what it is told.
    let uri = message.server_uri.take().ok_or_else(|| Refusal::new("server_uri", "missing"))?;
    let (uri, cluster, timeout) = http_uri(uri)?;
    let mut request = message.authorization_request.take().unwrap_or_default();
    let mut response = message.authorization_response.take().unwrap_or_default();
    let list = |list| string_list(list).map(Option::unwrap_or_default);
    let service = ExtAuthzService::Http {
        uri,
        cluster,
        timeout,
        path_prefix: take(&mut message.path_prefix),
        headers_to_add: plain(take(&mut request.headers_to_add)).at("headers_to_add")?,
        allowed_upstream_headers: list(response.allowed_upstream_headers.take())?,
        allowed_upstream_headers_to_append: list(response.allowed_upstream_headers_to_append.take())?,
        allowed_client_headers: list(response.allowed_client_headers.take())?,
        allowed_client_headers_on_success: list(response.allowed_client_headers_on_success.take())?,
    };
    refuse_rest(&request)?;
    refuse_rest(&response)?;
    refuse_rest(&message)?;
    Ok(service)
}
