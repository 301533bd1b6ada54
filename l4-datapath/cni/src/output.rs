//! Answers in the words of each version.
use std::net::IpAddr;

use serde_json::{Map, Value, json};

use crate::Version;
use crate::input::invalid;
use crate::protocol::{Added, Device, Failure};

/// The result of an ADD that made the device itself.
pub(crate) fn added(version: Version, added: &Added, netns: &str) -> Value {
    let interface = |device: &Device, sandbox: Option<&str>| {
        let mut interface = Map::new();
        interface.insert("name".into(), json!(device.name));
        interface.insert("mac".into(), json!(device.mac));
        if version >= Version::V1_1_0 {
            interface.insert("mtu".into(), json!(device.mtu));
        }
        if let Some(sandbox) = sandbox {
            interface.insert("sandbox".into(), json!(sandbox));
        }
        Value::Object(interface)
    };
    let ips = added.addresses.iter().map(|ip| {
        let mut out = Map::new();
        if version < Version::V1_0_0 {
            out.insert("version".into(), json!(if ip.address.addr().is_ipv4() { "4" } else { "6" }));
        }
        out.insert("address".into(), json!(ip.address.to_string()));
        out.insert("gateway".into(), json!(ip.gateway));
        // The pod's device below.
        out.insert("interface".into(), json!(1));
        Value::Object(out)
    });
    let routes = added.addresses.iter().map(|ip| {
        let destination = if ip.address.addr().is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        json!({"dst": destination, "gw": ip.gateway})
    });
    json!({
        "cniVersion": version.as_str(),
        "interfaces": [interface(&added.host, None), interface(&added.pod, Some(netns))],
        "ips": ips.collect::<Vec<_>>(),
        "routes": routes.collect::<Vec<_>>(),
        "dns": {},
    })
}

/// A chained call returns what it was given, in its configuration's version.
pub(crate) fn passed_through(version: Version, previous: &Value) -> Value {
    let mut result = previous.clone();
    if let Value::Object(fields) = &mut result {
        fields.insert("cniVersion".into(), json!(version.as_str()));
    }
    result
}

/// The addresses of a previous result.
pub(crate) fn addresses_of(previous: &Value) -> Result<Vec<IpAddr>, Failure> {
    let missing = || invalid("prevResult.ips", "is missing, empty or not a list");
    let ips = previous.get("ips").and_then(Value::as_array).filter(|ips| !ips.is_empty()).ok_or_else(missing)?;
    let mut addresses = Vec::with_capacity(ips.len());
    for (index, ip) in ips.iter().enumerate() {
        let text = ip.get("address").and_then(Value::as_str).unwrap_or_default();
        let address = text.split('/').next().unwrap_or_default().parse();
        addresses.push(address.map_err(|_| {
            invalid(&format!("prevResult.ips[{index}].address"), format!("{text:?} is not an address with a prefix"))
        })?);
    }
    Ok(addresses)
}

/// An error object. `version` is the configuration's, where it could be read.
pub(crate) fn failed(version: &str, failure: &Failure) -> Value {
    let mut out = Map::new();
    let version = if version.is_empty() { Version::V1_1_0.as_str() } else { version };
    out.insert("cniVersion".into(), json!(version));
    out.insert("code".into(), json!(failure.code));
    out.insert("msg".into(), json!(failure.message));
    if !failure.details.is_empty() {
        out.insert("details".into(), json!(failure.details));
    }
    Value::Object(out)
}
