//! From YAML to verdicts.
use crate::node::{Node, eventually, exchange};

const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
const ONLY_CHECKOUT: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: payments, namespace: shop}
spec:
  podSelector: {matchLabels: {app: payments}}
  ingress: [{from: [{podSelector: {matchLabels: {app: checkout}}}], ports: [{port: 8080}]}]
"#;

#[test]
fn edits_of_policy_and_labels_change_verdicts_for_new_and_open_connections() {
    let mut node = Node::new();
    node.write("namespace.yaml", NAMESPACE);
    node.describe("checkout", "app: checkout");
    node.describe("frontend", "app: frontend");
    node.describe("payments", "app: payments");
    node.start();
    let [checkout, frontend, payments] = ["checkout", "frontend", "payments"].map(|name| node.pod(name));
    payments.serve(8080);
    payments.serve(9090);
    for ip in [payments.v4, payments.v6] {
        assert!(checkout.connects(ip, 8080) && frontend.connects(ip, 8080), "{ip}");
    }
    let mut open = frontend.connect(payments.v4, 8080).expect("connection");
    assert!(exchange(&mut open));

    node.write("policy.yaml", ONLY_CHECKOUT);
    assert!(eventually(|| !frontend.connects(payments.v4, 8080)), "{}", node.get("/config_dump"));
    assert!(!frontend.connects(payments.v6, 8080), "IPv6 is open");
    assert!(!exchange(&mut open), "an open connection survived a policy that forbids it");
    assert!(checkout.connects(payments.v4, 8080) && checkout.connects(payments.v6, 8080));
    assert!(!checkout.connects(payments.v4, 9090), "a port no rule allows is open");

    // The flow names both ends and the policy.
    let flows = node.get_text("/flows");
    let denied = flows.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()).find(|flow| {
        flow["verdict"] == "dropped" && flow["src"]["workload"] == "frontend" && flow["dst"]["workload"] == "payments"
    });
    let denied = denied.unwrap_or_else(|| panic!("no flow of the denied connection in\n{flows}"));
    assert_eq!(denied["drop_reason"], "policy_denied");
    assert_eq!(denied["policy"]["names"][0], "payments");
    assert_eq!(denied["policy"]["direction"], "ingress");
    assert!(node.get_text("/metrics").contains(r#"hubble_drop_total{reason="policy_denied",protocol="TCP"}"#));

    // Labels: the frontend becomes a checkout, and back.
    node.describe("frontend", "app: checkout");
    assert!(eventually(|| frontend.connects(payments.v4, 8080)), "{}", node.get("/config_dump"));
    node.describe("frontend", "app: frontend");
    assert!(eventually(|| !frontend.connects(payments.v4, 8080)));

    // A broken file leaves the last good policy in force, and says so.
    node.write("policy.yaml", "kind: NetworkPolicy\nspec: [");
    assert!(eventually(|| !node.status()["source"]["faults"].as_array().unwrap().is_empty()), "{}", node.status());
    assert!(!frontend.connects(payments.v4, 8080) && checkout.connects(payments.v4, 8080));
    node.remove("policy.yaml");
    assert!(eventually(|| frontend.connects(payments.v4, 8080)));
}

#[test]
fn policy_outlives_the_agent_and_is_the_same_after_a_restart() {
    let mut node = Node::new();
    node.write("namespace.yaml", NAMESPACE);
    node.write("policy.yaml", ONLY_CHECKOUT);
    node.describe("checkout", "app: checkout");
    node.describe("frontend", "app: frontend");
    node.describe("payments", "app: payments");
    node.start();
    let [checkout, frontend, payments] = ["checkout", "frontend", "payments"].map(|name| node.pod(name));
    payments.serve(8080);
    let holds = || checkout.connects(payments.v4, 8080) && !frontend.connects(payments.v4, 8080);
    assert!(holds());
    let identities = node.get("/config_dump")["identities"].clone();
    node.kill();
    assert!(holds(), "without the agent");
    node.start();
    assert!(holds(), "after the restart");
    assert_eq!(node.get("/config_dump")["identities"], identities);
    // Sources that are away are no reason to forget the policy.
    node.kill();
    let away = node.objects().with_extension("away");
    std::fs::rename(node.objects(), &away).unwrap();
    std::fs::create_dir(node.objects()).unwrap();
    node.start();
    assert!(holds(), "with empty sources");
    assert!(node.status()["problem"].as_str().unwrap().contains("no object"), "{}", node.status());
    std::fs::remove_dir(node.objects()).unwrap();
    std::fs::rename(away, node.objects()).unwrap();
    assert!(eventually(|| node.status()["problem"].is_null()), "{}", node.status());
    assert!(holds());
}

#[test]
fn a_pod_is_unmanaged_until_its_object_comes() {
    let mut node = Node::new();
    node.write("namespace.yaml", NAMESPACE);
    node.write("policy.yaml", ONLY_CHECKOUT);
    node.describe("payments", "app: payments");
    node.start();
    let (payments, checkout) = (node.pod("payments"), node.pod("checkout"));
    payments.serve(8080);
    assert_eq!(node.status()["pods"][0]["described"].as_bool().map(|_| ()), Some(()));
    assert!(!checkout.connects(payments.v4, 8080), "a pod nobody described is let in");
    assert!(!node.status_file().contains("checkout"));
    node.describe("checkout", "app: checkout");
    assert!(eventually(|| checkout.connects(payments.v4, 8080)), "{}", node.status());
    assert!(eventually(|| node.status_file().contains(&checkout.v4.to_string())));
}

const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec: {clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10], selector: {app: payments}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: shop}
spec: {clusterIP: 10.96.0.11, clusterIPs: [10.96.0.11], selector: {app: nobody}, ports: [{port: 80}]}
"#;

