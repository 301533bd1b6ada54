//! Structured logs on standard error, one line an event.
use std::sync::OnceLock;

use parking_lot::Mutex;
use tracing_subscriber::EnvFilter;

/// What a process's command line says of logging; the environment wins.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// As `RUST_LOG`; `info` if not given.
    pub filter: Option<String>,
    /// One JSON object a line.
    pub json: bool,
}

type Reload = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

struct Control {
    reload: Reload,
    first: String,
    now: Mutex<String>,
}

static CONTROL: OnceLock<Control> = OnceLock::new();

/// What libraries say without being asked: kube's client calls each attempt that fails an error, ten a second while an API
/// server is away; whoever uses it says so once.
const QUIET: &str = "kube_client::client::builder=off";

/// A filter's directives count over ours.
fn parse(filter: &str) -> Result<EnvFilter, tracing_subscriber::filter::ParseError> {
    EnvFilter::try_new(format!("{QUIET},{filter}"))
}

/// Starts logging for a process. `RUST_LOG` filters (default `info`), `STRATA_LOG_FORMAT=json` or ztunnel's
/// `LOG_FORMAT=json` writes one JSON object a line with the same keys as the readable form. A second call does nothing.
pub fn init(component: &'static str) {
    init_with(component, &Settings::default());
}

/// As [`init`], with what the command line says.
pub fn init_with(component: &'static str, settings: &Settings) {
    let filter = std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
    let filter = filter.or_else(|| settings.filter.clone()).unwrap_or_else(|| "info".to_owned());
    let (filter, parsed) = match parse(&filter) {
        Ok(parsed) => (filter, parsed),
        Err(_) => ("info".to_owned(), EnvFilter::new(format!("{QUIET},info"))),
    };
    let is_json = |name| std::env::var(name).is_ok_and(|format| format.eq_ignore_ascii_case("json"));
    let json = settings.json || is_json("STRATA_LOG_FORMAT") || is_json("LOG_FORMAT");
    let builder = tracing_subscriber::fmt().with_env_filter(parsed).with_writer(std::io::stderr);
    let (started, reload): (bool, Reload) = if json {
        let builder = builder.json().flatten_event(true).with_current_span(false).with_filter_reloading();
        let handle = builder.reload_handle();
        let reload = move |filter| handle.reload(filter).map_err(|error| error.to_string());
        (builder.try_init().is_ok(), Box::new(reload))
    } else {
        let builder = builder.with_ansi(false).with_target(true).with_filter_reloading();
        let handle = builder.reload_handle();
        let reload = move |filter| handle.reload(filter).map_err(|error| error.to_string());
        (builder.try_init().is_ok(), Box::new(reload))
    };
    if started {
        // Err means that somebody was quicker, which a first successful `try_init` rules out.
        let _ = CONTROL.set(Control { reload, first: filter.clone(), now: Mutex::new(filter) });
        tracing::info!(component, version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "starting");
    }
}

/// Answers `POST /logging?QUERY` as ztunnel and Envoy do: `level=LEVEL` or `level=TARGET:LEVEL,...` changes the filter,
/// `reset` takes it back to the one at start, nothing shows it.
///
/// # Errors
/// If the query says something else or a level is unknown.
pub fn control(query: &str) -> Result<String, String> {
    let control = CONTROL.get().ok_or("logging has not been started")?;
    let wanted = match query.split_once('=') {
        None if query.is_empty() => return Ok(format!("current log level is {}\n", control.now.lock())),
        None if query == "reset" => control.first.clone(),
        // Envoy's names for the same: all loggers, or single ones.
        Some(("level" | "paths", "")) => control.first.clone(),
        Some(("level" | "paths", list)) => {
            let wanted = directives(list)?;
            // A level for single targets leaves the others as they are.
            let scoped = wanted.split(',').all(|directive| directive.contains('='));
            if scoped { format!("{},{wanted}", control.now.lock()) } else { wanted }
        }
        _ => return Err(format!("{query}: expected level=LEVEL, level=TARGET:LEVEL,... or reset\n")),
    };
    let filter = parse(&wanted).map_err(|error| format!("{wanted}: {error}\n"))?;
    (control.reload)(filter)?;
    wanted.clone_into(&mut control.now.lock());
    tracing::info!(filter = wanted, "log level changed");
    Ok(format!("current log level is {wanted}\n"))
}

/// `rbac:debug,warning` as tracing's `rbac=debug,warn`.
///
/// # Errors
/// With what is no level: tracing would take a word it does not know for a target, and go silent.
fn directives(list: &str) -> Result<String, String> {
    let list = list.replace("%2C", ",").replace("%3A", ":");
    let known = |level: &str| match level_name(level) {
        name @ ("off" | "error" | "warn" | "info" | "debug" | "trace") => Ok(name.to_owned()),
        _ => Err(format!("{level} is not a level: off, error, warn, info, debug or trace\n")),
    };
    let one = |directive: &str| match directive.rsplit_once(':') {
        Some((target, level)) => Ok(format!("{target}={}", known(level)?)),
        None => known(directive),
    };
    Ok(list.split(',').map(one).collect::<Result<Vec<_>, String>>()?.join(","))
}

/// Envoy's and Istio's names of levels as tracing's.
pub fn level_name(level: &str) -> &str {
    match level {
        "warning" => "warn",
        "critical" | "fatal" => "error",
        "none" => "off",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_in_istios_words() {
        assert_eq!(directives("debug").unwrap(), "debug");
        let list = directives("rbac:warning,l7_proxy::node:trace,critical").unwrap();
        assert_eq!(list, "rbac=warn,l7_proxy::node=trace,error");
        assert!(directives("l7_proxy::node").is_err());
    }

    #[test]
    fn the_level_changes_and_comes_back() {
        init_with("test", &Settings { filter: Some("warn".to_owned()), json: false });
        let first = control("").unwrap();
        assert_eq!(control("level=rbac:debug,info").unwrap(), "current log level is rbac=debug,info\n");
        assert_eq!(control("level=other:trace").unwrap(), "current log level is rbac=debug,info,other=trace\n");
        assert!(control("level=loud%20please").unwrap_err().contains("loud"));
        assert!(control("colour=red").unwrap_err().contains("colour"));
        assert_eq!(control("reset").unwrap(), first);
    }
}
