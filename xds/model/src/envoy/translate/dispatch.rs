//! `main_internal`'s matcher tree. Only the shapes istiod builds are understood.
use std::collections::BTreeMap;

use prost::Message;
use xds_proto::envoy::google::protobuf as wkt;
use xds_proto::envoy::xds::core::v3::{CidrRange, TypedExtensionConfig};
use xds_proto::envoy::xds::r#type::matcher::v3::Matcher;
use xds_proto::envoy::xds::r#type::matcher::v3::matcher as wire;

use super::common::{network, type_name, u32_of, unpack};
use super::report::{At, Refusable, Refusal};
use crate::envoy::chain::{ByProtocol, DispatchRule};

/// `xds.type.matcher.v3.IPMatcher`, which `envoy-types` leaves out.
#[derive(Clone, PartialEq, Message)]
struct IpMatcher {
    #[prost(message, repeated, tag = "1")]
    range_matchers: Vec<IpRangeMatcher>,
}

#[derive(Clone, PartialEq, Message)]
struct IpRangeMatcher {
    #[prost(message, repeated, tag = "1")]
    ranges: Vec<CidrRange>,
    #[prost(message, optional, tag = "2")]
    on_match: Option<wire::OnMatch>,
    #[prost(bool, tag = "3")]
    exclusive: bool,
}

/// `envoy.extensions.matching.common_inputs.network.v3.FilterStateInput`.
#[derive(Clone, PartialEq, Message)]
struct FilterStateInput {
    #[prost(string, tag = "1")]
    key: String,
}

/// How a connection finds its chain.
#[derive(Default)]
pub(super) struct Dispatch {
    pub(super) rules: Vec<DispatchRule>,
    pub(super) authorities: BTreeMap<String, ByProtocol>,
}

/// What a tree looks at.
enum Input {
    DestinationIp,
    DestinationPort,
    ApplicationProtocol,
    FilterState(String),
}

/// Reads the whole matcher.
pub(super) fn dispatch(matcher: Matcher) -> Refusable<Dispatch> {
    let mut out = Dispatch::default();
    let (input, tree, otherwise) = tree(matcher)?;
    match input {
        Input::FilterState(key) if key == "io.istio.connect_authority" => {
            for (authority, on_match) in exact(tree)? {
                let chain = by_protocol(on_match).at(&authority)?;
                out.authorities.insert(authority, chain);
            }
            match otherwise.map(matcher_of).transpose()? {
                Some(Next::Tree(inner)) => out.rules = dispatch(inner)?.rules,
                Some(Next::Chain(_)) => return Err(Refusal::new("on_no_match", "a tree is expected")),
                None => {}
            }
        }
        Input::DestinationIp => {
            let wire::matcher_tree::TreeType::CustomMatch(custom) = tree else {
                return Err(Refusal::new("matcher_tree", "an IPMatcher is expected"));
            };
            if otherwise.is_some() {
                return Err(Refusal::new("on_no_match", "not supported for the address"));
            }
            let any = custom.typed_config.ok_or_else(|| Refusal::new("custom_match", "no configuration"))?;
            if type_name(&any.type_url) != "xds.type.matcher.v3.IPMatcher" {
                return Err(Refusal::new("custom_match", format!("{} is not supported", any.type_url)));
            }
            let IpMatcher { range_matchers } = unpack(&any)?;
            out.rules = range_matchers.into_iter().map(rule).collect::<Refusable<_>>()?;
        }
        _ => return Err(Refusal::new("input", "the first tree must look at the address or authority")),
    }
    Ok(out)
}

fn rule(message: IpRangeMatcher) -> Refusable<DispatchRule> {
    // `exclusive` only matters where ranges nest and the inner one may fail to match.
    let IpRangeMatcher { ranges, on_match, exclusive: _ } = message;
    let networks = ranges
        .into_iter()
        .map(|CidrRange { address_prefix, prefix_len }| network(&address_prefix, u32_of(prefix_len)))
        .collect::<Refusable<Vec<_>>>()?;
    let on_match = on_match.ok_or_else(|| Refusal::new("on_match", "missing"))?;
    let (ports, any_port) = ports(on_match).at(format!("{networks:?}"))?;
    Ok(DispatchRule { networks, ports, any_port })
}

