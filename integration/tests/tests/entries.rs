//! ServiceEntries without istiod: a host outside the mesh is met at an address drawn for it, behind the shop's waypoint.
use std::time::Duration;

use serde_json::Value;
use strata_integration::{Shop, repository, shop};

const LIMIT: Duration = Duration::from_secs(20);
const HOST: &str = "partner.example";

/// `outside/gateway-1`, which is in no mesh, stands for the partner; the canary is a WorkloadEntry's.
fn entries(partner: &str, canary: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: canary, namespace: shop}}
spec: {{address: {canary}, labels: {{app: partner, version: v2}}}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: stable, namespace: shop}}
spec: {{address: {partner}, labels: {{app: partner, version: v1}}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: partner, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}
spec:
  hosts: [{HOST}]
  resolution: STATIC
  workloadSelector: {{labels: {{app: partner}}}}
  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8080}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: partner, namespace: shop}}
spec: {{host: {HOST}, subsets: [{{name: v1, labels: {{version: v1}}}}, {{name: v2, labels: {{version: v2}}}}]}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: partner, namespace: shop}}
spec:
  hosts: [{HOST}]
  http:
  - match: [{{headers: {{x-user: {{exact: jason}}}}}}]
    route: [{{destination: {{host: {HOST}, subset: v2}}}}]
  - route: [{{destination: {{host: {HOST}, subset: v1}}}}]
"
    )
}

/// The partner's IPv4 address, as the node proxy knows it.
fn address(shop: &Shop) -> Option<String> {
    let dump: Value = shop.lab.admin("proxy-node-a", "/config_dump").ok()?;
    let service = dump["services"].as_array()?.iter().find(|service| service["hostname"] == HOST)?.clone();
    let vips = service["vips"].as_array()?.iter().filter_map(Value::as_str);
    let v4 = vips.filter_map(|vip| vip.trim_start_matches('/').parse::<std::net::Ipv4Addr>().ok()).next();
    v4.map(|ip| ip.to_string())
}

#[test]
fn a_host_outside_is_governed_as_a_service_is() {
    let shop = shop();
    let lab = &shop.lab;
    for piece in ["ambient", "waypoint"] {
        lab.apply(&repository().join(format!("manifests/samples/scenes/{piece}.yaml"))).unwrap();
    }
    let ip = |namespace: &str, pod: &str| {
        let ips = lab.pod_ips(namespace, pod).unwrap();
        ips.into_iter().find(std::net::IpAddr::is_ipv4).unwrap().to_string()
    };
    lab.edit("entries.yaml", &entries(&ip("outside", "gateway-1"), &ip("shop", "payments-v2-b"))).unwrap();
    lab.wait_until("the partner's address", LIMIT, || address(&shop).is_some()).unwrap();
    let drawn = address(&shop).unwrap();
    assert!(drawn.starts_with("240.240."), "{drawn} is not of the range istiod draws from");

    let url = format!("http://{drawn}/");
    let ask = |headers: &[&str]| {
        let mut args = vec![url.as_str(), "--timeout", "2s", "--count", "10"];
        args.extend(headers);
        lab.call("shop/frontend-1", &args)
    };
    let all =
        |headers: &[&str], version: &str| ask(headers).is_ok_and(|call| call.ok == 10 && call.version(version) == 10);
    let settled = lab.wait_until("the partner to answer by its routes", LIMIT, || {
        all(&[], "v1") && all(&["-H", "x-user: jason"], "v2")
    });
    assert!(settled.is_ok(), "{:?}; {}", ask(&[]).map(|call| call.brief()), shop.dump("entries"));
    let last = ask(&[]).unwrap();
    assert_eq!(last.servers.keys().map(String::as_str).collect::<Vec<_>>(), ["gateway-1"]);

    // The same object without its route, and then without itself: nobody is there any more.
    lab.edit("entries.yaml", "# nothing\n").unwrap();
    let refused = || ask(&[]).is_ok_and(|call| call.ok == 0);
    lab.wait_until("the partner to be gone", LIMIT, refused).unwrap();
}
