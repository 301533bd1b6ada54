//! Load from wrk, cost from the kernel's accounting of the measured process.
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// One measured run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sample {
    pub(crate) requests_per_second: f64,
    /// User and system time of the proxy per request, in microseconds.
    pub(crate) cpu_us: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
}

/// User and system time the process and its threads have used so far (proc(5), fields 14 and 15).
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("{path}: is the process gone?"))?;
    // The command name may hold blanks; what follows its closing bracket does not.
    let fields: Vec<&str> = text.rsplit_once(')').context("no command in stat")?.1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    // USER_HZ is 100 on every Linux architecture Rust supports.
    Ok(Duration::from_millis(ticks * 10))
}

/// Processes of a service: those given and their children (nginx's and HAProxy's workers).
pub(crate) fn family(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let mut all = vec![pid];
    for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
        all.extend(family(child));
    }
    all
}

/// Runs wrk against `url` and charges `pid`'s family for it.
pub(crate) fn wrk(url: &str, headers: &[&str], pid: u32, connections: u32, seconds: u32) -> Result<Sample> {
    let total = |pids: &[u32]| pids.iter().map(|&pid| cpu_time(pid)).sum::<Result<Duration>>();
    let pids = family(pid);
    let before = total(&pids)?;
    let output = Command::new("wrk")
        .args(["-t1", &format!("-c{connections}"), &format!("-d{seconds}s"), "--latency"])
        .args(headers.iter().flat_map(|header| ["-H", header]))
        .arg(url)
        .stderr(Stdio::inherit())
        .output()
        .context("wrk (make setup installs it with the bench peers)")?;
    let cpu = total(&pids)? - before;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "wrk {url}: {text}");
    if let Some(errors) = text.lines().find(|line| line.contains("Non-2xx") || line.contains("Socket errors")) {
        bail!("wrk {url}: {}", errors.trim());
    }
    let requests: f64 = text
        .lines()
        .find_map(|line| line.trim().split_once(" requests in"))
        .context("wrk printed no count")?
        .0
        .parse()?;
    Ok(Sample {
        requests_per_second: requests / f64::from(seconds),
        cpu_us: cpu.as_secs_f64() * 1e6 / requests,
        p50_ms: latency(&text, "50%")?,
        p99_ms: latency(&text, "99%")?,
    })
}

fn latency(text: &str, percentile: &str) -> Result<f64> {
    let value = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(percentile))
        .with_context(|| format!("wrk printed no {percentile} latency"))?
        .trim();
    let split = value.find(|c: char| c.is_ascii_alphabetic()).context("latency without a unit")?;
    let scale = match &value[split..] {
        "us" => 1e-3,
        "ms" => 1.0,
        "s" => 1e3,
        unit => bail!("unknown unit {unit}"),
    };
    Ok(value[..split].parse::<f64>()? * scale)
}

/// The middle one by CPU; runs of the variants are interleaved by the caller.
pub(crate) fn median(mut samples: Vec<Sample>) -> Result<Sample> {
    samples.sort_by(|a, b| a.cpu_us.total_cmp(&b.cpu_us));
    samples.get(samples.len() / 2).copied().context("nothing was measured")
}

/// Asks until there is an answer, for at most 5 s.
pub(crate) fn wait_for<T>(what: &str, ask: impl Fn() -> Option<T>) -> Result<T> {
    for _ in 0..200 {
        if let Some(found) = ask() {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    bail!("waited 5 s for {what}")
}

/// Where an executable is, or what to do about it.
pub(crate) fn require(program: &Path) -> Result<()> {
    ensure!(program.exists(), "{} is missing: run `make bench`, which installs the peers", program.display());
    Ok(())
}
