//! What mistakes lead to: which object and field is named, and that security objects close rather than open.
use compat_objects::Kind;
use compat_objects::source::DirectorySource;
use compat_translate::{MeshOptions, MeshOutput, ObjectKey, translate};
use prost::Message;
use xds_proto::istio::security::{Action, Authorization};
use xds_proto::istio::workload as wds;

const MESH: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: w}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: w, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: a, namespace: shop}
spec: {clusterIP: 10.0.0.1, selector: {app: a}, ports: [{name: http, port: 80}, {name: tcp, port: 90}]}
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: shop}
spec: {clusterIP: 10.0.0.2, selector: {app: b}, ports: [{name: http, port: 80}]}
";

/// The whole output with some objects on top of a small mesh, past the reader's own checks.
fn output(objects: &str) -> MeshOutput {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("all.yaml"), format!("{MESH}---{objects}")).unwrap();
    let snapshot = DirectorySource::new(vec![folder.path().to_owned()]).load();
    let faults: Vec<String> = snapshot.errors().map(ToString::to_string).collect();
    assert!(faults.is_empty(), "{faults:#?}");
    translate(&snapshot.objects, &MeshOptions::default())
}

fn assert_fault(output: &MeshOutput, expected: &str) {
    let faults: Vec<String> = output.faults.iter().map(ToString::to_string).collect();
    assert!(faults.iter().any(|fault| fault.contains(expected)), "{expected:?} is not among {faults:#?}");
}

/// The inside listener's bytes as text: names and values of strings can be seen in it.
fn inside(output: &MeshOutput) -> String {
    String::from_utf8_lossy(&output.waypoints["shop/w"].listeners["main_internal"].value).into_owned()
}

fn virtual_service(http: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: v, namespace: shop}}
spec: {{hosts: [a], http: {http}}}
"
    )
}

#[test]
fn routes_name_the_field_that_is_wrong() {
    for (http, expected) in [
        ("[{route: [{destination: {host: gone}}]}]", "spec.http[0].route[0].destination.host: no Service"),
        ("[{route: [{destination: {host: a, port: {number: 81}}}]}]", "spec.http[0].route[0].destination.port: a.shop"),
        ("[{route: [{destination: {host: b, subset: x}}]}]", "spec.http[0].route[0].destination.subset: no Dest"),
        ("[{mirror: {host: gone}, route: [{destination: {host: a}}]}]", "spec.http[0].mirror.host: no Service"),
        ("[{delegate: {name: nobody}}]", "spec.http[0].delegate: no VirtualService shop/nobody"),
    ] {
        assert_fault(&output(&virtual_service(http)), &format!("VirtualService shop/v: {expected}"));
    }
}

#[test]
fn one_broken_route_leaves_other_services_alone() {
    let good = output(&virtual_service("[{route: [{destination: {host: a}}]}]"));
    let broken = output(&virtual_service("[{delegate: {name: nobody}}]"));
    assert!(inside(&broken).contains("inbound-vip|80|http|b.shop.svc.cluster.local"));
    assert_eq!(broken.waypoints["shop/w"].clusters, good.waypoints["shop/w"].clusters);
}

#[test]
fn a_policy_that_cannot_be_read_denies_what_it_selects() {
    let output = output(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {action: ALLOW, rules: [{from: [{source: {principals: [x/ns/a/sa/b], trustDomains: [y]}}]}]}
",
    );
    assert_fault(&output, "AuthorizationPolicy shop/p: spec.rules[0].from[0].source.trustDomains");
    let policy = Authorization::decode(output.authorizations["shop/p"].value.as_slice()).unwrap();
    assert_eq!(policy.action, Action::Deny as i32);
    // A rule without clauses matches everything.
    assert_eq!(policy.rules.len(), 1);
    assert!(policy.rules[0].clauses.is_empty());
}

#[test]
fn an_attached_policy_that_cannot_be_read_denies_its_target_only() {
    let output = output(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {targetRefs: [{kind: Service, group: '', name: a}], rules: [{when: [{key: experimental.envoy.filters.x, values: [y]}]}]}
",
    );
    assert_fault(&output, "AuthorizationPolicy shop/p: spec.rules[0].when[0]: key");
    let text = inside(&output);
    // On the HTTP and on the TCP port of the one service.
    assert_eq!(text.matches("ns[shop]-policy[p]-rule[invalid]").count(), 2);
}

