//! Everything istiod was recorded to say is translated and compiled; what is not served is listed by name.
mod support;

use std::fmt::Write as _;

use support::{BANK, SHOP, cases, load};

/// Cases with a part that is refused when it is read: a virtual machine behind a sidecar (13), Wasm (21). What is
/// refused later, when a connection is made, is in the snapshot alone.
const NOT_WHOLLY_SERVED: [&str; 2] = ["13-service-entries", "21-extension-filters"];

/// What the proxy's connector refuses to connect to.
fn closed(cluster: &xds_model::envoy::cluster::Cluster) -> Option<String> {
    let shared = cluster.proxy_protocol.is_some() && !cluster.name.contains("|tcp");
    shared.then(|| format!("NotConnected {}: the PROXY protocol on shared HTTP connections", cluster.name))
}

#[test]
fn every_recorded_set_compiles_and_what_is_not_served_is_named() {
    let cases = cases();
    assert_eq!(cases.len(), 25, "{cases:?}");
    let mut text = String::new();
    for case in &cases {
        for waypoint in [SHOP, BANK] {
            let (translation, snapshot, rejections) = load(case, waypoint);
            writeln!(text, "# {case} {waypoint}: {} chains", snapshot.chains().count()).expect("fmt");
            for rejection in translation.rejections.iter().chain(&rejections) {
                let part = if rejection.partial { "partly" } else { "whole" };
                writeln!(text, "rejected {part} {}: {}", rejection.name, rejection.reason).expect("fmt");
            }
            for notice in &translation.notices {
                writeln!(text, "{:?} {}: {}: {}", notice.effect, notice.resource, notice.field, notice.reason)
                    .expect("fmt");
            }
            let mut closed: Vec<_> = snapshot.clusters.iter().filter_map(|cluster| closed(cluster)).collect();
            closed.sort();
            closed.iter().for_each(|line| writeln!(text, "{line}").expect("fmt"));
            assert!(snapshot.terminate.is_some_and(|terminate| terminate.config.closed.is_none()));
            assert!(snapshot.originate.is_some());
        }
    }
    insta::assert_snapshot!("not_served", text);
}

#[test]
fn served_cases_have_no_rejection_and_nothing_fails_closed() {
    for case in cases().iter().filter(|case| !NOT_WHOLLY_SERVED.contains(&case.as_str())) {
        for waypoint in [SHOP, BANK] {
            let (translation, _, rejections) = load(case, waypoint);
            assert_eq!(translation.rejections, [], "{case}");
            assert_eq!(rejections, [], "{case}");
            let closed: Vec<_> = translation
                .notices
                .iter()
                .filter(|notice| notice.effect == xds_model::envoy::Effect::FailsClosed)
                .collect();
            assert_eq!(closed, Vec::<&xds_model::envoy::Notice>::new(), "{case}");
        }
    }
}