#[test]
fn services_are_translated_at_connect_and_denials_return_at_once() {
    let mut node = Node::new();
    node.write("namespace.yaml", NAMESPACE);
    node.write("service.yaml", SERVICE);
    node.describe("checkout", "app: checkout");
    node.describe("frontend", "app: frontend");
    node.describe("payments", "app: payments");
    node.start();
    let [checkout, frontend, payments] = ["checkout", "frontend", "payments"].map(|name| node.pod(name));
    payments.serve(8080);
    // No timeout can be reached: an errno at connect() is the only way to fail in time.
    let try_connect = |pod: &crate::node::Pod, to: &str| {
        let procs = node.cgroup().join("cgroup.procs");
        let (host, port) = to.rsplit_once(':').unwrap();
        let script = format!("echo $$ > {} && exec 3<>/dev/tcp/{host}/{port}", procs.display());
        let mut command = std::process::Command::new("bash");
        command.args(["-c", &script]);
        let output = pod.sandbox.inside(|| command.output().unwrap());
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let slice = |ip: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: p, namespace: shop, labels: {{kubernetes.io/service-name: payments}}}}\naddressType: IPv4\nports: [{{port: 8080, protocol: TCP}}]\nendpoints: [{{addresses: [{ip}], conditions: {{ready: true}}}}]\n"
        )
    };
    assert!(!try_connect(&checkout, "10.96.0.10:80").0, "a service without endpoints answers");
    node.write("slice.yaml", &slice(&payments.v4.to_string()));
    assert!(eventually(|| try_connect(&checkout, "10.96.0.10:80").0), "{}", node.get("/config_dump"));
    assert!(try_connect(&frontend, "10.96.0.10:80").0);
    let (ok, error) = try_connect(&checkout, "10.96.0.11:80");
    assert!(!ok && error.contains("refused"), "{error}");
    let (ok, error) = try_connect(&checkout, "10.96.0.10:81");
    assert!(!ok && error.contains("refused"), "{error}");

    node.write("policy.yaml", ONLY_CHECKOUT);
    assert!(eventually(|| !try_connect(&frontend, "10.96.0.10:80").0), "{}", node.get("/config_dump"));
    let (_, error) = try_connect(&frontend, "10.96.0.10:80");
    assert!(error.contains("not permitted"), "{error}");
    assert!(try_connect(&checkout, "10.96.0.10:80").0);
    let flows = node.get_text("/flows");
    let denied = flows.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()).find(|flow| {
        flow["hook"] == "connect" && flow["drop_reason"] == "policy_denied" && flow["src"]["workload"] == "frontend"
    });
    let denied = denied.unwrap_or_else(|| panic!("no flow of the denied connect in\n{flows}"));
    assert_eq!(denied["service"], "shop/payments:80");
    assert_eq!(denied["dst"]["workload"], "payments");
}
