//! The HTTP connection manager and its filters.
use std::mem::take;
use std::time::Duration;

use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::extensions::filters::common::set_filter_state::v3 as set_state;
use xds_proto::envoy::envoy::extensions::filters::http;
use xds_proto::envoy::envoy::extensions::filters::network::http_connection_manager::v3 as wire;
use xds_proto::envoy::google::protobuf as wkt;

use super::common::{TypedStruct, is_true, opt_duration, timeout, type_name, u32_of, unpack};
use super::report::{At, Refusable, Refusal, Report, refuse_rest};
use super::telemetry::{access_logs, stats, stats_as_json, tracing};
use super::{ext_authz, filter, headers, rbac, route};
use crate::envoy::chain::{
    EscapedSlashes, ForwardClientCert, HttpChain, HttpOptions, PathOptions, ServerHeader, UnderscoreAction,
};
use crate::envoy::filter::{FilterStateSet, HttpFilter, HttpFilterKind, Router};

/// Reads a whole connection manager.
pub(super) fn chain(mut message: wire::HttpConnectionManager, report: &mut Report) -> Refusable<HttpChain> {
    use wire::http_connection_manager::RouteSpecifier;
    let routes = match message.route_specifier.take() {
        Some(RouteSpecifier::RouteConfig(config)) => route::config(config, report)?,
        Some(RouteSpecifier::Rds(rds)) => {
            return Err(Refusal::new("rds", format!("{}: only inline routes are supported", rds.route_config_name)));
        }
        Some(RouteSpecifier::ScopedRoutes(_)) => return Err(Refusal::new("scoped_routes", "not supported")),
        None => return Err(Refusal::new("route_specifier", "missing")),
    };
    let filters = take(&mut message.http_filters)
        .into_iter()
        .filter_map(|message| http_filter(message, report).transpose())
        .collect::<Refusable<Vec<_>>>()
        .at("http_filters")?;
    if !matches!(filters.last().map(|filter| &filter.kind), Some(HttpFilterKind::Router(_))) {
        return Err(Refusal::new("http_filters", "the last one is not the router"));
    }
    let access_logs = access_logs(take(&mut message.access_log), report);
    let tracing = message.tracing.take().map(|message| tracing(message, report));
    let options = options(&mut message, report)?;
    rest(message, report)?;
    Ok(HttpChain { options, filters, routes, access_logs, tracing })
}

/// Fields without the effect they have in Envoy are noticed, fields touching security refused.
fn rest(mut message: wire::HttpConnectionManager, report: &mut Report) -> Refusable<()> {
    take(&mut message.stat_prefix);
    // x-request-id is always a UUID; its sampling bits are Envoy's own.
    message.request_id_extension.take();
    // One codec for both versions is what AUTO means; naming one narrows it, which is harmless.
    take(&mut message.codec_type);
    take(&mut message.http1_safe_max_connection_duration);
    for (set, field) in [
        (message.forward_client_cert_matcher.take().is_some(), "forward_client_cert_matcher"),
        (message.local_reply_config.take().is_some(), "local_reply_config"),
        (!take(&mut message.original_ip_detection_extensions).is_empty(), "original_ip_detection_extensions"),
        (!take(&mut message.early_header_mutation_extensions).is_empty(), "early_header_mutation_extensions"),
        (message.path_normalization_options.take().is_some(), "path_normalization_options"),
        (message.typed_header_validation_config.take().is_some(), "typed_header_validation_config"),
        (message.internal_address_config.take().is_some(), "internal_address_config"),
    ] {
        if set {
            return Err(Refusal::new(field, "not supported"));
        }
    }
    report.ignore_rest("", &message);
    Ok(())
}

