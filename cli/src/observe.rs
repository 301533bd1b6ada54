//! `strata observe`: one stream from the agents' flows and the proxies' connections and requests.
mod record;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::ValueEnum;
use futures::StreamExt;
use serde_json::Value;
use strata_runtime::client;
use tokio::sync::mpsc;

use crate::output::{self, Format};
use crate::parts::{self, Kind, Part};
use record::Record;

/// Records on the way from the processes to the terminal.
const QUEUE: usize = 1024;

/// Connections and requests as they are decided.
#[derive(clap::Args)]
#[command(after_help = "\
The layers, in the order in which they decide:
  network   the kernel: service addresses, NetworkPolicy, capture (steered) and short-cuts (direct)
  mesh      the node proxies: mutual TLS, identities, L4 authorization
  request   the waypoints: routes, retries, JWT, L7 authorization
Examples:
  strata observe                                    what happened lately
  strata observe --follow --pod shop/checkout-1     one pod, both directions
  strata observe --follow --layer request           requests only
  strata observe -o json | jq 'select(.verdict == \"dropped\")'")]
pub(crate) struct Observe {
    /// Go on with what happens from now
    #[arg(short, long)]
    follow: bool,
    /// Only this layer; repeatable
    #[arg(short, long, value_enum)]
    layer: Vec<Layer>,
    /// Only what this pod sent or received, as NAMESPACE/NAME
    #[arg(short, long, value_parser = pod)]
    pod: Option<(String, String)>,
    /// Only refusals: dropped packets and connections, answers of 400 and above
    #[arg(long)]
    refused: bool,
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Layer {
    Network,
    Mesh,
    Request,
}

impl Layer {
    fn name(self) -> &'static str {
        match self {
            Layer::Network => "network",
            Layer::Mesh => "mesh",
            Layer::Request => "request",
        }
    }
}

fn pod(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("is written NAMESPACE/NAME, such as shop/checkout-1".to_owned()),
    }
}

/// Who has an address, as the processes' statuses say.
#[derive(Debug, Default, Clone)]
struct Directory {
    /// Address to (namespace, pod).
    pods: BTreeMap<String, (String, String)>,
    /// (namespace, pod) to SPIFFE identity.
    identities: BTreeMap<(String, String), String>,
}

impl Observe {
    pub(crate) async fn run(self, run_dir: Option<&Path>) -> Result<ExitCode> {
        let parts = parts::find(run_dir)?;
        let directory = Directory::read(&parts).await;
        let (sender, mut records) = mpsc::channel(QUEUE);
        let mut readers = 0;
        for part in parts.into_iter().filter(|part| part.kind != Kind::Control) {
            let path = if part.kind == Kind::Agent { "/flows" } else { "/requests" };
            let path = if self.follow { format!("{path}?follow=true") } else { path.to_owned() };
            readers += 1;
            strata_runtime::task::spawn("observe", read(part, path, directory.clone(), sender.clone()));
        }
        drop(sender);
        let mut printer = Printer { format: self.output, header: false };
        if self.follow {
            while let Some(record) = records.recv().await {
                if self.wants(&record) {
                    printer.print(&record)?;
                }
            }
            eprintln!("strata: all {readers} streams ended: the mesh was stopped");
            return Ok(ExitCode::FAILURE);
        }
        let mut all = Vec::new();
        while let Some(record) = records.recv().await {
            all.push(record);
        }
        all.sort_by(|a: &Record, b| a.time.cmp(&b.time));
        for record in all.iter().filter(|record| self.wants(record)) {
            printer.print(record)?;
        }
        if !printer.header && self.output == Format::Table {
            eprintln!("strata: nothing to show yet; make some traffic, or use --follow");
        }
        Ok(ExitCode::SUCCESS)
    }

    fn wants(&self, record: &Record) -> bool {
        let layer = self.layer.is_empty() || self.layer.iter().any(|layer| layer.name() == record.layer);
        let pod = self.pod.as_ref().is_none_or(|(namespace, name)| {
            [&record.source, &record.destination].iter().any(|end| end.namespace == *namespace && end.pod == *name)
        });
        layer && pod && (!self.refused || record.refused())
    }
}

/// Sends what one process tells until it ends or nobody listens.
async fn read(part: Part, path: String, directory: Directory, sender: mpsc::Sender<Record>) {
    let lines = match client::lines(&part.socket, &path).await {
        Ok(lines) => lines,
        Err(error) => {
            eprintln!("strata: {}: {error}", part.place());
            return;
        }
    };
    let mut lines = std::pin::pin!(lines);
    while let Some(Ok(line)) = lines.next().await {
        let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
        if let Some(lost) = event["lost"].as_u64() {
            eprintln!("strata: {}: {lost} events were too many and are not shown", part.place());
            continue;
        }
        let mut record = Record::of(&event, &part.place());
        directory.complete(&mut record);
        if sender.send(record).await.is_err() {
            return;
        }
    }
}

impl Directory {
    async fn read(parts: &[Part]) -> Directory {
        let mut directory = Directory::default();
        for part in parts.iter().filter(|part| part.kind != Kind::Control) {
            let Ok(status) = client::get_json(&part.socket, "/status").await else { continue };
            for pod in status["pods"].as_array().into_iter().flatten() {
                let Some(key) = pod["uid"].as_str().and_then(of_uid) else { continue };
                for ip in pod["ips"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                    directory.pods.insert(ip.to_owned(), key.clone());
                }
                // An agent's identities are numbers, a proxy's SPIFFE.
                if let Some(identity) = pod["identity"].as_str() {
                    directory.identities.insert(key, identity.to_owned());
                }
            }
        }
        directory
    }

    /// Joins what one layer did not know from the others: pods of addresses, identities of pods.
    fn complete(&self, record: &mut Record) {
        for end in [&mut record.source, &mut record.destination] {
            if let Some((namespace, pod)) = self.pods.get(&end.ip) {
                (end.namespace, end.pod) = (namespace.clone(), pod.clone());
            }
            if end.identity.is_none() {
                let key = (end.namespace.clone(), end.pod.clone());
                end.identity = self.identities.get(&key).cloned();
            }
        }
    }
}

/// `Kubernetes//Pod/NAMESPACE/NAME` as Istio writes it.
fn of_uid(uid: &str) -> Option<(String, String)> {
    let mut words = uid.rsplit('/');
    let (name, namespace) = (words.next()?, words.next()?);
    Some((namespace.to_owned(), name.to_owned()))
}

struct Printer {
    format: Format,
    header: bool,
}

impl Printer {
    fn print(&mut self, record: &Record) -> Result<()> {
        if self.format != Format::Table {
            return output::record(self.format, record);
        }
        if !self.header {
            self.header = true;
            output::line(&Record::header())?;
        }
        output::line(&record.row())
    }
}

#[cfg(test)]
mod tests;
