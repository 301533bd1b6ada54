//! Bad input, one mistake after the other, on one mesh that serves all the while: each is told by object and field, the
//! last good configuration stays, nothing else is disturbed, and what protects something denies.
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use strata_integration::{Shop, repository, shop};
use strata_lab::Call;

const LIMIT: Duration = Duration::from_secs(20);
/// What payments has and the mistakes must not touch.
const PAYMENTS: &str = "http://10.96.1.20/";
/// What the mistakes are about.
const CHECKOUT: &str = "http://10.96.1.11/";

fn governed() -> Shop {
    let shop = shop();
    for piece in ["ambient", "subsets", "waypoint", "header"] {
        let file = repository().join("manifests/samples/scenes").join(format!("{piece}.yaml"));
        shop.lab.apply(&file).unwrap();
    }
    let label = "{istio.io/use-waypoint: waypoint}";
    let checkout =
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: checkout, namespace: shop, labels: {label}}}\n");
    shop.lab.edit("checkout-waypoint.yaml", &checkout).unwrap();
    let governed = |url: &str| {
        let answer = shop.lab.call("shop/frontend-1", &[url, "--timeout", "2s", "-H", "x-user: jason"]);
        answer.is_ok_and(|call| call.ok == 1 && answer_header(&call, "server") == "istio-envoy")
    };
    shop.lab
        .wait_until("payments and checkout behind the waypoint", LIMIT, || governed(PAYMENTS) && governed(CHECKOUT))
        .unwrap();
    shop
}

fn answer_header(call: &Call, name: &str) -> String {
    call.last.as_ref().and_then(|last| last["headers"][name].as_str()).unwrap_or_default().to_owned()
}

fn faults(shop: &Shop) -> Vec<String> {
    let status = shop.lab.admin("control", "/status").unwrap();
    let faults = status["faults"].as_array().cloned().unwrap_or_default();
    faults.iter().filter_map(|fault| fault.as_str().map(str::to_owned)).collect()
}

/// Puts a mistake in place and waits until one fault names all of `words`.
fn told(shop: &Shop, yaml: &str, words: &[&str]) {
    shop.lab.edit("mistake.yaml", yaml).unwrap();
    let names = |fault: &String| words.iter().all(|word| fault.contains(word));
    let waited = shop.lab.wait_until("the fault", LIMIT, || faults(shop).iter().any(names));
    assert!(waited.is_ok(), "no fault names {words:?}: {:?}", faults(shop));
}

/// While the mistake is in place payments is served as before; then it goes.
fn forget(shop: &Shop) {
    let call = shop.lab.call("shop/checkout-1", &[PAYMENTS, "--count", "20", "-H", "x-user: jason"]).unwrap();
    assert_eq!(call.version("v2"), 20, "{}", call.brief());
    shop.lab.remove_edit("mistake.yaml").unwrap();
    shop.lab.wait_until("no fault", LIMIT, || faults(shop).is_empty()).unwrap();
}

fn route(http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: mistake, namespace: shop}}\n\
         spec:\n  hosts: [checkout.shop.svc.cluster.local]\n  http: [{http}]\n"
    )
}

#[test]
fn mistakes_are_named_and_disturb_nothing() {
    let shop = governed();
    let jason = ["call", PAYMENTS, "--count", "0", "--rate", "100", "-H", "x-user: jason"];
    let traffic = shop.lab.spawn("shop/frontend-1", &jason).unwrap();

    told(&shop, "a: [1, 2\nb: }\n", &["mistake.yaml:2", "nothing of this file is in force"]);
    forget(&shop);
    told(
        &shop,
        &route("{frobnicate: 1, route: [{destination: {host: checkout}}]}"),
        &["VirtualService shop/mistake", "spec.http[0].frobnicate"],
    );
    forget(&shop);
    told(
        &shop,
        &route("{route: [{destination: {host: nowhere.shop.svc.cluster.local}}]}"),
        &["VirtualService shop/mistake", "destination.host", "nowhere"],
    );
    forget(&shop);
    let weights = "{route: [{destination: {host: checkout}, weight: 0}, {destination: {host: payments}, weight: 0}]}";
    told(&shop, &route(weights), &["VirtualService shop/mistake", "spec.http[0].route", "weights"]);
    forget(&shop);
    told(
        &shop,
        &route("{match: [{uri: {regex: 'a(b'}}], route: [{destination: {host: checkout}}]}"),
        &["VirtualService shop/mistake", "spec.http[0].match[0].uri.regex"],
    );
    forget(&shop);
    let block = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: mistake, namespace: outside}\n\
                 spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/99}}]}]}\n";
    told(&shop, block, &["NetworkPolicy outside/mistake", "spec.ingress[0].from[0].ipBlock.cidr"]);
    forget(&shop);

    let report: Call = traffic.finish().unwrap();
    assert!(report.sent > 10, "traffic ran all the while: {}", report.sent);
    assert_eq!(
        (report.failed(), report.version("v2")),
        (0, report.sent),
        "{}\n{}",
        report.brief(),
        shop.dump("mistakes")
    );
}

