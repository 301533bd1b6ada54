use std::path::Path;

use super::*;
use crate::read_str;

/// Field and start of the reason of every mistake in one object's spec, errors only.
fn mistakes(api_version: &str, kind: &str, spec: &str) -> Vec<String> {
    let text = format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: o, namespace: n}}\nspec: {spec}\n");
    let (set, faults) = read_str(&text, Path::new("o.yaml"));
    let errors: Vec<_> = faults.iter().filter(|fault| fault.severity == Severity::Error).collect();
    assert_eq!(set.is_empty(), !errors.is_empty(), "{faults:#?}");
    assert!(faults.iter().all(|fault| fault.object == format!("{kind} n/o") && fault.line == 4), "{faults:#?}");
    errors.iter().map(|fault| format!("{}: {}", fault.field, fault.reason)).collect()
}

/// Each spec is refused once, at the given field, for a reason that contains the given text.
fn refused(api_version: &str, kind: &str, cases: &[(&str, &str, &str)]) {
    for (spec, field, reason) in cases {
        let found = mistakes(api_version, kind, spec);
        assert_eq!(found.len(), 1, "{spec}: {found:#?}");
        assert!(found[0].starts_with(&format!("{field}: ")) && found[0].contains(reason), "{spec}: {found:#?}");
    }
}

#[test]
fn patterns_match_whole_values() {
    let pattern = full_match("a|bc").unwrap();
    assert!(pattern.is_match("a") && pattern.is_match("bc") && !pattern.is_match("xa") && !pattern.is_match("abc"));
    let error = full_match("a(").unwrap_err();
    assert!(error.contains("unclosed group") && !error.contains('\n'), "{error}");
    assert!(full_match("(?=a)").is_err(), "RE2 has no look-ahead");
    assert!(full_match(&"a".repeat(2000)).is_err());
}

#[test]
fn virtual_services() {
    let route = |rest: &str| format!("{{hosts: [a], http: [{{route: [{{destination: {{host: a}}}}]{rest}}}]}}");
    let cases = [
        ("{hosts: [a]}".to_owned(), "spec", "no rule"),
        ("{hosts: [a], http: [{match: [{uri: {exact: /}}]}]}".to_owned(), "spec.http[0]", "does nothing"),
        (
            "{hosts: [a], http: [{route: [{destination: {}}]}]}".to_owned(),
            "spec.http[0].route[0].destination.host",
            "missing",
        ),
        (route(", redirect: {uri: /}"), "spec.http[0]", "route and redirect exclude each other"),
        (route(", match: [{uri: {regex: 'a('}}]"), "spec.http[0].match[0].uri.regex", "unclosed group"),
        (
            route(", match: [{headers: {x.y: {exact: a, prefix: b}}}]"),
            "spec.http[0].match[0].headers[\"x.y\"]",
            "only one of",
        ),
        (route(", retries: {attempts: 2, retryOn: '5xx,sometimes'}"), "spec.http[0].retries.retryOn", "\"sometimes\""),
        (
            route(", fault: {abort: {percentage: {value: 101}, httpStatus: 500}}"),
            "spec.http[0].fault.abort.percentage.value",
            "101",
        ),
        (route(", fault: {abort: {grpcStatus: OOPS}}"), "spec.http[0].fault.abort.grpcStatus", "no gRPC status"),
        (route(", mirror: {host: b}, mirrors: [{destination: {host: b}}]"), "spec.http[0]", "mirror and mirrors"),
        (route(", timeout: 5"), "spec.http[0].timeout", "expected a string"),
        (route(", timeout: fast"), "spec.http[0].timeout", "no duration"),
        (route(", timeuot: 5s"), "spec.http[0].timeuot", "unknown field"),
        (
            "{hosts: [a], tls: [{match: [{port: 443}], route: [{destination: {host: a}}]}]}".to_owned(),
            "spec.tls[0].match[0].sniHosts",
            "missing",
        ),
        ("{hosts: [a], tcp: [{route: []}]}".to_owned(), "spec.tcp[0].route", "missing"),
        (
            "{hosts: [a], http: [{route: [{destination: {host: a}, weight: 0}, {destination: {host: b}, weight: 0}]}]}"
                .to_owned(),
            "spec.http[0].route",
            "sum up to 0",
        ),
        (
            "{hosts: [a], http: [{route: [{destination: {host: a, port: {number: 70000}}}]}]}".to_owned(),
            "spec.http[0].route[0].destination.port.number",
            "70000",
        ),
        ("{hosts: [a], http: [{directResponse: {status: 99}}]}".to_owned(), "spec.http[0].directResponse.status", "99"),
    ];
    for (spec, field, reason) in &cases {
        refused("networking.istio.io/v1", "VirtualService", &[(spec, field, reason)]);
    }
    assert_eq!(
        mistakes("networking.istio.io/v1beta1", "VirtualService", &route(", timeout: 5s")),
        Vec::<String>::new()
    );
}

