use std::net::IpAddr;
use std::path::Path;

use clap::Parser;
use serde_json::json;

use super::*;
use crate::config::{PodsFrom, Role, Switch};

/// What istiod's template passes (xds-contract 1.6, `files/waypoint.yaml`).
const WAYPOINT: &[&str] = &[
    "proxy",
    "waypoint",
    "--domain",
    "shop.svc.cluster.local",
    "--serviceCluster",
    "waypoint.shop",
    "--proxyLogLevel",
    "warning",
    "--proxyComponentLogLevel",
    "misc:error",
    "--log_output_level",
    "default:info",
];

const WAYPOINT_ENV: &[(&str, &str)] = &[
    ("ISTIO_META_SERVICE_ACCOUNT", "waypoint"),
    ("ISTIO_META_NODE_NAME", "ks-a"),
    ("PILOT_CERT_PROVIDER", "istiod"),
    ("CA_ADDR", "istiod.istio-system.svc:15012"),
    ("POD_NAME", "waypoint-5d9f-x"),
    ("POD_NAMESPACE", "shop"),
    ("INSTANCE_IP", "10.88.1.7"),
    ("SERVICE_ACCOUNT", "waypoint"),
    ("HOST_IP", "10.99.0.11"),
    ("ISTIO_CPU_LIMIT", "2"),
    (
        "PROXY_CONFIG",
        "{\"discoveryAddress\":\"istiod.istio-system.svc:15012\",\"terminationDrainDuration\":\"45s\",\
         \"proxyMetadata\":{\"ISTIO_META_DNS_CAPTURE\":\"true\",\"OTHER\":\"x\"}}\n",
    ),
    ("GOMEMLIMIT", "1073741824"),
    ("GOMAXPROCS", "2"),
    ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
    ("ISTIO_META_NETWORK", "net-1"),
    ("ISTIO_META_INTERCEPTION_MODE", "REDIRECT"),
    ("ISTIO_META_WORKLOAD_NAME", "waypoint"),
    ("ISTIO_META_OWNER", "kubernetes://apis/apps/v1/namespaces/shop/deployments/waypoint"),
    ("ISTIO_META_MESH_ID", "cluster.local"),
    ("TRUST_DOMAIN", "cluster.local"),
];

const LABELS: &str = "gateway.istio.io/managed=\"istio.io-mesh-controller\"\n\
    gateway.networking.k8s.io/gateway-class-name=\"istio-waypoint\"\n\
    gateway.networking.k8s.io/gateway-name=\"waypoint\"\n\
    istio.io/dataplane-mode=\"none\"\n\
    pod-template-hash=\"5d9f\"\n";

fn pod() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let info = folder.path().join("etc/istio/pod");
    std::fs::create_dir_all(&info).unwrap();
    std::fs::write(info.join("labels"), LABELS).unwrap();
    std::fs::write(info.join("annotations"), "prometheus.io/port=\"15020\"\n").unwrap();
    folder
}

fn translated(arguments: &[&str], root: &Path, env: &[(&str, &str)]) -> Result<Translated, String> {
    translate(arguments.iter().map(|argument| (*argument).to_owned()).collect(), &Environment::new(root, env))
}

fn flags(translated: &Translated) -> Flags {
    let program = std::iter::once("strata-proxy".to_owned());
    let mut flags = Flags::try_parse_from(program.chain(translated.arguments.iter().cloned())).unwrap();
    flags.metadata = translated.metadata.clone();
    flags
}

#[test]
fn istiods_waypoint_template() {
    let pod = pod();
    let translated = translated(WAYPOINT, pod.path(), WAYPOINT_ENV).unwrap();
    assert_eq!(translated.remarks, Vec::<String>::new());
    assert_eq!((translated.logging.filter.as_deref(), translated.logging.json), (Some("info"), false));
    let flags = flags(&translated);
    let file = |path: &str| Some(pod.path().join(path));
    assert_eq!(flags.role, Role::Waypoint);
    assert_eq!(flags.xds_address, "https://istiod.istio-system.svc:15012");
    assert_eq!(flags.ca_address(), "https://istiod.istio-system.svc:15012");
    assert_eq!(flags.xds_root_ca, file("var/run/secrets/istio/root-cert.pem"));
    assert_eq!(flags.mesh_roots, flags.xds_root_ca);
    assert_eq!(flags.token_path, file("var/run/secrets/tokens/istio-token"));
    assert_eq!(flags.revocations, file("var/run/secrets/istio/crl/ca-crl.pem"));
    assert_eq!((flags.gateway.as_deref(), flags.concurrency, flags.drain_seconds), (Some("waypoint"), 2, 45));
    assert_eq!(flags.admin_addr.unwrap().to_string(), "127.0.0.1:15000");
    assert_eq!(flags.readiness_addr.unwrap().port(), 15021);
    assert_eq!(flags.metrics_addr.unwrap().port(), 15020);
    assert_eq!(flags.node_id(), "waypoint~10.88.1.7~waypoint-5d9f-x.shop~shop.svc.cluster.local");
}