#[test]
fn the_last_good_version_stays() {
    let shop = governed();
    let broken = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nspec: {http: [{route: oops\n";
    shop.lab.edit("header.yaml", broken).unwrap();
    let kept = |fault: &String| fault.contains("header.yaml") && fault.contains("the last good version of this file");
    shop.lab.wait_until("the fault", LIMIT, || faults(&shop).iter().any(kept)).unwrap();
    let call = |user: &str| shop.lab.call("shop/frontend-1", &[PAYMENTS, "--count", "20", "-H", user]).unwrap();
    assert_eq!(call("x-user: jason").version("v2"), 20, "jason still gets v2");
    assert_eq!(call("x-user: jack").version("v1"), 20, "jack still gets v1");
}

#[test]
fn what_protects_and_cannot_be_honoured_denies() {
    let shop = governed();
    let ask = |headers: &[&str]| {
        let call = shop.lab.call("shop/frontend-1", &[&[CHECKOUT, "--timeout", "3s"], headers].concat()).unwrap();
        call.last.map_or(Value::Null, |last| last["status"].clone())
    };
    let target = "targetRefs: [{kind: Service, group: '', name: checkout}]";
    let custom = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: mistake, namespace: shop}}\n\
         spec: {{{target}, action: CUSTOM, provider: {{name: nobody}}, rules: [{{}}]}}\n"
    );
    told(&shop, &custom, &["AuthorizationPolicy shop/mistake", "spec.provider.name", "denied"]);
    shop.lab.wait_until("checkout to be denied", LIMIT, || ask(&[]) == json!(403)).unwrap();
    forget(&shop);
    shop.lab.wait_until("checkout to be served again", LIMIT, || ask(&[]) == json!(200)).unwrap();

    // An issuer whose keys nobody serves: its tokens are refused, requests without one go on.
    let silent = format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: mistake, namespace: shop}}\n\
         spec: {{{target}, jwtRules: [{{issuer: 'https://issuer.example', jwksUri: 'http://203.0.113.10:1/none'}}]}}\n"
    );
    told(
        &shop,
        &silent,
        &["RequestAuthentication shop/mistake", "spec.jwtRules[0].jwksUri", "http://203.0.113.10:1/none"],
    );
    let token = format!("authorization: Bearer {}", shop.lab.token(&[]).unwrap());
    shop.lab.wait_until("the token to be refused", LIMIT, || ask(&["-H", &token]) == json!(401)).unwrap();
    assert_eq!(ask(&[]), json!(200));
}

/// One CNI call as a runtime makes it; exit status and what was printed.
fn cni(shop: &Shop, command: &str, container: &str, netns: &Path, pod: &str) -> (bool, Value) {
    let plugin = Path::new(env!("CARGO_BIN_EXE_hold-lab")).with_file_name("strata-cni");
    let socket = shop.lab.description().nodes[0].agent.with_file_name("cni.sock");
    let config = json!({"cniVersion": "1.1.0", "name": "strata", "type": "strata-cni", "agentSocket": socket});
    let mut child = Command::new(plugin)
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", container)
        .env("CNI_NETNS", netns)
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/opt/cni/bin")
        .env("CNI_ARGS", format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME={pod}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("strata-cni runs");
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.success(), serde_json::from_slice(&output.stdout).unwrap_or(Value::Null))
}

#[test]
fn cni_calls_for_pods_that_exist_or_are_gone() {
    let shop = shop();
    let netns = shop.lab.pod_netns("shop/checkout-1").unwrap();
    let (ok, answer) = cni(&shop, "ADD", "another", &netns, "checkout-1");
    assert!(!ok && answer["msg"].is_string() && answer["code"].is_u64(), "{answer}");
    assert!(answer["details"].as_str().is_some_and(|text| text.contains("DEL it first")), "{answer}");
    let (ok, answer) = cni(&shop, "ADD", "gone", Path::new("/run/netns/strata-nowhere"), "gone");
    assert!(
        !ok && answer["details"].as_str().is_some_and(|text| text.contains("/run/netns/strata-nowhere")),
        "{answer}"
    );
    // The specification: DEL of what is gone succeeds.
    assert!(cni(&shop, "DEL", "gone", Path::new("/run/netns/strata-nowhere"), "gone").0);
    assert!(cni(&shop, "DEL", "gone", Path::new("/run/netns/strata-nowhere"), "gone").0);
    let call = shop.lab.call("shop/checkout-1", &["http://10.96.1.10/", "--count", "10"]).unwrap();
    assert_eq!(call.ok, 10, "the pod is not disturbed: {}", call.brief());
}
