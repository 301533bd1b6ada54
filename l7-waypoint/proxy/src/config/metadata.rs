//! What a proxy tells istiod of itself: the node metadata (xds-contract 1.2).
use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::environment::{Environment, path};

/// Label of the pods of a Gateway.
pub(crate) const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// A node's metadata as its environment has it, before what the flags say is added:
/// - every `ISTIO_META_X` as `X`, and the fields of every `ISTIO_METAJSON_X`; `PROXY_CONFIG`'s proxyMetadata likewise,
///   the environment winning;
/// - `LABELS` and `ANNOTATIONS` from the pod's files, and from `ISTIO_METAJSON_LABELS`;
/// - `PROXY_CONFIG`, which makes a waypoint visible to `istioctl proxy-status`.
///
/// Remarks are about what could not be read.
pub(crate) fn of_environment(env: &Environment, proxy_config: &Value, remarks: &mut Vec<String>) -> Map<String, Value> {
    let mut out = Map::new();
    let proxy_metadata = proxy_config["proxyMetadata"].as_object();
    for (name, value) in proxy_metadata.into_iter().flatten() {
        if let Some(key) = name.strip_prefix("ISTIO_META_") {
            out.insert(key.to_owned(), value.clone());
        }
    }
    for (key, value) in env.with_prefix("ISTIO_META_") {
        out.insert(key.to_owned(), json!(value));
    }
    for (key, value) in env.with_prefix("ISTIO_METAJSON_") {
        match serde_json::from_str(value) {
            Ok(Value::Object(fields)) if key == "LABELS" => drop(out.insert(key.to_owned(), fields.into())),
            Ok(Value::Object(fields)) => out.extend(fields),
            _ => remarks.push(format!("ISTIO_METAJSON_{key} is not a JSON object: it has no effect")),
        }
    }
    let labels = pairs(env, path::LABELS, remarks);
    if !labels.is_empty() {
        let mut all = out.get("LABELS").and_then(Value::as_object).cloned().unwrap_or_default();
        all.extend(labels.into_iter().filter(|(key, _)| key != "pod-template-hash").map(|(k, v)| (k, json!(v))));
        out.insert("LABELS".to_owned(), all.into());
    }
    let annotations = pairs(env, path::ANNOTATIONS, remarks);
    if !annotations.is_empty() {
        out.insert("ANNOTATIONS".to_owned(), json!(annotations));
    }
    if proxy_config.is_object() {
        out.insert("PROXY_CONFIG".to_owned(), proxy_config.clone());
    }
    out
}

fn pairs(env: &Environment, path: &str, remarks: &mut Vec<String>) -> BTreeMap<String, String> {
    let read = env.read(path).map_err(|error| error.to_string());
    let parsed = read
        .and_then(|text| downward(&text.unwrap_or_default()).map_err(|line| format!("{line:?} is not key=\"value\"")));
    parsed.unwrap_or_else(|error| {
        remarks.push(format!("{path}: {error}: the file has no effect"));
        BTreeMap::new()
    })
}

/// The downward API's lines `key="value"`, values quoted as Go does it.
///
/// # Errors
/// With the line that has another form.
fn downward(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut out = BTreeMap::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let (key, value) = line.split_once('=').ok_or(line)?;
        out.insert(key.to_owned(), unquoted(value).ok_or(line)?);
    }
    Ok(out)
}

/// A string in Go's quotes (`strconv.Quote`).
fn unquoted(text: &str) -> Option<String> {
    let inner = text.strip_prefix('"')?.strip_suffix('"')?;
    let mut bytes = Vec::with_capacity(inner.len());
    let mut rest = inner.chars();
    while let Some(char) = rest.next() {
        let char = match char {
            '\\' => match rest.next()? {
                'a' => '\x07',
                'b' => '\x08',
                'f' => '\x0c',
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                'v' => '\x0b',
                quoted @ ('\\' | '"') => quoted,
                // One byte, not one character.
                'x' => {
                    bytes.push(u8::try_from(hexadecimal(&mut rest, 2)?).ok()?);
                    continue;
                }
                'u' => char::from_u32(hexadecimal(&mut rest, 4)?)?,
                'U' => char::from_u32(hexadecimal(&mut rest, 8)?)?,
                _ => return None,
            },
            plain => plain,
        };
        bytes.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes());
    }
    String::from_utf8(bytes).ok()
}

fn hexadecimal(rest: &mut std::str::Chars<'_>, digits: usize) -> Option<u32> {
    let text: String = rest.by_ref().take(digits).collect();
    if text.len() == digits { u32::from_str_radix(&text, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_downward_api_as_go_quotes_it() {
        let text = "app=\"waypoint\"\nnote=\"a \\\"b\\\"\\n\\tc = d \\\\ \\u00e9\\xc3\\xa9\"\n\nempty=\"\"\n";
        let pairs = downward(text).unwrap();
        assert_eq!(pairs["app"], "waypoint");
        assert_eq!(pairs["note"], "a \"b\"\n\tc = d \\ éé");
        assert_eq!(pairs["empty"], "");
        assert_eq!(downward("app=waypoint").unwrap_err(), "app=waypoint");
        assert!(downward("a=\"\\q\"").is_err() && downward("a=\"\\xff\"").is_err() && downward("no pair").is_err());
    }

    #[test]
    fn what_cannot_be_read_is_remarked_and_has_no_effect() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("etc/istio/pod")).unwrap();
        std::fs::write(folder.path().join("etc/istio/pod/labels"), "broken").unwrap();
        let env =
            Environment::new(folder.path(), &[("ISTIO_METAJSON_X", "[1]"), ("ISTIO_METAJSON_Y", "{\"A\":\"b\"}")]);
        let mut remarks = Vec::new();
        let metadata = of_environment(&env, &Value::Null, &mut remarks);
        assert_eq!(json!(metadata), json!({ "A": "b" }));
        assert_eq!(remarks.len(), 2, "{remarks:?}");
    }
}