#[test]
fn custom_authorization_without_its_provider_is_closed() {
    let output = output(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {targetRefs: [{kind: Service, group: '', name: b}], action: CUSTOM, provider: {name: nobody}, rules: [{}]}
",
    );
    assert_fault(&output, "AuthorizationPolicy shop/p: spec.provider.name: the mesh configuration has no extension");
    // Enforced, not noted.
    let text = inside(&output);
    assert!(text.contains("istio-ext-authz-nobody-ns[shop]-policy[p]-rule[0]-deny-due-to-bad-CUSTOM-action"));
    assert!(!text.contains("envoy.filters.http.ext_authz"));
}

fn provider(mesh: &str, policy: &str) -> MeshOutput {
    let indented = mesh.replace('\n', "\n    ");
    output(&format!(
        "
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data:
  mesh: |
    {indented}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: p, namespace: shop}}
spec: {{targetRefs: [{{kind: Service, group: '', name: a}}], action: CUSTOM, {policy}}}
"
    ))
}

#[test]
fn what_is_not_read_of_the_mesh_configuration_is_named() {
    let mesh = "pathNormalization: {normalization: MERGE_SLASHES}\nextensionProviders: []";
    let output = provider(mesh, "provider: {name: g}, rules: [{}]");
    assert_fault(&output, "ConfigMap istio-system/istio: data.mesh.pathNormalization: is not read");
}

/// How much of the requests is mirrored, as the inside listener has it.
fn mirrored(http: &str) -> bool {
    let delegate = "
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: d, namespace: shop}
spec: {http: [{route: [{destination: {host: a}}]}]}
";
    let output = output(&format!("{}{delegate}", virtual_service(http)));
    // runtime_fraction's default value: 10,000 of a million.
    let one_percent = [0x08, 0x90, 0x4e, 0x10, 0x02];
    output.waypoints["shop/w"].listeners["main_internal"].value.windows(5).any(|bytes| bytes == one_percent)
}

#[test]
fn a_delegate_takes_the_share_along_with_the_mirror() {
    let share = "mirror: {host: b}, mirrorPercentage: {value: 1}";
    assert!(mirrored(&format!("[{{{share}, route: [{{destination: {{host: a}}}}]}}]")));
    assert!(mirrored(&format!("[{{{share}, delegate: {{name: d}}}}]")));
}

#[test]
fn custom_authorization_asks_its_provider_and_closes_what_it_cannot_ask() {
    let good = "extensionProviders: [{name: g, envoyExtAuthzGrpc: {service: b.shop.svc.cluster.local, port: 80}}]";
    let asked = provider(good, "provider: {name: g}, rules: [{}]");
    let text = inside(&asked);
    assert!(text.contains("istio-ext-authz-g-ns[shop]-policy[p]-rule[0]") && text.contains("istio_ext_authz_"));
    assert!(text.contains("outbound|80||b.shop.svc.cluster.local"));
    let waypoint = &asked.waypoints["shop/w"];
    assert!(waypoint.clusters.contains_key("outbound|80||b.shop.svc.cluster.local"));
    // The service's TCP port takes nothing.
    assert_fault(&asked, "AuthorizationPolicy shop/p: spec.action: external authorization of TCP connections");
    assert!(text.contains("ns[shop]-policy[p]-rule[custom]"));
    for (mesh, reason) in [
        (good.replace("b.shop", "nobody.shop"), "no Service or ServiceEntry has the provider's host nobody"),
        (good.replace("port: 80", "port: 81"), "has no port 81"),
        (good.replace("port: 80", "port: 80, failopen: true"), "unknown field `failopen`"),
    ] {
        let closed = provider(&mesh, "provider: {name: g}, rules: [{}]");
        assert_fault(&closed, reason);
        assert!(inside(&closed).contains("-deny-due-to-bad-CUSTOM-action"), "{reason}");
    }
    let broken = provider("extensionProviders: {", "provider: {name: g}, rules: [{}]");
    assert_fault(&broken, "ConfigMap istio-system/istio: data.mesh");
    assert!(inside(&broken).contains("-deny-due-to-bad-CUSTOM-action"));
    let rule = "provider: {name: g}, rules: [{when: [{key: experimental.envoy.filters.x, values: [y]}]}]";
    let unreadable = provider(good, rule);
    assert_fault(&unreadable, "AuthorizationPolicy shop/p: spec.rules[0].when[0]");
    assert!(inside(&unreadable).contains("ns[shop]-policy[p]-rule[invalid]"));
}