fn options(message: &mut wire::HttpConnectionManager, report: &mut Report) -> Refusable<HttpOptions> {
    use core::http_protocol_options::HeadersWithUnderscoresAction as Underscores;
    use wire::http_connection_manager::ServerHeaderTransformation as Transformation;
    let mut common = message.common_http_protocol_options.take().unwrap_or_default();
    let mut http1 = message.http_protocol_options.take().unwrap_or_default();
    let mut http2 = message.http2_protocol_options.take().unwrap_or_default();
    // set_current_client_cert_details only says which parts are set where SANITIZE_SET or APPEND_FORWARD ask for it.
    message.set_current_client_cert_details.take();
    let server_name = take(&mut message.server_name);
    let options = HttpOptions {
        server_name: if server_name.is_empty() { "envoy".to_owned() } else { server_name },
        server_header: match Transformation::try_from(take(&mut message.server_header_transformation)) {
            Ok(Transformation::Overwrite) => ServerHeader::Overwrite,
            Ok(Transformation::AppendIfAbsent) => ServerHeader::AppendIfAbsent,
            Ok(Transformation::PassThrough) => ServerHeader::PassThrough,
            Err(_) => return Err(Refusal::new("server_header_transformation", "unknown")),
        },
        path: path_options(message)?,
        upgrades: upgrades(take(&mut message.upgrade_configs))?,
        // Envoy's default is five minutes.
        stream_idle_timeout: timeout(
            "stream_idle_timeout",
            message.stream_idle_timeout.take(),
            Some(Duration::from_secs(300)),
        )?,
        idle_timeout: timeout("idle_timeout", common.idle_timeout.take(), Some(Duration::from_secs(3600)))?,
        request_timeout: timeout("request_timeout", message.request_timeout.take(), None)?,
        request_headers_timeout: timeout("request_headers_timeout", message.request_headers_timeout.take(), None)?,
        max_connection_duration: opt_duration("max_connection_duration", common.max_connection_duration.take())?,
        max_stream_duration: timeout("max_stream_duration", common.max_stream_duration.take(), None)?,
        max_requests_per_connection: u32_of(common.max_requests_per_connection.take()).filter(|max| *max > 0),
        max_request_headers_kb: u32_of(message.max_request_headers_kb.take()).unwrap_or(60),
        max_headers_count: u32_of(common.max_headers_count.take()).unwrap_or(100),
        underscores: match Underscores::try_from(take(&mut common.headers_with_underscores_action)) {
            Ok(Underscores::Allow) => UnderscoreAction::Allow,
            Ok(Underscores::RejectRequest) => UnderscoreAction::Reject,
            Ok(Underscores::DropHeader) => UnderscoreAction::Drop,
            Err(_) => return Err(Refusal::new("headers_with_underscores_action", "unknown")),
        },
        drain_timeout: opt_duration("drain_timeout", message.drain_timeout.take())?.unwrap_or(Duration::from_secs(5)),
        accept_http10: take(&mut http1.accept_http_10),
        default_host_http10: Some(take(&mut http1.default_host_for_http_10)).filter(|host| !host.is_empty()),
        preserve_header_case: http1.header_key_format.take().is_some(),
        max_concurrent_streams: u32_of(http2.max_concurrent_streams.take()),
        forward_100_continue: take(&mut message.proxy_100_continue),
        use_remote_address: is_true(message.use_remote_address.take()),
        xff_trusted_hops: take(&mut message.xff_num_trusted_hops),
        client_cert: client_cert(take(&mut message.forward_client_cert_details))?,
        generate_request_id: message.generate_request_id.take().is_none_or(|flag| flag.value),
        preserve_external_request_id: take(&mut message.preserve_external_request_id),
        always_set_request_id_in_response: take(&mut message.always_set_request_id_in_response),
        via: Some(take(&mut message.via)).filter(|via| !via.is_empty()),
        strip_port_from_host: take(&mut message.strip_matching_host_port) | strip_port(message.strip_port_mode.take()),
    };
    // CONNECT is served where the chain asks for it; keep-alive of the HBONE connection is read by its owner.
    take(&mut http2.allow_connect);
    http2.connection_keepalive.take();
    report.ignore_rest("common_http_protocol_options", &common);
    report.ignore_rest("http_protocol_options", &http1);
    report.ignore_rest("http2_protocol_options", &http2);
    Ok(options)
}

fn strip_port(mode: Option<wire::http_connection_manager::StripPortMode>) -> bool {
    use wire::http_connection_manager::StripPortMode;
    matches!(mode, Some(StripPortMode::StripAnyHostPort(true)))
}

fn path_options(message: &mut wire::HttpConnectionManager) -> Refusable<PathOptions> {
    use wire::http_connection_manager::PathWithEscapedSlashesAction as Action;
    Ok(PathOptions {
        normalize: is_true(message.normalize_path.take()),
        merge_slashes: take(&mut message.merge_slashes),
        escaped_slashes: match Action::try_from(take(&mut message.path_with_escaped_slashes_action)) {
            Ok(Action::ImplementationSpecificDefault | Action::KeepUnchanged) => EscapedSlashes::Keep,
            Ok(Action::RejectRequest) => EscapedSlashes::Reject,
            Ok(Action::UnescapeAndRedirect) => EscapedSlashes::UnescapeAndRedirect,
            Ok(Action::UnescapeAndForward) => EscapedSlashes::UnescapeAndForward,
            Err(_) => return Err(Refusal::new("path_with_escaped_slashes_action", "unknown")),
        },
    })
}

