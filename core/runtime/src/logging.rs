//! Structured logs on standard error.
use tracing_subscriber::EnvFilter;

/// Starts logging for a process. `RUST_LOG` filters (default `info`), `LOG_FORMAT=json` writes one JSON
/// object a line with the same keys as the readable form. A second call does nothing.
pub fn init(component: &'static str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let json = std::env::var("LOG_FORMAT").is_ok_and(|format| format.eq_ignore_ascii_case("json"));
    let started = if json {
        builder.json().flatten_event(true).with_current_span(false).try_init()
    } else {
        builder.with_ansi(false).with_target(true).try_init()
    };
    if started.is_ok() {
        tracing::info!(component, version = env!("CARGO_PKG_VERSION"), pid = std::process::id(), "starting");
    }
}
