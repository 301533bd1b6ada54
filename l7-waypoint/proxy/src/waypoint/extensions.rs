//! Filters whose configuration comes by extension discovery (ECDS): WasmPlugins, as istiod sends them.
//!
//! Nothing here runs Wasm. What Istio's agent does with a module it cannot fetch is done with each: by its failure
//! policy the filter lets everything pass or nothing, which is said by name. A configuration that has not arrived
//! lets nothing pass, where Envoy would not serve the listener at all.
use std::collections::{BTreeMap, BTreeSet};

use prost::Message;
use xds_model::envoy::{Effect, Notice};
use xds_proto::any;
use xds_proto::envoy::envoy::config::core::v3::{ExtensionConfigSource, TypedExtensionConfig};
use xds_proto::envoy::envoy::config::listener::v3::{Listener, filter};
use xds_proto::envoy::envoy::config::rbac::v3::Rbac as Rules;
use xds_proto::envoy::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use xds_proto::envoy::envoy::extensions::filters::http::wasm::v3::Wasm;
use xds_proto::envoy::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, http_filter,
};
use xds_proto::envoy::envoy::extensions::filters::network::rbac::v3::Rbac as NetworkRbac;
use xds_proto::envoy::envoy::extensions::wasm::v3::FailurePolicy;
use xds_proto::envoy::google::protobuf::Any;

const HCM: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const HTTP_RBAC: &str = "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC";
const NETWORK_RBAC: &str = "type.googleapis.com/envoy.extensions.filters.network.rbac.v3.RBAC";
const WASM: [&str; 2] = [
    "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm",
    "type.googleapis.com/envoy.extensions.filters.network.wasm.v3.Wasm",
];

/// Extension configurations by name.
pub(crate) type Extensions = BTreeMap<String, TypedExtensionConfig>;

/// Names the listener's filters ask for.
pub(crate) fn wanted(listener: &Listener) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    // The copy is thrown away; only the names count.
    drop(with_filters(listener.clone(), |_, name, _| {
        names.insert(name.to_owned());
        Resolved::Nothing
    }));
    names
}

/// The listener with every discovered filter in its place, and what became of it where that is not what it says.
pub(crate) fn resolve(listener: &Listener, extensions: &Extensions, notices: &mut Vec<Notice>) -> Listener {
    with_filters(listener.clone(), |network, name, source| {
        let (resolved, remark) = one(network, source, extensions.get(name).and_then(|e| e.typed_config.as_ref()));
        if let Some((reason, effect)) = remark {
            let (resource, field) = (listener.name.clone(), format!("filter {name}"));
            notices.push(Notice { resource, field, reason: reason.to_owned(), effect });
        }
        resolved
    })
}

/// What takes the place of a discovered filter.
enum Resolved {
    Nothing,
    Filter(Any),
}

fn one(
    network: bool,
    source: &ExtensionConfigSource,
    found: Option<&Any>,
) -> (Resolved, Option<(&'static str, Effect)>) {
    let default = source.default_config.as_ref().filter(|_| source.apply_default_config_without_warming);
    match found.or(default) {
        None => {
            let reason = "its configuration has not arrived: nothing passes until it has";
            (Resolved::Filter(deny(network)), Some((reason, Effect::FailsClosed)))
        }
        Some(any) if WASM.contains(&any.type_url.as_str()) => {
            if lets_pass(any) {
                let reason = "Wasm is not run here; by its failure policy requests pass without it";
                (Resolved::Nothing, Some((reason, Effect::Ignored)))
            } else {
                let reason = "Wasm is not run here; by its failure policy nothing passes without it";
                (Resolved::Filter(deny(network)), Some((reason, Effect::FailsClosed)))
            }
        }
        Some(any) => (Resolved::Filter(any.clone()), None),
    }
}

/// The failure policy of a Wasm filter; what cannot be read lets nothing pass. Both kinds of filter are one message.
fn lets_pass(any: &Any) -> bool {
    let Ok(Wasm { config: Some(config) }) = any::unpack::<Wasm>(any) else { return false };
    #[allow(deprecated, reason = "istiod sets it where the policy is not set")]
    let by_flag = config.fail_open;
    match FailurePolicy::try_from(config.failure_policy) {
        Ok(FailurePolicy::FailOpen) => true,
        Ok(FailurePolicy::Unspecified) => by_flag,
        _ => false,
    }
}

/// A filter that denies everything: rules that allow nothing.
fn deny(network: bool) -> Any {
    let rules = Some(Rules::default());
    if network {
        any::pack(NETWORK_RBAC, &NetworkRbac { rules, stat_prefix: "extension.".to_owned(), ..Default::default() })
    } else {
        any::pack(HTTP_RBAC, &HttpRbac { rules, ..Default::default() })
    }
}

/// Calls `resolve` (is it a network filter, its name, where it comes from) for each discovered filter and puts the
/// answer in its place.
fn with_filters(
    mut listener: Listener,
    mut resolve: impl FnMut(bool, &str, &ExtensionConfigSource) -> Resolved,
) -> Listener {
    let chains = listener.filter_chains.iter_mut().chain(listener.default_filter_chain.as_mut());
    for chain in chains {
        chain.filters.retain_mut(|filter| match &mut filter.config_type {
            Some(filter::ConfigType::ConfigDiscovery(source)) => match resolve(true, &filter.name, source) {
                Resolved::Nothing => false,
                Resolved::Filter(any) => {
                    filter.config_type = Some(filter::ConfigType::TypedConfig(any));
                    true
                }
            },
            Some(filter::ConfigType::TypedConfig(any)) if any.type_url == HCM => {
                if let Ok(manager) = any::unpack::<HttpConnectionManager>(any)
                    && let Some(changed) = with_http_filters(manager, &mut resolve)
                {
                    any.value = changed.encode_to_vec();
                }
                true
            }
            _ => true,
        });
    }
    listener
}

/// `None` if no filter is discovered.
fn with_http_filters(
    mut manager: HttpConnectionManager,
    resolve: &mut impl FnMut(bool, &str, &ExtensionConfigSource) -> Resolved,
) -> Option<HttpConnectionManager> {
    let mut changed = false;
    manager.http_filters.retain_mut(|filter| {
        let Some(http_filter::ConfigType::ConfigDiscovery(source)) = &filter.config_type else { return true };
        changed = true;
        match resolve(false, &filter.name, source) {
            Resolved::Nothing => false,
            Resolved::Filter(any) => {
                filter.config_type = Some(http_filter::ConfigType::TypedConfig(any));
                true
            }
        }
    });
    changed.then_some(manager)
}

#[cfg(test)]
mod tests;