fn client_cert(value: i32) -> Refusable<ForwardClientCert> {
    use wire::http_connection_manager::ForwardClientCertDetails as Details;
    Ok(match Details::try_from(value) {
        Ok(Details::Sanitize) => ForwardClientCert::Sanitize,
        Ok(Details::ForwardOnly) => ForwardClientCert::ForwardOnly,
        Ok(Details::AppendForward) => ForwardClientCert::AppendForward,
        Ok(Details::SanitizeSet) => ForwardClientCert::SanitizeSet,
        Ok(Details::AlwaysForwardOnly) => ForwardClientCert::AlwaysForwardOnly,
        Err(_) => return Err(Refusal::new("forward_client_cert_details", "unknown")),
    })
}

fn upgrades(list: Vec<wire::http_connection_manager::UpgradeConfig>) -> Refusable<Vec<String>> {
    let mut out = Vec::new();
    for upgrade in list {
        if !upgrade.filters.is_empty() {
            return Err(Refusal::new("upgrade_configs.filters", "not supported"));
        }
        if upgrade.enabled.is_none_or(|flag| flag.value) {
            out.push(upgrade.upgrade_type.to_ascii_lowercase());
        }
    }
    Ok(out)
}

/// One filter; `None` if it is disabled or optional and unknown.
pub(super) fn http_filter(message: wire::HttpFilter, report: &mut Report) -> Refusable<Option<HttpFilter>> {
    let wire::HttpFilter { name, is_optional, disabled, config_type } = message;
    if disabled {
        report.ignored(format!("http_filters {name}"), "disabled, and no route can enable it");
        return Ok(None);
    }
    let any = match config_type {
        Some(wire::http_filter::ConfigType::TypedConfig(any)) => any,
        Some(wire::http_filter::ConfigType::ConfigDiscovery(_)) => {
            return Err(Refusal::new(&name, "filters by extension discovery (Wasm) are not supported"));
        }
        None if name == "envoy.filters.http.router" => {
            wkt::Any { type_url: "envoy.extensions.filters.http.router.v3.Router".to_owned(), value: Vec::new() }
        }
        None => return Err(Refusal::new(&name, "no configuration")),
    };
    match filter_kind(&any, report) {
        Ok(Some(kind)) => Ok(Some(HttpFilter { name, kind })),
        Ok(None) => Ok(None),
        // `is_optional` only spares the unknown; a security filter that is known but unreadable still refuses.
        Err(Refusal(reason)) if is_optional && reason.starts_with("unknown filter") => {
            report.ignored(format!("http_filters {name}"), reason);
            Ok(None)
        }
        Err(refusal) => Err(refusal.at(name)),
    }
}

fn filter_kind(any: &wkt::Any, report: &mut Report) -> Refusable<Option<HttpFilterKind>> {
    Ok(Some(match type_name(&any.type_url) {
        "envoy.extensions.filters.http.rbac.v3.RBAC" => {
            HttpFilterKind::Rbac(Box::new(rbac::http_filter(unpack(any)?, report)?))
        }
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication" => {
            HttpFilterKind::JwtAuthn(Box::new(filter::jwt_authn(unpack(any)?)?))
        }
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz" => {
            HttpFilterKind::ExtAuthz(Box::new(ext_authz::filter(unpack(any)?, report)?))
        }
        "envoy.extensions.filters.http.cors.v3.Cors" => {
            let http::cors::v3::Cors {} = unpack(any)?;
            HttpFilterKind::Cors
        }
        "envoy.extensions.filters.http.fault.v3.HTTPFault" => {
            HttpFilterKind::Fault(filter::fault(unpack(any)?, report)?.map(Box::new))
        }
        "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation" => header_mutation(unpack(any)?)?,
        "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig" => {
            let config: http::grpc_stats::v3::FilterConfig = unpack(any)?;
            HttpFilterKind::GrpcStats { emit_filter_state: config.emit_filter_state }
        }
        "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb" => {
            report.ignored("grpc_web", "not translated yet; gRPC-Web requests pass as they are");
            HttpFilterKind::GrpcWeb
        }
        "envoy.extensions.filters.http.set_filter_state.v3.Config" => {
            let mut config: http::set_filter_state::v3::Config = unpack(any)?;
            take(&mut config.clear_route_cache);
            HttpFilterKind::FilterState(filter_state(config.on_request_headers)?)
        }
        // Its DNS cache is the cluster's; nothing else is in it that could change a request.
        "envoy.extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig" => HttpFilterKind::DynamicForwardProxy,
        "envoy.extensions.filters.http.router.v3.Router" => HttpFilterKind::Router(router(unpack(any)?, report)),
        "stats.PluginConfig" => HttpFilterKind::Stats(Box::new(stats(unpack(any)?, report))),
        "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct" => return typed_struct(any, report).map(Some),
        other => return Err(Refusal::new("unknown filter", other)),
    }))
}