#[test]
fn destination_rules_and_service_entries() {
    refused(
        "networking.istio.io/v1",
        "DestinationRule",
        &[
            ("{trafficPolicy: {}}", "spec.host", "missing"),
            ("{host: a, subsets: [{name: v1}, {name: v1}]}", "spec.subsets[1].name", "twice"),
            (
                "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {}}}}",
                "spec.trafficPolicy.loadBalancer.consistentHash",
                "what is hashed",
            ),
            (
                "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 100}}}}}",
                "spec.trafficPolicy.loadBalancer.consistentHash.maglev.tableSize",
                "prime",
            ),
            (
                "{host: a, trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: r, to: {x: 60, y: 30}}]}}}}",
                "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to",
                "90, not 100",
            ),
            (
                "{host: a, trafficPolicy: {outlierDetection: {maxEjectionPercent: 120}}}",
                "spec.trafficPolicy.outlierDetection.maxEjectionPercent",
                "120",
            ),
            (
                "{host: a, trafficPolicy: {portLevelSettings: [{tls: {mode: ISTIO_MUTUAL}}]}}",
                "spec.trafficPolicy.portLevelSettings[0].port",
                "missing",
            ),
            (
                "{host: a, trafficPolicy: {tls: {mode: MUTUAL, clientCertificate: /c}}}",
                "spec.trafficPolicy.tls.privateKey",
                "missing",
            ),
            ("{host: a, trafficPolicy: {tls: {mode: LOOSE}}}", "spec.trafficPolicy.tls.mode", "unknown variant"),
        ],
    );
    let port = "ports: [{number: 80, name: http, protocol: HTTP}]";
    for (spec, field, reason) in [
        ("{ports: [{number: 80, name: http}]}".to_owned(), "spec.hosts", "missing"),
        (format!("{{hosts: ['*.a.example'], resolution: DNS, {port}}}"), "spec.hosts[0]", "wildcard"),
        (format!("{{hosts: [a.example], addresses: [10.0.0.0/40], {port}}}"), "spec.addresses[0]", "neither"),
        (
            format!("{{hosts: [a.example], resolution: STATIC, endpoints: [{{address: b.example}}], {port}}}"),
            "spec.endpoints[0].address",
            "STATIC",
        ),
        (
            format!(
                "{{hosts: [a.example], resolution: STATIC, endpoints: [{{address: 10.0.0.1, ports: {{web: 80}}}}], {port}}}"
            ),
            "spec.endpoints[0].ports.web",
            "no port",
        ),
        (
            "{hosts: [a.example], ports: [{number: 80, name: a}, {number: 80, name: b}]}".to_owned(),
            "spec.ports[1].number",
            "twice",
        ),
    ] {
        refused("networking.istio.io/v1", "ServiceEntry", &[(&spec, field, reason)]);
    }
}

