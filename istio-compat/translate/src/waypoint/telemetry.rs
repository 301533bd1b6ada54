//! Telemetry -> what a chain logs and traces. The mesh configuration's defaults first, then the mesh's Telemetry, the waypoint's
//! namespace's, and those attached to the waypoint and to the service; what is more specific counts.
mod metrics;
pub(crate) use metrics::is_metric;

use std::collections::BTreeMap;
use std::time::Duration;

use compat_objects::istio::{CustomTag, ModeSelector, ProviderRef, Telemetry, WorkloadMode};
use compat_objects::{HasMeta, Kind, ObjectKey};
use serde_json::Value as Json;

use super::Builder;
use super::access::Target;
use crate::mesh::providers::{FileLog, Header as HeaderToAdd, OpenTelemetry, TraceContextOption, Tracer, Zipkin};
use crate::pb::{self, Struct, any, core, ext, structure, text, trace, tracing_tag, types, u32v};
use accesslog::access_log::ConfigType;
use core::substitution_format_string::Format;
use ext::access_loggers::file::v3 as file;
use ext::filters::network::http_connection_manager::v3::http_connection_manager::Tracing;
use pb::accesslog;
use tracing_tag::custom_tag::{Environment, Header, Literal, Metadata, Type};

/// Istio's text, where a provider has no format of its own.
const TEXT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
    %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
    \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
    %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
    \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% \
    %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";
/// Percent of the traces that begin at a waypoint, where nobody says.
const SAMPLED: f64 = 1.0;
/// Istio's tags of the peers: the word in the tag's name and the field of what is known of a peer.
const OF_PEERS: [(&str, &str); 9] = [
    ("app", "app"),
    ("app_version", "version"),
    ("canonical_revision", "revision"),
    ("canonical_service", "service"),
    ("cluster_id", "cluster"),
    ("instance_name", "name"),
    ("namespace", "namespace"),
    ("workload", "workload"),
    ("workload_type", "type"),
];

/// What policies would have decided that are not in force yet: tag, and key in the metadata of RBAC.
const DRY_RUN: [(&str, &str); 4] = [
    ("allow_policy.name", "istio_dry_run_allow_shadow_effective_policy_id"),
    ("allow_policy.result", "istio_dry_run_allow_shadow_engine_result"),
    ("deny_policy.name", "istio_dry_run_deny_shadow_effective_policy_id"),
    ("deny_policy.result", "istio_dry_run_deny_shadow_engine_result"),
];

/// One object in force, with its name.
pub(super) type InForce<'t> = (ObjectKey, &'t Telemetry);

/// A provider that is to log.
struct Logged<'t> {
    /// Who named it; `None`: the mesh configuration.
    asked: Option<ObjectKey>,
    /// CEL.
    filter: Option<&'t str>,
}

/// What of tracing is said, all told.
struct Traced<'t> {
    providers: Vec<String>,
    /// Who named them.
    object: Option<ObjectKey>,
    sampling: f64,
    silent: bool,
    istio_tags: bool,
    custom: Option<&'t BTreeMap<String, CustomTag>>,
}

