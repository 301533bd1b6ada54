use std::path::Path;

use prost::Message;
use xds_client::{Rejected, Resource, Update};
use xds_proto::envoy::envoy::service::discovery::v3::DeltaDiscoveryResponse;

use super::*;

/// What a real istiod sent to a waypoint, as held.
fn held(case: &str) -> Held {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/testdata/istiod/recorded");
    let mut held = Held::default();
    let files = [
        (type_url::CLUSTER, "clusters.binpb"),
        (type_url::ENDPOINT, "endpoints.binpb"),
        (type_url::LISTENER, "listeners.binpb"),
        (type_url::EXTENSION, "extensions.binpb"),
    ];
    for (type_url, file) in files {
        let path = |case: &str| root.join(case).join("waypoint-shop-waypoint").join(file);
        let Ok(bytes) = std::fs::read(path(case)).or_else(|_| std::fs::read(path("00-base"))) else { continue };
        let response = DeltaDiscoveryResponse::decode(bytes.as_slice()).unwrap();
        let resources = response.resources.into_iter().map(|resource| {
            let body = resource.resource.unwrap().value.into();
            Resource { name: resource.name, version: resource.version, type_url: type_url.to_owned(), body }
        });
        let update = Update { type_url: type_url.to_owned(), resources: resources.collect(), removed: Vec::new() };
        held.take(&update, &[], |_| true);
    }
    held
}

#[test]
fn every_recorded_resource_can_be_shown() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/testdata/istiod/recorded");
    let mut shown = 0;
    for case in std::fs::read_dir(root).unwrap() {
        let held = held(case.unwrap().file_name().to_str().unwrap());
        for type_url in [type_url::CLUSTER, type_url::ENDPOINT, type_url::LISTENER, type_url::EXTENSION] {
            for (name, entry) in held.of(type_url) {
                let version = entry.accepted.as_ref().unwrap();
                proto_json::any(type_url, &version.body).unwrap_or_else(|error| panic!("{name}: {error}"));
                shown += 1;
            }
        }
    }
    assert!(shown > 500, "only {shown} resources");
}

#[test]
fn listeners_and_their_inline_routes_in_envoys_shape() {
    let held = held("03-header-canary");
    let (name, entry) = held.of(type_url::LISTENER).find(|(name, _)| *name == "main_internal").unwrap();
    let listener = listener(name, entry);
    assert_eq!(listener["activeState"]["listener"]["@type"], type_url::LISTENER);
    let mut routes = Vec::new();
    inline_routes(&listener, entry.accepted.as_ref().unwrap(), &mut routes);
    let tables: Vec<_> = routes.iter().map(|route| route["routeConfig"]["name"].as_str().unwrap()).collect();
    assert!(tables.iter().any(|name| name.contains("reviews.shop.svc.cluster.local")), "{tables:?}");
    assert!(routes.iter().all(|route| route["routeConfig"]["@type"] == type_url::ROUTE));
}

#[test]
fn clusters_list_their_endpoints() {
    let held = held("00-base");
    let Reply::Json(shown) = clusters(&held, "format=json") else { panic!("JSON was asked for") };
    let statuses = shown["clusterStatuses"].as_array().unwrap();
    let named = |part: &str| statuses.iter().find(|status| status["name"].as_str().unwrap().contains(part)).unwrap();
    let reviews = named("reviews.shop.svc.cluster.local");
    let hosts = reviews["hostStatuses"].as_array().unwrap();
    assert!(!hosts.is_empty() && hosts.iter().all(|host| host["healthStatus"]["edsHealthStatus"] == "HEALTHY"));
    let Reply::Text(text) = clusters(&held, "") else { panic!("text was asked for") };
    assert!(
        text.lines().any(|line| line.contains("reviews.shop.svc.cluster.local") && line.contains("envoy://")),
        "{text}"
    );
}

#[test]
fn a_refused_version_stands_beside_the_one_in_force() {
    let mut held = held("00-base");
    let (name, body) = {
        let (name, entry) = held.of(type_url::CLUSTER).next().unwrap();
        (name.to_owned(), entry.accepted.as_ref().unwrap().body.clone())
    };
    let resource =
        Resource { name: name.clone(), version: "bad".to_owned(), type_url: type_url::CLUSTER.to_owned(), body };
    let update = Update { type_url: type_url::CLUSTER.to_owned(), resources: vec![resource], removed: Vec::new() };
    let rejected = [Rejected { name: name.clone(), reason: "cannot be taken".to_owned() }];
    held.take(&update, &rejected, |_| false);
    let (_, entry) = held.of(type_url::CLUSTER).find(|(found, _)| **found == name).unwrap();
    let shown = dynamic("cluster", type_url::CLUSTER, entry);
    assert_eq!(shown["errorState"]["details"], "cannot be taken");
    assert_ne!(shown["versionInfo"], "bad");
    held.take(&Update { resources: Vec::new(), removed: vec![name.clone()], ..update }, &[], |_| true);
    assert!(!held.of(type_url::CLUSTER).any(|(found, _)| *found == name));
}
