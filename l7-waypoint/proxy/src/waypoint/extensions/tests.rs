use std::path::Path;

use xds_model::envoy::{Resources, translate};
use xds_proto::envoy::envoy::extensions::wasm::v3::PluginConfig;
use xds_proto::envoy::envoy::service::discovery::v3::DeltaDiscoveryResponse;

use super::*;

/// What a real istiod sent for WasmPlugins (case 21): listeners and extension configurations.
fn recorded() -> (BTreeMap<String, Listener>, Extensions) {
    let root = "../../integration/testdata/istiod/recorded/21-extension-filters/waypoint-shop-waypoint";
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(root);
    let read = |file: &str| {
        let response = DeltaDiscoveryResponse::decode(std::fs::read(folder.join(file)).unwrap().as_slice()).unwrap();
        response.resources.into_iter().map(|resource| (resource.name, resource.resource.unwrap()))
    };
    let listeners = read("listeners.binpb").map(|(name, any)| (name, any::unpack(&any).unwrap())).collect();
    let extensions = read("extensions.binpb").map(|(name, any)| (name, any::unpack(&any).unwrap())).collect();
    (listeners, extensions)
}

fn all_wanted(listeners: &BTreeMap<String, Listener>) -> BTreeSet<String> {
    listeners.values().flat_map(wanted).collect()
}

#[test]
fn istiods_wasm_plugins_are_asked_for_and_act_by_their_failure_policy() {
    let (listeners, extensions) = recorded();
    let names = all_wanted(&listeners);
    assert!(!names.is_empty());
    for name in &names {
        assert!(extensions.contains_key(name), "{name} is not among {:?}", extensions.keys());
    }
    let mut notices = Vec::new();
    let resolved: BTreeMap<_, _> =
        listeners.iter().map(|(name, l)| (name.clone(), resolve(l, &extensions, &mut notices))).collect();
    assert!(all_wanted(&resolved).is_empty());
    for name in &names {
        assert!(notices.iter().any(|notice| notice.field.contains(name)), "{name}: {notices:?}");
    }
    let translation = translate(&Resources { listeners: resolved, ..Default::default() });
    let by_discovery = |r: &&xds_model::envoy::Rejection| r.reason.contains("discovery");
    assert_eq!(translation.rejections.iter().find(by_discovery), None);
}

#[test]
fn until_the_configuration_arrives_nothing_passes() {
    let (listeners, _) = recorded();
    let mut notices = Vec::new();
    for listener in listeners.values().filter(|listener| !wanted(listener).is_empty()) {
        resolve(listener, &Extensions::new(), &mut notices);
    }
    assert!(!notices.is_empty());
    assert!(notices.iter().all(|notice| notice.effect == Effect::FailsClosed), "{notices:?}");
}

#[test]
fn failure_policies() {
    let wasm = |failure_policy: FailurePolicy, fail_open| {
        #[allow(deprecated, reason = "istiod sets it where the policy is not set")]
        let config = PluginConfig { failure_policy: failure_policy as i32, fail_open, ..Default::default() };
        any::pack(WASM[0], &Wasm { config: Some(config) })
    };
    assert!(lets_pass(&wasm(FailurePolicy::FailOpen, false)));
    assert!(lets_pass(&wasm(FailurePolicy::Unspecified, true)));
    assert!(!lets_pass(&wasm(FailurePolicy::Unspecified, false)));
    assert!(!lets_pass(&wasm(FailurePolicy::FailClosed, true)));
    assert!(!lets_pass(&Any { type_url: WASM[0].to_owned(), value: vec![0xff] }));
}