#[test]
fn an_issuer_without_keys_accepts_nothing() {
    let output = output(
        "
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: r, namespace: shop}
spec: {targetRefs: [{kind: Service, group: '', name: a}], jwtRules: [{issuer: https://i.example, jwksUri: 'https://i.example/keys'}]}
",
    );
    assert!(inside(&output).contains(r#""kid":"nobody""#));
    assert!(output.jwks_uris.contains("https://i.example/keys"));
}

#[test]
fn a_waypoint_that_is_not_there_is_named() {
    let output = output(
        "
apiVersion: v1
kind: Service
metadata: {name: c, namespace: shop, labels: {istio.io/use-waypoint: typo}}
spec: {clusterIP: 10.0.0.3, selector: {app: c}, ports: [{name: http, port: 80}]}
",
    );
    assert_fault(&output, "Service shop/c: metadata.labels[istio.io/use-waypoint]: no Gateway shop/typo");
}

/// A cluster's bytes as text, and whether it has endpoints.
fn cluster(output: &MeshOutput, name: &str) -> (String, bool) {
    let waypoint = &output.waypoints["shop/w"];
    let text = String::from_utf8_lossy(&waypoint.clusters[name].value).into_owned();
    (text, waypoint.endpoints.contains_key(name))
}

#[test]
fn tls_that_cannot_be_spoken_closes_the_port_it_was_asked_for() {
    const HTTP: &str = "inbound-vip|80|http|a.shop.svc.cluster.local";
    const TCP: &str = "inbound-vip|90|tcp|a.shop.svc.cluster.local";
    let policy = |validation: &str| {
        output(&format!(
            "
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {{name: p, namespace: shop}}
spec: {{targetRefs: [{{group: \"\", kind: Service, name: a, sectionName: http}}], validation: {{hostname: a.example, {validation}}}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: a, namespace: shop}}
spec: {{hosts: [a.outside], resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{{address: 203.0.113.1}}]}}
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: roots, namespace: shop}}
data: {{ca.crt: \"{}\"}}
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: scribble, namespace: shop}}
data: {{ca.crt: THE-ROOTS}}
",
            pem("CERTIFICATE", "Uk9PVFM=")
        ))
    };
    let roots = |kind: &str, name: &str| format!("caCertificateRefs: [{{group: \"\", kind: {kind}, name: {name}}}]");
    let spoken = policy(&roots("ConfigMap", "roots"));
    assert!(spoken.faults.iter().all(|fault| !fault.to_string().contains("BackendTLSPolicy")), "{:?}", spoken.faults);
    let (http, open) = cluster(&spoken, HTTP);
    assert!(open && http.contains("configmap://shop/roots-cacert") && http.contains("a.example"), "{http}");
    assert!(sent(&spoken, "configmap://shop/roots-cacert").contains("Uk9PVFM="));
    let (entry, open) = cluster(&spoken, "inbound-vip|80|http|a.outside");
    assert!(open && !entry.contains("UpstreamTlsContext"), "a ServiceEntry of the Service's name: {entry}");
    let (tcp, open) = cluster(&spoken, TCP);
    assert!(open && !tcp.contains("UpstreamTlsContext"), "another port than the policy's: {tcp}");
    let refs = "BackendTLSPolicy shop/p: spec.validation.caCertificateRefs";
    let closed = policy(&roots("Secret", "roots"));
    assert_fault(&closed, &format!("{refs}: Secret roots: only ConfigMaps are read"));
    assert_eq!((cluster(&closed, HTTP).1, cluster(&closed, TCP).1), (false, true));
    // Waypoints send nothing before the roots have come.
    for (name, expected) in [
        ("gone", format!("{refs}: ConfigMap shop/gone is not known")),
        ("scribble", "ConfigMap shop/scribble: data: ca.crt is no certificate in PEM".to_owned()),
    ] {
        let unsent = policy(&roots("ConfigMap", name));
        assert_fault(&unsent, &expected);
        assert!(cluster(&unsent, HTTP).0.contains(&format!("configmap://shop/{name}-cacert")));
        assert!(unsent.waypoints["shop/w"].roots.is_empty());
        assert!(unsent.referred.contains(&ObjectKey::new(Kind::ConfigMap, "shop", name)));
    }

    let rule = |tls: &str| {
        output(&format!(
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: r, namespace: shop}}
spec: {{host: a, trafficPolicy: {{tls: {tls}}}}}
"
        ))
    };
    let closed = rule("{mode: SIMPLE, credentialName: sds://x}");
    assert_fault(
        &closed,
        "DestinationRule shop/r: spec.trafficPolicy.tls.credentialName: sds://x: only names of Secrets",
    );
    assert!(!cluster(&closed, HTTP).1);
    let spoken = rule("{mode: SIMPLE, insecureSkipVerify: true, sni: x}");
    let (http, open) = cluster(&spoken, HTTP);
    assert!(open && http.contains("UpstreamTlsContext") && !http.contains("file-root"), "{http}");
}

/// One section of PEM, for a text in double quotes.
fn pem(kind: &str, base64: &str) -> String {
    format!("-----BEGIN {kind}-----\\n{base64}\\n-----END {kind}-----\\n")
}

/// A secret sent to the waypoint, as text.
fn sent(output: &MeshOutput, name: &str) -> String {
    let waypoint = &output.waypoints["shop/w"];
    let found = waypoint.roots.get(name).or_else(|| waypoint.certificates.get(name));
    String::from_utf8_lossy(&found.unwrap_or_else(|| panic!("{name} is not sent")).value).into_owned()
}

#[test]
fn secrets_are_sent_as_istiod_finds_them() {
    let (roots, chain, key) =
        (pem("CERTIFICATE", "Uk9PVFM="), pem("CERTIFICATE", "Q0hBSU4="), pem("PRIVATE KEY", "S0VZ"));
    let with = |mode: &str, secrets: &[(&str, &str)]| {
        let rule = format!(
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: r, namespace: shop}}
spec: {{host: a, trafficPolicy: {{tls: {{mode: {mode}, credentialName: psp}}}}}}
"
        );
        let secret = |(name, data): &(&str, &str)| {
            format!(
                "---\napiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: shop}}\nstringData: {{{data}}}\n"
            )
        };
        output(&(rule + &secrets.iter().map(secret).collect::<String>()))
    };
    let (generic, typed) = (
        format!("cacert: \"{roots}\", cert: \"{chain}\", key: \"{key}\""),
        format!("tls.crt: \"{chain}\", tls.key: \"{key}\""),
    );
    let of_own = format!("ca.crt: \"{roots}\"");
    for secrets in [vec![("psp", generic.as_str())], vec![("psp", &typed), ("psp-cacert", &of_own)]] {
        let output = with("MUTUAL", &secrets);
        assert!(output.faults.is_empty(), "{:?}", output.faults);
        assert!(sent(&output, "kubernetes://psp-cacert").contains("Uk9PVFM="));
        let certificate = sent(&output, "kubernetes://psp");
        assert!(certificate.contains("Q0hBSU4=") && certificate.contains("S0VZ"));
    }
    // Whoever needs roots alone is sent no key.
    let simple = with("SIMPLE", &[("psp", &generic)]);
    assert_eq!((simple.waypoints["shop/w"].roots.len(), simple.waypoints["shop/w"].certificates.len()), (1, 0));
    let missing = with("SIMPLE", &[]);
    assert_fault(
        &missing,
        "DestinationRule shop/r: spec.trafficPolicy.tls.credentialName: Secret shop/psp is not known",
    );
    let names: Vec<&str> = missing.referred.iter().map(|key| key.name.as_str()).collect();
    assert_eq!(names, ["psp", "psp-cacert"]);
    for (data, expected) in [
        ("other: x".to_owned(), "there are neither cert and key nor tls.crt and tls.key"),
        (format!("tls.crt: \"{chain}\", tls.key: none"), "tls.key is no private key in PEM"),
        (format!("cacert: \"{roots}\", crl: none"), "crl is no revocation list in PEM"),
    ] {
        assert_fault(&with("MUTUAL", &[("psp", &data)]), &format!("Secret shop/psp: data: {expected}"));
    }
}

#[test]
fn nobody_takes_over_a_services_address_or_name() {
    let entry = |name: &str, namespace: &str, host: &str, address: &str| {
        format!(
            "
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: {namespace}}}
spec: {{hosts: [{host}], addresses: [{address}], resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{{address: 203.0.113.1}}]}}
"
        )
    };
    let found = output(
        &[
            entry("address", "evil", "evil.example", "10.0.0.1"),
            entry("name", "evil", "a.shop.svc.cluster.local", "240.1.0.1"),
            entry("own", "shop", "a.shop.svc.cluster.local", "240.1.0.2"),
            entry("around", "evil", "around.example", "10.0.0.0/24"),
        ]
        .concat(),
    );
    assert_fault(&found, "ServiceEntry evil/address: spec.addresses[0]: 10.0.0.1 is Service shop/a's");
    assert_fault(&found, "ServiceEntry shop/own: spec.hosts[0]: a.shop.svc.cluster.local is Service shop/a's");
    let service = |key: &str| {
        let address = wds::Address::decode(found.addresses[key].value.as_slice()).unwrap();
        let Some(wds::address::Type::Service(service)) = address.r#type else { panic!("{key} is no service") };
        (service.addresses.len(), service.canonical)
    };
    assert_eq!(service("evil/evil.example"), (0, true));
    assert_eq!(service("shop/a.shop.svc.cluster.local"), (1, true), "the Service is who everybody means");
    assert_eq!(service("evil/a.shop.svc.cluster.local"), (1, false));
    assert_eq!(service("evil/around.example").0, 1);
}

