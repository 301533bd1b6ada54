//! Messages as JSON by reflection, normalised, and their differences as lines.
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::{Map, Value};
use xds_proto::envoy::google::protobuf::Any;

/// Every file with a message that occurs.
const FILES: &[&str] = &[
    "envoy/config/listener/v3/listener.proto",
    "envoy/config/cluster/v3/cluster.proto",
    "envoy/config/endpoint/v3/endpoint.proto",
    "envoy/config/trace/v3/opentelemetry.proto",
    "envoy/extensions/access_loggers/file/v3/file.proto",
    "envoy/extensions/access_loggers/filters/cel/v3/cel.proto",
    "envoy/extensions/filters/network/http_connection_manager/v3/http_connection_manager.proto",
    "envoy/extensions/filters/network/tcp_proxy/v3/tcp_proxy.proto",
    "envoy/extensions/filters/network/rbac/v3/rbac.proto",
    "envoy/extensions/filters/network/set_filter_state/v3/set_filter_state.proto",
    "envoy/extensions/clusters/dynamic_forward_proxy/v3/cluster.proto",
    "envoy/extensions/filters/http/dynamic_forward_proxy/v3/dynamic_forward_proxy.proto",
    "envoy/extensions/filters/http/rbac/v3/rbac.proto",
    "envoy/extensions/filters/http/set_filter_state/v3/set_filter_state.proto",
    "envoy/extensions/filters/http/jwt_authn/v3/config.proto",
    "envoy/extensions/filters/http/ext_authz/v3/ext_authz.proto",
    "envoy/extensions/filters/http/cors/v3/cors.proto",
    "envoy/extensions/filters/http/fault/v3/fault.proto",
    "envoy/extensions/filters/http/grpc_stats/v3/config.proto",
    "envoy/extensions/filters/http/router/v3/router.proto",
    "envoy/extensions/filters/listener/original_dst/v3/original_dst.proto",
    "envoy/extensions/filters/listener/http_inspector/v3/http_inspector.proto",
    "envoy/extensions/filters/listener/tls_inspector/v3/tls_inspector.proto",
    "envoy/extensions/transport_sockets/tls/v3/tls.proto",
    "envoy/extensions/transport_sockets/raw_buffer/v3/raw_buffer.proto",
    "envoy/extensions/transport_sockets/internal_upstream/v3/internal_upstream.proto",
    "envoy/extensions/transport_sockets/proxy_protocol/v3/upstream_proxy_protocol.proto",
    "envoy/extensions/upstreams/http/v3/http_protocol_options.proto",
    "envoy/extensions/retry/host/previous_hosts/v3/previous_hosts.proto",
    "envoy/extensions/retry/priority/previous_priorities/v3/previous_priorities_config.proto",
    "envoy/extensions/matching/common_inputs/network/v3/network_inputs.proto",
    "envoy/extensions/request_id/uuid/v3/uuid.proto",
    "envoy/extensions/network/dns_resolver/cares/v3/cares_dns_resolver.proto",
    "envoy/extensions/path/match/uri_template/v3/uri_template_match.proto",
    "ip.proto",
    "stats.proto",
    "typed_struct.proto",
    "istio/workload.proto",
    "istio/authorization.proto",
];

/// Where cargo unpacked the crate whose sources hold Envoy's messages: the version of the lock file.
fn envoy_types() -> PathBuf {
    let lock = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.lock")).unwrap();
    let (_, rest) = lock.split_once("name = \"envoy-types\"\nversion = \"").expect("envoy-types is in Cargo.lock");
    let (version, _) = rest.split_once('"').unwrap();
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cargo"));
    let sources = home.join("registry/src");
    let registries = std::fs::read_dir(&sources).unwrap_or_else(|error| panic!("{}: {error}", sources.display()));
    let unpacked = registries.filter_map(Result::ok).map(|r| r.path().join(format!("envoy-types-{version}/proto")));
    unpacked.into_iter().find(|path| path.is_dir()).expect("cargo unpacked envoy-types, which we depend on")
}

