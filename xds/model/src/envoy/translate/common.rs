//! Small messages that occur everywhere.
use std::time::Duration;

use ipnet::IpNet;
use prost::Message;
use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::envoy::config::route::v3 as route;
use xds_proto::envoy::envoy::r#type::matcher::v3 as matcher;
use xds_proto::envoy::envoy::r#type::v3 as kind;
use xds_proto::envoy::google::protobuf as wkt;

use super::report::{At, Refusable, Refusal, refuse_rest};
use crate::envoy::matcher::{
    Fraction, HeaderMatcher, HeaderTest, MetadataMatcher, QueryMatcher, QueryTest, StringMatcher, StringPattern,
    ValueMatcher,
};

/// `xds.type.v3.TypedStruct` and, the same on the wire, `udpa.type.v1.TypedStruct`; `envoy-types` has neither.
#[derive(Clone, PartialEq, Message)]
pub(super) struct TypedStruct {
    #[prost(string, tag = "1")]
    pub(super) type_url: String,
    #[prost(message, optional, tag = "2")]
    pub(super) value: Option<wkt::Struct>,
}

/// The message name of a type URL.
pub(super) fn type_name(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or(type_url)
}

/// Decodes an `Any`'s payload.
pub(super) fn unpack<M: Message + Default>(any: &wkt::Any) -> Refusable<M> {
    M::decode(any.value.as_slice())
        .map_err(|error| Refusal::new(type_name(&any.type_url), format!("does not decode: {error}")))
}

