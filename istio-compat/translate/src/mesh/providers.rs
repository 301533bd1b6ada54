//! What is read of the mesh configuration: extension providers that authorize, log and trace, and whether everybody is logged. It is
//! where istiod reads it, in the ConfigMap `istio` of the root namespace, under the key `mesh`.
mod tracers;

use std::collections::BTreeMap;

use compat_objects::{Duration, Kind, ObjectKey, ObjectSet};
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use crate::Faults;
pub(crate) use tracers::{Header, OpenTelemetry, TraceContextOption, Tracer, Zipkin};

const CONFIG_MAP: &str = "istio";
const KEY: &str = "mesh";
/// What istiod gives a provider that does not say.
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(600);

/// The logger that is there without being declared.
const BUILT_IN_LOGGER: &str = "envoy";
/// The same for metrics, and the type of such providers.
const PROMETHEUS: &str = "prometheus";

/// Providers by name; for one that cannot be used, why.
#[derive(Debug, Default)]
pub(crate) struct Providers {
    named: BTreeMap<String, Result<Provider, String>>,
    defaults: Defaults,
}

/// What holds where no Telemetry says otherwise: names of providers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Defaults {
    pub(crate) access_logging: Vec<String>,
    pub(crate) tracing: Vec<String>,
    pub(crate) metrics: Vec<String>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { access_logging: Vec::new(), tracing: Vec::new(), metrics: vec![PROMETHEUS.to_owned()] }
    }
}

/// A service or a file outside, by `meshConfig.extensionProviders[]`.
#[derive(Debug, Clone, PartialEq)]
enum Provider {
    Authorizer(Authorizer),
    /// `envoyFileAccessLog`
    Log(FileLog),
    Trace(Tracer),
    /// `prometheus`
    Metrics,
}

/// Who is asked whether a request may pass.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Authorizer {
    /// `envoyExtAuthzHttp`
    Http(Http),
    /// `envoyExtAuthzGrpc`
    Grpc(Grpc),
}

/// Where and how requests are written down.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct FileLog {
    #[serde(default = "standard_output")]
    pub(crate) path: String,
    #[serde(default)]
    pub(crate) log_format: LogFormat,
    #[serde(default)]
    pub(crate) omit_empty_values: bool,
}

/// One of both; Istio's own text without either.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct LogFormat {
    #[serde(default)]
    pub(crate) text: Option<String>,
    #[serde(default)]
    pub(crate) labels: Option<serde_json::Map<String, Value>>,
}

