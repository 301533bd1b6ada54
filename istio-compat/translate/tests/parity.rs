//! Our output beside what a real istiod sent for the same objects (`integration/testdata/istiod`).
//!
//! Both sides become JSON by reflection, are normalised (order that means nothing, telemetry), and compared field by
//! field. Where we differ on purpose, [`known::DIFFERENCES`] says why.
#[path = "parity/json.rs"]
mod json;
#[path = "parity/known.rs"]
mod known;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use compat_objects::ObjectSet;
use compat_objects::istio::ServiceEntry;
use compat_objects::source::{DirectorySource, Snapshot};
use compat_translate::{MeshOptions, MeshOutput, Resources, translate};
use prost::Message;
use serde_json::Value;
use xds_proto::envoy::envoy::service::discovery::v3::DeltaDiscoveryResponse;

const SHOP: &str = "shop/waypoint";
const BANK: &str = "bank/payments-waypoint";

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/testdata/istiod")
}

/// The folder or file in `parent` that begins with the case's number.
fn numbered(parent: &str, case: &str) -> PathBuf {
    let folder = testdata().join(parent);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let found = entries.filter_map(Result::ok).find(|entry| entry.file_name().to_string_lossy().starts_with(case));
    found.unwrap_or_else(|| panic!("nothing for case {case} in {}", folder.display())).path()
}

