//! Messages as protobuf's JSON (lowerCamelCase, `@type` in every `Any`), for admin interfaces that answer as Envoy's.
use std::collections::BTreeSet;
use std::sync::OnceLock;

use prost_reflect::prost_types::{DescriptorProto, FileDescriptorProto};
use prost_reflect::{DescriptorPool, DynamicMessage, ReflectMessage, SerializeOptions, Value};
use serde_json::Map;

/// Why a message cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    #[error("the descriptors built in cannot be read: {0}")]
    Descriptors(String),
    #[error("{0}: no descriptor of this type is built in")]
    UnknownType(String),
    #[error("{type_url}: {source}")]
    Decode { type_url: String, source: prost::DecodeError },
    #[error("{type_url}: {source}")]
    Serialize { type_url: String, source: serde_json::Error },
}

const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.binpb"));
const ANY: &str = "google.protobuf.Any";

fn pool() -> Result<&'static DescriptorPool, JsonError> {
    static POOL: OnceLock<Result<DescriptorPool, String>> = OnceLock::new();
    let pool = POOL.get_or_init(|| DescriptorPool::decode(DESCRIPTORS).map_err(|error| error.to_string()));
    pool.as_ref().map_err(|error| JsonError::Descriptors(error.clone()))
}

/// `body` as JSON, `@type` first. Packed messages of types that are not built in are shown by their type alone.
///
/// # Errors
/// If the type itself is not built in, or `body` is no message of it.
pub fn any(type_url: &str, body: &[u8]) -> Result<serde_json::Value, JsonError> {
    let known = pool()?;
    let message = decode(known, type_url, body)?;
    let mut unknown = BTreeSet::new();
    collect_unknown(known, &message, &mut unknown);
    let message = if unknown.is_empty() { message } else { decode(&with(known, unknown)?, type_url, body)? };
    let failed = |source| JsonError::Serialize { type_url: type_url.to_owned(), source };
    let options = SerializeOptions::new();
    let fields = message.serialize_with_options(serde_json::value::Serializer, &options).map_err(failed)?;
    let mut out = Map::from_iter([("@type".to_owned(), type_url.into())]);
    match fields {
        serde_json::Value::Object(fields) => out.extend(fields),
        // Well-known types have a form of their own.
        value => drop(out.insert("value".to_owned(), value)),
    }
    Ok(out.into())
}

fn decode(pool: &DescriptorPool, type_url: &str, body: &[u8]) -> Result<DynamicMessage, JsonError> {
    let descriptor =
        pool.get_message_by_name(name(type_url)).ok_or_else(|| JsonError::UnknownType(type_url.to_owned()))?;
    DynamicMessage::decode(descriptor, body)
        .map_err(|source| JsonError::Decode { type_url: type_url.to_owned(), source })
}

fn name(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or(type_url)
}

/// Names of packed types, at any depth, that `pool` does not hold.
fn collect_unknown(pool: &DescriptorPool, message: &DynamicMessage, unknown: &mut BTreeSet<String>) {
    if message.descriptor().full_name() == ANY {
        let field = |number| message.get_field_by_number(number);
        let (Some(type_url), Some(body)) = (field(1), field(2)) else { return };
        let (Some(type_url), Some(body)) = (type_url.as_str(), body.as_bytes()) else { return };
        match decode(pool, type_url, body) {
            Ok(packed) => collect_unknown(pool, &packed, unknown),
            Err(JsonError::UnknownType(_)) => drop(unknown.insert(name(type_url).to_owned())),
            // Serializing says what is wrong.
            Err(_) => {}
        }
        return;
    }
    for (_, value) in message.fields() {
        collect_in_value(pool, value, unknown);
    }
}

fn collect_in_value(pool: &DescriptorPool, value: &Value, unknown: &mut BTreeSet<String>) {
    match value {
        Value::Message(message) => collect_unknown(pool, message, unknown),
        Value::List(list) => list.iter().for_each(|value| collect_in_value(pool, value, unknown)),
        Value::Map(map) => map.values().for_each(|value| collect_in_value(pool, value, unknown)),
        _ => {}
    }
}

/// `pool` with an empty message for each of `names`, so that the `Any`s that hold them can be written.
fn with(pool: &DescriptorPool, names: BTreeSet<String>) -> Result<DescriptorPool, JsonError> {
    let mut pool = pool.clone();
    for (index, name) in names.into_iter().enumerate() {
        let (package, message) = name.rsplit_once('.').unwrap_or(("", &name));
        let file = FileDescriptorProto {
            name: Some(format!("unknown/{index}.proto")),
            package: Some(package.to_owned()),
            syntax: Some("proto3".to_owned()),
            message_type: vec![DescriptorProto { name: Some(message.to_owned()), ..Default::default() }],
            ..Default::default()
        };
        pool.add_file_descriptor_proto(file).map_err(|error| JsonError::Descriptors(error.to_string()))?;
    }
    Ok(pool)
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::cluster::v3::Cluster;
    use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
    use envoy_types::pb::google::protobuf::{Any, Duration};
    use prost::Message;
    use serde_json::json;

    use crate::type_url;

    #[test]
    fn envoys_names_and_durations() {
        let timeout = Some(Duration { seconds: 10, nanos: 0 });
        let cluster = Cluster { name: "c".to_owned(), connect_timeout: timeout, ..Default::default() };
        let shown = super::any(type_url::CLUSTER, &cluster.encode_to_vec()).unwrap();
        assert_eq!(shown, json!({ "@type": type_url::CLUSTER, "name": "c", "connectTimeout": "10s" }));
    }

    #[test]
    fn a_packed_type_nobody_knows_is_named() {
        let packed = Any { type_url: "type.googleapis.com/some.new.Filter".to_owned(), value: vec![8, 1] };
        let config = TypedExtensionConfig { name: "x".to_owned(), typed_config: Some(packed) };
        let shown = super::any(type_url::EXTENSION, &config.encode_to_vec()).unwrap();
        assert_eq!(shown["typedConfig"], json!({ "@type": "type.googleapis.com/some.new.Filter" }));
    }

    #[test]
    fn what_cannot_be_shown_is_an_error() {
        assert!(super::any("type.googleapis.com/some.Thing", &[]).unwrap_err().to_string().contains("some.Thing"));
        assert!(super::any(type_url::CLUSTER, &[0xff]).unwrap_err().to_string().contains("Cluster"));
    }
}
