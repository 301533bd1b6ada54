//! Every scene on the running cluster (`make test-cluster`), one after the other on one shop.
//! `STRATA_SCENES=3,5` plays only those.
#![cfg(feature = "cluster-tests")]
use strata_cluster::{Cluster, scenes};

#[test]
fn every_scene_holds_on_a_cluster() {
    let wanted = std::env::var("STRATA_SCENES").unwrap_or_default();
    let wanted: Vec<u8> = wanted.split(',').filter_map(|number| number.trim().parse().ok()).collect();
    let cluster = Cluster::connect().unwrap_or_else(|error| panic!("the shop is not on the cluster: {error}"));
    let (mut failed, mut played) = (Vec::new(), 0);
    for scene in scenes::all() {
        if !wanted.is_empty() && !wanted.contains(&scene.number()) {
            continue;
        }
        let report = scene.play(&cluster);
        played += 1;
        let held = report.checks.iter().filter(|check| check.ok).count();
        println!("scene {} {}: {held} of {} checks held", scene.number(), scene.title(), report.checks.len());
        for line in &report.measured {
            println!("    measured: {line}");
        }
        assert!(!report.checks.is_empty(), "scene {} checked nothing", scene.number());
        for check in report.checks.iter().filter(|check| !check.ok) {
            println!("    FAILED {}: {}", check.what, check.detail);
            failed.push(format!("scene {}: {}: {}", scene.number(), check.what, check.detail));
        }
    }
    assert!(played > 0, "no scene of the numbers {wanted:?}");
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