fn ports(on_match: wire::OnMatch) -> Refusable<(BTreeMap<u16, ByProtocol>, Option<ByProtocol>)> {
    let inner = match matcher_of(on_match)? {
        Next::Chain(chain) => return Ok((BTreeMap::new(), Some(ByProtocol::always(&chain)))),
        Next::Tree(inner) => inner,
    };
    let (input, tree, otherwise) = tree(inner)?;
    match input {
        Input::DestinationPort => {
            let mut ports = BTreeMap::new();
            for (text, on_match) in exact(tree)? {
                let port = text.parse().map_err(|_| Refusal::new("port", format!("{text} is no port")))?;
                ports.insert(port, by_protocol(on_match).at(text)?);
            }
            Ok((ports, otherwise.map(by_protocol).transpose()?))
        }
        Input::ApplicationProtocol => Ok((BTreeMap::new(), Some(protocols(tree, otherwise)?))),
        _ => Err(Refusal::new("input", "a port or protocol is expected")),
    }
}

fn by_protocol(on_match: wire::OnMatch) -> Refusable<ByProtocol> {
    match matcher_of(on_match)? {
        Next::Chain(chain) => Ok(ByProtocol::always(&chain)),
        Next::Tree(inner) => {
            let (Input::ApplicationProtocol, tree, otherwise) = tree(inner)? else {
                return Err(Refusal::new("input", "a protocol is expected"));
            };
            protocols(tree, otherwise)
        }
    }
}

fn protocols(tree: wire::matcher_tree::TreeType, otherwise: Option<wire::OnMatch>) -> Refusable<ByProtocol> {
    let other = otherwise.map(chain_of).transpose()?;
    let mut out = ByProtocol { http10: other.clone(), http11: other.clone(), h2c: other.clone(), other };
    for (key, on_match) in exact(tree)? {
        let chain = Some(chain_of(on_match)?);
        // istiod's keys carry the quotes of Envoy's protocol list text.
        match key.trim_matches('\'') {
            "http/1.0" => out.http10 = chain,
            "http/1.1" => out.http11 = chain,
            "h2c" => out.h2c = chain,
            other => return Err(Refusal::new("application_protocol", format!("{other} is not supported"))),
        }
    }
    Ok(out)
}

enum Next {
    Tree(Matcher),
    Chain(String),
}

fn matcher_of(on_match: wire::OnMatch) -> Refusable<Next> {
    let wire::OnMatch { keep_matching, on_match } = on_match;
    if keep_matching {
        return Err(Refusal::new("keep_matching", "not supported"));
    }
    match on_match {
        Some(wire::on_match::OnMatch::Matcher(inner)) => Ok(Next::Tree(*inner)),
        Some(wire::on_match::OnMatch::Action(action)) => {
            let any = action.typed_config.ok_or_else(|| Refusal::new("action", "no configuration"))?;
            if type_name(&any.type_url) != "google.protobuf.StringValue" {
                return Err(Refusal::new("action", format!("{} is not supported", any.type_url)));
            }
            let wkt::StringValue { value } = unpack(&any)?;
            Ok(Next::Chain(value))
        }
        None => Err(Refusal::new("on_match", "missing")),
    }
}

fn chain_of(on_match: wire::OnMatch) -> Refusable<String> {
    match matcher_of(on_match)? {
        Next::Chain(chain) => Ok(chain),
        Next::Tree(_) => Err(Refusal::new("on_match", "a chain name is expected")),
    }
}

fn tree(matcher: Matcher) -> Refusable<(Input, wire::matcher_tree::TreeType, Option<wire::OnMatch>)> {
    let Matcher { on_no_match, matcher_type } = matcher;
    let Some(wire::MatcherType::MatcherTree(wire::MatcherTree { input, tree_type })) = matcher_type else {
        return Err(Refusal::new("matcher_tree", "missing"));
    };
    let TypedExtensionConfig { name, typed_config } = input.ok_or_else(|| Refusal::new("input", "missing"))?;
    let any = typed_config.ok_or_else(|| Refusal::new("input", "no configuration"))?;
    let input = match type_name(&any.type_url).rsplit('.').next() {
        Some("DestinationIPInput") => Input::DestinationIp,
        Some("DestinationPortInput") => Input::DestinationPort,
        Some("ApplicationProtocolInput") => Input::ApplicationProtocol,
        Some("FilterStateInput") => {
            let FilterStateInput { key } = unpack(&any)?;
            Input::FilterState(key)
        }
        _ => return Err(Refusal::new("input", format!("{name} ({}) is not supported", any.type_url))),
    };
    let tree_type = tree_type.ok_or_else(|| Refusal::new("tree_type", "missing"))?;
    Ok((input, tree_type, on_no_match.map(|boxed| *boxed)))
}

fn exact(tree: wire::matcher_tree::TreeType) -> Refusable<BTreeMap<String, wire::OnMatch>> {
    match tree {
        wire::matcher_tree::TreeType::ExactMatchMap(wire::matcher_tree::MatchMap { map }) => {
            Ok(map.into_iter().collect())
        }
        _ => Err(Refusal::new("tree_type", "an exact match map is expected")),
    }
}
