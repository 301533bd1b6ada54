//! The ten scenes of the demo as tests: each on a mesh of its own, so that their order does not matter.
use strata_integration::shop;
use strata_lab::scenes;

fn play(number: u8) {
    let shop = shop();
    let scene = scenes::ALL.iter().find(|scene| scene.number == number).expect("a scene of this number");
    let report = scene.play(&shop.lab);
    for line in &report.measured {
        println!("measured: {line}");
    }
    let failed: Vec<String> = report
        .checks
        .iter()
        .filter(|check| !check.ok)
        .map(|check| format!("  {}: {}", check.what, check.detail))
        .collect();
    assert!(!report.checks.is_empty(), "scene {number} checked nothing");
    assert!(failed.is_empty(), "{}:\n{}\n{}", report.title, failed.join("\n"), shop.dump(&format!("scene-{number}")));
}

#[test]
fn scene_01_service_access() {
    play(1);
}

#[test]
fn scene_02_policy_by_identity() {
    play(2);
}

#[test]
fn scene_03_enrolment() {
    play(3);
}

#[test]
fn scene_04_header_routing() {
    play(4);
}

#[test]
fn scene_05_canary() {
    play(5);
}

#[test]
fn scene_06_resilience() {
    play(6);
}

#[test]
fn scene_07_zero_trust() {
    play(7);
}

#[test]
fn scene_08_short_cut() {
    play(8);
}

#[test]
fn scene_09_nothing_lost() {
    play(9);
}

#[test]
fn scene_10_seen() {
    play(10);
}
