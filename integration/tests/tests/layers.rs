//! The arrows of docs/architecture.md: who may depend on whom. Read from `cargo metadata`, so nothing escapes.
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;
use strata_integration::repository;

/// Crates of ours by the group of their folder, and which groups each may use (its own too).
const GROUPS: [(&str, &[&str]); 8] = [
    ("core", &[]),
    ("bpf", &[]),
    ("l4-datapath", &["bpf", "core"]),
    ("l7-waypoint", &["core", "xds"]),
    ("xds", &["core"]),
    ("istio-compat", &["core", "xds"]),
    ("cli", &["core", "integration"]),
    ("integration", &["bpf", "core", "l4-datapath", "l7-waypoint", "xds", "istio-compat"]),
];

/// Single crates across groups: the contract between the layers, the objects the lower layer reads, and which of the
/// xDS crates the control plane may use.
const ALSO: [(&str, &str); 3] =
    [("l4-datapath", "compat-objects"), ("l4-datapath", "compat-kubernetes"), ("l7-waypoint", "strata-handoff")];

/// What only some crates may use, directly.
const FENCED: [(&str, &[&str]); 9] = [
    ("aya", &["l4-loader"]),
    ("aya-obj", &["l4-loader"]),
    ("rtnetlink", &["l4-netns"]),
    ("netlink-packet-route", &["l4-netns"]),
    ("kube", &["compat-kubernetes"]),
    ("kube-client", &[]),
    ("kube-runtime", &[]),
    ("compat-kubernetes", &["l4-agent", "compat-control"]),
    ("gateway-api", &["compat-objects"]),
];

/// What a whole group must not use, directly.
const FORBIDDEN: [(&str, &[&str]); 3] = [
    ("l4-datapath", &["hyper", "hyper-util", "h2", "rustls", "tokio-rustls", "tonic", "envoy-types"]),
    ("l7-waypoint", &["aya", "aya-obj", "rtnetlink", "netlink-packet-route"]),
    ("bpf", &["tokio", "hyper", "aya"]),
];

struct Ours {
    group: String,
    /// Direct dependencies of the crate itself, without those of its tests.
    uses: BTreeSet<String>,
}

fn ours() -> BTreeMap<String, Ours> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(repository())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let root = metadata["workspace_root"].as_str().expect("workspace root").to_owned();
    let mut crates = BTreeMap::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let manifest = package["manifest_path"].as_str().expect("manifest path");
        let inside = manifest.strip_prefix(&format!("{root}/")).expect("a path in the workspace");
        let group = inside.split('/').next().expect("a folder").to_owned();
        let uses = package["dependencies"].as_array().expect("dependencies").iter();
        let uses = uses.filter(|dependency| dependency["kind"] != "dev");
        let uses = uses.map(|dependency| dependency["name"].as_str().expect("name").to_owned()).collect();
        crates.insert(package["name"].as_str().expect("name").to_owned(), Ours { group, uses });
    }
    crates
}

#[test]
fn no_arrow_points_the_wrong_way() {
    let crates = ours();
    assert!(crates.len() > 20, "the workspace was read: {} crates", crates.len());
    let mut wrong = Vec::new();
    for (name, this) in &crates {
        let allowed = GROUPS.iter().find(|(group, _)| *group == this.group);
        let Some((_, allowed)) = allowed else {
            wrong.push(format!("{name}: folder {} is not in docs/architecture.md", this.group));
            continue;
        };
        for used in &this.uses {
            let Some(other) = crates.get(used) else { continue };
            let also = ALSO.iter().any(|(group, one)| *group == this.group && one == used);
            if other.group != this.group && !allowed.contains(&other.group.as_str()) && !also {
                wrong.push(format!("{name} ({}) uses {used} ({})", this.group, other.group));
            }
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn fenced_dependencies_stay_behind_their_fence() {
    let crates = ours();
    let mut wrong = Vec::new();
    for (name, this) in &crates {
        for (fenced, users) in FENCED {
            if this.uses.contains(fenced) && !users.contains(&name.as_str()) {
                wrong.push(format!("{name} uses {fenced}, which only {} may", users.join(", ")));
            }
        }
        for (group, forbidden) in FORBIDDEN {
            let uses = forbidden.iter().filter(|one| this.group == group && this.uses.contains(**one));
            wrong.extend(uses.map(|one| format!("{name} ({group}) uses {one}")));
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn the_control_plane_serves_and_never_listens_to_xds() {
    let crates = ours();
    for (name, this) in crates.iter().filter(|(_, this)| this.group == "istio-compat") {
        for forbidden in ["xds-client", "xds-model"] {
            assert!(!this.uses.contains(forbidden), "{name} uses {forbidden}");
        }
    }
}
