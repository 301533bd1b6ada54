use compat_kubernetes::Kept;
use compat_objects::source::DirectorySource;
use compat_translate::{MeshOptions, translate};

use super::*;

const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: waypoint}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop, uid: u1, generation: 3}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge, namespace: shop}
spec: {gatewayClassName: nginx, listeners: [{name: http, port: 80, protocol: HTTP}]}
---
apiVersion: v1
kind: Service
metadata: {name: waypoint, namespace: shop}
spec: {clusterIP: 10.96.0.9, ports: [{name: mesh, port: 15008}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.7, selector: {app: cart}, ports: [{name: http, port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart}, {name: edge}, {group: '', kind: Service, name: gone}]
  rules: [{backendRefs: [{name: cart, port: 80}, {name: missing, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: at-the-edge, namespace: shop}
spec: {parentRefs: [{name: edge}], rules: [{backendRefs: [{name: cart, port: 80}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: shop}
spec: {action: ALLOW, rules: [{to: [{operation: {methods: [GET]}}]}]}
";

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: waypoint-1, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: waypoint}}
spec: {nodeName: node-a, containers: [{name: istio-proxy}]}
status: {phase: Running, podIP: 10.1.0.5, conditions: [{type: Ready, status: 'True'}]}
";

fn found(yaml: &str, troubles: &Troubles) -> BTreeMap<ObjectKey, Status> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("all.yaml"), yaml).unwrap();
    let objects = DirectorySource::new(vec![folder.path().to_owned()]).load().objects.clone();
    let output = translate(&objects, &MeshOptions::default());
    all(&objects, &output, troubles, &BTreeMap::new())
}

fn conditions(status: &Status) -> Vec<String> {
    let shown = |condition: &Value| {
        format!("{}={} {}", condition["type"], condition["status"], condition["reason"]).replace('"', "")
    };
    match &status.said {
        Said::Conditions { conditions, .. } => conditions.iter().map(shown).collect(),
        Said::Parents { parents, .. } => parents
            .iter()
            .flat_map(|(parent, conditions)| {
                let name = parent["name"].as_str().unwrap().to_owned();
                conditions.iter().map(move |condition| format!("{name}: {}", shown(condition)))
            })
            .collect(),
    }
}

#[test]
fn of_the_meshs_objects_alone_is_something_said() {
    let statuses = found(SHOP, &Troubles::default());
    let keys: Vec<String> = statuses.keys().map(ToString::to_string).collect();
    assert_eq!(keys, ["Gateway shop/waypoint", "HTTPRoute shop/cart", "AuthorizationPolicy shop/allow"]);
    let of = |kind, name| &statuses[&ObjectKey::new(kind, "shop", name)];
    assert_eq!(conditions(of(Kind::Gateway, "waypoint")), ["Accepted=True Accepted", "Programmed=False Pending"]);
    assert_eq!(
        conditions(of(Kind::HTTPRoute, "cart")),
        [
            "cart: Accepted=True Accepted",
            "cart: ResolvedRefs=False BackendNotFound",
            "gone: Accepted=False NoMatchingParent",
            "gone: ResolvedRefs=False BackendNotFound",
        ]
    );
    assert_eq!(conditions(of(Kind::AuthorizationPolicy, "allow")), ["ZtunnelAccepted=False UnsupportedValue"]);
    assert_eq!(of(Kind::Gateway, "waypoint").meta.generation, Some(3));
}

#[test]
fn addresses_drawn_for_a_service_entry_are_kept_in_it() {
    let entry = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: partner, namespace: shop}
spec: {hosts: [partner.example], resolution: DNS, ports: [{number: 443, name: tls, protocol: TLS}]}
";
    let key = ObjectKey::new(Kind::ServiceEntry, "shop", "partner");
    let status = found(&format!("{SHOP}---{entry}"), &Troubles::default()).remove(&key).unwrap();
    let Said::Conditions { members, .. } = &status.said else { panic!() };
    let addresses = members["addresses"].as_array().unwrap();
    assert_eq!(addresses.len(), 2, "one of each family");
    assert_eq!(addresses[0]["host"], "partner.example");
    assert!(addresses[0]["value"].as_str().unwrap().starts_with("240.240."));
}

#[test]
fn a_waypoint_is_programmed_when_a_pod_serves_and_says_what_is_in_the_way() {
    let key = ObjectKey::new(Kind::Gateway, "shop", "waypoint");
    let status = found(&format!("{SHOP}---{POD}"), &Troubles::default()).remove(&key).unwrap();
    assert_eq!(conditions(&status), ["Accepted=True Accepted", "Programmed=True Programmed"]);
    let Said::Conditions { members, .. } = &status.said else { panic!() };
    assert_eq!(members["addresses"], json!([{"type": "IPAddress", "value": "10.96.0.9"}]));
    assert_eq!(members["listeners"][0]["name"], "mesh");

    let id = KeptId { kind: Kept::Deployment, namespace: "shop".to_owned(), name: "waypoint".to_owned() };
    let troubles = Troubles::from(BTreeMap::from([(id, "somebody else's".to_owned())]));
    let status = found(SHOP, &troubles).remove(&key).unwrap();
    let Said::Conditions { conditions, .. } = &status.said else { panic!() };
    assert_eq!(conditions[1]["message"], "Deployment shop/waypoint: somebody else's");
}