#[test]
fn security_objects() {
    refused(
        "security.istio.io/v1",
        "AuthorizationPolicy",
        &[
            ("{action: CUSTOM, rules: [{}]}", "spec.provider", "missing"),
            ("{action: REFUSE}", "spec.action", "unknown variant"),
            ("{selector: {}, targetRefs: [{kind: Service, group: '', name: a}]}", "spec", "selector and targetRefs"),
            (
                "{targetRefs: [{kind: Pod, group: '', name: a}]}",
                "spec.targetRefs[0].kind",
                "nothing a policy can be for",
            ),
            ("{rules: [{from: [{source: {}}]}]}", "spec.rules[0].from[0].source", "says nothing"),
            (
                "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]}",
                "spec.rules[0].from[0].source.ipBlocks[0]",
                "neither",
            ),
            ("{rules: [{to: [{operation: {ports: [http]}}]}]}", "spec.rules[0].to[0].operation.ports[0]", "no port"),
            (
                "{rules: [{to: [{operation: {paths: ['/a{*}']}}]}]}",
                "spec.rules[0].to[0].operation.paths[0]",
                "whole path elements",
            ),
            ("{rules: [{when: [{key: source.colour, values: [red]}]}]}", "spec.rules[0].when[0].key", "no attribute"),
            ("{rules: [{when: [{key: source.ip}]}]}", "spec.rules[0].when[0]", "says nothing"),
            ("{rules: [{from: [{source: {principals: null}}]}]}", "spec.rules[0].from[0].source.principals", "null"),
            (
                "{rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]}",
                "spec.rules[0].from[0].source",
                "beside",
            ),
        ],
    );
    refused(
        "security.istio.io/v1",
        "RequestAuthentication",
        &[
            ("{jwtRules: [{jwks: '{\"keys\": []}'}]}", "spec.jwtRules[0].issuer", "missing"),
            ("{jwtRules: [{issuer: a, jwks: nonsense}]}", "spec.jwtRules[0].jwks", "Key Set"),
            ("{jwtRules: [{issuer: a, jwksUri: 'file:///etc'}]}", "spec.jwtRules[0].jwksUri", "URL"),
        ],
    );
    refused(
        "security.istio.io/v1",
        "PeerAuthentication",
        &[
            ("{portLevelMtls: {80: {mode: STRICT}}}", "spec.portLevelMtls", "selector"),
            (
                "{selector: {matchLabels: {a: b}}, portLevelMtls: {http: {mode: STRICT}}}",
                "spec.portLevelMtls",
                "to be a number",
            ),
            ("{mtls: {mode: STRIKT}}", "spec.mtls.mode", "unknown variant"),
        ],
    );
}

#[test]
fn kubernetes_objects() {
    refused(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        &[
            (
                "{podSelector: {matchExpressions: [{key: a, operator: Like}]}}",
                "spec.podSelector.matchExpressions[0].operator",
                "Like",
            ),
            ("{podSelector: {}, policyTypes: [Both]}", "spec.policyTypes[0]", "neither"),
            ("{podSelector: {}, ingress: [{from: [{}]}]}", "spec.ingress[0].from[0]", "names nobody"),
            (
                "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/9]}}]}]}",
                "spec.ingress[0].from[0].ipBlock.except[0]",
                "no part of",
            ),
            (
                "{podSelector: {}, egress: [{ports: [{port: 90, endPort: 80}]}]}",
                "spec.egress[0].ports[0].endPort",
                "below",
            ),
            ("{podSelector: {}, egress: [{ports: [{port: 0}]}]}", "spec.egress[0].ports[0].port", "no port"),
            ("{podSelector: {}, egres: []}", "spec.egres", "unknown field"),
        ],
    );
    refused(
        "v1",
        "Service",
        &[
            ("{clusterIP: 10.96.0.300, ports: [{port: 80}]}", "spec.clusterIP", "no IP address"),
            ("{clusterIP: 10.96.0.3, ports: [{port: 80}, {port: 81, name: b}]}", "spec.ports[0].name", "names"),
            ("{clusterIP: 10.96.0.3, ports: [{port: 80, protocol: HTTP}]}", "spec.ports[0].protocol", "none of"),
        ],
    );
}

#[test]
fn gateway_objects() {
    let parent = "parentRefs: [{group: '', kind: Service, name: a}]";
    for (rest, field, reason) in [
        ("backendRefs: [{name: a}]", "spec.rules[0].backendRefs[0].port", "missing"),
        ("matches: [{path: {type: Exact, value: a}}]", "spec.rules[0].matches[0].path.value", "start with /"),
        (
            "matches: [{headers: [{name: a, type: RegularExpression, value: '['}]}]",
            "spec.rules[0].matches[0].headers[0].value",
            "regular expression",
        ),
        ("filters: [{type: URLRewrite}]", "spec.rules[0].filters[0].urlRewrite", "missing"),
        ("filters: [{type: Teleport}]", "spec.rules[0].filters[0].type", "unknown variant"),
        ("retry: {codes: [200]}", "spec.rules[0].retry.codes[0]", "200"),
        ("timeouts: {request: 1s, backendRequest: 2s}", "spec.rules[0].timeouts.backendRequest", "longer"),
        ("backendRefs: [{name: a, port: 80, wieght: 1}]", "spec.rules[0].backendRefs[0].wieght", "unknown field"),
    ] {
        let spec = format!("{{{parent}, rules: [{{{rest}}}]}}");
        refused("gateway.networking.k8s.io/v1", "HTTPRoute", &[(&spec, field, reason)]);
    }
    refused(
        "gateway.networking.k8s.io/v1",
        "BackendTLSPolicy",
        &[(
            "{targetRefs: [{group: '', kind: Service, name: a}], validation: {hostname: a.example}}",
            "spec.validation",
            "exactly one of",
        )],
    );
}
