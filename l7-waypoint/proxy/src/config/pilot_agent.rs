//! The place of Istio's own processes: their command lines and environment as our flags.
//!
//! istiod starts a waypoint as `proxy waypoint --domain …` (pilot-agent's flags, `files/waypoint.yaml` of its chart),
//! Istio's chart a node proxy as `proxy ztunnel`; both get the rest by environment and files. Here all of that becomes
//! arguments of [`Flags`], so that there is one way to be configured. What is given on the command line wins.
use std::collections::BTreeMap;
use std::time::Duration;

use clap::CommandFactory;
use serde_json::{Map, Value};
use strata_runtime::logging;

use super::environment::{Environment, path};
use super::{Flags, metadata};

/// The admin interface of Envoy and ztunnel; istioctl reaches it by port-forward.
const ADMIN: &str = "127.0.0.1:15000";
const READINESS: &str = "[::]:15021";
const METRICS: &str = "[::]:15020";
/// Where istio-cni listens for ztunnel.
const ZTUNNEL_SOCKET: &str = "/var/run/ztunnel/ztunnel.sock";
/// ztunnel's: seconds of the grace period left for cutting what has not ended by itself.
const RESERVE_SECONDS: u64 = 5;

/// pilot-agent's flags that take a value, without meaning here beyond what [`translate`] says.
const PILOT_AGENT_VALUES: [&str; 16] = [
    "domain",
    "serviceCluster",
    "proxyLogLevel",
    "proxyComponentLogLevel",
    "concurrency",
    "templateFile",
    "stsPort",
    "tokenManagerPlugin",
    "outlierLogPath",
    "meshConfig",
    "log_output_level",
    "log_caller",
    "log_stacktrace_level",
    "log_target",
    "log_rotate",
    "vklog",
];
/// Those that are on or off.
const PILOT_AGENT_SWITCHES: [&str; 2] = ["log_as_json", "profiling"];

/// Environment variables that say what a flag says, the first one set winning. ztunnel's names, pilot-agent's, ours.
const VARIABLES: [(&str, &[&str]); 18] = [
    ("node-name", &["NODE_NAME", "ISTIO_META_NODE_NAME"]),
    ("xds-address", &["XDS_ADDRESS"]),
    ("ca-address", &["CA_ADDRESS", "CA_ADDR"]),
    ("xds-root-ca", &["XDS_ROOT_CA"]),
    ("ca-root-ca", &["CA_ROOT_CA"]),
    ("xds-server-name", &["ALT_XDS_HOSTNAME", "ISTIOD_SAN"]),
    ("ca-server-name", &["ALT_CA_HOSTNAME", "ISTIOD_SAN"]),
    ("token-path", &["AUTH_TOKEN"]),
    ("trust-domain", &["TRUST_DOMAIN"]),
    ("network", &["NETWORK", "ISTIO_META_NETWORK"]),
    ("cluster-id", &["CLUSTER_ID", "ISTIO_META_CLUSTER_ID"]),
    ("instance-ip", &["INSTANCE_IP"]),
    ("instance-ips", &["INSTANCE_IPS"]),
    ("name", &["POD_NAME"]),
    ("namespace", &["POD_NAMESPACE"]),
    ("service-account", &["SERVICE_ACCOUNT", "ISTIO_META_SERVICE_ACCOUNT"]),
    ("gateway", &["GATEWAY_NAME"]),
    ("revocations", &["CRL_PATH"]),
];

/// A command line and an environment in our own words.
#[derive(Debug)]
pub(crate) struct Translated {
    /// For [`Flags`], without the program's name.
    pub arguments: Vec<String>,
    /// Node metadata beyond what the flags say.
    pub metadata: Map<String, Value>,
    pub logging: logging::Settings,
    /// What was not understood or has no effect, for the log.
    pub remarks: Vec<String>,
}