#[test]
fn a_waypoints_metadata() {
    let pod = pod();
    let metadata = flags(&translated(WAYPOINT, pod.path(), WAYPOINT_ENV).unwrap()).node_metadata();
    let expected = json!({
        "NAME": "waypoint-5d9f-x", "NAMESPACE": "shop", "INSTANCE_IPS": "10.88.1.7", "NODE_NAME": "ks-a",
        "SERVICE_ACCOUNT": "waypoint", "CLUSTER_ID": "Kubernetes", "NETWORK": "net-1", "DNS_CAPTURE": "true",
        "INTERCEPTION_MODE": "REDIRECT", "WORKLOAD_NAME": "waypoint", "MESH_ID": "cluster.local",
        "OWNER": "kubernetes://apis/apps/v1/namespaces/shop/deployments/waypoint",
        "ISTIO_VERSION": crate::config::ISTIO_VERSION,
        "ANNOTATIONS": { "prometheus.io/port": "15020" },
        "LABELS": {
            "gateway.istio.io/managed": "istio.io-mesh-controller",
            "gateway.networking.k8s.io/gateway-class-name": "istio-waypoint",
            "gateway.networking.k8s.io/gateway-name": "waypoint",
            "istio.io/dataplane-mode": "none",
        },
        "PROXY_CONFIG": {
            "discoveryAddress": "istiod.istio-system.svc:15012", "terminationDrainDuration": "45s",
            "proxyMetadata": { "ISTIO_META_DNS_CAPTURE": "true", "OTHER": "x" },
        },
    });
    assert_eq!(json!(metadata), expected);
    let mut env = WAYPOINT_ENV.to_vec();
    env.push(("ISTIO_META_ISTIO_VERSION", "1.30.2"));
    let metadata = flags(&translated(WAYPOINT, pod.path(), &env).unwrap()).node_metadata();
    assert_eq!(metadata["ISTIO_VERSION"], "1.30.2");
}

#[test]
fn more_of_pilot_agents_flags_and_some_of_nobodys() {
    let pod = pod();
    let mut arguments = WAYPOINT.to_vec();
    arguments.extend(["--concurrency=3", "--stsPort", "15463", "--templateFile=/x.json", "--log_as_json"]);
    arguments.extend([
        "--outlierLogPath=/dev/stdout",
        "--newFlag",
        "value",
        "--other=1",
        "--last",
        "--hbone-port=15009",
    ]);
    arguments[7] = "debug,misc:error";
    let translated = translated(&arguments, pod.path(), WAYPOINT_ENV).unwrap();
    assert_eq!((translated.logging.filter.as_deref(), translated.logging.json), (Some("debug"), true));
    let named: Vec<_> =
        ["newFlag", "other", "last"].map(|name| format!("flag --{name} is not known: it has no effect")).into();
    assert_eq!(translated.remarks, named);
    let flags = flags(&translated);
    assert_eq!((flags.concurrency, flags.hbone_port), (3, 15009));
}

