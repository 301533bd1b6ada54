//! The mesh configuration's extension providers, as far as they authorize: where istiod reads them, in the ConfigMap
//! `istio` of the root namespace, under the key `mesh`.
use std::collections::BTreeMap;

use compat_objects::{Duration, Kind, ObjectKey, ObjectSet};
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use crate::Faults;

const CONFIG_MAP: &str = "istio";
const KEY: &str = "mesh";
/// What istiod gives a provider that does not say.
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(600);

/// Providers by name; for one that cannot be used, why.
#[derive(Debug, Default)]
pub(crate) struct Providers(BTreeMap<String, Result<Provider, String>>);

/// An authorization service outside (`meshConfig.extensionProviders[].envoyExtAuthzHttp` and `...Grpc`).
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Provider {
    Http(Http),
    Grpc(Grpc),
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
        let Some(text) = map.and_then(|map| map.data.as_ref()?.get(KEY)) else { return Self::default() };
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
                Self::default()
            }
        }
    }

    fn of(config: MeshConfig) -> Self {
        let named = config.extension_providers.into_iter().filter_map(|mut provider| {
            let name = provider.get("name")?.as_str()?.to_owned();
            let mut take = |kind: &str| provider.get_mut(kind).map(Value::take);
            let read = match (take("envoyExtAuthzHttp"), take("envoyExtAuthzGrpc")) {
                (Some(http), _) => serde_json::from_value(http).map(Provider::Http),
                (None, Some(grpc)) => serde_json::from_value(grpc).map(Provider::Grpc),
                (None, None) => return None,
            };
            let read = read.map_err(|error| format!("extension provider {name} cannot be read: {error}"));
            Some((name, read))
        });
        Self(named.collect())
    }

    /// A provider by name.
    ///
    /// # Errors
    /// Why there is none.
    pub(crate) fn get(&self, name: &str) -> Result<&Provider, String> {
        match self.0.get(name) {
            Some(provider) => provider.as_ref().map_err(Clone::clone),
            None => Err(format!("the mesh configuration has no extension provider {name:?} that authorizes")),
        }
    }
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
  envoyFileAccessLog: {path: /dev/stdout}
defaultConfig: {whatever: 1}
",
        );
        let Ok(Provider::Grpc(good)) = found.get("good") else { panic!("{found:?}") };
        assert_eq!((good.timeout().as_millis(), good.status_on_error, good.fail_open), (2500, Some(503), false));
        assert!(found.get("misspelt").unwrap_err().contains("failopen"));
        assert!(found.get("status").unwrap_err().contains("statusOnError"));
        assert!(found.get("log").unwrap_err().contains("no extension provider"));
    }
}
