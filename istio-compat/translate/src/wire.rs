//! Deterministic bytes.
//!
//! prost encodes `HashMap` fields in whatever order the hasher gives, which differs between two encodings of the
//! same message. Resource versions are hashes of content, so an unchanged object must give the same bytes every
//! time, also after a restart. This module re-orders the map entries of an encoded message by their bytes (the key
//! comes first in an entry). It knows only the few message types that Strata emits and that contain maps.
use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};
use xds_proto::envoy::google::protobuf::Any;

/// What a length-delimited field holds.
#[derive(Clone, Copy)]
enum Kind {
    /// A message of the named type.
    Is(&'static str),
    /// A map whose values are of the named type (`""`: no maps below).
    Map(&'static str),
    /// A `google.protobuf.Any`; its type URL says how to go on.
    Any,
}

use Kind::{Is, Map};

const ANY: Kind = Kind::Any;

/// The fields on the way to a map, by message type.
fn fields(message: &str) -> &'static [(u32, Kind)] {
    match message {
        "envoy.config.listener.v3.Listener" => &[(3, Is("FilterChain")), (32, Is("Matcher"))],
        "FilterChain" => &[(3, Is("Filter"))],
        "Filter" => &[(4, ANY)],
        "Matcher" => &[(2, Is("MatcherTree")), (3, Is("OnMatch"))],
        "MatcherTree" => &[(2, Is("MatchMap")), (3, Is("MatchMap")), (4, Is("TypedExtensionConfig"))],
        "MatchMap" => &[(1, Map("OnMatch"))],
        "OnMatch" => &[(1, Is("Matcher"))],
        "TypedExtensionConfig" => &[(2, ANY)],
        "xds.type.matcher.v3.IPMatcher" => &[(1, Is("IPRangeMatcher"))],
        "IPRangeMatcher" => &[(2, Is("OnMatch"))],
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => {
            &[(4, Is("RouteConfiguration")), (5, Is("Filter"))]
        }
        "RouteConfiguration" => &[(2, Is("VirtualHost"))],
        "VirtualHost" => &[(3, Is("Route"))],
        "Route" => &[(4, Is("Metadata")), (13, Map("google.protobuf.Any"))],
        "Metadata" => &[(1, Map("Struct"))],
        "Struct" => &[(1, Map("Value"))],
        "Value" => &[(5, Is("Struct")), (6, Is("ListValue"))],
        "ListValue" => &[(1, Is("Value"))],
        "envoy.extensions.filters.http.rbac.v3.RBAC" | "envoy.extensions.filters.network.rbac.v3.RBAC" => {
            &[(1, Is("RBAC")), (2, Is("RBAC"))]
        }
        "RBAC" => &[(2, Map(""))],
        "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication" => &[(1, Map("")), (5, Map(""))],
        "envoy.config.cluster.v3.Cluster" => {
            &[(25, Is("Metadata")), (36, Map("google.protobuf.Any")), (43, Is("SocketMatch"))]
        }
        "SocketMatch" => &[(2, Is("Struct"))],
        "envoy.config.endpoint.v3.ClusterLoadAssignment" => &[(2, Is("LocalityLbEndpoints"))],
        "LocalityLbEndpoints" => &[(2, Is("LbEndpoint"))],
        "LbEndpoint" => &[(3, Is("Metadata"))],
        "udpa.type.v1.TypedStruct" => &[(2, Is("Struct"))],
        "istio.workload.Address" => &[(1, Is("istio.workload.Workload"))],
        "istio.workload.Workload" => &[(22, Map(""))],
        _ => &[],
    }
}

/// Packs a message under its type URL with deterministic bytes.
pub(crate) fn pack<M: Message>(type_url: &str, message: &M) -> Any {
    let name = type_url.rsplit('/').next().unwrap_or(type_url);
    let encoded = message.encode_to_vec();
    // Encoded by prost a moment ago, so it decodes; should it not, the bytes as they are are still valid.
    let value = canonical(name, &encoded).unwrap_or(encoded);
    Any { type_url: type_url.to_owned(), value }
}

/// The same message with every known map in the order of its entries' bytes; `None` if the bytes are malformed.
fn canonical(message: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    if message == "google.protobuf.Any" {
        return canonical_any(bytes);
    }
    let table = fields(message);
    if table.is_empty() {
        return Some(bytes.to_vec());
    }
    let mut out = Vec::with_capacity(bytes.len());
    // Entries of one map lie next to each other in prost's output; they are collected until another field follows.
    let mut entries: Vec<Vec<u8>> = Vec::new();
    let mut map_field = 0;
    for (field, wire, raw, payload) in Fields(bytes) {
        let kind = match wire {
            WireType::LengthDelimited => table.iter().find(|(f, _)| *f == field).map(|(_, kind)| *kind),
            _ => None,
        };
        if map_field != 0 && map_field != field {
            flush(&mut out, map_field, &mut entries);
            map_field = 0;
        }
        match kind {
            None => out.extend_from_slice(raw),
            Some(Kind::Map(value)) => {
                map_field = field;
                entries.push(map_entry(value, payload)?);
            }
            Some(Kind::Is(name)) => append(&mut out, field, &canonical(name, payload)?),
            Some(Kind::Any) => append(&mut out, field, &canonical_any(payload)?),
        }
    }
    if map_field != 0 {
        flush(&mut out, map_field, &mut entries);
    }
    Some(out)
}

fn flush(out: &mut Vec<u8>, field: u32, entries: &mut Vec<Vec<u8>>) {
    entries.sort();
    for entry in entries.drain(..) {
        append(out, field, &entry);
    }
}

fn append(out: &mut Vec<u8>, field: u32, payload: &[u8]) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(payload.len() as u64, out);
    out.extend_from_slice(payload);
}