/// A duration; negative ones are refused.
pub(super) fn duration(value: &wkt::Duration) -> Refusable<Duration> {
    match (u64::try_from(value.seconds), u32::try_from(value.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Ok(Duration::new(seconds, nanos)),
        _ => Err(Refusal::new("duration", format!("{}s {}ns is not a duration", value.seconds, value.nanos))),
    }
}

/// An optional duration, `field` named in a refusal.
pub(super) fn opt_duration(field: &str, value: Option<wkt::Duration>) -> Refusable<Option<Duration>> {
    value.as_ref().map(duration).transpose().at(field)
}

/// An optional timeout in which 0 means "none".
pub(super) fn timeout(
    field: &str,
    value: Option<wkt::Duration>,
    default: Option<Duration>,
) -> Refusable<Option<Duration>> {
    Ok(match opt_duration(field, value)? {
        None => default,
        Some(Duration::ZERO) => None,
        some => some,
    })
}

pub(super) fn u32_of(value: Option<wkt::UInt32Value>) -> Option<u32> {
    value.map(|value| value.value)
}

pub(super) fn is_true(value: Option<wkt::BoolValue>) -> bool {
    value.is_some_and(|value| value.value)
}

/// A regex text.
pub(super) fn regex(message: matcher::RegexMatcher) -> Refusable<String> {
    // GoogleRe2's only field is the obsolete program size.
    let matcher::RegexMatcher { regex, engine_type: _ } = message;
    if regex.is_empty() { Err(Refusal::new("safe_regex", "is empty")) } else { Ok(regex) }
}

/// A pattern and what replaces it.
pub(super) fn substitution(message: matcher::RegexMatchAndSubstitute) -> Refusable<(String, String)> {
    let matcher::RegexMatchAndSubstitute { pattern, substitution } = message;
    let pattern = pattern.ok_or_else(|| Refusal::new("regex_rewrite", "no pattern")).and_then(regex)?;
    Ok((pattern, substitution))
}

/// A string matcher; one without a pattern is refused.
pub(super) fn string(message: matcher::StringMatcher) -> Refusable<StringMatcher> {
    string_or_any(message)?.ok_or_else(|| Refusal::new("string_match", "no pattern"))
}

/// A string matcher; `None` if it has no pattern (istiod's text for "any value" under an inverted claim).
fn string_or_any(message: matcher::StringMatcher) -> Refusable<Option<StringMatcher>> {
    use matcher::string_matcher::MatchPattern;
    let matcher::StringMatcher { ignore_case, match_pattern } = message;
    let pattern = match match_pattern {
        None => return Ok(None),
        Some(MatchPattern::Exact(text)) => StringPattern::Exact(text),
        Some(MatchPattern::Prefix(text)) => StringPattern::Prefix(text),
        Some(MatchPattern::Suffix(text)) => StringPattern::Suffix(text),
        Some(MatchPattern::Contains(text)) => StringPattern::Contains(text),
        Some(MatchPattern::SafeRegex(text)) => StringPattern::Regex(regex(text)?),
        Some(MatchPattern::Custom(custom)) => {
            return Err(Refusal::new("string_match.custom", format!("{} is not supported", custom.name)));
        }
    };
    Ok(Some(StringMatcher { pattern, ignore_case }))
}

/// A list of string matchers.
pub(super) fn strings(list: Vec<matcher::StringMatcher>) -> Refusable<Vec<StringMatcher>> {
    list.into_iter().map(string).collect()
}

/// An optional list message of string matchers.
pub(super) fn string_list(list: Option<matcher::ListStringMatcher>) -> Refusable<Option<Vec<StringMatcher>>> {
    list.map(|matcher::ListStringMatcher { patterns }| strings(patterns)).transpose()
}

/// A test on a header.
pub(super) fn header(message: route::HeaderMatcher) -> Refusable<HeaderMatcher> {
    use route::header_matcher::HeaderMatchSpecifier as Specifier;
    let route::HeaderMatcher { name, invert_match, treat_missing_header_as_empty, header_match_specifier } = message;
    let plain = |pattern| HeaderTest::Value(StringMatcher { pattern, ignore_case: false });
    let test = match header_match_specifier {
        // Envoy: without a specifier the header's presence is asked.
        None => HeaderTest::Present(true),
        Some(Specifier::PresentMatch(present)) => HeaderTest::Present(present),
        Some(Specifier::StringMatch(matcher)) => HeaderTest::Value(string(matcher).at(&name)?),
        Some(Specifier::ExactMatch(text)) => plain(StringPattern::Exact(text)),
        Some(Specifier::PrefixMatch(text)) => plain(StringPattern::Prefix(text)),
        Some(Specifier::SuffixMatch(text)) => plain(StringPattern::Suffix(text)),
        Some(Specifier::ContainsMatch(text)) => plain(StringPattern::Contains(text)),
        Some(Specifier::SafeRegexMatch(text)) => plain(StringPattern::Regex(regex(text)?)),
        Some(Specifier::RangeMatch(kind::Int64Range { start, end })) => HeaderTest::Range { start, end },
    };
    Ok(HeaderMatcher {
        name: name.to_ascii_lowercase(),
        test,
        invert: invert_match,
        missing_as_empty: treat_missing_header_as_empty,
    })
}

/// A test on a query parameter.
pub(super) fn query(message: route::QueryParameterMatcher) -> Refusable<QueryMatcher> {
    use route::query_parameter_matcher::QueryParameterMatchSpecifier as Specifier;
    let route::QueryParameterMatcher { name, query_parameter_match_specifier } = message;
    let test = match query_parameter_match_specifier {
        None => QueryTest::Present(true),
        Some(Specifier::PresentMatch(present)) => QueryTest::Present(present),
        Some(Specifier::StringMatch(matcher)) => QueryTest::Value(string(matcher).at(&name)?),
    };
    Ok(QueryMatcher { name, test })
}

/// A test on a JSON-like value.
fn value(message: matcher::ValueMatcher) -> Refusable<ValueMatcher> {
    use matcher::value_matcher::MatchPattern;
    Ok(match message.match_pattern {
        None => return Err(Refusal::new("value", "no pattern")),
        Some(MatchPattern::NullMatch(_)) => ValueMatcher::Null,
        Some(MatchPattern::BoolMatch(wanted)) => ValueMatcher::Bool(wanted),
        Some(MatchPattern::PresentMatch(wanted)) => ValueMatcher::Present(wanted),
        // A user's empty match ("the claim, whatever its value") arrives as a matcher without a pattern.
        Some(MatchPattern::StringMatch(text)) => match string_or_any(text)? {
            Some(text) => ValueMatcher::String(text),
            None => ValueMatcher::Present(true),
        },
        Some(MatchPattern::DoubleMatch(number)) => match number.match_pattern {
            Some(matcher::double_matcher::MatchPattern::Exact(wanted)) => ValueMatcher::Number(wanted),
            Some(matcher::double_matcher::MatchPattern::Range(kind::DoubleRange { start, end })) => {
                ValueMatcher::NumberRange { start, end }
            }
            None => return Err(Refusal::new("double_match", "no pattern")),
        },
        Some(MatchPattern::ListMatch(list)) => match list.match_pattern {
            Some(matcher::list_matcher::MatchPattern::OneOf(one)) => ValueMatcher::List(Box::new(value(*one)?)),
            None => return Err(Refusal::new("list_match", "no pattern")),
        },
        Some(MatchPattern::OrMatch(matcher::OrMatcher { value_matchers })) => {
            ValueMatcher::Or(value_matchers.into_iter().map(value).collect::<Refusable<_>>()?)
        }
    })
}

/// A test on dynamic metadata.
pub(super) fn metadata(message: matcher::MetadataMatcher) -> Refusable<MetadataMatcher> {
    use matcher::metadata_matcher::path_segment::Segment;
    let matcher::MetadataMatcher { filter, path, value: wanted, invert } = message;
    let path = path
        .into_iter()
        .map(|segment| match segment.segment {
            Some(Segment::Key(key)) => Ok(key),
            None => Err(Refusal::new("path", "a segment without a key")),
        })
        .collect::<Refusable<Vec<_>>>()?;
    let wanted = wanted.ok_or_else(|| Refusal::new("value", "missing")).and_then(value)?;
    Ok(MetadataMatcher { filter, path, value: wanted, invert })
}

/// A share of requests.
pub(super) fn fraction(message: kind::FractionalPercent) -> Refusable<Fraction> {
    use kind::fractional_percent::DenominatorType;
    let kind::FractionalPercent { numerator, denominator } = message;
    let denominator = match DenominatorType::try_from(denominator) {
        Ok(DenominatorType::Hundred) => 100,
        Ok(DenominatorType::TenThousand) => 10_000,
        Ok(DenominatorType::Million) => 1_000_000,
        Err(_) => return Err(Refusal::new("denominator", "unknown")),
    };
    Ok(Fraction { numerator, denominator })
}

/// A share of requests with a runtime key; there is no runtime, the default value counts.
pub(super) fn runtime_fraction(message: core::RuntimeFractionalPercent) -> Refusable<Fraction> {
    let core::RuntimeFractionalPercent { default_value, runtime_key: _ } = message;
    // Envoy: without a default the key's value counts, and without a runtime that is 100 %... of HUNDRED: refuse.
    default_value.ok_or_else(|| Refusal::new("default_value", "missing")).and_then(fraction)
}

/// Inline bytes; a file or environment variable is refused.
pub(super) fn inline(message: core::DataSource) -> Refusable<Vec<u8>> {
    use core::data_source::Specifier;
    let core::DataSource { watched_directory, specifier } = message;
    if watched_directory.is_some() {
        return Err(Refusal::new("watched_directory", "not supported"));
    }
    match specifier {
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes),
        Some(Specifier::InlineString(text)) => Ok(text.into_bytes()),
        Some(Specifier::Filename(_)) => Err(Refusal::new("filename", "only inline data is supported here")),
        Some(Specifier::EnvironmentVariable(_)) => {
            Err(Refusal::new("environment_variable", "only inline data is supported here"))
        }
        None => Ok(Vec::new()),
    }
}