#[test]
fn istios_chart_for_ztunnel() {
    let folder = tempfile::tempdir().unwrap();
    let env = [
        ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
        ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
        ("RUST_LOG", "info"),
        ("ISTIO_META_CLUSTER_ID", "west"),
        ("INPOD_ENABLED", "true"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        ("POD_NAME", "ztunnel-x7"),
        ("POD_NAMESPACE", "istio-system"),
        ("NODE_NAME", "ks-b"),
        ("INSTANCE_IP", "fd00:88::7"),
        ("SERVICE_ACCOUNT", "ztunnel"),
        ("ZTUNNEL_WORKER_THREADS", "2"),
        ("NETWORK", "net-1"),
    ];
    let translated = translated(&["proxy", "ztunnel", "--shortcut=off"], folder.path(), &env).unwrap();
    let flags = flags(&translated);
    assert_eq!((flags.role, flags.shortcut, flags.concurrency, flags.drain_seconds), (Role::Node, Switch::Off, 2, 25));
    assert_eq!(
        (flags.cluster_id.as_str(), flags.network.as_str(), flags.node_name.as_str()),
        ("west", "net-1", "ks-b")
    );
    assert_eq!(flags.pods_socket(), Path::new("/var/run/ztunnel/ztunnel.sock"));
    assert_eq!(flags.instance_ip, "fd00:88::7".parse::<IpAddr>().unwrap());
    assert_eq!(flags.node_id(), "ztunnel~fd00:88::7~ztunnel-x7.istio-system~istio-system.svc.cluster.local");
    assert_eq!(flags.admin_addr.unwrap().to_string(), "127.0.0.1:15000");
    assert_eq!(flags.xds_root_ca.unwrap(), folder.path().join("var/run/secrets/istio/root-cert.pem"));
    assert_eq!(flags.metadata.get("CLUSTER_ID"), Some(&json!("west")));
}

#[test]
fn ztunnels_pods_come_from_istio_cni_and_ours_from_the_agent() {
    let folder = tempfile::tempdir().unwrap();
    let from = |arguments: &[&str], env: &[(&str, &str)]| {
        translated(arguments, folder.path(), env).map(|translated| flags(&translated).pods_from)
    };
    let ztunnel = &["proxy", "ztunnel"];
    let zds = |path: &str| Ok(PodsFrom::Zds(path.into()));
    assert_eq!(from(ztunnel, &[("INPOD_UDS", "/cni/z.sock"), ("PROXY_MODE", "shared")]), zds("/cni/z.sock"));
    assert_eq!(from(ztunnel, &[]), Ok(PodsFrom::Agent));
    assert_eq!(from(ztunnel, &[("INPOD_ENABLED", "false")]), Ok(PodsFrom::Agent));
    assert_eq!(from(&["proxy", "ztunnel", "--pods-from=agent"], &[("INPOD_ENABLED", "true")]), Ok(PodsFrom::Agent));
    assert_eq!(from(&["--role=node", "--pods-from=zds:/x"], &[]), zds("/x"));
    assert!(from(ztunnel, &[("PROXY_MODE", "dedicated")]).unwrap_err().contains("PROXY_MODE=dedicated"));
    assert!(from(ztunnel, &[("INPOD_ENABLED", "perhaps")]).unwrap_err().contains("INPOD_ENABLED=perhaps"));
    for wrong in ["zds:", "istio-cni", ""] {
        assert!(wrong.parse::<PodsFrom>().unwrap_err().contains("expected agent"), "{wrong}");
    }
}

#[test]
fn our_own_flags_use_the_pods_files_where_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let plain = ["--role", "waypoint", "--gateway", "edge"];
    let nothing = translated(&plain, folder.path(), &[]).unwrap();
    assert_eq!(nothing.arguments, plain);
    let metadata = flags(&nothing).node_metadata();
    assert_eq!(metadata["LABELS"]["gateway.networking.k8s.io/gateway-name"], "edge");
    assert!(metadata["PROXY_CONFIG"].is_object(), "istioctl proxy-status lists no waypoint without it");

    for path in [path::TOKEN, path::ROOTS] {
        let file = folder.path().join(path.trim_start_matches('/'));
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, "x").unwrap();
    }
    let found = flags(&translated(&plain, folder.path(), &[("CA_ADDR", "ca:1")]).unwrap());
    assert!(found.token_path.is_some() && found.xds_root_ca.is_some() && found.mesh_roots == found.xds_root_ca);
    assert_eq!((found.revocations, found.admin_addr, found.ca_address.as_deref()), (None, None, Some("https://ca:1")));

    // Another CA's roots say nothing about workloads.
    let other = flags(&translated(&plain, folder.path(), &[("XDS_ROOT_CA", "/other.pem")]).unwrap());
    assert_eq!((other.xds_root_ca, other.mesh_roots), (Some("/other.pem".into()), None));
}

#[test]
fn mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |arguments: &[&str], env: &[(&str, &str)]| translated(arguments, folder.path(), env).unwrap_err();
    assert!(fails(&["proxy", "router"], &[]).contains("router"));
    assert!(fails(&["proxy", "--domain", "x"], &[]).contains("sidecar"));
    assert!(fails(WAYPOINT, &[("PROXY_CONFIG", "{")]).contains("PROXY_CONFIG"));
    assert!(fails(WAYPOINT, &[("ISTIO_CPU_LIMIT", "many")]).contains("ISTIO_CPU_LIMIT=many"));
    assert!(fails(&["proxy", "ztunnel"], &[("SECRET_TTL", "1 day")]).contains("SECRET_TTL=1 day"));
    let unlabelled = translated(WAYPOINT, folder.path(), &[]).unwrap();
    assert!(unlabelled.remarks[0].contains("gateway.networking.k8s.io/gateway-name"), "{:?}", unlabelled.remarks);
}

#[test]
fn durations_of_go() {
    let seconds = |text: &str| go_duration(text).map(|duration| duration.as_secs_f64());
    assert_eq!(seconds("24h0m0s"), Some(86400.0));
    assert_eq!((seconds("1.5s"), seconds("300ms"), seconds("2m5s")), (Some(1.5), Some(0.3), Some(125.0)));
    assert!(seconds("").is_none() && seconds("5").is_none() && seconds("s").is_none() && seconds("5 s").is_none());
}
