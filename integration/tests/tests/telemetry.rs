//! Access logs, spans and labels of metrics without istiod: the mesh configuration's providers, and Telemetry that asks for
//! them.
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use strata_integration::{Shop, repository, shop};

const LIMIT: Duration = Duration::from_secs(20);
const PAYMENTS: &str = "http://10.96.1.20";

/// A log of JSON lines in a file, and a collector in a pod that no mesh has.
fn providers(file: &Path) -> String {
    format!(
        "
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data:
  mesh: |
    extensionProviders:
    - name: requests
      envoyFileAccessLog:
        path: {}
        logFormat: {{labels: {{path: '%REQ(:PATH)%', status: '%RESPONSE_CODE%'}}}}
    - name: otel
      opentelemetry: {{service: otel.outside.svc.cluster.local, port: 4317}}
---
apiVersion: v1
kind: Pod
metadata: {{name: otel, namespace: outside, labels: {{app: otel}}}}
spec:
  nodeName: node-b
  containers:
  - name: collector
    image: strata.io/echo:dev
    args: [collect, --listen, '0.0.0.0:4317']
    ports: [{{name: grpc, containerPort: 4317}}]
---
apiVersion: v1
kind: Service
metadata: {{name: otel, namespace: outside}}
spec: {{clusterIP: 10.96.1.99, clusterIPs: [10.96.1.99], selector: {{app: otel}}, ports: [{{name: grpc, port: 4317}}]}}
",
        file.display()
    )
}

const TELEMETRY: &str = "
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: seen, namespace: shop}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}]
  accessLogging: [{providers: [{name: requests}], filter: {expression: \"!('x-quiet' in request.headers)\"}}]
  tracing: [{providers: [{name: otel}], randomSamplingPercentage: 100, customTags: {team: {literal: {value: payments}}}}]
  metrics:
  - overrides:
    - match: {metric: REQUEST_COUNT}
      tagOverrides:
        request_method: {value: request.method}
        tenant: {value: \"request.headers['x-tenant']\"}
        response_flags: {operation: REMOVE}
    - {match: {metric: REQUEST_SIZE}, disabled: true}
";

fn ask(shop: &Shop, path: &str) {
    let call = shop.lab.call("shop/checkout-1", &[&format!("{PAYMENTS}{path}"), "--timeout", "2s"]).unwrap();
    assert_eq!(call.ok, 1, "{}", call.brief());
}

/// Lines that are JSON and of requests for this path.
fn of_path(text: &str, pick: impl Fn(&Value) -> Option<&str>, path: &str) -> Vec<Value> {
    let all = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    all.filter(|line| pick(line).is_some_and(|found| found.ends_with(path))).collect()
}

#[test]
fn a_telemetry_resource_turns_logs_and_spans_on_and_off() {
    let shop = shop();
    let lab = &shop.lab;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("requests.log");
    for piece in ["ambient", "waypoint"] {
        lab.apply(&repository().join(format!("manifests/samples/scenes/{piece}.yaml"))).unwrap();
    }
    lab.edit("providers.yaml", &providers(&file)).unwrap();
    lab.edit("telemetry.yaml", TELEMETRY).unwrap();

    let logged = |path: &str| {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        of_path(&text, |line| line["path"].as_str(), path)
    };
    let spans = |path: &str| {
        let printed = lab.log_tail("pod-outside-otel", 10_000);
        of_path(&printed, |span| span["attributes"]["http.url"].as_str(), path)
    };
    let arrived = lab.wait_until("a line and a span", LIMIT, || {
        // The pods are being enrolled, the waypoint begins to serve: a request may find neither.
        let asked = lab.call("shop/checkout-1", &[&format!("{PAYMENTS}/first"), "--timeout", "2s"]);
        asked.is_ok_and(|call| call.ok == 1) && !logged("/first").is_empty() && !spans("/first").is_empty()
    });
    assert!(
        arrived.is_ok(),
        "{} lines, {} spans; {}",
        logged("/first").len(),
        spans("/first").len(),
        shop.dump("telemetry")
    );
    ask(&shop, "/second");
    lab.wait_until("the second request's", LIMIT, || !logged("/second").is_empty() && !spans("/second").is_empty())
        .unwrap();
    assert_eq!(logged("/second")[0]["status"], 200);
    let span = spans("/second").remove(0);
    assert_eq!(span["attributes"]["team"], "payments");
    assert_eq!(span["attributes"]["istio.namespace"], "shop");
    assert!(span["attributes"]["istio.source_workload"].as_str().unwrap().starts_with("checkout"), "{span}");

    // Traced, and not logged.
    let quiet = lab.call("shop/checkout-1", &[&format!("{PAYMENTS}/quiet"), "--timeout", "2s", "-H", "x-quiet: yes"]);
    assert_eq!(quiet.unwrap().ok, 1);
    ask(&shop, "/after");
    lab.wait_until("both requests' spans", LIMIT, || !spans("/quiet").is_empty() && !logged("/after").is_empty())
        .unwrap();
    assert!(logged("/quiet").is_empty());

    // Requests were counted as the Telemetry says from the moment it was logged by it.
    let metrics = lab.admin_text("shop/waypoint-1", "/metrics").unwrap();
    let requests = metrics.lines().filter(|line| line.starts_with("istio_requests_total{")).collect::<Vec<_>>();
    let told = requests.iter().find(|line| line.contains(r#"request_method="GET",tenant="unknown""#));
    assert!(told.is_some_and(|line| !line.contains("response_flags=")), "{requests:#?}");

    lab.edit("telemetry.yaml", "# nothing\n").unwrap();
    let quiet = lab.wait_until("nothing to be logged", LIMIT, || {
        ask(&shop, "/last");
        let before = logged("/last").len();
        ask(&shop, "/last");
        std::thread::sleep(Duration::from_millis(100));
        logged("/last").len() == before
    });
    assert!(quiet.is_ok(), "{} lines", logged("/last").len());
}
