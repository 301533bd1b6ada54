//! Delta ADS client (`envoy.service.discovery.v3`, incremental aggregated): subscribes, acknowledges and
//! refuses resource by resource, remembers which versions it holds over reconnects, and never takes a
//! silence for a deletion. What the resources mean is the [`Handler`]'s business.
//!
//! Behaviour follows what istiod expects of its clients (xds-contract 1.3, 1.4): the node is repeated on the
//! first request of every type; a NACK names each refused resource; refused resources are not recorded as
//! held, so a reconnect asks for them again; a graceful end of the stream reconnects without penalty.

mod connect;
mod metrics;
mod state;
mod stream;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
pub use connect::{ConnectError, Endpoint, Token};
pub use metrics::Metrics;
use strata_runtime::{ReadyGuard, drain};

/// One resource as it came, still encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    pub name: String,
    pub version: String,
    /// Type URL of the payload.
    pub type_url: String,
    /// The payload (`Any.value`).
    pub body: Bytes,
}

/// What one response changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// The subscription it belongs to.
    pub type_url: String,
    pub resources: Vec<Resource>,
    pub removed: Vec<String>,
}

/// A resource the handler cannot use; the last good one of that name stays in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    pub name: String,
    pub reason: String,
}

/// Gives the resources their meaning.
pub trait Handler: Send {
    /// Applies what it can and names what it cannot. Called with one update at a time, in order.
    fn apply(&mut self, update: Update) -> Vec<Rejected>;

    /// Names to be subscribed to for a type; `None` is everything (wildcard). Asked again after each update.
    fn wanted(&self, type_url: &str) -> Option<BTreeSet<String>> {
        let _ = type_url;
        None
    }
}

/// Whom to ask, as whom, for what.
#[derive(Debug, Clone)]
pub struct Config {
    pub endpoint: Endpoint,
    /// `TYPE~IP~NAME.NAMESPACE~DOMAIN`.
    pub node_id: String,
    /// Node metadata (a JSON object).
    pub metadata: serde_json::Value,
    /// Type URLs, in the order they are asked for.
    pub types: Vec<String>,
    /// Those among them that readiness does not wait for: a control plane may have no answer to a name it does not know.
    pub late: Vec<String>,
    /// First and largest pause before a reconnect.
    pub backoff: (Duration, Duration),
}

impl Config {
    /// Pauses grow from Istio's 10 ms to 5 s (Istio: 15 s): a proxy that has just missed the control plane's return goes on
    /// with endpoints that may be gone, and a connection attempt in five seconds is little even from every node at once.
    pub fn new(endpoint: Endpoint, node_id: impl Into<String>, metadata: serde_json::Value, types: &[&str]) -> Self {
        Self {
            endpoint,
            node_id: node_id.into(),
            metadata,
            types: types.iter().map(|&url| url.to_owned()).collect(),
            late: Vec::new(),
            backoff: (Duration::from_millis(10), Duration::from_secs(5)),
        }
    }
}

/// A failure that goes on is logged again once the pauses are as long as this.
const REPEAT: Duration = Duration::from_secs(1);

/// Runs until the drain starts. `ready` is dropped when the first response of every type has been answered.
/// State is kept over disconnects; nothing is flushed.
pub async fn run(
    config: Config,
    mut handler: impl Handler,
    metrics: Metrics,
    ready: ReadyGuard,
    mut drain: drain::Watch,
) {
    let mut state = state::State::new(&config.types, &config.late);
    let mut ready = Some(ready);
    let mut pause = config.backoff.0;
    let mut said = String::new();
    loop {
        let started = Instant::now();
        let ended = tokio::select! {
            _ = drain.signaled() => return,
            ended = stream::run(&config, &mut handler, &mut state, &metrics, &mut ready) => ended,
        };
        metrics.terminated(ended.reason());
        // A server that goes on closing at once is not one to be asked without a pause.
        let well = ended.is_graceful() && started.elapsed() >= REPEAT;
        if well {
            pause = config.backoff.0;
        }
        if ended.is_graceful() {
            said.clear();
            tracing::info!(%ended, "xDS stream ended, reconnecting");
        } else {
            let (reason, retry_ms) = (ended.to_string(), pause.as_millis() as u64);
            // The same failure again within a second is no news.
            if reason != said || pause >= REPEAT {
                tracing::warn!(reason, retry_ms, "xDS stream failed, reconnecting");
            }
            said = reason;
        }
        tokio::select! {
            _ = drain.signaled() => return,
            // Jitter keeps a fleet from reconnecting in step after the control plane's restart.
            () = tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))) => {}
        }
        if !well {
            pause = (pause * 2).min(config.backoff.1);
        }
    }
}

#[cfg(test)]
mod tests;