/// Inline UTF-8 text.
pub(super) fn inline_text(message: core::DataSource) -> Refusable<String> {
    String::from_utf8(inline(message)?).map_err(|_| Refusal::new("inline_bytes", "not UTF-8"))
}

/// A format text with command operators.
pub(super) fn format_text(mut message: core::SubstitutionFormatString) -> Refusable<String> {
    use core::substitution_format_string::Format;
    let format = message.format.take();
    refuse_rest(&message)?;
    match format {
        Some(Format::TextFormat(text)) => Ok(text),
        Some(Format::TextFormatSource(source)) => inline_text(source),
        Some(Format::JsonFormat(_)) => Err(Refusal::new("json_format", "a text is wanted here")),
        None => Err(Refusal::new("format", "missing")),
    }
}

/// A network from an address and a prefix length (0 if absent).
pub(super) fn network(address: &str, length: Option<u32>) -> Refusable<IpNet> {
    let wrong = || Refusal::new("address_prefix", format!("{address}/{length:?} is not a network"));
    let address: std::net::IpAddr = address.parse().map_err(|_| wrong())?;
    let length = u8::try_from(length.unwrap_or(0)).map_err(|_| wrong())?;
    IpNet::new(address, length).map(|network| network.trunc()).map_err(|_| wrong())
}

/// A `core.CidrRange`.
pub(super) fn cidr(message: core::CidrRange) -> Refusable<IpNet> {
    let core::CidrRange { address_prefix, prefix_len } = message;
    network(&address_prefix, u32_of(prefix_len))
}

/// A `Struct` as JSON.
pub(super) fn json(message: wkt::Struct) -> serde_json::Value {
    // The wire map has no order; sorted keys make the outcome stable.
    let sorted: std::collections::BTreeMap<_, _> = message.fields.into_iter().collect();
    serde_json::Value::Object(sorted.into_iter().map(|(key, value)| (key, json_value(value))).collect())
}

fn json_value(message: wkt::Value) -> serde_json::Value {
    use wkt::value::Kind;
    match message.kind {
        None | Some(Kind::NullValue(_)) => serde_json::Value::Null,
        Some(Kind::NumberValue(number)) => serde_json::json!(number),
        Some(Kind::StringValue(text)) => serde_json::Value::String(text),
        Some(Kind::BoolValue(flag)) => serde_json::Value::Bool(flag),
        Some(Kind::StructValue(object)) => json(object),
        Some(Kind::ListValue(list)) => serde_json::Value::Array(list.values.into_iter().map(json_value).collect()),
    }
}

/// One namespace of filter metadata as JSON.
pub(super) fn metadata_json(metadata: &core::Metadata, namespace: &str) -> Option<serde_json::Value> {
    metadata.filter_metadata.get(namespace).cloned().map(json)
}

/// The cluster and timeout of an HTTP URI.
pub(super) fn http_uri(message: core::HttpUri) -> Refusable<(String, String, Duration)> {
    let core::HttpUri { uri, timeout, http_upstream_type } = message;
    let cluster = match http_upstream_type {
        Some(core::http_uri::HttpUpstreamType::Cluster(cluster)) => cluster,
        None => return Err(Refusal::new("http_uri", "no cluster")),
    };
    let timeout = opt_duration("timeout", timeout)?.unwrap_or(Duration::from_secs(5));
    Ok((uri, cluster, timeout))
}