fn standard_output() -> String {
    "/dev/stdout".to_owned()
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Http {
    pub(crate) service: String,
    pub(crate) port: u16,
    #[serde(default)]
    timeout: Option<Duration>,
    #[serde(default)]
    pub(crate) path_prefix: String,
    #[serde(default)]
    pub(crate) fail_open: bool,
    #[serde(default)]
    pub(crate) clear_route_cache: bool,
    #[serde(default, deserialize_with = "status")]
    pub(crate) status_on_error: Option<u16>,
    /// The old name; the new one wins.
    #[serde(default)]
    include_headers_in_check: Vec<String>,
    #[serde(default)]
    include_request_headers_in_check: Vec<String>,
    #[serde(default)]
    pub(crate) include_additional_headers_in_check: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) include_request_body_in_check: Option<Body>,
    #[serde(default)]
    pub(crate) headers_to_upstream_on_allow: Vec<String>,
    #[serde(default)]
    pub(crate) headers_to_downstream_on_deny: Vec<String>,
    #[serde(default)]
    pub(crate) headers_to_downstream_on_allow: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Grpc {
    pub(crate) service: String,
    pub(crate) port: u16,
    #[serde(default)]
    timeout: Option<Duration>,
    #[serde(default)]
    pub(crate) fail_open: bool,
    #[serde(default)]
    pub(crate) clear_route_cache: bool,
    #[serde(default, deserialize_with = "status")]
    pub(crate) status_on_error: Option<u16>,
    #[serde(default)]
    pub(crate) include_request_body_in_check: Option<Body>,
}

/// How much of a body the service sees.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Body {
    #[serde(default)]
    pub(crate) max_request_bytes: u32,
    #[serde(default)]
    pub(crate) allow_partial_message: bool,
    #[serde(default)]
    pub(crate) pack_as_bytes: bool,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct MeshConfig {
    extension_providers: Vec<Value>,
    default_providers: Defaults,
    access_log_file: String,
    access_log_format: String,
    /// `TEXT` or `JSON`.
    access_log_encoding: String,
    /// What is not read.
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

impl Http {
    pub(crate) fn timeout(&self) -> std::time::Duration {
        self.timeout.map_or(TIMEOUT, Into::into)
    }

    /// Request headers the service is told, besides those it is always told.
    pub(crate) fn request_headers(&self) -> &[String] {
        let new = &self.include_request_headers_in_check;
        if new.is_empty() { &self.include_headers_in_check } else { new }
    }
}

impl Grpc {
    pub(crate) fn timeout(&self) -> std::time::Duration {
        self.timeout.map_or(TIMEOUT, Into::into)
    }
}

impl Providers {
    /// Of the mesh. A configuration that cannot be read has no providers, so that what asks for one is denied.
    pub(crate) fn read(objects: &ObjectSet, root_namespace: &str, faults: &mut Faults) -> Self {
        let map = objects.config_map(root_namespace, CONFIG_MAP);
        let none = || Self::of(MeshConfig::default());
        let Some(text) = map.and_then(|map| map.data.as_ref()?.get(KEY)) else { return none() };
        let key = ObjectKey::new(Kind::ConfigMap, root_namespace, CONFIG_MAP);
        match serde_saphyr::from_str::<Option<MeshConfig>>(text) {
            Ok(config) => {
                let config = config.unwrap_or_default();
                for field in config.rest.keys() {
                    let reason = "is not read by this control plane: its own flags and defaults count";
                    faults.warning(objects, &key, &format!("data.{KEY}.{field}"), reason);
                }
                Self::of(config)
            }
            Err(error) => {
                let reason = format!("{error}; no extension provider is known until it is corrected");
                faults.error(objects, &key, &format!("data.{KEY}"), reason);
                none()
            }
        }
    }

    fn of(config: MeshConfig) -> Self {
        let built_in = built_in(&config);
        let named = config.extension_providers.into_iter().filter_map(|mut provider| {
            let name = provider.get("name")?.as_str()?.to_owned();
            let read = READERS.iter().find_map(|(kind, read)| Some(read(provider.get_mut(*kind)?.take())));
            let other = || provider.as_object()?.keys().find(|key| *key != "name").cloned();
            let read = match read {
                Some(read) => read.map_err(|error| format!("extension provider {name} cannot be read: {error}")),
                None => Err(format!("extension provider {name} is of type {}, which is not served", other()?)),
            };
            Some((name, read))
        });
        let mut defaults = config.default_providers;
        if !config.access_log_file.is_empty() && defaults.access_logging.is_empty() {
            defaults.access_logging.push(BUILT_IN_LOGGER.to_owned());
        }
        let mut named: BTreeMap<_, _> = named.collect();
        named.entry(BUILT_IN_LOGGER.to_owned()).or_insert(built_in);
        named.entry(PROMETHEUS.to_owned()).or_insert(Ok(Provider::Metrics));
        Self { named, defaults }
    }

    pub(crate) fn defaults(&self) -> &Defaults {
        &self.defaults
    }

    /// A provider that authorizes.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn authorizer(&self, name: &str) -> Result<&Authorizer, String> {
        self.of_kind(name, "authorizes", |provider| match provider {
            Provider::Authorizer(authorizer) => Some(authorizer),
            _ => None,
        })
    }

    /// A provider that logs requests.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn logger(&self, name: &str) -> Result<&FileLog, String> {
        self.of_kind(name, "logs requests to a file", |provider| match provider {
            Provider::Log(log) => Some(log),
            _ => None,
        })
    }

    /// A provider that takes spans.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn tracer(&self, name: &str) -> Result<&Tracer, String> {
        self.of_kind(name, "takes spans", |provider| match provider {
            Provider::Trace(tracer) => Some(tracer),
            _ => None,
        })
    }

    /// Whether a provider fetches metrics.
    ///
    /// # Errors
    /// Why it does not.
    pub(crate) fn fetches_metrics(&self, name: &str) -> Result<(), String> {
        self.of_kind(name, "fetches metrics", |provider| matches!(provider, Provider::Metrics).then_some(()))
    }

    fn of_kind<'p, T>(&'p self, name: &str, does: &str, pick: impl Fn(&'p Provider) -> Option<T>) -> Result<T, String> {
        let found = self.named.get(name).map(|provider| provider.as_ref().map_err(Clone::clone)).transpose()?;
        let none = || format!("the mesh configuration has no extension provider {name:?} that {does}");
        found.and_then(pick).ok_or_else(none)
    }
}

type Reader = fn(Value) -> Result<Provider, serde_json::Error>;
const READERS: [(&str, Reader); 6] = [
    ("envoyExtAuthzHttp", |value| serde_json::from_value(value).map(Authorizer::Http).map(Provider::Authorizer)),
    ("envoyExtAuthzGrpc", |value| serde_json::from_value(value).map(Authorizer::Grpc).map(Provider::Authorizer)),
    ("envoyFileAccessLog", |value| serde_json::from_value(value).map(Provider::Log)),
    ("opentelemetry", |value| serde_json::from_value(value).map(Tracer::OpenTelemetry).map(Provider::Trace)),
    ("zipkin", |value| serde_json::from_value(value).map(Tracer::Zipkin).map(Provider::Trace)),
    (PROMETHEUS, |_| Ok(Provider::Metrics)),
];