#[test]
fn a_provider_that_cannot_be_asked_is_named_where_it_was_asked_for() {
    let telemetry = |spec: &str, mesh: &str| {
        output(&format!(
            "
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data: {{mesh: '{mesh}'}}
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{name: t, namespace: shop}}
spec: {spec}
"
        ))
    };
    let logs = |output: &MeshOutput| inside(output).contains("envoy.access_loggers.file");
    let nobody = telemetry("{accessLogging: [{providers: [{name: nobody}]}]}", "{}");
    assert_fault(&nobody, "Telemetry shop/t: spec.accessLogging[].providers: the mesh configuration has no extension");
    assert!(!logs(&nobody));
    let datadog = "{extensionProviders: [{name: d, datadog: {service: a.shop.svc.cluster.local, port: 80}}]}";
    let datadog = telemetry("{tracing: [{providers: [{name: d}]}]}", datadog);
    assert_fault(&datadog, "Telemetry shop/t: spec.tracing[].providers: extension provider d is of type datadog");
    let zipkin = "{extensionProviders: [{name: z, zipkin: {service: a.shop.svc.cluster.local, port: 80}}]}";
    let zipkin = telemetry("{tracing: [{providers: [{name: z}]}]}", zipkin);
    assert!(zipkin.faults.is_empty() && inside(&zipkin).contains("http://a.shop.svc.cluster.local/api/v2/spans"));
    let gone = "{extensionProviders: [{name: o, opentelemetry: {service: gone.example, port: 4317}}]}";
    let gone = telemetry("{tracing: [{providers: [{name: o}]}]}", gone);
    assert_fault(&gone, "no Service or ServiceEntry has the provider's host gone.example");
    // The whole mesh is logged, but for one namespace.
    assert!(logs(&telemetry("{}", "{accessLogFile: /dev/stdout}")));
    assert!(!logs(&telemetry("{accessLogging: [{disabled: true}]}", "{accessLogFile: /dev/stdout}")));
    let unreadable = telemetry("{accessLogging: [{filter: {expression: \"response.code >=\"}}]}", "{}");
    assert_fault(&unreadable, "Telemetry shop/t: spec.accessLogging[0].filter.expression: ");
    let default = telemetry("{}", "{defaultProviders: {accessLogging: [nobody]}}");
    assert_fault(&default, "ConfigMap istio-system/istio: data.mesh.defaultProviders.accessLogging[].providers");
}