impl Builder<'_, '_> {
    /// From the general to the specific; of several alike the oldest.
    pub(super) fn telemetry(&self, target: &Target<'_>) -> Vec<InForce<'_>> {
        let (root, own) = (self.mesh.options.root_namespace.as_str(), self.waypoint.key.namespace.as_str());
        let mut found = Vec::new();
        for object in self.mesh.objects.telemetries() {
            let spec = &object.spec;
            let references = spec.target_ref.iter().chain(&spec.target_refs);
            let level = if references.clone().next().is_some() {
                if !self.attached(object.namespace(), spec.target_ref.as_ref(), &spec.target_refs, target) {
                    continue;
                }
                let of_service = references.into_iter().any(|reference| reference.kind.starts_with("Service"));
                if of_service { 3 } else { 2 }
            } else if spec.selector.is_some() || ![root, own].contains(&object.namespace()) {
                continue;
            } else {
                u8::from(object.namespace() != root)
            };
            let key = ObjectKey::new(Kind::Telemetry, object.namespace(), object.name());
            found.push(((level, object.created(), key.name.clone()), (key, &**object)));
        }
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        found.dedup_by_key(|((level, ..), _)| *level);
        found.into_iter().map(|(_, in_force)| in_force).collect()
    }

    /// Where the requests or connections of a target are written down.
    pub(super) fn access_logs(&self, in_force: &[InForce<'_>]) -> Vec<accesslog::AccessLog> {
        let defaults = self.mesh.providers.defaults().access_logging.iter();
        let mut wanted: BTreeMap<String, Logged<'_>> =
            defaults.map(|name| (name.clone(), Logged { asked: None, filter: None })).collect();
        for (key, object) in in_force {
            let entries = object.spec.access_logging.iter();
            let entries: Vec<_> = entries.filter(|entry| of_servers(entry.selector)).collect();
            let names = |providers: &[ProviderRef]| providers.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
            let before: Vec<String> = wanted.keys().cloned().collect();
            // Whoever names providers replaces those named before.
            if entries.iter().any(|entry| !entry.providers.is_empty() && entry.disabled != Some(true)) {
                wanted.clear();
            }
            for entry in entries {
                let filter = entry.filter.as_ref().map(|filter| filter.expression.as_str());
                let named = if entry.providers.is_empty() { before.clone() } else { names(&entry.providers) };
                for name in named {
                    match entry.disabled {
                        Some(true) => drop(wanted.remove(&name)),
                        _ => drop(wanted.insert(name, Logged { asked: Some(key.clone()), filter })),
                    }
                }
            }
        }
        let log = |(name, logged): (String, Logged<'_>)| match self.mesh.providers.logger(&name) {
            Ok(log) => Some(access_log(log, logged.filter)),
            Err(reason) => {
                self.unserved(logged.asked, "accessLogging", &reason);
                None
            }
        };
        wanted.into_iter().filter_map(log).collect()
    }

    /// How requests of a target are traced; `None` where no spans go anywhere.
    pub(super) fn tracing(&self, in_force: &[InForce<'_>]) -> Option<Tracing> {
        let mut traced = Traced {
            providers: self.mesh.providers.defaults().tracing.clone(),
            object: None,
            sampling: SAMPLED,
            silent: false,
            istio_tags: true,
            custom: None,
        };
        for (key, object) in in_force {
            let entries = object.spec.tracing.iter().enumerate();
            for (index, entry) in entries.filter(|(_, entry)| of_servers(entry.selector)) {
                if !entry.providers.is_empty() {
                    traced.providers = entry.providers.iter().map(|provider| provider.name.clone()).collect();
                    traced.object = Some(key.clone());
                }
                traced.sampling = entry.random_sampling_percentage.unwrap_or(traced.sampling);
                traced.silent = entry.disable_span_reporting.unwrap_or(traced.silent);
                traced.istio_tags = entry.enable_istio_tags.unwrap_or(traced.istio_tags);
                traced.custom = Some(&entry.custom_tags).filter(|tags| !tags.is_empty()).or(traced.custom);
                for (field, asked) in [
                    ("useRequestIdForTraceSampling", entry.use_request_id_for_trace_sampling.is_some()),
                    ("disableContextPropagation", entry.disable_context_propagation.is_some()),
                ] {
                    if asked {
                        self.warning(key, &format!("spec.tracing[{index}].{field}"), "is not looked at");
                    }
                }
            }
        }
        let (first, more) = traced.providers.split_first()?;
        if !more.is_empty() {
            self.unserved(traced.object.clone(), "tracing", &format!("spans go to one provider, {first}"));
        }
        let found = self.mesh.providers.tracer(first).and_then(|tracer| {
            let (service, port) = tracer.address();
            let (host, cluster) = self.provider_cluster(service, port)?;
            Ok((tracer, provider(tracer, &host, cluster)))
        });
        match found {
            Ok(_) if traced.silent => None,
            Ok((tracer, provider)) => Some(self.tracing_by(&traced, tracer.max_tag_length(), provider)),
            Err(reason) => {
                self.unserved(traced.object, "tracing", &reason);
                None
            }
        }
    }

    fn tracing_by(&self, traced: &Traced<'_>, max_tag_length: Option<u32>, provider: trace::tracing::Http) -> Tracing {
        let percent = |value: f64| Some(types::v3::Percent { value });
        let mut tags = BTreeMap::new();
        if traced.istio_tags {
            tags.extend(self.istio_tags());
        }
        tags.extend(traced.custom.into_iter().flatten().filter_map(|(name, tag)| Some((name.clone(), custom(tag)?))));
        Tracing {
            client_sampling: percent(100.0),
            random_sampling: percent(traced.sampling),
            overall_sampling: percent(100.0),
            max_path_tag_length: max_tag_length.and_then(u32v),
            custom_tags: tags
                .into_iter()
                .map(|(tag, value)| tracing_tag::CustomTag { tag, r#type: Some(value) })
                .collect(),
            provider: Some(provider),
            ..Tracing::default()
        }
    }

    fn istio_tags(&self) -> Vec<(String, Type)> {
        let literal = |value: &str| Type::Literal(Literal { value: value.to_owned() });
        let mut tags = vec![
            ("istio.canonical_revision".to_owned(), literal("latest")),
            ("istio.canonical_service".to_owned(), literal(&self.waypoint.key.name)),
            ("istio.cluster_id".to_owned(), literal(&self.mesh.options.cluster_id)),
            ("istio.mesh_id".to_owned(), literal(&self.mesh.options.trust_domain)),
            ("istio.namespace".to_owned(), literal(&self.waypoint.key.namespace)),
        ];
        tags.extend(DRY_RUN.map(|(word, key)| (format!("istio.authorization.dry_run.{word}"), of_rbac(key))));
        for (peer, known) in [("source", "downstream_peer_obj"), ("destination", "upstream_peer_obj")] {
            tags.extend(OF_PEERS.iter().map(|(word, field)| {
                (format!("istio.{peer}_{word}"), Type::Value(format!("%FILTER_STATE({known}:FIELD:{field})%")))
            }));
        }
        tags
    }

    /// Something asked for a provider that cannot do it.
    fn unserved(&self, asked: Option<ObjectKey>, section: &str, reason: &str) {
        let (key, field) = match asked {
            Some(key) => (key, format!("spec.{section}")),
            None => {
                let key = ObjectKey::new(Kind::ConfigMap, self.mesh.options.root_namespace.as_str(), "istio");
                (key, format!("data.mesh.defaultProviders.{section}"))
            }
        };
        self.warning(&key, &format!("{field}[].providers"), reason);
    }
}

/// A waypoint is the server's side.
fn of_servers(selector: Option<ModeSelector>) -> bool {
    selector.is_none_or(|selector| selector.mode != WorkloadMode::Client)
}

fn access_log(log: &FileLog, filter: Option<&str>) -> accesslog::AccessLog {
    let format = match (&log.log_format.labels, &log.log_format.text) {
        (Some(labels), _) => Format::JsonFormat(labels_of(labels)),
        (None, given) => {
            let mut given = given.as_deref().unwrap_or(TEXT).to_owned();
            if !given.ends_with('\n') {
                given.push('\n');
            }
            let inline = core::data_source::Specifier::InlineString(given);
            Format::TextFormatSource(core::DataSource { specifier: Some(inline), ..Default::default() })
        }
    };
    let format = core::SubstitutionFormatString {
        omit_empty_values: log.omit_empty_values,
        format: Some(format),
        ..Default::default()
    };
    let config = file::FileAccessLog {
        path: log.path.clone(),
        access_log_format: Some(file::file_access_log::AccessLogFormat::LogFormat(format)),
    };
    accesslog::AccessLog {
        name: "envoy.access_loggers.file".into(),
        filter: filter.map(expression),
        config_type: Some(ConfigType::TypedConfig(any(&config))),
    }
}

fn expression(text: &str) -> accesslog::AccessLogFilter {
    use accesslog::{access_log_filter::FilterSpecifier, extension_filter};
    let filter =
        ext::access_loggers::filters::cel::v3::ExpressionFilter { expression: text.to_owned(), ..Default::default() };
    let filter = accesslog::ExtensionFilter {
        name: "envoy.access_loggers.extension_filters.cel".into(),
        config_type: Some(extension_filter::ConfigType::TypedConfig(any(&filter))),
    };
    accesslog::AccessLogFilter { filter_specifier: Some(FilterSpecifier::ExtensionFilter(filter)) }
}

fn labels_of(labels: &serde_json::Map<String, Json>) -> Struct {
    let value = |value: &Json| match value {
        Json::String(format) => text(format),
        Json::Object(inner) => pb::nested(labels_of(inner)),
        other => text(&other.to_string()),
    };
    let mut out = structure([]);
    out.fields = labels.iter().map(|(name, format)| (name.clone(), value(format))).collect();
    out
}

fn provider(tracer: &Tracer, host: &str, cluster: String) -> trace::tracing::Http {
    let (name, config) = match tracer {
        Tracer::OpenTelemetry(tracer) => ("envoy.tracers.opentelemetry", any(&open_telemetry(tracer, host, cluster))),
        Tracer::Zipkin(tracer) => ("envoy.tracers.zipkin", any(&zipkin(tracer, host, cluster))),
    };
    trace::tracing::Http { name: name.into(), config_type: Some(trace::tracing::http::ConfigType::TypedConfig(config)) }
}

fn open_telemetry(tracer: &OpenTelemetry, host: &str, cluster: String) -> trace::OpenTelemetryConfig {
    use core::grpc_service::{EnvoyGrpc, TargetSpecifier};
    let mut config = trace::OpenTelemetryConfig::default();
    match &tracer.http {
        None => {
            let target = EnvoyGrpc { cluster_name: cluster, authority: host.to_owned(), ..Default::default() };
            let target = Some(TargetSpecifier::EnvoyGrpc(target));
            config.grpc_service = Some(core::GrpcService { target_specifier: target, ..Default::default() });
        }
        Some(http) => {
            let timeout = http.timeout().unwrap_or(Duration::from_secs(1));
            config.http_service = Some(http_service(format!("{host}{}", http.path), timeout, cluster, &http.headers));
        }
    }
    config
}

/// As istiod tells proxies from Istio 1.29 on.
fn zipkin(tracer: &Zipkin, host: &str, cluster: String) -> trace::ZipkinConfig {
    use trace::zipkin_config::{CollectorEndpointVersion, TraceContextOption as Wire};
    let uri = format!("http://{host}{}", tracer.path);
    let option = match tracer.trace_context_option {
        TraceContextOption::UseB3 => Wire::UseB3,
        TraceContextOption::UseB3WithW3cPropagation => Wire::UseB3WithW3cPropagation,
    };
    trace::ZipkinConfig {
        collector_service: Some(http_service(uri, tracer.timeout(), cluster, &tracer.headers)),
        collector_endpoint_version: CollectorEndpointVersion::HttpJson.into(),
        trace_id_128bit: !tracer.short_ids,
        shared_span_context: pb::boolv(false),
        trace_context_option: option.into(),
        ..Default::default()
    }
}

fn http_service(uri: String, timeout: Duration, cluster: String, headers: &[HeaderToAdd]) -> core::HttpService {
    let target = core::HttpUri {
        uri,
        timeout: pb::duration(timeout),
        http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster(cluster)),
    };
    core::HttpService {
        http_uri: Some(target),
        request_headers_to_add: headers.iter().map(|header| pb::set_header(&header.name, &header.value)).collect(),
        ..Default::default()
    }
}

/// From the request's metadata.
fn of_rbac(key: &str) -> Type {
    use pb::types::metadata::v3::{MetadataKey, MetadataKind, metadata_key, metadata_kind};
    let segment = metadata_key::path_segment::Segment::Key(key.to_owned());
    let path = vec![metadata_key::PathSegment { segment: Some(segment) }];
    Type::Metadata(Metadata {
        kind: Some(MetadataKind { kind: Some(metadata_kind::Kind::Request(metadata_kind::Request {})) }),
        metadata_key: Some(MetadataKey { key: "envoy.filters.http.rbac".into(), path }),
        default_value: String::new(),
    })
}

fn custom(tag: &CustomTag) -> Option<Type> {
    let CustomTag { literal, environment, header, formatter } = tag;
    let literal = literal.as_ref().map(|tag| Type::Literal(Literal { value: tag.value.clone() }));
    let environment = environment
        .as_ref()
        .map(|tag| Type::Environment(Environment { name: tag.name.clone(), default_value: tag.default_value.clone() }));
    let header = header
        .as_ref()
        .map(|tag| Type::RequestHeader(Header { name: tag.name.clone(), default_value: tag.default_value.clone() }));
    literal.or(environment).or(header).or_else(|| Some(Type::Value(formatter.as_ref()?.value.clone())))
}
