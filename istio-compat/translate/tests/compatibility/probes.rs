//! What each field is tried with: a value, and the rest of the object that makes it mean something.
use serde_json::{Value, json};

use crate::fields::Field;

/// Everything the objects under test refer to.
pub(crate) const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: w}}
---
apiVersion: v1
kind: Namespace
metadata: {name: other, labels: {kubernetes.io/metadata.name: other, stage: prod}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "{extensionProviders: [{name: somebody, envoyExtAuthzGrpc: {service: b.shop.svc.cluster.local, port: 80}}, {name: file, envoyFileAccessLog: {path: /dev/stderr}}, {name: otel, opentelemetry: {service: b.shop.svc.cluster.local, port: 80}}, {name: other, opentelemetry: {service: b.shop.svc.cluster.local, port: 90}}]}"}
---
apiVersion: v1
kind: Secret
metadata: {name: roots, namespace: shop}
stringData: {cacert: "-----BEGIN CERTIFICATE-----\nUk9PVFM=\n-----END CERTIFICATE-----\n"}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: w, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: a, namespace: shop}
spec: {clusterIP: 10.0.0.1, selector: {app: a}, ports: [{name: http, port: 80}, {name: tcp, port: 90}, {name: tls, port: 443}, {name: grpc, port: 100}]}
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: shop}
spec: {clusterIP: 10.0.0.2, selector: {app: b}, ports: [{name: http, port: 80}, {name: tcp, port: 90}, {name: grpc, port: 100}]}
---
apiVersion: v1
kind: Service
metadata: {name: c, namespace: shop, labels: {istio.io/use-waypoint: probe}}
spec: {clusterIP: 10.0.0.4, selector: {app: c}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: e, namespace: shop}
spec: {clusterIP: 10.0.0.6, selector: {app: e}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: d, namespace: other, labels: {istio.io/use-waypoint: probe, istio.io/use-waypoint-namespace: shop}}
spec: {clusterIP: 10.0.0.5, selector: {app: d}, ports: [{name: http, port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: granted, namespace: shop}
spec: {parentRefs: [{group: "", kind: Service, name: e}], rules: [{backendRefs: [{name: b, namespace: other, port: 80}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: other}
spec: {clusterIP: 10.0.0.3, selector: {app: b}, ports: [{name: http, port: 80}, {name: tcp, port: 90}]}
---
apiVersion: v1
kind: Pod
metadata: {name: a-1, namespace: shop, labels: {app: a}, annotations: {ambient.istio.io/redirection: enabled}}
spec: {nodeName: n1, serviceAccountName: a, containers: [{name: c}]}
status: {podIP: 10.1.0.1, podIPs: [{ip: 10.1.0.1}], phase: Running, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: w-1, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: w, gateway.istio.io/managed: istio.io-mesh-controller}}
spec: {nodeName: n1, serviceAccountName: w, containers: [{name: c}]}
status: {podIP: 10.1.0.9, podIPs: [{ip: 10.1.0.9}], phase: Running, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: a-2, namespace: shop, labels: {app: a}, annotations: {ambient.istio.io/redirection: enabled}}
spec: {nodeName: n2, serviceAccountName: a, containers: [{name: c}]}
status: {podIP: 10.2.0.1, podIPs: [{ip: 10.2.0.1}], phase: Running, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: a-3, namespace: shop, labels: {app: a}, annotations: {ambient.istio.io/redirection: enabled}}
spec: {nodeName: n3, serviceAccountName: a, containers: [{name: c}]}
status: {podIP: 10.3.0.1, podIPs: [{ip: 10.3.0.1}], phase: Running, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z}}
---
apiVersion: v1
kind: Node
metadata: {name: n2, labels: {topology.kubernetes.io/region: q, topology.kubernetes.io/zone: y}}
---
apiVersion: v1
kind: Node
metadata: {name: n3, labels: {topology.kubernetes.io/region: p, topology.kubernetes.io/zone: x}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a-1, namespace: shop, labels: {kubernetes.io/service-name: a}}
addressType: IPv4
endpoints: [{addresses: [10.1.0.1], conditions: {ready: true}, targetRef: {kind: Pod, name: a-1, namespace: shop}}, {addresses: [10.2.0.1], conditions: {ready: true}, targetRef: {kind: Pod, name: a-2, namespace: shop}}, {addresses: [10.3.0.1], conditions: {ready: true}, targetRef: {kind: Pod, name: a-3, namespace: shop}}]
ports: [{name: http, port: 8080}, {name: tcp, port: 9090}, {name: tls, port: 8443}, {name: grpc, port: 100}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: b, namespace: shop}
spec: {host: b, subsets: [{name: v1, labels: {version: v1}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: delegate, namespace: shop}
spec: {http: [{match: [{uri: {prefix: /d}}], route: [{destination: {host: b}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: delegate, namespace: other}
spec: {http: [{match: [{uri: {prefix: /o}}], route: [{destination: {host: b}}]}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: vm, namespace: shop}
spec: {hosts: [vm.example], addresses: [240.1.0.2], resolution: STATIC, workloadSelector: {labels: {app: vm}}, ports: [{number: 80, name: http, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: ReferenceGrant
metadata: {name: from-shop, namespace: other}
spec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}, {group: gateway.networking.k8s.io, kind: TCPRoute, namespace: shop}], to: [{group: "", kind: Service}]}
"#;

/// An object of the kind without anything special.
pub(crate) fn base(field: &Field) -> Value {
    let target = json!({"group": "", "kind": "Service", "name": "a"});
    let parent = json!({"group": "", "kind": "Service", "name": "a"});
    match field.kind.as_str() {
        "VirtualService" if field.under("spec.tcp[]") => {
            json!({"hosts": ["a"], "tcp": [{"match": [{"port": 90}], "route": [{"destination": {"host": "b", "port": {"number": 90}}}]}]})
        }
        "VirtualService" if field.under("spec.tls[]") => {
            json!({"hosts": ["a"], "tls": [{"match": [{"port": 443, "sniHosts": ["a.shop.svc.cluster.local"]}], "route": [{"destination": {"host": "b", "port": {"number": 90}}}]}]})
        }
        "VirtualService" => json!({"hosts": ["a"], "http": [{"route": [{"destination": {"host": "a"}}]}]}),
        // Not an empty policy: the first thing in one changes the cluster's origin as well.
        "DestinationRule" => json!({"host": "a", "trafficPolicy": {"connectionPool": {"tcp": {"maxConnections": 5}}}}),
        "AuthorizationPolicy" | "RequestAuthentication" if field.under("spec.selector") => match field.kind.as_str() {
            "AuthorizationPolicy" => json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["7"]}}]}]}),
            _ => json!({"jwtRules": [{"issuer": "i", "jwks": "{\"keys\":[]}"}]}),
        },
        "AuthorizationPolicy" => json!({"targetRefs": [target], "action": "ALLOW", "rules": [{}]}),
        "RequestAuthentication" => {
            json!({"targetRefs": [target], "jwtRules": [{"issuer": "i", "jwks": "{\"keys\":[]}"}]})
        }
        "PeerAuthentication" if field.under("spec.selector") => {
            json!({"selector": {"matchLabels": {"app": "a"}}, "mtls": {"mode": "STRICT"}})
        }
        "PeerAuthentication" => json!({"selector": {"matchLabels": {"app": "a"}}, "mtls": {"mode": "PERMISSIVE"}}),
        "Gateway" => {
            json!({"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]})
        }
        "HTTPRoute" => json!({"parentRefs": [parent], "rules": [{"backendRefs": [{"name": "a", "port": 80}]}]}),
        "GRPCRoute" => json!({"parentRefs": [parent], "rules": [{"backendRefs": [{"name": "a", "port": 100}]}]}),
        "TCPRoute" => json!({"parentRefs": [parent], "rules": [{"backendRefs": [{"name": "a", "port": 90}]}]}),
        "TLSRoute" => {
            json!({"parentRefs": [parent], "hostnames": ["a.shop.svc.cluster.local"], "rules": [{"backendRefs": [{"name": "a", "port": 443}]}]})
        }
        "ReferenceGrant" => {
            json!({"from": [{"group": "gateway.networking.k8s.io", "kind": "GRPCRoute", "namespace": "shop"}], "to": [{"group": "", "kind": "Service"}]})
        }
        "ServiceEntry" => {
            let ports = json!([{"number": 80, "name": "http", "protocol": "TCP"}]);
            json!({"hosts": ["s.example"], "addresses": ["240.1.0.1"], "resolution": "STATIC", "ports": ports, "endpoints": [{"address": "203.0.113.1"}]})
        }
        "Telemetry" => json!({"targetRefs": [target]}),
        "WorkloadEntry" => json!({"address": "203.0.113.2", "labels": {"app": "vm"}}),
        other => panic!("no base for {other}"),
    }
}

/// Beginnings of paths, what goes with them (merged into the spec), and what must not be beside them.
const COMPANIONS: [(&str, &str, &[&str]); 41] = [
    ("spec.http[].redirect.", "{}", &["/http/0/route"]),
    ("spec.http[].redirect.prefixRewrite", r#"{"http":[{"match":[{"uri":{"prefix":"/x"}}]}]}"#, &[]),
    ("spec.http[].redirect.redirectCode", r#"{"http":[{"redirect":{"uri":"/x"}}]}"#, &[]),
    ("spec.http[].redirect.port", r#"{"http":[{"redirect":{"uri":"/x"}}]}"#, &[]),
    ("spec.http[].redirect.derivePort", r#"{"http":[{"redirect":{"scheme":"https"}}]}"#, &[]),
    ("spec.http[].directResponse.", "{}", &["/http/0/route"]),
    ("spec.http[].directResponse.body", r#"{"http":[{"directResponse":{"status":503}}]}"#, &[]),
    ("spec.http[].delegate.", "{}", &["/http/0/route"]),
    ("spec.http[].delegate.namespace", r#"{"http":[{"delegate":{"name":"delegate"}}]}"#, &[]),
    ("DestinationRule spec.host", r#"{"trafficPolicy":{"connectionPool":{"tcp":{"maxConnections":3}}}}"#, &[]),
    ("VirtualService spec.exportTo", r#"{"http":[{"timeout":"9s"}]}"#, &[]),
    ("VirtualService spec.gateways", r#"{"http":[{"timeout":"9s"}]}"#, &[]),
    ("VirtualService spec.hosts", r#"{"http":[{"timeout":"9s"}]}"#, &[]),
    (
        "spec.listeners[].allowedRoutes.namespaces.selector",
        r#"{"listeners":[{"allowedRoutes":{"namespaces":{"from":"Selector"}}}]}"#,
        &[],
    ),
    (
        "spec.listeners[].allowedRoutes.namespaces.selector.matchExpressions",
        r#"{"listeners":[{"allowedRoutes":{"namespaces":{"selector":{"matchExpressions":[{"key":"kubernetes.io/metadata.name","operator":"In","values":["other"]}]}}}}]}"#,
        &[],
    ),
    (
        "spec.trafficPolicy.loadBalancer.localityLbSetting.enabled",
        r#"{"trafficPolicy":{"loadBalancer":{"localityLbSetting":{"failover":[{"from":"r","to":"q"}]}}}}"#,
        &[],
    ),
    ("DestinationRule spec.exportTo", r#"{"trafficPolicy":{"connectionPool":{"tcp":{"maxConnections":3}}}}"#, &[]),
    ("spec.http[].fault.abort.percentage", r#"{"http":[{"fault":{"abort":{"httpStatus":418}}}]}"#, &[]),
    ("spec.http[].fault.delay.perc", r#"{"http":[{"fault":{"delay":{"fixedDelay":"1s"}}}]}"#, &[]),
    ("spec.http[].mirror.port", r#"{"http":[{"mirror":{"host":"b"}}]}"#, &[]),
    ("spec.http[].mirror.subset", r#"{"http":[{"mirror":{"host":"b"}}]}"#, &[]),
    ("spec.http[].mirror_percent", r#"{"http":[{"mirror":{"host":"b"}}]}"#, &[]),
    ("spec.http[].mirrorPercent", r#"{"http":[{"mirror":{"host":"b"}}]}"#, &[]),
    ("spec.http[].mirrors[]", r#"{"http":[{"mirrors":[{"destination":{"host":"b"}}]}]}"#, &[]),
    ("spec.http[].retries.", r#"{"http":[{"retries":{"attempts":2}}]}"#, &[]),
    (
        "spec.http[].rewrite.uriRegexRewrite",
        r#"{"http":[{"rewrite":{"uriRegexRewrite":{"match":"/a","rewrite":"/b"}}}]}"#,
        &[],
    ),
    ("spec.http[].match[].name", r#"{"http":[{"match":[{"uri":{"prefix":"/x"}}]}]}"#, &[]),
    ("spec.http[].match[].statPrefix", r#"{"http":[{"match":[{"uri":{"prefix":"/x"}}]}]}"#, &[]),
    ("spec.http[].match[].ignoreUriCase", r#"{"http":[{"match":[{"uri":{"prefix":"/x"}}]}]}"#, &[]),
    ("spec.http[].corsPolicy.", r#"{"http":[{"corsPolicy":{"allowOrigins":[{"exact":"http://x"}]}}]}"#, &[]),
    ("spec.http[].route[].destination.subset", r#"{"http":[{"route":[{"destination":{"host":"b"}}]}]}"#, &[]),
    (
        "spec.http[].route[].weight",
        r#"{"http":[{"route":[{"weight":1},{"weight":1,"destination":{"host":"b"}}]}]}"#,
        &[],
    ),
    (
        "spec.tcp[].route[].weight",
        r#"{"tcp":[{"route":[{"weight":1},{"weight":1,"destination":{"host":"b","port":{"number":90}}}]}]}"#,
        &[],
    ),
    (
        "spec.tls[].route[].weight",
        r#"{"tls":[{"route":[{"weight":1},{"weight":1,"destination":{"host":"b","port":{"number":90}}}]}]}"#,
        &[],
    ),
    ("spec.tcp[].route[].destination.subset", r#"{"tcp":[{"route":[{"destination":{"host":"b"}}]}]}"#, &[]),
    (
        "spec.tls[].route[].destination.subset",
        r#"{"tls":[{"route":[{"destination":{"host":"b","port":{"number":90}}}]}]}"#,
        &[],
    ),
    ("spec.subsets[].labels", r#"{"subsets":[{"name":"v1"}]}"#, &[]),
    (
        "spec.trafficPolicy.loadBalancer.consistentHash.httpCookie",
        r#"{"trafficPolicy":{"loadBalancer":{"consistentHash":{"httpCookie":{"name":"c","ttl":"0s"}}}}}"#,
        &[],
    ),
    (
        "spec.trafficPolicy.loadBalancer.consistentHash.m",
        r#"{"trafficPolicy":{"loadBalancer":{"consistentHash":{"httpHeaderName":"h"}}}}"#,
        &[],
    ),
    (
        "spec.trafficPolicy.loadBalancer.consistentHash.ringHash",
        r#"{"trafficPolicy":{"loadBalancer":{"consistentHash":{"httpHeaderName":"h"}}}}"#,
        &[],
    ),
    ("spec.trafficPolicy.loadBalancer.warmup", r#"{"trafficPolicy":{"loadBalancer":{"simple":"ROUND_ROBIN"}}}"#, &[]),
];
const MORE_COMPANIONS: [(&str, &str, &[&str]); 39] = [
    ("Telemetry spec.targetRef", r#"{"accessLogging":[{"providers":[{"name":"file"}]}]}"#, &[]),
    ("Telemetry spec.selector", r#"{"accessLogging":[{"providers":[{"name":"file"}]}]}"#, &["/targetRefs"]),
    (
        "Telemetry spec.metrics[].overrides[].match",
        r#"{"metrics":[{"overrides":[{"disabled":true,"match":{"metric":"REQUEST_COUNT"}}]}]}"#,
        &[],
    ),
    ("Telemetry spec.accessLogging[].", r#"{"accessLogging":[{"providers":[{"name":"file"}]}]}"#, &[]),
    ("Telemetry spec.tracing[].", r#"{"tracing":[{"providers":[{"name":"otel"}]}]}"#, &[]),
    (
        "Telemetry spec.tracing[].customTags.*.environment.defaultValue",
        r#"{"tracing":[{"customTags":{"app":{"environment":{"name":"E"}}}}]}"#,
        &[],
    ),
    (
        "Telemetry spec.tracing[].customTags.*.header.defaultValue",
        r#"{"tracing":[{"customTags":{"app":{"header":{"name":"h"}}}}]}"#,
        &[],
    ),
    ("ServiceEntry spec.ports[].name", r#"{"ports":[{"protocol":"","name":"tcp"}]}"#, &["/endpoints"]),
    ("ServiceEntry spec.workloadSelector", "{}", &["/endpoints"]),
    (
        "spec.trafficPolicy.loadBalancer.warmup.",
        r#"{"trafficPolicy":{"loadBalancer":{"warmup":{"duration":"9s"}}}}"#,
        &[],
    ),
    (
        "spec.trafficPolicy.loadBalancer.localityLbSetting.",
        r#"{"trafficPolicy":{"outlierDetection":{"consecutive5xxErrors":3},"loadBalancer":{"simple":"ROUND_ROBIN"}}}"#,
        &[],
    ),
    (
        "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[].from",
        r#"{"trafficPolicy":{"loadBalancer":{"localityLbSetting":{"distribute":[{"to":{"r/*":100}}]}}}}"#,
        &[],
    ),
    (
        "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[].to",
        r#"{"trafficPolicy":{"loadBalancer":{"localityLbSetting":{"distribute":[{"from":"r/*"}]}}}}"#,
        &[],
    ),
    (
        "spec.trafficPolicy.loadBalancer.localityLbSetting.failover[].from",
        r#"{"trafficPolicy":{"loadBalancer":{"localityLbSetting":{"failover":[{"to":"q"}]}}}}"#,
        &[],
    ),
    (
        "spec.trafficPolicy.loadBalancer.localityLbSetting.failover[].to",
        r#"{"trafficPolicy":{"loadBalancer":{"localityLbSetting":{"failover":[{"from":"r"}]}}}}"#,
        &[],
    ),
    ("spec.trafficPolicy.tls.", r#"{"trafficPolicy":{"tls":{"mode":"SIMPLE"}}}"#, &[]),
    ("spec.trafficPolicy.tls.mode", r#"{"trafficPolicy":{"tls":{"mode":"DISABLE"}}}"#, &[]),
    ("spec.trafficPolicy.tunnel.", r#"{"trafficPolicy":{"tunnel":{"targetHost":"y.example","targetPort":443}}}"#, &[]),
    (
        "spec.trafficPolicy.tls.clientCertificate",
        r#"{"trafficPolicy":{"tls":{"mode":"MUTUAL","privateKey":"k"}}}"#,
        &[],
    ),
    (
        "spec.trafficPolicy.tls.privateKey",
        r#"{"trafficPolicy":{"tls":{"mode":"MUTUAL","clientCertificate":"c"}}}"#,
        &[],
    ),
    (
        "spec.trafficPolicy.outlierDetection.consecutiveLocalOriginFailures",
        r#"{"trafficPolicy":{"outlierDetection":{"splitExternalLocalOriginErrors":true}}}"#,
        &[],
    ),
    ("spec.http[].corsPolicy.allowOrigin", "{}", &["/http/0/corsPolicy/allowOrigins"]),
    (
        "spec.trafficPolicy.outlierDetection.",
        r#"{"trafficPolicy":{"outlierDetection":{"consecutive5xxErrors":3}}}"#,
        &[],
    ),
    // CUSTOM is for HTTP: on a service without TCP ports.
    ("spec.provider.", r#"{"action":"CUSTOM","targetRefs":[{"group":"","kind":"Service","name":"e"}]}"#, &[]),
    ("spec.rules[].when[].key", r#"{"rules":[{"when":[{"values":["x"]}]}]}"#, &[]),
    ("spec.rules[].when[].values", r#"{"rules":[{"when":[{"key":"request.headers[x]"}]}]}"#, &[]),
    ("spec.rules[].when[].notValues", r#"{"rules":[{"when":[{"key":"request.headers[x]"}]}]}"#, &[]),
    ("spec.jwtRules[].fromHeaders[].prefix", r#"{"jwtRules":[{"fromHeaders":[{"name":"x-token"}]}]}"#, &[]),
    (
        "spec.jwtRules[].outputClaimToHeaders[].claim",
        r#"{"jwtRules":[{"outputClaimToHeaders":[{"header":"x-sub"}]}]}"#,
        &[],
    ),
    (
        "spec.jwtRules[].outputClaimToHeaders[].header",
        r#"{"jwtRules":[{"outputClaimToHeaders":[{"claim":"sub"}]}]}"#,
        &[],
    ),
    ("spec.jwtRules[].jwks_uri", "{}", &["/jwtRules/0/jwks"]),
    ("spec.jwtRules[].jwksUri", "{}", &["/jwtRules/0/jwks"]),
    ("spec.targetRef.", r#"{"targetRef":{"group":"","kind":"Service","name":"a"}}"#, &["/targetRefs"]),
    ("spec.targetRef.kind", r#"{"targetRef":{"group":"gateway.networking.k8s.io","name":"w"}}"#, &[]),
    ("spec.targetRef.group", r#"{"targetRef":{"kind":"Gateway","name":"w"}}"#, &[]),
    ("spec.targetRefs[].kind", r#"{"targetRefs":[{"group":"gateway.networking.k8s.io","name":"w"}]}"#, &[]),
    ("spec.targetRefs[].group", r#"{"targetRefs":[{"kind":"Gateway","name":"w"}]}"#, &[]),
    ("TLSRoute spec.rules[].backendRefs[].name", r#"{"rules":[{"backendRefs":[{"port":90}]}]}"#, &[]),
    ("spec.rules[].sessionPersistence.", r#"{"rules":[{"sessionPersistence":{"sessionName":"s"}}]}"#, &[]),
];

/// The object without the field, made so that the field means something.
pub(crate) fn around(field: &Field) -> Value {
    let mut spec = base(field);
    // With a kind before it, only of that kind.
    let full = format!("{} {}", field.kind, field.path);
    let fits =
        |prefix: &str| if prefix.contains(' ') { full.starts_with(prefix) } else { field.path.starts_with(prefix) };
    for (prefix, with, without) in COMPANIONS.iter().chain(&MORE_COMPANIONS) {
        if fits(prefix) {
            merge(&mut spec, &serde_json::from_str(with).expect("a companion"));
            without.iter().for_each(|path| remove(&mut spec, path));
        }
    }
    route_companions(field, &mut spec);
    spec
}

/// Filters and matches of routes say what they are by `type`.
fn route_companions(field: &Field, spec: &mut Value) {
    const FILTERS: [(&str, &str, &str); 8] = [
        ("requestHeaderModifier", "RequestHeaderModifier", r#"{"set":[{"name":"x","value":"1"}]}"#),
        ("responseHeaderModifier", "ResponseHeaderModifier", r#"{"set":[{"name":"x","value":"1"}]}"#),
        ("requestMirror", "RequestMirror", r#"{"backendRef":{"name":"b","port":80}}"#),
        ("requestRedirect", "RequestRedirect", "{}"),
        ("urlRewrite", "URLRewrite", "{}"),
        ("extensionRef", "ExtensionRef", r#"{"group":"x.io","kind":"Filter","name":"f"}"#),
        ("cors", "CORS", r#"{"allowOrigins":["http://x"]}"#),
        ("externalAuth", "ExternalAuth", r#"{"protocol":"HTTP","backendRef":{"name":"b","port":80}}"#),
    ];
    for (name, kind, content) in FILTERS {
        if field.under(&format!("spec.rules[].filters[].{name}")) {
            let content: Value = serde_json::from_str(content).expect("a filter");
            merge(spec, &json!({"rules": [{"filters": [{"type": kind, name: content}]}]}));
            if name == "requestRedirect" {
                remove(spec, "/rules/0/backendRefs");
            }
        }
    }
    for filter in ["requestRedirect", "urlRewrite"] {
        for (leaf, kind) in [("replaceFullPath", "ReplaceFullPath"), ("replacePrefixMatch", "ReplacePrefixMatch")] {
            let path = format!("spec.rules[].filters[].{filter}.path");
            if field.path == format!("{path}.{leaf}") {
                merge(
                    spec,
                    &json!({"rules": [{"matches": [{"path": {"type": "PathPrefix", "value": "/p"}}], "filters": [{filter: {"path": {"type": kind}}}]}]}),
                );
            }
            if field.path == format!("{path}.type") {
                merge(
                    spec,
                    &json!({"rules": [{"matches": [{"path": {"type": "PathPrefix", "value": "/p"}}], "filters": [{filter: {"path": {"replacePrefixMatch": "/q"}}}]}]}),
                );
            }
        }
    }
    if field.path.contains(".fraction.") {
        merge(spec, &json!({"rules": [{"filters": [{"requestMirror": {"fraction": {"numerator": 1}}}]}]}));
    }
    if field.path == "spec.rules[].filters[].type" {
        merge(
            spec,
            &json!({"rules": [{"filters": [{"requestHeaderModifier": {"set": [{"name": "x", "value": "1"}]}}]}]}),
        );
    }
    for list in ["headers", "queryParams"] {
        if field.under(&format!("spec.rules[].matches[].{list}[]")) {
            merge(spec, &json!({"rules": [{"matches": [{list: [{"name": "n", "value": "v"}]}]}]}));
        }
    }
    for list in ["set", "add"] {
        for modifier in ["requestHeaderModifier", "responseHeaderModifier"] {
            if field.under(&format!("spec.rules[].filters[].{modifier}.{list}[]")) {
                merge(spec, &json!({"rules": [{"filters": [{modifier: {list: [{"name": "x", "value": "1"}]}}]}]}));
            }
        }
    }
    if field.under("spec.rules[].matches[].path.") {
        merge(spec, &json!({"rules": [{"matches": [{"path": {"value": "/p"}}]}]}));
    }
    if field.under("spec.rules[].matches[].method.") {
        merge(spec, &json!({"rules": [{"matches": [{"method": {"service": "s.S", "method": "M"}}]}]}));
    }
    if field.under("spec.rules[].retry.") && !field.path.ends_with("attempts") {
        merge(spec, &json!({"rules": [{"retry": {"attempts": 2}}]}));
    }
    if field.path.ends_with("backendRefs[].weight") {
        let port = if field.kind == "HTTPRoute" { 80 } else { 90 };
        merge(spec, &json!({"rules": [{"backendRefs": [{"weight": 1}, {"name": "b", "port": port, "weight": 1}]}]}));
    }
    if field.path.ends_with("backendRefs[].namespace") {
        merge(spec, &json!({"rules": [{"backendRefs": [{"name": "b", "port": 80}]}]}));
    }
}

/// Paths that end so are tried with this (the longest ending counts), whatever their type says.
const VALUES: [(&str, &str); 96] = [
    ("directResponse.status", "418"),
    ("abort.httpStatus", "418"),
    ("abort.grpcStatus", r#""UNAVAILABLE""#),
    ("abort.http2Error", r#""REFUSED_STREAM""#),
    ("redirect.redirectCode", "308"),
    ("redirect.port", "8443"),
    ("redirect.uri", r#""/elsewhere""#),
    ("redirect.scheme", r#""https""#),
    ("redirect.prefixRewrite", r#""/y""#),
    ("rewrite.uri", r#""/elsewhere""#),
    ("uriRegexRewrite.match", r#""/x""#),
    ("uriRegexRewrite.rewrite", r#""/y""#),
    ("uri.exact", r#""/x""#),
    ("uri.prefix", r#""/x""#),
    ("method.exact", r#""POST""#),
    ("regex", r#""x.*""#),
    ("retryOn", r#""gateway-error""#),
    ("destination.host", r#""b""#),
    ("mirror.host", r#""b""#),
    ("port.number", "80"),
    ("tcp[].route[].destination.port.number", "80"),
    ("tls[].route[].destination.port.number", "80"),
    (".subset", r#""v1""#),
    ("delegate.namespace", r#""other""#),
    ("delegate.name", r#""delegate""#),
    ("http[].match[].port", "80"),
    ("tcp[].match[].port", "80"),
    ("tls[].match[].port", "90"),
    ("tls[].route[].destination.host", r#""a""#),
    ("tcp[].route[].destination.host", r#""a""#),
    ("localityLbSetting.enabled", "false"),
    ("TLSRoute spec.hostnames[]", r#""x.example""#),
    ("allowedRoutes.namespaces.from", r#""All""#),
    ("matchExpressions[].key", r#""stage""#),
    ("matchExpressions[].operator", r#""NotIn""#),
    ("matchExpressions[].values[]", r#""prod""#),
    ("gateways[]", r#""shop/another""#),
    ("exportTo[]", r#""other""#),
    ("mirrors[].destination.host", r#""a""#),
    ("directResponse.body.bytes", r#""eA==""#),
    ("DestinationRule spec.trafficPolicy.tls.credentialName", r#""roots""#),
    ("DestinationRule spec.trafficPolicy.tls.mode", r#""SIMPLE""#),
    ("tunnel.protocol", r#""CONNECT""#),
    ("tunnel.targetHost", r#""x.example""#),
    ("derivePort", r#""FROM_PROTOCOL_DEFAULT""#),
    ("retryIgnorePreviousHosts", "false"),
    ("Modifier.set[].name", r#""y""#),
    ("Modifier.add[].name", r#""y""#),
    ("spec.hosts[]", r#""b""#),
    ("spec.host", r#""b""#),
    ("destinationSubnets[]", r#""10.9.0.0/16""#),
    ("sourceSubnet", r#""10.9.0.0/16""#),
    ("pBlocks[]", r#""10.9.0.0/16""#),
    ("rincipals[]", r#""cluster.local/ns/shop/sa/x""#),
    ("erviceAccounts[]", r#""shop/x""#),
    ("orts[]", r#""80""#),
    ("aths[]", r#""/x""#),
    ("ethods[]", r#""PUT""#),
    ("osts[]", r#""x.example""#),
    ("when[].key", r#""request.headers[y]""#),
    ("provider.name", r#""somebody""#),
    ("jwtRules[].jwks", r#""{\"keys\":[{\"kty\":\"oct\",\"k\":\"AA\",\"kid\":\"1\"}]}""#),
    ("jwks_uri", r#""https://x.example/jwks""#),
    ("jwksUri", r#""https://x.example/jwks""#),
    ("corsPolicy.allowMethods[]", r#""PUT""#),
    ("simple", r#""RANDOM""#),
    ("failoverPriority[]", r#""topology.kubernetes.io/zone""#),
    ("distribute[].from", r#""r/*""#),
    ("distribute[].to.*", "100"),
    ("failover[].from", r#""r""#),
    ("failover[].to", r#""q""#),
    ("outlierDetectionHttpErrorCodes[]", "502"),
    ("weight", "3"),
    ("percent", "30"),
    ("percentage.value", "30"),
    ("minimumPercent", "20"),
    ("targetRef.name", r#""b""#),
    ("targetRefs[].name", r#""b""#),
    ("targetRefs[].kind", r#""Gateway""#),
    ("targetRefs[].group", r#""gateway.networking.k8s.io""#),
    ("targetRef.group", r#""gateway.networking.k8s.io""#),
    ("spec.action", r#""DENY""#),
    ("timeouts.request", r#""7s""#),
    ("timeouts.backendRequest", r#""7s""#),
    ("requestMirror.backendRef.name", r#""a""#),
    ("namespaces.selector.matchLabels.*", r#""other""#),
    ("targetRef.kind", r#""Gateway""#),
    (".group", r#""x.io""#),
    ("parentRefs[].kind", r#""Gateway""#),
    ("parentRefs[].name", r#""b""#),
    ("parentRefs[].port", "80"),
    ("backendRefs[].kind", r#""Thing""#),
    ("backendRefs[].name", r#""b""#),
    ("backendRef.kind", r#""Thing""#),
    ("backendRef.port", "90"),
    ("namespace", r#""other""#),
];
const MORE_VALUES: [(&str, &str); 44] = [
    ("accessLogging[].providers[].name", r#""envoy""#),
    ("accessLogging[].match.mode", r#""CLIENT""#),
    ("tracing[].match.mode", r#""CLIENT""#),
    ("tracing[].providers[].name", r#""other""#),
    ("overrides[].match.mode", r#""CLIENT""#),
    ("overrides[].match.metric", r#""REQUEST_SIZE""#),
    ("overrides[].match.customMetric", r#""request_bytes""#),
    ("enableIstioTags", "false"),
    ("randomSamplingPercentage", "30"),
    ("metrics[].providers[].name", r#""stackdriver""#),
    ("ServiceEntry spec.hosts[]", r#""x.example""#),
    ("ServiceEntry spec.addresses[]", r#""240.1.0.9""#),
    ("ServiceEntry spec.exportTo[]", r#"".""#),
    ("ServiceEntry spec.ports[].name", r#""http""#),
    ("ServiceEntry spec.ports[].protocol", r#""HTTP""#),
    ("ServiceEntry spec.resolution", r#""DNS""#),
    ("workloadSelector.labels.*", r#""a""#),
    ("endpoints[].address", r#""203.0.113.9""#),
    ("WorkloadEntry spec.address", r#""203.0.113.9""#),
    ("HTTPRoute spec.rules[].backendRefs[].port", "90"),
    ("GRPCRoute spec.rules[].backendRefs[].port", "80"),
    ("TCPRoute spec.parentRefs[].port", "90"),
    ("TLSRoute spec.parentRefs[].port", "443"),
    ("GRPCRoute spec.parentRefs[].port", "100"),
    ("TCPRoute spec.rules[].backendRefs[].port", "80"),
    ("TLSRoute spec.rules[].backendRefs[].port", "90"),
    ("spec.gatewayClassName", r#""another""#),
    ("requestRedirect.statusCode", "308"),
    ("requestRedirect.port", "8443"),
    ("requestRedirect.path.type", r#""ReplacePrefixMatch""#),
    ("urlRewrite.path.type", r#""ReplacePrefixMatch""#),
    ("replaceFullPath", r#""/full""#),
    ("replacePrefixMatch", r#""/q""#),
    ("filters[].type", r#""RequestHeaderModifier""#),
    ("path.value", r#""/x""#),
    ("path.type", r#""Exact""#),
    ("method.type", r#""RegularExpression""#),
    ("headers[].type", r#""RegularExpression""#),
    ("queryParams[].type", r#""RegularExpression""#),
    ("retry.codes[]", "503"),
    ("listeners[].port", "15009"),
    ("listeners[].protocol", r#""HTTP""#),
    ("maglev.tableSize", "101"),
    ("mode", r#""STRICT""#),
];

/// The value a field is tried with.
pub(crate) fn value(field: &Field) -> Value {
    let full = format!("{} {}", field.kind, field.path);
    let ending = VALUES.iter().chain(&MORE_VALUES).filter(|(ending, _)| full.ends_with(ending));
    if let Some((_, value)) = ending.max_by_key(|(ending, _)| ending.len()) {
        return serde_json::from_str(value).expect("a value");
    }
    if let Some(value) = field.values.last() {
        return value.parse::<u64>().map_or_else(|_| json!(value), |number| json!(number));
    }
    let name = field.path.rsplit('.').next().unwrap_or_default().to_lowercase();
    let lasting =
        ["timeout", "interval", "time", "delay", "backoff", "duration", "ttl", "maxage", "warmupdurationsecs"];
    match field.value_type.as_str() {
        "boolean" => json!(true),
        "integer" | "number" => json!(7),
        "int-or-string" => json!("7"),
        _ if lasting.iter().any(|word| name.ends_with(word)) => json!("7s"),
        _ => json!("x"),
    }
}

/// Puts a value at the field's place: list items are the first ones, `*` is a key of its own.
pub(crate) fn set(spec: &mut Value, path: &str, value: Value) {
    let mut place = spec;
    for step in path.trim_start_matches("spec.").split('.') {
        let (name, list) = match step.strip_suffix("[]") {
            Some(name) => (name, true),
            None => (step, false),
        };
        if !place.is_object() {
            *place = json!({});
        }
        // Labels of the mesh's pods; namespaces carry their names.
        let key = match path {
            path if path.contains("namespaces.selector") => "kubernetes.io/metadata.name",
            path if path.contains("portLevelMtls") => "8080",
            path if path.ends_with("ports.*") => "http",
            _ => "app",
        };
        place = &mut place[if name == "*" { key } else { name }];
        if list {
            if !place.is_array() {
                *place = json!([null]);
            }
            place = &mut place[0];
        }
    }
    *place = value;
}

fn merge(into: &mut Value, other: &Value) {
    match (into, other) {
        (Value::Object(into), Value::Object(other)) => {
            other.iter().for_each(|(key, value)| merge(into.entry(key).or_insert(Value::Null), value));
        }
        (Value::Array(into), Value::Array(other)) => {
            for (index, value) in other.iter().enumerate() {
                if index == into.len() {
                    into.push(Value::Null);
                }
                merge(&mut into[index], value);
            }
        }
        (into, other) => *into = other.clone(),
    }
}

fn remove(spec: &mut Value, pointer: &str) {
    let Some((parent, name)) = pointer.rsplit_once('/') else { return };
    if let Some(Value::Object(parent)) = spec.pointer_mut(parent) {
        parent.remove(name);
    }
}