fn pool() -> &'static DescriptorPool {
    static POOL: OnceLock<DescriptorPool> = OnceLock::new();
    POOL.get_or_init(|| {
        let (here, envoy) = (Path::new(env!("CARGO_MANIFEST_DIR")), envoy_types());
        let mut includes = vec![here.join("tests/proto"), here.join("../../xds/proto/proto")];
        let folders = [
            "data-plane-api",
            "xds",
            "protoc-gen-validate",
            "googleapis",
            "cel-spec/proto",
            "cel-spec",
            "client_model",
            "opentelemetry-proto",
        ];
        includes.extend(folders.iter().map(|folder| envoy.join(folder)));
        let set = protox::compile(FILES, includes).unwrap_or_else(|error| panic!("{error:?}"));
        let mut pool = DescriptorPool::from_file_descriptor_set(set).unwrap();
        // Any payloads of well-known types.
        let _known = pool.add_file_descriptor_set(DescriptorPool::global().file_descriptor_protos().fold(
            Default::default(),
            |mut set: prost_types_set::Set, file| {
                set.file.push(file.clone());
                set
            },
        ));
        pool
    })
}

mod prost_types_set {
    pub(super) type Set = prost_reflect::prost_types::FileDescriptorSet;
}

/// A packed message as normalised JSON.
pub(crate) fn any(any: &Any) -> Value {
    let name = any.type_url.rsplit('/').next().unwrap();
    let descriptor = pool().get_message_by_name(name).unwrap_or_else(|| panic!("{name} is not among FILES"));
    let message = DynamicMessage::decode(descriptor, any.value.as_slice()).unwrap();
    let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(true);
    let value = message.serialize_with_options(serde_json::value::Serializer, &options).unwrap();
    normalised(value)
}

/// Lists whose order means nothing.
const UNORDERED: &[&str] = &[
    "filter_chains",
    "range_matchers",
    "ranges",
    "endpoints",
    "lb_endpoints",
    "addresses",
    "authorization_policies",
    "request_headers_to_add",
    "response_headers_to_add",
    "passthrough_metadata",
];

/// Members that no data plane of ours reads.
const DROPPED: &[&str] = &["disable_mx"];

fn normalised(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            // An empty place, and what is to be done with spans that go nowhere: as good as nothing.
            let empty = |name: &str, value: &Value| match name {
                "locality" => *value == Value::Object(Map::new()),
                "tracing" => value.get("provider").is_none(),
                _ => false,
            };
            let dropped = |name: &str, value: &Value| DROPPED.contains(&name) || empty(name, value);
            let kept = members.into_iter().filter(|(name, value)| !dropped(name, value));
            let mut out: Map<String, Value> = Map::new();
            for (name, value) in kept {
                let mut value = normalised(value);
                if let ("ranges", Value::Array(list)) = (name.as_str(), &mut value) {
                    list.retain(|range| !is_left_out(range));
                }
                if let ("range_matchers", Value::Array(list)) = (name.as_str(), &mut value) {
                    list.retain(|matcher| matcher["ranges"].as_array().is_some_and(|ranges| !ranges.is_empty()));
                }
                if let (true, Value::Array(list)) = (UNORDERED.contains(&name.as_str()), &mut value) {
                    list.sort_by_key(sort_key);
                }
                out.insert(name, value);
            }
            Value::Object(out)
        }
        Value::Array(list) => Value::Array(list.into_iter().map(normalised).collect()),
        other => other,
    }
}

fn is_left_out(range: &Value) -> bool {
    let prefix = range["address_prefix"].as_str().unwrap_or_default();
    crate::known::RANGES.iter().any(|(beginning, _)| prefix.starts_with(beginning))
}

fn sort_key(value: &Value) -> String {
    match value.get("name").and_then(Value::as_str) {
        Some(name) => name.to_owned(),
        None => value.to_string(),
    }
}

/// One line for every differing leaf, `path: ours VALUE, istiod's VALUE`.
pub(crate) fn diff(at: &str, ours: &Value, theirs: &Value, out: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            for name in a.keys().chain(b.keys().filter(|name| !a.contains_key(*name))) {
                let null = Value::Null;
                diff(&format!("{at}.{name}"), a.get(name).unwrap_or(&null), b.get(name).unwrap_or(&null), out);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            let label = |index: usize, list: &[Value]| {
                list.get(index).and_then(|v| v.get("name")).and_then(Value::as_str).unwrap_or_default().to_owned()
            };
            for index in 0..a.len().max(b.len()) {
                let null = Value::Null;
                let name = label(index, if index < a.len() { a } else { b });
                let at = format!("{at}[{index}{}{name}]", if name.is_empty() { "" } else { " " });
                diff(&at, a.get(index).unwrap_or(&null), b.get(index).unwrap_or(&null), out);
            }
        }
        (a, b) if a == b => {}
        (a, b) => {
            let short = |value: &Value| {
                let text = value.to_string();
                if text.len() > 300 { format!("{}...", text.chars().take(300).collect::<String>()) } else { text }
            };
            out.push(format!("{at}: ours {}, istiod's {}", short(a), short(b)));
        }
    }
}