/// `arguments` is the command line without the program's name: `proxy TYPE …`, or our own flags.
///
/// # Errors
/// If the type is not one whose place we can take, or a value cannot be read.
pub(crate) fn translate(arguments: Vec<String>, env: &Environment) -> Result<Translated, String> {
    let mut remarks = Vec::new();
    let (istio, rest) = place(&arguments)?;
    let given = match istio {
        Some(_) => Given::read(rest, &mut remarks),
        None => Given { ours: rest.to_vec(), ..Given::default() },
    };
    let proxy_config = proxy_config(env)?;
    let metadata = metadata::of_environment(env, &proxy_config, &mut remarks);
    let mut found = Found { given: &given, flags: Vec::new() };
    if let Some(istio) = istio {
        found.add("role", istio.role());
        found.add("admin-addr", ADMIN);
        found.add("readiness-addr", READINESS);
        found.add("metrics-addr", METRICS);
    }
    if istio == Some(Istio::Ztunnel) {
        found.add_some("pods-from", pods_from(env)?.as_deref());
        // As ztunnel reads it: anything but true is no.
        let capture = env.get("ISTIO_META_DNS_CAPTURE").map(|value| value.eq_ignore_ascii_case("true"));
        found.add_some("dns-capture", capture.map(|on| if on { "on" } else { "off" }));
    }
    for (flag, names) in VARIABLES {
        found.add_some(flag, env.first(names));
    }
    found.add_some("xds-address", proxy_config["discoveryAddress"].as_str());
    found.add_some("dns-domain", given.agents.get("domain").map(String::as_str));
    found.files(env, istio.is_some());
    if istio == Some(Istio::Waypoint) {
        let labels = metadata.get("LABELS").unwrap_or(&Value::Null);
        found.add_some("gateway", labels[metadata::GATEWAY_NAME].as_str());
        if !found.has("gateway") {
            remarks.push(format!(
                "{} has no label {}: istiod will not take this pod for a waypoint",
                path::LABELS,
                metadata::GATEWAY_NAME
            ));
        }
    }
    let threads = threads(istio, &given, env, &proxy_config, &mut remarks)?;
    found.add_some("concurrency", threads.map(|threads| threads.to_string()).as_deref());
    let drain = drain_seconds(istio, env, &proxy_config)?;
    found.add_some("drain-seconds", drain.map(|seconds| seconds.to_string()).as_deref());
    if let Some(text) = env.get("SECRET_TTL") {
        let ttl = go_duration(text).ok_or_else(|| format!("SECRET_TTL={text}: not a duration"))?;
        found.add("secret-ttl-seconds", &ttl.as_secs().to_string());
    }
    let logging = given.logging();
    let mut arguments = found.flags;
    arguments.extend(given.ours);
    Ok(Translated { arguments, metadata, logging, remarks })
}

/// `proxy TYPE` and what comes after it; no type is pilot-agent's word for a sidecar.
fn place(arguments: &[String]) -> Result<(Option<Istio>, &[String]), String> {
    match arguments {
        [first, kind, rest @ ..] if first == "proxy" && !kind.starts_with('-') => Ok((Some(Istio::of(kind)?), rest)),
        [first, ..] if first == "proxy" => Err(Istio::of("sidecar").err().unwrap_or_default()),
        rest => Ok((None, rest)),
    }
}

/// Whose place we take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Istio {
    Waypoint,
    Ztunnel,
}

impl Istio {
    fn of(kind: &str) -> Result<Istio, String> {
        match kind {
            "waypoint" => Ok(Istio::Waypoint),
            "ztunnel" => Ok(Istio::Ztunnel),
            other => Err(format!(
                "proxy {other}: strata-proxy takes the place of `proxy waypoint` and `proxy ztunnel`, not of a {other}"
            )),
        }
    }

    fn role(self) -> &'static str {
        match self {
            Istio::Waypoint => "waypoint",
            Istio::Ztunnel => "node",
        }
    }
}

/// The command line after `proxy TYPE`.
#[derive(Debug, Default)]
struct Given {
    /// pilot-agent's flags and their values.
    agents: BTreeMap<String, String>,
    /// Our own, as they came.
    ours: Vec<String>,
}

