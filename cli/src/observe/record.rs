//! One shape for the three kinds of events.
use serde::Serialize;
use serde_json::Value;

use crate::output::{Tone, paint};

/// One decision about a connection or a request.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Record {
    /// RFC 3339, UTC.
    pub(super) time: String,
    /// `network`, `mesh` or `request`: who decided.
    pub(super) layer: String,
    pub(super) node: String,
    pub(super) verdict: String,
    pub(super) source: End,
    pub(super) destination: End,
    /// The service that was asked for.
    pub(super) service: Option<String>,
    /// The rule, policy or route that decided, and why.
    pub(super) decided_by: Option<String>,
    /// Mutual TLS, attested by the kernel, or none; mesh and request layers.
    pub(super) security: Option<String>,
    pub(super) protocol: String,
    /// HTTP status; request layer.
    pub(super) status: Option<u64>,
    pub(super) method: Option<String>,
    pub(super) path: Option<String>,
    pub(super) latency_ms: Option<f64>,
    pub(super) attempts: Option<u64>,
    /// Where in the layer it was decided: a kernel hook, or the proxy's direction.
    pub(super) at: String,
    /// Socket cookie, where the layer knows it.
    pub(super) cookie: Option<u64>,
}

/// One side.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct End {
    pub(super) ip: String,
    pub(super) port: u16,
    pub(super) namespace: String,
    pub(super) pod: String,
    /// SPIFFE.
    pub(super) identity: Option<String>,
}

impl Record {
    /// Reads an agent's flow, a node proxy's connection or a waypoint's request.
    pub(super) fn of(event: &Value, place: &str) -> Record {
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        let some = |key: &str| event[key].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let mut record = Record {
            time: text("time"),
            layer: text("layer"),
            node: some("node").unwrap_or_else(|| place.to_owned()),
            verdict: text("verdict"),
            service: some("service"),
            security: some("security"),
            protocol: some("proto").or_else(|| some("protocol")).unwrap_or_default().to_uppercase(),
            cookie: event["cookie"].as_u64().filter(|cookie| *cookie != 0),
            ..Record::default()
        };
        if !event["src"].is_null() {
            record.flow(event);
        } else {
            record.source = End::of_peer(&event["source"]);
            record.destination = End::of_peer(&event["destination"]);
            if event["kind"].is_string() { record.request(event) } else { record.connection(event) }
        }
        record
    }

    fn flow(&mut self, event: &Value) {
        self.source = End::of_endpoint(&event["src"]);
        self.destination = End::of_endpoint(&event["dst"]);
        self.at = event["hook"].as_str().unwrap_or_default().to_owned();
        let policy = event["policy"]["text"].as_str();
        let reason = event["drop_reason"].as_str();
        self.decided_by = match (policy, reason) {
            (Some(policy), Some(reason)) => Some(format!("{policy} ({reason})")),
            (one, other) => one.or(other).map(str::to_owned),
        };
    }

    fn connection(&mut self, event: &Value) {
        self.at = event["direction"].as_str().unwrap_or_default().to_owned();
        let policy = event["policy"].as_str();
        let reason = event["reason"].as_str().or(event["flag"].as_str());
        self.decided_by = match (policy, reason) {
            (Some(policy), Some(reason)) => Some(format!("{policy} ({reason})")),
            (one, other) => one.or(other).map(str::to_owned),
        };
        self.latency_ms = event["duration_ms"].as_f64();
    }