fn map_entry(value: &str, entry: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(entry.len());
    for (field, wire, raw, payload) in Fields(entry) {
        if field == 2 && matches!(wire, WireType::LengthDelimited) && !value.is_empty() {
            append(&mut out, field, &canonical(value, payload)?);
        } else {
            out.extend_from_slice(raw);
        }
    }
    Some(out)
}

fn canonical_any(bytes: &[u8]) -> Option<Vec<u8>> {
    let any = Any::decode(bytes).ok()?;
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    let value = canonical(name, &any.value)?;
    Some(Any { type_url: any.type_url.clone(), value }.encode_to_vec())
}

/// The fields of an encoded message: number, wire type, whole field, payload (length-delimited only). Ends early on
/// malformed bytes, which prost does not produce.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = (u32, WireType, &'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let start = self.0;
        let mut rest = start;
        let (field, wire) = decode_key(&mut rest).ok()?;
        let mut payload: &[u8] = &[];
        match wire {
            WireType::Varint => {
                decode_varint(&mut rest).ok()?;
            }
            WireType::SixtyFourBit => rest = rest.get(8..)?,
            WireType::ThirtyTwoBit => rest = rest.get(4..)?,
            WireType::LengthDelimited => {
                let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
                payload = rest.get(..length)?;
                rest = &rest[length..];
            }
            WireType::StartGroup | WireType::EndGroup => return None,
        }
        self.0 = rest;
        Some((field, wire, &start[..start.len() - rest.len()], payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xds_proto::envoy::envoy::config::cluster::v3::Cluster;
    use xds_proto::envoy::envoy::config::core::v3::Metadata;
    use xds_proto::envoy::google::protobuf::{Struct, Value, value};

    fn cluster() -> Cluster {
        let text = |s: &str| Value { kind: Some(value::Kind::StringValue(s.into())) };
        let inner = Struct { fields: (0..20).map(|i| (format!("k{i}"), text("v"))).collect() };
        let metadata = (0..20).map(|i| (format!("m{i}"), inner.clone())).collect();
        let options =
            (0..20).map(|i| (format!("o{i}"), Any { type_url: format!("t/{i}"), value: vec![1, 2, i] })).collect();
        Cluster {
            name: "c".into(),
            metadata: Some(Metadata { filter_metadata: metadata, ..Metadata::default() }),
            typed_extension_protocol_options: options,
            alt_stat_name: "c;".into(),
            ..Cluster::default()
        }
    }

    #[test]
    fn equal_messages_have_equal_bytes_and_keep_their_meaning() {
        let url = xds_proto::type_url::CLUSTER;
        let (a, b) = (pack(url, &cluster()), pack(url, &cluster()));
        assert_eq!(a.value, b.value);
        assert_eq!(Cluster::decode(a.value.as_slice()).unwrap(), cluster());
    }
}