impl Given {
    fn read(arguments: &[String], remarks: &mut Vec<String>) -> Given {
        let command = Flags::command();
        let own = |name: &str| command.get_arguments().find(|argument| argument.get_long() == Some(name));
        let mut out = Given::default();
        let mut rest = arguments.iter().peekable();
        while let Some(argument) = rest.next() {
            let Some(flag) = argument.strip_prefix("--") else {
                remarks.push(format!("argument {argument} is not known: it has no effect"));
                continue;
            };
            let (name, mut value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let agents = PILOT_AGENT_VALUES.contains(&name);
            let takes_value = match own(name) {
                _ if PILOT_AGENT_SWITCHES.contains(&name) => false,
                _ if agents => true,
                Some(own) => own.get_action().takes_values(),
                // A stranger's next word is its value unless it looks like a flag.
                None => true,
            };
            if takes_value && value.is_none() {
                value = rest.next_if(|next| agents || !next.starts_with("--")).cloned();
            }
            if agents || PILOT_AGENT_SWITCHES.contains(&name) {
                out.agents.insert(name.to_owned(), value.unwrap_or_else(|| "true".to_owned()));
            } else if own(name).is_some() {
                out.ours.push(match value {
                    Some(value) => format!("--{name}={value}"),
                    None => format!("--{name}"),
                });
            } else {
                remarks.push(format!("flag --{name} is not known: it has no effect"));
            }
        }
        out
    }

    /// Whether one of our own flags was given.
    fn has(&self, flag: &str) -> bool {
        self.ours
            .iter()
            .any(|argument| argument.strip_prefix("--").is_some_and(|rest| rest.split('=').next() == Some(flag)))
    }

    /// Envoy's and the agent's level, whichever says more: our log is both.
    fn logging(&self) -> logging::Settings {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        let rank = |level: &str| LEVELS.iter().position(|name| *name == logging::level_name(level));
        let envoy = self.agents.get("proxyLogLevel").and_then(|list| list.split(',').find(|one| !one.contains(':')));
        let scopes = self.agents.get("log_output_level").map(String::as_str).unwrap_or_default();
        let agent = scopes.split(',').find_map(|scope| match scope.split_once(':') {
            Some(("default" | "all", level)) => Some(level),
            Some(_) => None,
            None => Some(scope).filter(|level| !level.is_empty()),
        });
        let most = [envoy, agent].into_iter().flatten().filter_map(rank).max();
        let json = self.agents.get("log_as_json").is_some_and(|value| value != "false");
        logging::Settings { filter: most.map(|rank| LEVELS[rank].to_owned()), json }
    }
}

/// Our flags as found so far; the first word on each counts.
struct Found<'a> {
    given: &'a Given,
    flags: Vec<String>,
}

impl Found<'_> {
    fn has(&self, flag: &str) -> bool {
        let start = format!("--{flag}=");
        self.given.has(flag) || self.flags.iter().any(|argument| argument.starts_with(&start))
    }

    fn add(&mut self, flag: &str, value: &str) {
        if !self.has(flag) {
            self.flags.push(format!("--{flag}={value}"));
        }
    }

    fn add_some(&mut self, flag: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.add(flag, value);
        }
    }

    /// Files that pods of the mesh get. In Istio's places they are expected; elsewhere they are used if they are there.
    fn files(&mut self, env: &Environment, expected: bool) {
        // Istio's other provider of istiod's own certificate.
        let by_kubernetes = env.get("PILOT_CERT_PROVIDER") == Some("kubernetes");
        let control_plane = if by_kubernetes { path::KUBERNETES_ROOTS } else { path::ROOTS };
        let files = [
            ("xds-root-ca", control_plane),
            ("token-path", path::TOKEN),
            ("mesh-roots", path::ROOTS),
            ("revocations", path::REVOCATIONS),
        ];
        // Roots given by name may be another CA's than the mesh's.
        let elsewhere = self.has("xds-root-ca") || self.has("ca-root-ca");
        let own = [format!("--xds-root-ca={}", path::ROOTS), format!("--ca-root-ca={}", path::ROOTS)];
        let elsewhere = elsewhere && !own.iter().any(|own| self.flags.contains(own) || self.given.ours.contains(own));
        for (flag, file) in files {
            let mesh = flag != "mesh-roots" || !elsewhere;
            if mesh && (expected || env.has(file)) {
                self.add(flag, &env.file(file).display().to_string());
            }
        }
    }
}

