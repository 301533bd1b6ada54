//! The tools people have: istioctl, kubectl, Prometheus' scrapes.
use std::process::Command;
use std::time::Instant;

use strata_lab::Result;

use super::Own;
use super::act::Act;
use crate::{SYSTEM, output};

pub(super) const SCENE: Own = Own {
    number: 12,
    title: "istioctl, status, metrics and logs as on any Istio",
    expect: "ztunnel-config, proxy-config, proxy-status, analyze and waypoint list answer for our processes; the API's status \
             is true; Istio's metric names are scraped; the processes' logs are readable",
    play,
};

fn play(act: &mut Act<'_>) -> Result<()> {
    let began = Instant::now();
    act.governed()?;
    act.place("scenes/canary-90-10")?;
    act.call("shop/checkout-1", "http://payments.shop/ --count 50")?;
    ztunnel_config(act)?;
    proxy_config(act)?;
    status(act)?;
    metrics(act)?;
    logs(act, began.elapsed().as_secs())
}

fn istioctl(act: &mut Act<'_>, arguments: &str) -> Result<String> {
    act.type_this(format!("istioctl {arguments}"));
    let mut command = Command::new(std::env::var("ISTIOCTL").unwrap_or_else(|_| "istioctl".into()));
    command.args(arguments.split_whitespace());
    output(command, &format!("istioctl {arguments}"), None)
}

/// Runs istioctl and wants these words in its output.
fn shows(act: &mut Act<'_>, arguments: &str, words: &[&str]) -> Result<()> {
    let answer = istioctl(act, arguments);
    let missing: Vec<&str> = match &answer {
        Ok(text) => words.iter().filter(|word| !text.contains(**word)).copied().collect(),
        Err(_) => words.to_vec(),
    };
    let detail = match &answer {
        Ok(text) if missing.is_empty() => format!("{} lines", text.lines().count()),
        Ok(text) => format!("without {missing:?}: {text}"),
        Err(error) => error.to_string(),
    };
    act.check(&format!("istioctl {arguments}"), answer.is_ok() && missing.is_empty(), detail);
    Ok(())
}

fn ztunnel_config(act: &mut Act<'_>) -> Result<()> {
    let node = act.cluster.part(SYSTEM, "app=ztunnel", Some("node-a"))?;
    let on = format!("{node}.{SYSTEM}");
    shows(act, &format!("ztunnel-config workloads {on}"), &["checkout-1", "payments-v1-a", "HBONE", "waypoint"])?;
    shows(act, &format!("ztunnel-config services {on}"), &["payments", "10.96.1.20"])?;
    shows(
        act,
        &format!("ztunnel-config certificates {on}"),
        &["spiffe://cluster.local/ns/shop/sa/checkout", "Leaf", "Root"],
    )?;
    shows(act, &format!("ztunnel-config policies {on}"), &[])?;
    shows(act, &format!("ztunnel-config connections {on}"), &[])?;
    shows(act, &format!("ztunnel-config all {on}"), &["checkout-1"])
}

fn proxy_config(act: &mut Act<'_>) -> Result<()> {
    let waypoint = act.cluster.part("shop", "gateway.networking.k8s.io/gateway-name=waypoint", None)?;
    let on = format!("{waypoint}.shop");
    shows(act, &format!("proxy-config clusters {on}"), &["payments.shop.svc.cluster.local", "v1", "v2"])?;
    shows(act, &format!("proxy-config listeners {on}"), &["15008"])?;
    shows(act, &format!("proxy-config endpoints {on}"), &["payments"])?;
    shows(act, &format!("proxy-config routes {on}"), &[])?;
    shows(act, &format!("proxy-config secret {on}"), &["default", "ROOTCA", "ACTIVE"])?;
    shows(act, &format!("proxy-config bootstrap {on}"), &["waypoint~"])?;
    shows(act, "proxy-status", &["ztunnel-", "waypoint-"])
}

fn status(act: &mut Act<'_>) -> Result<()> {
    // The sample's route leaves the port open on purpose, which the analyzer takes for an error.
    shows(act, "analyze -n shop --suppress IST0112=*", &[])?;
    shows(act, "waypoint list -n shop", &["waypoint", "True"])?;
    let gateway = act.kubectl().get("gateway -n shop waypoint")?;
    let conditions = gateway["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let programmed = conditions.iter().any(|c| c["type"] == "Programmed" && c["status"] == "True");
    act.type_this("kubectl get gateway,httproute,virtualservice -n shop");
    act.check("the Gateway says Programmed", programmed, gateway["status"].to_string());
    Ok(())
}

fn metrics(act: &mut Act<'_>) -> Result<()> {
    // As Prometheus does by the pods' prometheus.io annotations: from another pod, on the port they name.
    let mut scrape = |what: &str, namespace: &str, label: &str, wanted: &[&str]| -> Result<()> {
        let pod = act.cluster.part(namespace, label, None)?;
        let object = act.kubectl().get(&format!("pod -n {namespace} {pod}"))?;
        let notes = &object["metadata"]["annotations"];
        let path = notes["prometheus.io/path"].as_str().unwrap_or("/metrics").to_owned();
        let port = notes["prometheus.io/port"].as_str().unwrap_or_default().to_owned();
        let ip = object["status"]["podIP"].as_str().unwrap_or_default().to_owned();
        let text = act.kubectl().exec(
            "outside",
            "gateway-1",
            &["timeout", "5", "wget", "-qO-", &format!("http://{ip}:{port}{path}")],
        )?;
        let missing: Vec<&&str> = wanted.iter().filter(|name| !text.contains(**name)).collect();
        let detail = format!("{what}: {} lines, missing {missing:?}", text.lines().count());
        act.check_measured(&format!("{what} is scraped with Istio's names"), missing.is_empty(), detail);
        Ok(())
    };
    scrape(
        "the node proxy",
        SYSTEM,
        "app=ztunnel",
        &["istio_tcp_connections_opened_total", "istio_tcp_received_bytes_total", "istio_build"],
    )?;
    scrape(
        "the waypoint",
        "shop",
        "gateway.networking.k8s.io/gateway-name=waypoint",
        &[
            "istio_requests_total",
            "istio_request_duration_milliseconds_bucket",
            "destination_service_name=\"payments\"",
        ],
    )
}

/// Since the scene began: what others refused before is in the logs, too.
fn logs(act: &mut Act<'_>, seconds: u64) -> Result<()> {
    for (what, namespace, label) in [
        ("the agent", SYSTEM, "app.kubernetes.io/name=strata-agent"),
        ("the node proxy", SYSTEM, "app=ztunnel"),
        ("the waypoint", "shop", "gateway.networking.k8s.io/gateway-name=waypoint"),
    ] {
        let text = act.kubectl().words(&format!("logs -n {namespace} -l {label} --tail=-1 --since={seconds}s"))?;
        let errors: Vec<&str> =
            text.lines().filter(|line| line.contains("ERROR") || line.contains("panicked")).collect();
        act.check(
            &format!("{what}'s log has lines and no error"),
            !text.is_empty() && errors.is_empty(),
            errors.join("\n"),
        );
    }
    Ok(())
}
