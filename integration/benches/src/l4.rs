//! Round trips and throughput between two pods: plain veth, DIRECT, through the node proxy on one node, and HBONE
//! between nodes, in one run on one lab.
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use comfy_table::Table;
use serde_json::Value;
use strata_lab::{Lab, Options};

const CLIENT: &str = "shop/checkout-1";
const PATIENCE: Duration = Duration::from_secs(10);

/// What was measured on one path, once.
#[derive(Debug, Clone, Copy)]
struct Sample {
    p50_us: f64,
    gbit: f64,
}

/// A path between two pods and what it is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    VethOneNode,
    Direct,
    ProxyOneNode,
    PlainTwoNodes,
    Hbone,
}

impl Way {
    const ALL: [Way; 5] = [Way::VethOneNode, Way::Direct, Way::ProxyOneNode, Way::PlainTwoNodes, Way::Hbone];

    fn name(self) -> &'static str {
        match self {
            Way::VethOneNode => "one node, plain veth",
            Way::Direct => "one node, DIRECT",
            Way::ProxyOneNode => "one node, node proxy",
            Way::PlainTwoNodes => "two nodes, plain",
            Way::Hbone => "two nodes, HBONE (mTLS, two proxies)",
        }
    }

    fn yardstick(self) -> Way {
        match self {
            Way::VethOneNode | Way::Direct | Way::ProxyOneNode => Way::VethOneNode,
            Way::PlainTwoNodes | Way::Hbone => Way::PlainTwoNodes,
        }
    }
}

/// Runs everything `runs` times, the ways interleaved, and prints medians as ratios.
pub(crate) fn run(runs: u32) -> Result<()> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut options = Options::new(format!("bench{}", std::process::id()), repository.join("manifests/samples/shop"));
    options.copy = true;
    let lab = Lab::start(options)?;
    let scenes = repository.join("manifests/samples/scenes");
    let here = format!("{}:9090", address(&lab, "payments-v1-a")?);
    let there = format!("{}:9090", address(&lab, "payments-v1-b")?);
    let mut samples: BTreeMap<Way, Vec<Sample>> = BTreeMap::new();
    let mut add = |way: Way, sample: Sample| samples.entry(way).or_default().push(sample);
    for run in 1..=runs {
        eprintln!("run {run}/{runs}");
        lab.reset()?;
        enrolled(&lab, false)?;
        add(Way::VethOneNode, measure(&lab, &here)?);
        add(Way::PlainTwoNodes, measure(&lab, &there)?);
        lab.apply(&scenes.join("ambient.yaml"))?;
        enrolled(&lab, true)?;
        short_cut(&lab, &here, true)?;
        add(Way::Direct, measure(&lab, &here)?);
        add(Way::Hbone, measure(&lab, &there)?);
        // A waypoint in front of the service ends the short-cut; the pod's own address still means the pod.
        lab.apply(&scenes.join("waypoint.yaml"))?;
        short_cut(&lab, &here, false)?;
        add(Way::ProxyOneNode, measure(&lab, &here)?);
    }
    print(&samples)
}

fn address(lab: &Lab, pod: &str) -> Result<String> {
    let ips = lab.pod_ips("shop", pod)?;
    Ok(ips.iter().find(|ip| ip.is_ipv4()).context("a pod without IPv4 address")?.to_string())
}

fn measure(lab: &Lab, target: &str) -> Result<Sample> {
    let rr: Value = lab.client(CLIENT, &["rr", target, "--count", "5000", "--size", "128"])?;
    let bulk: Value = lab.client(CLIENT, &["bulk", target, "--duration", "2s"])?;
    let p50 = rr["latency_ms"]["p50"].as_f64().context("rr printed no median")?;
    Ok(Sample { p50_us: p50 * 1e3, gbit: bulk["gbit_per_second"].as_f64().context("bulk printed no rate")? })
}

fn enrolled(lab: &Lab, wanted: bool) -> Result<()> {
    let settled = || -> Option<bool> {
        let status = lab.admin("agent-node-a", "/status").ok()?;
        let pods = status["pods"].as_array()?.clone();
        let other = lab.admin("agent-node-b", "/status").ok()?;
        let mut shop = pods.iter().chain(other["pods"].as_array()?).filter(|pod| {
            pod["namespace"] == "shop" && !pod["name"].as_str().unwrap_or_default().starts_with("waypoint")
        });
        Some(shop.all(|pod| pod["mesh"]["enrolled"] == wanted))
    };
    lab.wait_until("enrolment to settle", PATIENCE, || settled() == Some(true))?;
    Ok(())
}

/// Waits until the client has (or no longer has) a short-cut to the target.
fn short_cut(lab: &Lab, target: &str, wanted: bool) -> Result<()> {
    let granted = || -> Option<bool> {
        if wanted {
            lab.connect(CLIENT, &[target, "--say", "WHO"]).ok()?;
        }
        let dump = lab.admin("agent-node-a", "/config_dump").ok()?;
        let to = |grant: &Value| format!("{}:{}", grant["dst"].as_str().unwrap_or_default(), grant["port"]);
        Some(dump["grants"].as_array()?.iter().any(|grant| grant["in_force"] == true && to(grant) == target))
    };
    lab.wait_until("the short-cut", PATIENCE, || granted() == Some(wanted))?;
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(samples: &BTreeMap<Way, Vec<Sample>>) -> Result<()> {
    let of = |way: Way| -> Result<Sample> {
        let all = samples.get(&way).context("a way was not measured")?;
        ensure!(!all.is_empty(), "nothing was measured");
        let (p50_us, gbit) =
            (median(all.iter().map(|sample| sample.p50_us)), median(all.iter().map(|sample| sample.gbit)));
        Ok(Sample { p50_us, gbit })
    };
    let mut table = Table::new();
    table.set_header(["path", "128 B round trip, us", "/ plain", "throughput, Gbit/s", "/ plain"]);
    for way in Way::ALL {
        let (sample, plain) = (of(way)?, of(way.yardstick())?);
        table.add_row([
            way.name().to_owned(),
            format!("{:.1}", sample.p50_us),
            format!("{:.2}", sample.p50_us / plain.p50_us),
            format!("{:.1}", sample.gbit),
            format!("{:.2}", sample.gbit / plain.gbit),
        ]);
    }
    println!("{table}");
    Ok(())
}