    fn request(&mut self, event: &Value) {
        self.at = event["kind"].as_str().unwrap_or_default().to_owned();
        self.status = event["status"].as_u64().filter(|status| *status != 0);
        let refused = self.status.is_some_and(|status| status == 401 || status == 403);
        self.verdict = if refused { "dropped" } else { "forwarded" }.to_owned();
        self.method = event["method"].as_str().map(str::to_owned);
        self.path = event["path"].as_str().map(str::to_owned);
        self.latency_ms = event["latency_ms"].as_f64();
        self.attempts = event["attempts"].as_u64();
        let route = event["route"].as_str().filter(|route| !route.is_empty()).map(|route| format!("route {route}"));
        let cluster = event["cluster"].as_str().map(|cluster| format!("to {cluster}"));
        let flags = event["flags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>();
        let flags = (!flags.is_empty()).then(|| flags.join(","));
        let details = event["details"].as_str().filter(|text| refused && !text.is_empty()).map(str::to_owned);
        let words: Vec<String> = [route, cluster, flags, details].into_iter().flatten().collect();
        self.decided_by = (!words.is_empty()).then(|| words.join(" "));
    }

    /// Whether the answer was no.
    pub(super) fn refused(&self) -> bool {
        self.verdict == "dropped" || self.verdict == "denied" || self.status.is_some_and(|status| status >= 400)
    }

    /// Titles over [`Record::row`].
    pub(super) fn header() -> String {
        let line = format!(
            "{:<12}  {:<7}  {:<10}  {:<24}  {:<24}  {:<32}  WHAT DECIDED",
            "TIME", "LAYER", "VERDICT", "FROM", "TO", "SERVICE OR REQUEST"
        );
        paint(&line, Tone::Strong)
    }

    /// One line.
    pub(super) fn row(&self) -> String {
        let clock = self.time.get(11..23).unwrap_or(&self.time);
        let verdict = format!("{:<10}", self.verdict);
        let verdict = paint(&verdict, if self.refused() { Tone::Bad } else { Tone::Good });
        let asked = match (self.status, &self.method) {
            (Some(status), Some(method)) => {
                format!("{status} {method} {}", self.path.as_deref().unwrap_or_default())
            }
            _ => self.service.clone().unwrap_or_else(|| self.protocol.clone()),
        };
        let mut words: Vec<String> = self.decided_by.iter().cloned().collect();
        words.extend(self.security.clone().filter(|_| self.layer == "mesh"));
        words.extend(self.source.identity.clone().filter(|_| self.layer != "network"));
        words.extend(self.latency_ms.map(|ms| format!("{ms:.1} ms")));
        words.extend(self.attempts.filter(|tries| *tries > 1).map(|tries| format!("{tries} tries")));
        words.push(paint(&format!("[{} {}]", self.node, self.at), Tone::Faint));
        format!(
            "{:<12}  {:<7}  {verdict}  {:<24}  {:<24}  {asked:<32}  {}",
            clock,
            self.layer,
            self.source.label(),
            self.destination.label(),
            words.join("; ")
        )
    }
}

impl End {
    /// An agent's.
    fn of_endpoint(value: &Value) -> End {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let kind = text("kind");
        End {
            ip: text("ip"),
            port: value["port"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap_or(0),
            namespace: text("namespace"),
            pod: if text("pod").is_empty() { kind } else { text("pod") },
            identity: None,
        }
    }

    /// A proxy's.
    fn of_peer(value: &Value) -> End {
        let address = value["address"].as_str().unwrap_or_default();
        let (ip, port) = address.rsplit_once(':').unwrap_or((address, ""));
        End {
            ip: ip.trim_matches(['[', ']']).to_owned(),
            port: port.parse().unwrap_or(0),
            namespace: value["namespace"].as_str().unwrap_or_default().to_owned(),
            pod: value["workload"].as_str().unwrap_or_default().to_owned(),
            identity: value["identity"].as_str().map(str::to_owned),
        }
    }

    fn label(&self) -> String {
        let name = match (self.namespace.as_str(), self.pod.as_str()) {
            ("", "") => self.ip.clone(),
            ("", pod) => format!("{pod} {}", self.ip),
            (namespace, pod) => format!("{namespace}/{pod}"),
        };
        if self.port == 0 { name } else { format!("{name}:{}", self.port) }
    }
}
