//! One configuration path: what the embedded control plane makes of YAML is what the waypoint compiles, for every
//! case that was recorded of a real istiod. (Neither side may depend on the other, so the check stands here.)
use std::path::{Path, PathBuf};

use compat_objects::ObjectSet;
use compat_translate::{MeshOptions, WaypointOutput, translate};
use l7_route::Snapshot;
use strata_integration::repository;
use xds_model::envoy::Resources;
use xds_proto::type_url;

fn testdata() -> PathBuf {
    repository().join("integration/testdata/istiod")
}

fn objects(files: &[PathBuf]) -> ObjectSet {
    let mut text = String::new();
    for file in files {
        text.push_str(&std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display())));
        text.push_str("\n---\n");
    }
    compat_objects::read_str(&text, Path::new("case.yaml")).0
}

fn yaml_in(folder: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(testdata().join(folder)).expect("test data");
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// What the waypoint refuses of it.
fn refused(output: &WaypointOutput) -> Vec<String> {
    let mut resources = Resources::default();
    let mut refused = Vec::new();
    let sets = [
        (type_url::LISTENER, &output.listeners),
        (type_url::CLUSTER, &output.clusters),
        (type_url::ENDPOINT, &output.endpoints),
    ];
    for (type_url, set) in sets {
        for (name, any) in set {
            if let Err(rejection) = resources.insert(type_url, name, &any.value) {
                refused.push(format!("{name}: {}", rejection.reason));
            }
        }
    }
    let translation = xds_model::envoy::translate(&resources);
    let (snapshot, more) = Snapshot::compile(&translation.config);
    let all = translation.rejections.iter().chain(&more);
    refused.extend(all.map(|rejection| format!("{}: {}", rejection.name, rejection.reason)));
    assert!(snapshot.terminate.is_some(), "a waypoint that terminates nothing");
    refused
}

#[test]
fn every_case_is_translated_into_what_the_waypoint_serves() {
    let base = yaml_in("base");
    let cases = yaml_in("cases");
    assert!(cases.len() >= 24, "only {} cases found", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let files: Vec<PathBuf> = base.iter().cloned().chain([case.clone()]).collect();
        let output = translate(&objects(&files), &MeshOptions::default());
        assert!(output.waypoints.len() >= 2, "{}: two waypoints stand in base", case.display());
        for (name, waypoint) in &output.waypoints {
            assert!(!waypoint.listeners.is_empty() && !waypoint.clusters.is_empty(), "{name} got nothing");
            wrong.extend(refused(waypoint).into_iter().map(|text| format!("{}: {name}: {text}", case.display())));
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}