/// As the mesh configuration says logs are to be, wherever they are turned on.
fn built_in(config: &MeshConfig) -> Result<Provider, String> {
    let (format, file) = (&config.access_log_format, &config.access_log_file);
    let path = if file.is_empty() { standard_output() } else { file.clone() };
    let log_format = match (config.access_log_encoding.as_str(), format.as_str()) {
        ("JSON", "") => LogFormat { labels: Some(default_labels()), text: None },
        ("JSON", format) => LogFormat {
            labels: Some(serde_json::from_str(format).map_err(|error| format!("accessLogFormat is no JSON: {error}"))?),
            text: None,
        },
        (_, "") => LogFormat::default(),
        (_, format) => LogFormat { text: Some(format.to_owned()), labels: None },
    };
    Ok(Provider::Log(FileLog { path, log_format, omit_empty_values: false }))
}

/// Istio's fields where only the encoding is said.
fn default_labels() -> serde_json::Map<String, Value> {
    const LABELS: [(&str, &str); 24] = [
        ("start_time", "%START_TIME%"),
        ("route_name", "%ROUTE_NAME%"),
        ("method", "%REQ(:METHOD)%"),
        ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
        ("protocol", "%PROTOCOL%"),
        ("response_code", "%RESPONSE_CODE%"),
        ("response_flags", "%RESPONSE_FLAGS%"),
        ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
        ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
        ("bytes_received", "%BYTES_RECEIVED%"),
        ("bytes_sent", "%BYTES_SENT%"),
        ("duration", "%DURATION%"),
        ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
        ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
        ("user_agent", "%REQ(USER-AGENT)%"),
        ("request_id", "%REQ(X-REQUEST-ID)%"),
        ("authority", "%REQ(:AUTHORITY)%"),
        ("upstream_host", "%UPSTREAM_HOST%"),
        ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
        ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
        ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
        ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
        ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
        ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
    ];
    LABELS.iter().map(|(name, format)| ((*name).to_owned(), (*format).into())).collect()
}

/// A status, which Istio writes as a text.
fn status<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    let status = match Value::deserialize(deserializer)? {
        Value::Null => return Ok(None),
        Value::String(text) if text.is_empty() => return Ok(None),
        Value::String(text) => text.parse().ok(),
        value => value.as_u64().and_then(|status| u16::try_from(status).ok()),
    };
    let status = status.filter(|status| (200..600).contains(status));
    status.map(Some).ok_or_else(|| de::Error::custom("statusOnError is no status from 200 to 599"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn providers(text: &str) -> Providers {
        Providers::of(serde_saphyr::from_str(text).unwrap())
    }

    #[test]
    fn providers_are_read_one_by_one() {
        let found = providers(
            "
extensionProviders:
- name: good
  envoyExtAuthzGrpc: {service: a/authz.example, port: 9000, timeout: 2.5s, statusOnError: \"503\"}
- name: misspelt
  envoyExtAuthzGrpc: {service: authz.example, port: 9000, failopen: true}
- name: status
  envoyExtAuthzHttp: {service: authz.example, port: 80, statusOnError: \"99\"}
- name: log
  envoyFileAccessLog: {path: /dev/stderr}
- name: datadog
  datadog: {service: d, port: 1}
- name: zipkin
  zipkin: {service: z, port: 9411, enable64bitTraceId: true, traceContextOption: USE_B3_WITH_W3C_PROPAGATION}
defaultConfig: {whatever: 1}
",
        );
        let Ok(Authorizer::Grpc(good)) = found.authorizer("good") else { panic!("{found:?}") };
        assert_eq!((good.timeout().as_millis(), good.status_on_error, good.fail_open), (2500, Some(503), false));
        assert!(found.authorizer("misspelt").unwrap_err().contains("failopen"));
        assert!(found.authorizer("status").unwrap_err().contains("statusOnError"));
        assert!(found.authorizer("log").unwrap_err().contains("no extension provider"));
        assert_eq!(found.logger("log").unwrap().path, "/dev/stderr");
        assert_eq!(
            found.tracer("datadog").unwrap_err(),
            "extension provider datadog is of type datadog, which is not served"
        );
        let Ok(Tracer::Zipkin(zipkin)) = found.tracer("zipkin") else { panic!("{found:?}") };
        assert_eq!((zipkin.path.as_str(), zipkin.timeout().as_secs(), zipkin.short_ids), ("/api/v2/spans", 5, true));
        assert_eq!(zipkin.trace_context_option, TraceContextOption::UseB3WithW3cPropagation);
        assert_eq!(found.logger("envoy").unwrap().path, "/dev/stdout");
        assert!(found.defaults().access_logging.is_empty());
    }

    #[test]
    fn logs_of_the_whole_mesh_are_as_the_configuration_says() {
        let text = providers("{accessLogFile: /dev/stdout, accessLogFormat: '%PATH%'}");
        assert_eq!(text.defaults().access_logging, ["envoy"]);
        assert_eq!(text.logger("envoy").unwrap().log_format.text.as_deref(), Some("%PATH%"));
        let json = providers("{accessLogFile: /dev/stdout, accessLogEncoding: JSON}");
        assert!(json.logger("envoy").unwrap().log_format.labels.as_ref().unwrap().contains_key("response_code"));
        let odd = providers("{accessLogFile: /dev/stdout, accessLogEncoding: JSON, accessLogFormat: 'x'}");
        assert!(odd.logger("envoy").unwrap_err().contains("no JSON"));
    }
}
