//! Scene 10: what `strata observe` and `strata status` show of all this.
use std::time::Duration;

use serde_json::Value;

use super::Scene;
use super::stage::{PAYMENTS, Stage};
use crate::{LabError, Result};

pub(super) const SCENE: Scene = Scene {
    number: 10,
    title: "Seen",
    expect: "strata observe shows connections and requests of both layers with workloads, identity, verdict, what decided, \
             status and latency; strata status shows the health of every part",
    play,
};

fn play(stage: &mut Stage<'_>) -> Result<()> {
    stage.governed()?;
    stage.place("header")?;
    stage.place("policy")?;
    stage.wait("the policy", |stage| Ok(!stage.connect("frontend-1", &format!("{PAYMENTS}:80"))?.ok))?;
    stage.wait("the route", |stage| {
        Ok(stage.call("checkout-1", &format!("http://{PAYMENTS}/seen -H x-user:jason --count 5"))?.version("v2") == 5)
    })?;
    stage.call("checkout-1", &format!("http://{PAYMENTS}/seen -H x-user:jason --count 5 --new-connection"))?;
    stage.connect("frontend-1", &format!("{PAYMENTS}:80"))?;
    // The proxies tell of a connection when it has ended.
    std::thread::sleep(Duration::from_millis(500));
    observe(stage)?;
    status(stage)
}

/// Runs the CLI as a user would, on this mesh.
fn strata(stage: &Stage<'_>, arguments: &[&str]) -> Result<String> {
    let root = stage.lab()?.root().display().to_string();
    let program = stage.lab()?.program("strata");
    let output = std::process::Command::new(&program).args(["--run-dir", &root]).args(arguments).output();
    let output = output.map_err(|error| LabError::Other(format!("{}: {error}", program.display())))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.is_empty() {
        let errors = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(LabError::Command { command: format!("strata {}", arguments.join(" ")), output: errors });
    }
    Ok(text)
}

fn observe(stage: &mut Stage<'_>) -> Result<()> {
    stage.type_this("strata observe");
    let text = strata(stage, &["observe", "-o", "json"])?;
    let records: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let checkout = "spiffe://cluster.local/ns/shop/sa/checkout";
    let of_layer = |layer: &'static str| records.iter().rev().filter(move |record| record["layer"] == layer);

    let steered =
        of_layer("network").find(|r| r["source"]["pod"] == "checkout-1" && r["source"]["identity"] == checkout);
    found(stage, "network: a connect of checkout, joined with its identity", steered);
    let denied = of_layer("network").find(|r| {
        r["source"]["pod"] == "frontend-1"
            && r["verdict"] == "dropped"
            && r["decided_by"].as_str().is_some_and(|by| by.contains("payments"))
    });
    found(stage, "network: the frontend's refused connect with the policy's name", denied);
    let mesh = of_layer("mesh").find(|r| {
        r["source"]["identity"] == checkout
            && r["verdict"] == "forwarded"
            && r["security"] == "mutual_tls"
            && !r["latency_ms"].is_null()
    });
    found(stage, "mesh: a connection over mutual TLS with the identity", mesh);
    let request = of_layer("request").find(|r| {
        r["path"] == "/seen"
            && r["status"] == 200
            && !r["latency_ms"].is_null()
            && r["source"]["identity"] == checkout
            && r["decided_by"].as_str().is_some_and(|by| by.contains("jason"))
    });
    found(stage, "request: GET /seen with route, status, latency and the caller's identity", request);
    let table = strata(stage, &["observe", "--pod", "shop/checkout-1"])?;
    let lines: Vec<&str> = table.lines().collect();
    for line in lines.iter().take(1).chain(lines.iter().rev().take(4).rev()) {
        stage.measured((*line).to_owned());
    }
    Ok(())
}

fn found(stage: &mut Stage<'_>, what: &str, record: Option<&Value>) {
    let detail = record.map_or_else(|| "no such record".to_owned(), Value::to_string);
    stage.check(what, record.is_some(), detail);
}

fn status(stage: &mut Stage<'_>) -> Result<()> {
    stage.type_this("strata status");
    let text = strata(stage, &["status", "-o", "json"])?;
    let status: Value = serde_json::from_str(&text).map_err(LabError::other)?;
    let parts = status["parts"].as_array().cloned().unwrap_or_default();
    for part in &parts {
        let text = |key: &str| part[key].as_str().unwrap_or_default().to_owned();
        stage.measured(format!("{} {}: {}, {}", text("part"), text("node"), text("health"), text("detail")));
    }
    let count = |name: &str| parts.iter().filter(|part| part["part"] == name).count();
    let whole = count("strata-control") == 1
        && count("strata-agent") == 2
        && count("strata-proxy (node)") == 2
        && count("strata-proxy (waypoint)") == 1;
    stage.check(
        "status knows control plane, agents, node proxies and waypoint",
        whole,
        format!("{} parts", parts.len()),
    );
    stage.check("and all are healthy", status["healthy"] == true, format!("healthy: {}", status["healthy"]));
    let pods = status["pods"].as_array().cloned().unwrap_or_default();
    let enrolled = pods.iter().filter(|pod| pod["mesh"] == "enrolled" && pod["identity"].is_string()).count();
    stage.check(
        "and every pod of the shop, with its identity",
        enrolled == 5,
        format!("{enrolled} enrolled pods of {}", pods.len()),
    );
    Ok(())
}
