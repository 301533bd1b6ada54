//! `strata status`.
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use comfy_table::{Cell, Color};
use serde::Serialize;
use serde_json::Value;
use strata_runtime::client;

use crate::output::{self, Format};
use crate::parts::{self, Kind, Part};

/// Exit code 1: a part is not healthy.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  strata status
  strata status -o json | jq '.parts[] | select(.health != \"ready\")'
  strata --run-dir /run/strata status -o yaml")]
pub(crate) struct Status {
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

/// Everything, as `-o json` prints it.
#[derive(Debug, Serialize)]
struct View {
    healthy: bool,
    parts: Vec<PartView>,
    pods: Vec<PodView>,
    /// Mistakes in the YAML and refusals of configuration, each once.
    faults: Vec<String>,
}

#[derive(Debug, Serialize)]
struct PartView {
    part: String,
    node: String,
    /// `ready`, `not ready` or `away`.
    health: &'static str,
    detail: String,
    socket: String,
    /// The process's own `/status`.
    status: Value,
}

#[derive(Debug, Default, Serialize)]
struct PodView {
    namespace: String,
    name: String,
    node: String,
    ips: Vec<String>,
    /// `enrolled`, or the state on the way there; `-` outside the mesh.
    mesh: String,
    identity: Option<String>,
}

impl Status {
    pub(crate) async fn run(self, run_dir: Option<&Path>) -> Result<ExitCode> {
        let found = parts::find(run_dir)?;
        let mut views = Vec::new();
        for part in &found {
            views.push(ask(part).await);
        }
        let view = View {
            healthy: views.iter().all(|part| part.health == "ready"),
            pods: pods(&views),
            faults: faults(&views),
            parts: views,
        };
        match self.output {
            Format::Table => print(&view)?,
            format => output::document(format, &view)?,
        }
        Ok(if view.healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

async fn ask(part: &Part) -> PartView {
    let mut view = PartView {
        part: part.kind.name().to_owned(),
        node: part.place(),
        health: "away",
        detail: String::new(),
        socket: part.socket.display().to_string(),
        status: Value::Null,
    };
    match client::get_json(&part.socket, "/status").await {
        Err(error) => view.detail = error.to_string(),
        Ok(status) => {
            if let Some(role) = status["role"].as_str() {
                view.part = format!("{} ({role})", part.kind.name());
            }
            let ready = client::get_text(&part.socket, "/healthz/ready").await;
            // Readiness is about starting; an agent that fell behind says so in its status.
            let problem = status["problem"].as_str().or(status["edge"]["problem"].as_str()).map(str::to_owned);
            view.health = if ready.is_ok() && problem.is_none() { "ready" } else { "not ready" };
            let waiting = ready.err().map(|error| error.to_string());
            view.detail = problem.or(waiting).unwrap_or_else(|| detail(part.kind, &status));
            view.status = status;
        }
    }
    view
}

/// What is worth a glance when all is well.
fn detail(kind: Kind, status: &Value) -> String {
    let count = |key: &str| match &status[key] {
        Value::Array(items) => items.len() as u64,
        Value::Object(items) => items.len() as u64,
        number => number.as_u64().unwrap_or(0),
    };
    match kind {
        Kind::Control => {
            let objects: u64 =
                status["objects"].as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
            format!("{objects} objects, {} clients, {} refusals", count("clients"), count("nacks"))
        }
        Kind::Agent => {
            let at = |key: &str| status["statistics"][key].as_u64().unwrap_or(0);
            let enrolled = status["pods"].as_array().into_iter().flatten();
            let enrolled = enrolled.filter(|pod| pod["mesh"]["enrolled"] == true).count();
            let proxy = if status["proxy"]["connected"] == true { "proxy connected" } else { "no proxy" };
            format!(
                "{} pods ({enrolled} enrolled), {proxy}; connects: {} translated, {} steered, {} direct, {} denied; {} packets dropped",
                count("pods"),
                at("connect_translated"),
                at("connect_steered"),
                at("connect_direct"),
                at("connect_denied"),
                at("packets_dropped")
            )
        }
        Kind::Proxy => {
            let names = ["workloads", "services", "policies", "listeners", "routes", "clusters"];
            let known = names.iter().filter(|key| !status[**key].is_null());
            let mut words: Vec<String> = known.map(|key| format!("{} {key}", count(key))).collect();
            let certificates = status["certificates"].as_array().map(Vec::as_slice).unwrap_or_default();
            let valid = certificates.iter().filter(|c| c["state"] == "Available").count();
            if !certificates.is_empty() {
                words.push(format!("{valid} of {} certificates", certificates.len()));
            }
            if !status["short_cuts"].is_null() {
                words.push(format!("{} short-cuts", count("short_cuts")));
            }
            words.join(", ")
        }
    }
}

/// The agents know the pods, the node proxies who they are.
fn pods(parts: &[PartView]) -> Vec<PodView> {
    let identities: BTreeMap<&str, &str> = parts
        .iter()
        .filter(|part| part.status["role"] == "node")
        .flat_map(|part| part.status["pods"].as_array().into_iter().flatten())
        .filter_map(|pod| Some((pod["uid"].as_str()?, pod["identity"].as_str()?)))
        .collect();
    let mut pods = Vec::new();
    for part in parts.iter().filter(|part| part.part == Kind::Agent.name()) {
        for pod in part.status["pods"].as_array().into_iter().flatten() {
            let text = |key: &str| pod[key].as_str().unwrap_or_default().to_owned();
            let ips = pod["ips"].as_array().into_iter().flatten();
            let state = pod["mesh"]["state"].as_str().unwrap_or("-");
            let wanted = pod["mesh"]["wanted"] == true || pod["mesh"]["enrolled"] == true;
            pods.push(PodView {
                namespace: text("namespace"),
                name: text("name"),
                node: part.status["node"].as_str().unwrap_or(&part.node).to_owned(),
                ips: ips.filter_map(|ip| ip.as_str().map(str::to_owned)).collect(),
                mesh: if wanted { state.to_owned() } else { "-".to_owned() },
                identity: pod["uid"].as_str().and_then(|uid| identities.get(uid)).map(|id| (*id).to_owned()),
            });
        }
    }
    pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    pods
}

fn faults(parts: &[PartView]) -> Vec<String> {
    let mut all = Vec::new();
    for part in parts {
        let lists = [&part.status["faults"], &part.status["nacks"], &part.status["source"]["faults"]];
        for fault in lists.into_iter().filter_map(Value::as_array).flatten() {
            let text = fault.as_str().map_or_else(|| fault.to_string(), str::to_owned);
            if !all.contains(&text) {
                all.push(text);
            }
        }
    }
    all
}

fn print(view: &View) -> Result<()> {
    let mut table = output::table(&["PART", "WHERE", "HEALTH", "DETAIL"]);
    for part in &view.parts {
        let colour = if part.health == "ready" { Color::Green } else { Color::Red };
        table.add_row(vec![
            Cell::new(&part.part),
            Cell::new(&part.node),
            Cell::new(part.health).fg(colour),
            Cell::new(&part.detail),
        ]);
    }
    output::line(&table.trim_fmt())?;
    let mut table = output::table(&["POD", "NODE", "ADDRESSES", "MESH", "IDENTITY"]);
    for pod in &view.pods {
        table.add_row(vec![
            Cell::new(format!("{}/{}", pod.namespace, pod.name)),
            Cell::new(&pod.node),
            Cell::new(pod.ips.join(" ")),
            Cell::new(&pod.mesh),
            Cell::new(pod.identity.as_deref().unwrap_or("-")),
        ]);
    }
    output::line(&format!("\n{}", table.trim_fmt()))?;
    if !view.faults.is_empty() {
        output::line("\nWhat is wrong with the configuration (the last good one stays in force):")?;
        for fault in &view.faults {
            output::line(&format!("  {fault}"))?;
        }
    }
    Ok(())
}
