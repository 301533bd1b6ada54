//! What `call` prints.
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderValue};
use serde::Serialize;

use crate::stats::Latency;

/// How many failures are kept in full.
const KEPT_FAILURES: usize = 5;
/// How much of a body is shown.
const SHOWN_BODY: usize = 4096;

#[derive(Debug, Default, Serialize)]
pub(super) struct Summary {
    sent: u64,
    /// Answered with 2xx.
    ok: u64,
    seconds: f64,
    status: BTreeMap<u16, u64>,
    /// By the name of the server that answered.
    servers: BTreeMap<String, u64>,
    versions: BTreeMap<String, u64>,
    /// By kind: `connect: ECONNREFUSED`, `timeout`, `ECONNRESET`.
    errors: BTreeMap<String, u64>,
    latency_ms: Latency,
    connections: u64,
    /// What getpeername() and getsockname() said on the last connection.
    peer: Option<String>,
    local: Option<String>,
    first_failures: Vec<Failure>,
    /// The last answer: status, headers, body.
    last: Option<Answer>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    samples: Vec<(f64, u16, String, f64)>,
    #[serde(skip)]
    keep_samples: bool,
    #[serde(skip)]
    times: Vec<Duration>,
}

#[derive(Debug, Serialize)]
struct Failure {
    /// Since the start.
    at_ms: f64,
    took_ms: f64,
    what: String,
}

/// An HTTP answer.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    trailers: BTreeMap<String, String>,
    body_bytes: usize,
    /// As JSON where it is JSON.
    body: serde_json::Value,
}

impl Answer {
    pub(super) fn new(parts: &http::response::Parts, trailers: &HeaderMap, bytes: &[u8]) -> Answer {
        let shown = &bytes[..bytes.len().min(SHOWN_BODY)];
        let text = || serde_json::Value::String(String::from_utf8_lossy(shown).into_owned());
        Answer {
            status: parts.status.as_u16(),
            headers: headers_of(&parts.headers),
            trailers: headers_of(trailers),
            body_bytes: bytes.len(),
            body: serde_json::from_slice(bytes).unwrap_or_else(|_| text()),
        }
    }

    fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

impl Summary {
    pub(super) fn new(keep_samples: bool) -> Summary {
        Summary { keep_samples, ..Summary::default() }
    }

    pub(super) fn connected(&mut self, peer: Option<SocketAddr>, local: Option<SocketAddr>) {
        self.connections += 1;
        self.peer = peer.map(|peer| peer.to_string());
        self.local = local.map(|local| local.to_string());
    }

    pub(super) fn record(&mut self, started: Instant, began: Instant, result: Result<Answer, String>) {
        let took = began.elapsed();
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        self.sent += 1;
        self.times.push(took);
        let failed = match &result {
            Ok(answer) if answer.is_success() => None,
            Ok(answer) => Some(format!("{}: {}", answer.status, brief(&answer.body))),
            Err(kind) => Some(kind.clone()),
        };
        if let Some(what) = failed.filter(|_| self.first_failures.len() < KEPT_FAILURES) {
            self.first_failures.push(Failure { at_ms: millis(began - started), took_ms: millis(took), what });
        }
        let header = |answer: &Answer, name: &str| answer.headers.get(name).cloned().unwrap_or_default();
        if self.keep_samples {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let (status, version) =
                result.as_ref().map_or((0, String::new()), |a| (a.status, header(a, "x-echo-version")));
            self.samples.push((millis(now.saturating_sub(took)), status, version, millis(took)));
        }
        match result {
            Ok(answer) => {
                *self.status.entry(answer.status).or_default() += 1;
                self.ok += u64::from(answer.is_success());
                *self.servers.entry(header(&answer, "x-echo-name")).or_default() += 1;
                *self.versions.entry(header(&answer, "x-echo-version")).or_default() += 1;
                self.last = Some(answer);
            }
            Err(kind) => *self.errors.entry(kind).or_default() += 1,
        }
    }

    pub(super) fn finish(&mut self, elapsed: Duration) {
        self.seconds = elapsed.as_secs_f64();
        self.latency_ms = Latency::of(&mut self.times);
        self.samples.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
}

fn headers_of(map: &HeaderMap) -> BTreeMap<String, String> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    map.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
}

fn brief(body: &serde_json::Value) -> String {
    let text = body.as_str().map_or_else(|| body.to_string(), str::to_owned);
    text.chars().take(120).collect::<String>().trim().to_owned()
}