#[test]
fn changes_of_metrics_are_sent_and_those_that_mean_nothing_are_named() {
    let telemetry = |metrics: &str| {
        output(&format!(
            "
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{name: t, namespace: shop}}
spec: {{metrics: {metrics}}}
"
        ))
    };
    let sent = |output: &MeshOutput| inside(output).contains("stats.PluginConfig");
    let good =
        telemetry("[{overrides: [{match: {metric: REQUEST_COUNT}, tagOverrides: {m: {value: request.method}}}]}]");
    assert!(sent(&good) && inside(&good).contains("request.method") && good.faults.is_empty(), "{:?}", good.faults);
    let field = "Telemetry shop/t: spec.metrics[0].overrides[0]";
    for (change, expected) in [
        ("{tagOverrides: {m: {value: \"request.\"}}}", ".tagOverrides[m].value: "),
        ("{match: {customMetric: hits}, disabled: true}", ".match.customMetric: there is no metric hits here"),
    ] {
        assert_fault(&telemetry(&format!("[{{overrides: [{change}]}}]")), &format!("{field}{expected}"));
    }
    assert!(sent(&telemetry("[{overrides: [{disabled: true}]}]")), "all are turned off");
    assert!(sent(&telemetry("[{providers: [{name: nobody}]}]")), "nobody fetches them");
    assert!(!sent(&telemetry("[{overrides: [{match: {mode: CLIENT}, disabled: true}]}]")));
    assert!(!sent(&telemetry("[]")));
}