/// A payload given as JSON; only telemetry comes this way.
fn typed_struct(any: &wkt::Any, report: &mut Report) -> Refusable<HttpFilterKind> {
    // udpa.type.v1 and xds.type.v3 are the same on the wire.
    let TypedStruct { type_url, value: _ } = unpack(any)?;
    match type_name(&type_url) {
        "io.istio.http.peer_metadata.Config" => Ok(HttpFilterKind::PeerMetadata),
        "stats.PluginConfig" => Ok(HttpFilterKind::Stats(Box::new(stats_as_json(report)))),
        other => Err(Refusal::new("unknown filter", other)),
    }
}

fn header_mutation(mut message: http::header_mutation::v3::HeaderMutation) -> Refusable<HttpFilterKind> {
    let mut mutations = message.mutations.take().unwrap_or_default();
    take(&mut message.most_specific_header_mutations_wins);
    let request = headers::rules(take(&mut mutations.request_mutations)).at("request_mutations")?;
    let response = headers::rules(take(&mut mutations.response_mutations)).at("response_mutations")?;
    refuse_rest(&mutations)?;
    refuse_rest(&message)?;
    Ok(HttpFilterKind::HeaderMutation { request, response })
}

/// Keys whose meaning Strata carries itself; any other key might be read by a filter that is not understood.
const KNOWN_STATE: [(&str, &str); 6] = [
    ("envoy.filters.listener.original_dst.local_ip", "%REQ(:AUTHORITY)%"),
    (
        "envoy.filters.listener.original_dst.local_ip",
        "%FILTER_STATE(envoy.filters.listener.original_dst.local_ip:PLAIN)%",
    ),
    ("io.istio.connect_authority", "%REQ(:AUTHORITY)%"),
    ("envoy.filters.listener.original_dst.remote_ip", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("io.istio.peer_principal", "%DOWNSTREAM_PEER_URI_SAN%"),
    ("io.istio.local_principal", "%DOWNSTREAM_LOCAL_URI_SAN%"),
];

/// `set_filter_state`: exactly istiod's own entries are understood, anything else is refused, since
/// authorization reads these keys.
pub(super) fn filter_state(list: Vec<set_state::FilterStateValue>) -> Refusable<Vec<FilterStateSet>> {
    list.into_iter()
        .map(|message| {
            let set_state::FilterStateValue {
                factory_key: _,
                read_only: _,
                shared_with_upstream: _,
                skip_if_empty: _,
                key,
                value,
            } = message;
            let set_state::filter_state_value::Key::ObjectKey(key) =
                key.ok_or_else(|| Refusal::new("set_filter_state", "no key"))?;
            let set_state::filter_state_value::Value::FormatString(format) =
                value.ok_or_else(|| Refusal::new("set_filter_state", "no value"))?;
            let format = super::telemetry::text(Some(format)).at(&key)?;
            if KNOWN_STATE.contains(&(key.as_str(), format.as_str())) {
                Ok(FilterStateSet { key, format })
            } else {
                Err(Refusal::new("set_filter_state", format!("{key} = {format} is not supported")))
            }
        })
        .collect()
}

fn router(mut message: http::router::v3::Router, report: &mut Report) -> Router {
    let router = Router { suppress_envoy_headers: take(&mut message.suppress_envoy_headers) };
    message.dynamic_stats.take();
    report.ignore_rest("router", &message);
    router
}