/// Where ztunnel's environment says that pods come from. Istio's chart sets `INPOD_ENABLED`; ours, which starts us the
/// same way beside our agent, does not.
fn pods_from(env: &Environment) -> Result<Option<String>, String> {
    match env.get("PROXY_MODE") {
        None | Some("shared") => {}
        Some(mode) => {
            return Err(format!("PROXY_MODE={mode}: strata-proxy serves the pods of a node, which is `shared`"));
        }
    }
    let inpod = match env.get("INPOD_ENABLED") {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => return Err(format!("INPOD_ENABLED={other}: expected true or false")),
    };
    let socket = env.get("INPOD_UDS").or_else(|| inpod.then_some(ZTUNNEL_SOCKET));
    Ok(socket.map(|socket| format!("zds:{socket}")))
}

/// `PROXY_CONFIG`, the mesh's ProxyConfig as JSON; null if there is none.
fn proxy_config(env: &Environment) -> Result<Value, String> {
    let Some(text) = env.get("PROXY_CONFIG") else { return Ok(Value::Null) };
    match serde_json::from_str(text) {
        Ok(config @ Value::Object(_)) => Ok(config),
        Ok(_) => Err("PROXY_CONFIG is not a JSON object".to_owned()),
        Err(error) => Err(format!("PROXY_CONFIG is not JSON: {error}")),
    }
}

/// Data-plane threads: the flag, the mesh's setting, or the CPU limit, as pilot-agent; 0 is one a processor.
fn threads(
    istio: Option<Istio>,
    given: &Given,
    env: &Environment,
    proxy_config: &Value,
    remarks: &mut Vec<String>,
) -> Result<Option<usize>, String> {
    let number =
        |name: &str, text: &str| text.parse::<usize>().map_err(|_| format!("{name}={text}: not a number of threads"));
    let set = if let Some(text) = given.agents.get("concurrency") {
        number("--concurrency", text)?
    } else if let Some(text) = env.get("STRATA_CONCURRENCY") {
        number("STRATA_CONCURRENCY", text)?
    } else if let Some(text) = env.get("ZTUNNEL_WORKER_THREADS").filter(|_| istio != Some(Istio::Waypoint)) {
        if text.ends_with('%') {
            remarks.push(format!("ZTUNNEL_WORKER_THREADS={text}: shares of the processors have no effect here"));
            return Ok(None);
        }
        number("ZTUNNEL_WORKER_THREADS", text)?
    } else if let Some(concurrency) = proxy_config["concurrency"].as_u64() {
        usize::try_from(concurrency).unwrap_or(usize::MAX)
    } else if istio == Some(Istio::Waypoint)
        && let Some(text) = env.first(&["ISTIO_CPU_LIMIT", "GOMAXPROCS"])
    {
        number("ISTIO_CPU_LIMIT", text)?
    } else {
        return Ok(None);
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Some(if set == 0 { processors } else { set }.clamp(1, 256)))
}

/// How long open connections may go on: what Envoy, respectively ztunnel, is told.
fn drain_seconds(istio: Option<Istio>, env: &Environment, proxy_config: &Value) -> Result<Option<u64>, String> {
    if env.get("CONNECTION_TERMINATION_DEADLINE_SECONDS").is_some() {
        return Ok(None);
    }
    let seconds = |name: &str, text: &str| {
        go_duration(text).map(|duration| duration.as_secs()).ok_or_else(|| format!("{name}={text}: not a duration"))
    };
    if istio == Some(Istio::Waypoint) {
        let text = proxy_config["terminationDrainDuration"].as_str();
        return text.map(|text| seconds("PROXY_CONFIG.terminationDrainDuration", text)).transpose();
    }
    if let Some(text) = env.get("CONNECTION_TERMINATION_DEADLINE") {
        return seconds("CONNECTION_TERMINATION_DEADLINE", text).map(Some);
    }
    let Some(text) = env.get("TERMINATION_GRACE_PERIOD_SECONDS") else { return Ok(None) };
    let grace: u64 = text.parse().map_err(|_| format!("TERMINATION_GRACE_PERIOD_SECONDS={text}: not a number"))?;
    Ok(Some(grace.saturating_sub(RESERVE_SECONDS).max(1)))
}

/// Go's and protobuf's durations: `24h0m0s`, `1.5s`, `300ms`.
fn go_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|char: char| !char.is_ascii_digit() && char != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|char: char| char.is_ascii_digit()).unwrap_or(rest.len());
        let seconds = match &rest[..unit] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += Duration::try_from_secs_f64(number * seconds).ok()?;
        rest = &rest[unit..];
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests;