fn objects(case: &str) -> Arc<Snapshot> {
    let mut sources = vec![testdata().join("base"), Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")];
    if case != "00" {
        sources.push(numbered("cases", case));
    }
    let snapshot = DirectorySource::new(sources).load();
    let faults: Vec<String> = snapshot.errors().map(ToString::to_string).collect();
    assert!(faults.is_empty(), "case {case} does not read: {faults:#?}");
    snapshot
}

fn ours(case: &str) -> MeshOutput {
    let mut objects = objects(case).objects.clone();
    keep_addresses(case, &mut objects);
    translate(&objects, &MeshOptions::default())
}

/// ServiceEntries with the status that istiod wrote, which has the addresses it drew for them.
fn keep_addresses(case: &str, objects: &mut ObjectSet) {
    let Ok(text) = std::fs::read_to_string(numbered("recorded", case).join("status.json")) else { return };
    let written: Vec<Value> = serde_json::from_str(&text).unwrap();
    for written in written.iter().filter(|written| written["kind"] == "ServiceEntry") {
        let text = |field: &str| written[field].as_str().unwrap();
        let Some(entry) = objects.service_entry(text("namespace"), text("name")) else { continue };
        let mut entry = ServiceEntry::clone(entry);
        entry.status = Some(written["status"].clone());
        objects.insert(entry.into(), None);
    }
}

/// A recorded set; one that is absent equals the base's. `None`: nothing was sent at all.
fn recorded(case: &str, set: &str, kind: &str) -> BTreeMap<String, Value> {
    let file = |case: &str| numbered("recorded", case).join(set).join(format!("{kind}.binpb"));
    let path = [file(case), file("00")].into_iter().find(|path| path.exists());
    let Some(path) = path else { return BTreeMap::new() };
    let bytes = std::fs::read(&path).unwrap();
    let response = DeltaDiscoveryResponse::decode(bytes.as_slice()).unwrap();
    let body = |r: xds_proto::envoy::envoy::service::discovery::v3::Resource| (r.name, json::any(&r.resource.unwrap()));
    response.resources.into_iter().map(body).collect()
}

fn as_json(resources: &Resources) -> BTreeMap<String, Value> {
    resources.iter().map(|(name, any)| (name.clone(), json::any(any))).collect()
}

fn compare(case: &str, set: &str, kind: &str, resources: &Resources) -> Vec<String> {
    let (ours, theirs) = (as_json(resources), recorded(case, set, kind));
    let mut differences = Vec::new();
    for name in ours.keys().chain(theirs.keys().filter(|name| !ours.contains_key(*name))) {
        let at = format!("{kind} {name}");
        match (ours.get(name), theirs.get(name)) {
            (Some(a), Some(b)) => json::diff(&at, a, b, &mut differences),
            (Some(_), None) => differences.push(format!("{at}: only ours")),
            (None, _) => differences.push(format!("{at}: only istiod's")),
        }
    }
    differences
}

fn check(case: &str, differences: Vec<String>) {
    let unknown: Vec<String> = differences.into_iter().filter(|d| !known::is_known(case, d)).collect();
    let shown = unknown.iter().take(60).cloned().collect::<Vec<_>>().join("\n");
    assert!(unknown.is_empty(), "case {case}: {} unexplained differences\n{shown}", unknown.len());
}

fn node(case: &str) {
    let output = ours(case);
    let mut differences = compare(case, "node", "address", &output.addresses);
    differences.extend(compare(case, "node", "authorization", &output.authorizations));
    check(case, differences);
}

fn waypoints(case: &str) {
    governed_by(case, &[(SHOP, "waypoint-shop-waypoint"), (BANK, "waypoint-bank-payments-waypoint")]);
}

fn governed_by(case: &str, sets: &[(&str, &str)]) {
    let output = ours(case);
    let mut differences = Vec::new();
    for (key, set) in sets {
        let waypoint = &output.waypoints[*key];
        let mut found = compare(case, set, "listeners", &waypoint.listeners);
        found.extend(compare(case, set, "clusters", &waypoint.clusters));
        found.extend(compare(case, set, "endpoints", &waypoint.endpoints));
        found.extend(compare(case, set, "workloads", &output.workloads));
        differences.extend(found.into_iter().map(|difference| format!("{key} {difference}")));
    }
    check(case, differences);
}

macro_rules! cases {
    ($($name:ident $case:literal $check:ident;)*) => {$(
        #[test]
        fn $name() {
            $check($case);
        }
    )*};
}

cases! {
    base_node "00" node;
    base_waypoints "00" waypoints;
    l4_authorization_node "01" node;
    l4_authorization_waypoints "01" waypoints;
    peer_authentication_node "02" node;
    peer_authentication_waypoints "02" waypoints;
    header_canary_node "03" node;
    header_canary_waypoints "03" waypoints;
    match_everything_waypoints "04" waypoints;
    actions_waypoints "05" waypoints;
    tcp_routes_node "06" node;
    tcp_routes_waypoints "06" waypoints;
    destination_rules_waypoints "07" waypoints;
    destination_rules_tls_waypoints "08" waypoints;
    l7_authorization_node "09" node;
    l7_authorization_waypoints "09" waypoints;
    external_authorization_waypoints "10" waypoints;
    audit_and_dry_run_waypoints "11" waypoints;
    jwt_waypoints "12" waypoints;
    service_entries_node "13" node;
    service_entries_waypoints "13" waypoints;
    http_routes_waypoints "14" waypoints;
    grpc_routes_waypoints "15" waypoints;
    gateway_tcp_routes_node "16" node;
    gateway_tcp_routes_waypoints "16" waypoints;
    backend_tls_waypoints "17" waypoints;
    telemetry_waypoints "18" waypoints;
    service_shapes_node "19" node;
    service_shapes_waypoints "19" waypoints;
    visibility_node "20" node;
    visibility_waypoints "20" waypoints;
    mistakes_waypoints "22" waypoints;
    weighted_waypoints_node "23" node;
    claim_presence_waypoints "24" waypoints;
}

#[test]
fn equal_objects_give_equal_bytes() {
    for case in ["03", "05", "09", "12"] {
        let (first, second) = (ours(case), ours(case));
        assert_eq!(first.addresses, second.addresses, "case {case}");
        assert_eq!(first.authorizations, second.authorizations, "case {case}");
        assert_eq!(first.waypoints, second.waypoints, "case {case}");
    }
}

#[test]
fn mistakes_name_object_and_field() {
    let faults: Vec<String> = ours("22").faults.iter().map(ToString::to_string).collect();
    for expected in [
        "VirtualService shop/to-nowhere: spec.http[0].route[0].destination.host: no Service",
        "VirtualService shop/to-nowhere: spec.http[1].route[0].destination.subset: no DestinationRule",
    ] {
        assert!(faults.iter().any(|fault| fault.contains(expected)), "{expected:?} is not among {faults:#?}");
    }
}
