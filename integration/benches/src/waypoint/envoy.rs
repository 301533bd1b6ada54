//! Envoy as a waypoint: the resources a control plane sends to it, in a bootstrap file. Envoy from PyPI has none of Istio's own
//! extensions: what only they do is telemetry, and is left out, to Envoy's advantage.
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use compat_translate::WaypointOutput;
use serde_json::{Value, json};

const TYPED_STRUCT: &str = "type.googleapis.com/udpa.type.v1.TypedStruct";
const ISTIO_ONLY: [&str; 2] = ["istio.http.peer_metadata", "metadataexchange"];

/// Where Envoy reads a secret that istiod's resources ask for by name: a file holds one.
fn secret_file(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("secret-{name}.json"))
}

/// Writes the secrets, from PEM files.
pub(super) fn secrets(folder: &Path, chain: &Path, key: &Path, root: &Path) -> Result<()> {
    let file = |path: &Path| json!({"filename": path});
    let secrets = [
        ("default", "tlsCertificate", json!({"certificateChain": file(chain), "privateKey": file(key)})),
        ("ROOTCA", "validationContext", json!({"trustedCa": file(root)})),
    ];
    for (name, field, content) in secrets {
        let kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
        let resources = json!({"resources": [{"@type": kind, "name": name, field: content}]});
        std::fs::write(secret_file(folder, name), resources.to_string())?;
    }
    Ok(())
}

/// A bootstrap that serves the waypoint's resources at `listen`.
pub(super) fn bootstrap(output: &WaypointOutput, listen: SocketAddr, folder: &Path) -> Result<Value> {
    let adapted = |resource: &xds_proto::envoy::google::protobuf::Any| -> Result<Value> {
        let mut value = xds_proto::json::any(&resource.type_url, &resource.value)?;
        adapt(&mut value, folder);
        drop(value.as_object_mut().context("a resource is an object")?.remove("@type"));
        Ok(value)
    };
    let mut listeners = output.listeners.values().map(adapted).collect::<Result<Vec<_>>>()?;
    for listener in listeners.iter_mut().filter(|listener| listener["name"] == "connect_terminate") {
        let address = json!({"socketAddress": {"address": listen.ip(), "portValue": listen.port()}});
        listener["address"] = address;
    }
    let mut clusters = output.clusters.values().map(adapted).collect::<Result<Vec<_>>>()?;
    for cluster in clusters.iter_mut().filter(|cluster| cluster["type"] == "EDS") {
        let name = cluster["name"].as_str().unwrap_or_default().to_owned();
        let endpoints = output.endpoints.get(&name).map(adapted).transpose()?;
        cluster["type"] = "STATIC".into();
        cluster["loadAssignment"] = endpoints.unwrap_or_else(|| json!({"clusterName": name}));
        drop(cluster.as_object_mut().context("a cluster is an object")?.remove("edsClusterConfig"));
    }
    // A name some filters refer to.
    clusters.push(json!({"name": "xds-grpc", "type": "STATIC", "loadAssignment": {"clusterName": "xds-grpc"}}));
    let internal =
        json!({"@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener"});
    Ok(json!({
        "node": {"id": "waypoint~127.0.0.4~waypoint.bench~bench.svc.cluster.local", "cluster": "waypoint"},
        "bootstrapExtensions": [{"name": "envoy.bootstrap.internal_listener", "typedConfig": internal}],
        "staticResources": {"listeners": listeners, "clusters": clusters},
    }))
}

fn adapt(value: &mut Value, folder: &Path) {
    match value {
        Value::Array(values) => {
            values.retain(|value| !is_istios(value));
            values.iter_mut().for_each(|value| adapt(value, folder));
        }
        Value::Object(fields) => {
            let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default();
            let secret = secret_file(folder, text("name"));
            let is_istios = text("objectKey").starts_with("io.istio") || text("factoryKey") == "istio.hashable_string";
            if is_istios {
                fields.insert("factoryKey".to_owned(), "envoy.string".into());
            }
            for (name, field) in fields.iter_mut() {
                match name.as_str() {
                    "sdsConfig" => *field = json!({"pathConfigSource": {"path": secret}}),
                    _ => adapt(field, folder),
                }
            }
        }
        _ => {}
    }
}

/// Whether this is a filter that only Istio's Envoy has.
fn is_istios(value: &Value) -> bool {
    let config = &value["typedConfig"];
    let kind = match config["@type"].as_str() {
        Some(TYPED_STRUCT) => config["typeUrl"].as_str(),
        kind => kind,
    };
    kind.is_some_and(|kind| ISTIO_ONLY.iter().any(|istios| kind.contains(istios)))
}
