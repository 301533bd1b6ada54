//! Every object Istio's control plane was recorded with is read whole.
use std::path::{Path, PathBuf};

use compat_objects::source::DirectorySource;
use compat_objects::{Fault, HasMeta as _, ObjectSet, Severity, read_str};

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/testdata/istiod")
}

fn files(folder: &str) -> Vec<PathBuf> {
    let dir = testdata().join(folder);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", dir.display());
    files
}

fn read(file: &Path) -> (ObjectSet, Vec<Fault>) {
    read_str(&std::fs::read_to_string(file).unwrap(), file)
}

#[test]
fn the_base_is_read_without_a_word() {
    for file in files("base") {
        let (set, faults) = read(&file);
        assert!(faults.is_empty(), "{}: {faults:#?}", file.display());
        assert!(!set.is_empty());
    }
    let snapshot = DirectorySource::new(vec![testdata().join("base")]).load();
    let objects = &snapshot.objects;
    assert!(snapshot.faults.is_empty());
    assert_eq!(objects.nodes().count(), 3);
    let payments = objects.pod("bank", "payments-v1-a").unwrap();
    assert_eq!(payments.label("version"), Some("v1"));
    assert_eq!(payments.status.as_ref().unwrap().pod_ips.as_ref().unwrap()[1].ip, "fd00:8:0::14");
    assert_eq!(objects.gateway("shop", "waypoint").unwrap().spec.listeners[0].protocol, "HBONE");
}

#[test]
fn every_case_is_read_whole() {
    for file in files("cases") {
        let (set, faults) = read(&file);
        let errors: Vec<&Fault> = faults.iter().filter(|fault| fault.severity == Severity::Error).collect();
        assert!(errors.is_empty(), "{}: {errors:#?}", file.display());
        let documents = std::fs::read_to_string(&file).unwrap().matches("apiVersion: ").count();
        assert_eq!(set.len(), documents, "{}", file.display());
    }
}

#[test]
fn fields_arrive_where_they_belong() {
    let case = |name: &str| read(&testdata().join("cases").join(name)).0;
    let actions = case("05-actions.yaml");
    let http = &actions.virtual_service("shop", "reviews").unwrap().spec.http;
    let retries = http.iter().find(|route| route.name == "retries").unwrap();
    assert_eq!(retries.timeout.unwrap().as_secs(), 5);
    assert_eq!(retries.retries.as_ref().unwrap().per_try_timeout.unwrap().as_millis(), 750);
    let bytes = http.iter().find(|route| route.name == "direct-bytes").unwrap();
    let body = bytes.direct_response.as_ref().unwrap().body.as_ref().unwrap();
    assert_eq!(body.bytes.as_ref().unwrap().0, b"hello");

    let peers = case("02-peer-authentication.yaml");
    let ports = &peers.peer_authentication("bank", "payments-ports").unwrap().spec.port_level_mtls;
    assert_eq!(ports.keys().copied().collect::<Vec<_>>(), [9901]);

    let routes = case("14-http-routes.yaml");
    let reviews = routes.http_route("shop", "reviews").unwrap();
    assert_eq!(reviews.spec.rules[1].backend_refs[1].filters.len(), 1);
    assert_eq!(reviews.spec.rules[1].retry.as_ref().unwrap().codes, [500, 503]);

    let traffic = case("07-destination-rule-traffic.yaml");
    let reviews = &traffic.destination_rule("shop", "reviews").unwrap().spec;
    let outlier = reviews.traffic_policy.as_ref().unwrap().outlier_detection.as_ref().unwrap();
    assert_eq!(outlier.consecutive_5xx_errors, Some(3));
    assert_eq!(reviews.subsets[2].name, "v3");
}

#[test]
fn a_misspelt_field_of_a_security_object_is_refused_by_name() {
    let text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a, namespace: b}\n\
                spec:\n  action: ALLOW\n  rules:\n  - form: [{source: {namespaces: [x]}}]\n";
    let (set, faults) = read_str(text, Path::new("p.yaml"));
    assert!(set.is_empty());
    let shown = faults[0].to_string();
    assert!(
        shown.starts_with("p.yaml:7: error: AuthorizationPolicy b/a: spec.rules[0].form: unknown field"),
        "{shown}"
    );
}

#[test]
fn a_misspelt_field_of_a_pod_is_a_warning() {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: c, imagee: x}]}\n";
    let (set, faults) = read_str(text, Path::new("p.yaml"));
    assert!(set.pod("default", "a").is_some());
    assert_eq!(faults.len(), 1);
    assert_eq!(faults[0].severity, Severity::Warning);
    assert_eq!(faults[0].field, "spec.containers[0].imagee");
}

#[test]
fn wrong_versions_and_strange_kinds() {
    let text = "apiVersion: networking.istio.io/v2\nkind: VirtualService\nmetadata: {name: a}\n---\n\
                apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\n---\nkind: Pod\n";
    let (set, faults) = read_str(text, Path::new("p.yaml"));
    assert!(set.is_empty());
    assert_eq!(faults.len(), 3);
    assert!(faults[0].reason.contains("use networking.istio.io/v1"), "{}", faults[0]);
    assert_eq!(faults[1].severity, Severity::Warning);
    assert_eq!((faults[2].field.as_str(), faults[2].line), ("apiVersion", 9));
}
