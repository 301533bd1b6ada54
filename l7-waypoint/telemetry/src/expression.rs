//! CEL over finished requests: the filter of an access log, the value of a metric's label, in the attributes that Envoy has
//! (envoy/docs/intro/arch_overview/advanced/attributes).
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};

use cel::{Context, Env, Program, Value};
use http::HeaderMap;

use crate::metrics::Security;
use crate::peer::Peer;
use crate::record::Record;

/// The language's own functions, made once.
static FUNCTIONS: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(Env::stdlib()));

type Fields = HashMap<&'static str, Value>;
type Known = fn(&Record<'_>) -> Fields;
/// Longer texts are refused, bytes: parser and evaluation go as deep as a text is long (nesting itself is bounded by the parser).
const LONGEST: usize = 1024;

/// What is shown of a value, bytes.
const LONGEST_VALUE: usize = 256;

/// What can be asked of a request: Envoy's attributes, and Istio's for the workloads at both ends. Not its times, and nothing that
/// filters leave behind in Envoy (`metadata`, `filter_state`).
const KNOWN: [(&str, Known); 9] = [
    ("request", request),
    ("response", response),
    ("connection", connection),
    ("source", |record| endpoint(Some(record.downstream_remote))),
    ("destination", |record| endpoint(Some(record.downstream_local))),
    ("upstream", upstream),
    ("xds", xds),
    ("downstream_peer", |record| peer(record.source)),
    ("upstream_peer", |record| peer(record.destination)),
];

/// Compiled.
pub(crate) struct Expression {
    program: Program,
    asked: Vec<(&'static str, Known)>,
}

impl Expression {
    /// # Errors
    /// If the text is no CEL, or asks for what is not known of a finished request.
    pub(crate) fn compile(text: &str) -> Result<Self, String> {
        if text.len() > LONGEST {
            return Err(format!("is longer than {LONGEST} bytes"));
        }
        let program = FUNCTIONS.compile(text).map_err(|error| error.to_string())?;
        let mut asked = Vec::new();
        for variable in program.references().variables() {
            let known = KNOWN.iter().find(|(name, _)| *name == variable);
            asked.push(*known.ok_or_else(|| format!("{variable} is not known of a finished request"))?);
        }
        Ok(Self { program, asked })
    }

    /// Whether it is true of a request. As with Envoy, what cannot be evaluated (a header that is not there) is not.
    pub(crate) fn holds(&self, record: &Record<'_>) -> bool {
        matches!(self.value(record), Some(Value::Bool(true)))
    }

    /// What it says of a request, as text (the first [`LONGEST_VALUE`] bytes); `None` if it cannot be evaluated, or is neither
    /// text, number nor truth.
    pub(crate) fn text(&self, record: &Record<'_>) -> Option<String> {
        Some(match self.value(record)? {
            Value::String(text) => text[..text.floor_char_boundary(LONGEST_VALUE)].to_owned(),
            Value::Int(number) => number.to_string(),
            Value::UInt(number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::Bool(truth) => truth.to_string(),
            _ => return None,
        })
    }

    fn value(&self, record: &Record<'_>) -> Option<Value> {
        let mut context = Context::with_env(FUNCTIONS.clone());
        for (name, known) in &self.asked {
            context.add_variable_from_value(*name, known(record));
        }
        self.program.execute(&context).ok()
    }
}

fn text(value: impl Into<String>) -> Value {
    Value::String(Arc::new(value.into()))
}

fn number(value: u64) -> Value {
    Value::Int(i64::try_from(value).unwrap_or(i64::MAX))
}

/// Several values of one name are joined, as Envoy joins them.
fn headers(headers: &HeaderMap) -> Value {
    let mut all: HashMap<String, String> = HashMap::new();
    for (name, value) in headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        let joined = all.entry(name.as_str().to_owned()).or_default();
        if !joined.is_empty() {
            joined.push(',');
        }
        joined.push_str(&value);
    }
    all.into()
}

fn request(record: &Record<'_>) -> Fields {
    let (path, query) = record.path.split_once('?').unwrap_or((record.path, ""));
    let header = |name: &str| record.request_headers.get(name).and_then(|value| value.to_str().ok()).map(text);
    let mut fields = Fields::from([
        ("path", text(record.path)),
        ("url_path", text(path)),
        ("query", text(query)),
        ("host", text(record.authority)),
        ("scheme", text(record.scheme)),
        ("headers", headers(record.request_headers)),
        ("size", number(record.bytes_received)),
        ("total_size", number(record.bytes_received)),
    ]);
    fields.extend(record.method.map(|method| ("method", text(method.as_str()))));
    fields.extend(record.version.map(|version| ("protocol", text(format!("{version:?}").replace("2.0", "2")))));
    fields.extend(record.request_id.map(|id| ("id", text(id))));
    fields.extend(header("referer").map(|value| ("referer", value)));
    fields.extend(header("user-agent").map(|value| ("useragent", value)));
    fields
}

fn response(record: &Record<'_>) -> Fields {
    let mut fields = Fields::from([
        ("code", number(u64::from(record.status))),
        ("code_details", text(record.details)),
        ("size", number(record.bytes_sent)),
        ("total_size", number(record.bytes_sent)),
    ]);
    fields.extend(record.response_headers.map(|map| ("headers", headers(map))));
    fields.extend(record.trailers.map(|map| ("trailers", headers(map))));
    fields.extend(record.grpc_status.map(|status| ("grpc_status", number(u64::from(status)))));
    fields
}

fn connection(record: &Record<'_>) -> Fields {
    let mut fields = Fields::from([("mtls", Value::Bool(record.security == Security::MutualTls))]);
    fields.extend(record.peer_principal.map(|peer| ("uri_san_peer_certificate", text(peer))));
    fields.extend(record.local_principal.map(|own| ("uri_san_local_certificate", text(own))));
    fields
}

fn endpoint(addr: Option<SocketAddr>) -> Fields {
    let fields = |addr: SocketAddr| {
        Fields::from([("address", text(addr.to_string())), ("port", number(u64::from(addr.port())))])
    };
    addr.map(fields).unwrap_or_default()
}

fn upstream(record: &Record<'_>) -> Fields {
    let Some(found) = &record.upstream else { return Fields::new() };
    let mut fields = endpoint(found.host.and_then(|host| host.parse().ok()));
    fields.extend(found.local.map(|local| ("local_address", text(local.to_string()))));
    fields.extend(found.transport_failure.map(|reason| ("transport_failure_reason", text(reason))));
    fields.insert("request_attempt_count", number(u64::from(found.attempts)));
    fields
}

/// Under the names that Istio gives the parts of a workload.
fn peer(peer: &Peer) -> Fields {
    let known = [
        ("workload", &peer.workload),
        ("namespace", &peer.namespace),
        ("principal", &peer.principal),
        ("app", &peer.app),
        ("version", &peer.version),
        ("service", &peer.canonical_service),
        ("revision", &peer.canonical_revision),
        ("cluster", &peer.cluster),
    ];
    known.into_iter().map(|(name, value)| (name, text(&**value))).collect()
}

fn xds(record: &Record<'_>) -> Fields {
    let mut fields = Fields::from([("route_name", text(record.route_name))]);
    fields.extend(record.upstream.as_ref().map(|found| ("cluster_name", text(found.cluster))));
    fields
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::tests::with_record;

    fn holds(expression: &str) -> bool {
        let mut found = false;
        let compiled = Expression::compile(expression).unwrap();
        with_record(|record| found = compiled.holds(&record));
        found
    }

    #[test]
    fn what_istios_examples_ask_for_is_known() {
        for expression in [
            "response.code >= 400",
            "response.code >= 400 || connection.mtls == false",
            "request.url_path == '/new' && request.query == 'q=1' && request.method == 'GET'",
            "request.headers['user-agent'].startsWith('curl/')",
            "request.useragent.matches('^curl')",
            "!('x-none' in request.headers)",
            "has(request.headers) && !has(request.referer)",
            "upstream.port == 8080 && upstream.request_attempt_count == 2 && xds.cluster_name == 'c'",
            "source.address == '10.0.0.1:5000' && destination.port == 80",
            "connection.uri_san_peer_certificate.endsWith('/sa/web') && request.protocol == 'HTTP/1.1'",
        ] {
            assert!(holds(expression), "{expression}");
        }
        for expression in ["response.code < 400", "!connection.mtls", "request.size > 3", "response.size == 0"] {
            assert!(!holds(expression), "{expression}");
        }
    }

    #[test]
    fn what_cannot_be_evaluated_is_not_true() {
        for expression in
            ["request.headers['x-none'] == 'a'", "response.headers['a'] == 'b'", "request.path", "1 / 0 == 1"]
        {
            assert!(!holds(expression), "{expression}");
        }
    }

    #[test]
    fn what_is_no_condition_is_refused() {
        let refused =
            |expression: &str| Expression::compile(expression).err().unwrap_or_else(|| panic!("{expression}"));
        assert!(refused("metadata.filter_metadata['x']['y'] == 'z'").contains("metadata is not known"));
        for expression in
            ["response.code >=", "(", ")", "'", "\"", "a b", "request.", "\u{0}", "🦀 == 1", "[1, 2", "{1: "]
        {
            assert!(!refused(expression).is_empty());
        }
    }

    #[test]
    fn deep_and_long_texts_end_no_process() {
        let refused = |text: String| Expression::compile(&text).is_err();
        assert!(refused("[".repeat(LONGEST)) && refused("(".repeat(LONGEST)));
        assert!(refused(format!("{}true{}", "(".repeat(2000), ")".repeat(2000))));
        assert!(refused("true || ".repeat(100_000) + "true"));
        // As long as may be: evaluated, whatever comes of it.
        for text in ["1+".repeat(500) + "1 == 501", "!".repeat(1000) + "true", "request".to_owned() + &".a".repeat(500)]
        {
            if let Ok(expression) = Expression::compile(&text) {
                with_record(|record| {
                    let _evaluated = expression.holds(&record);
                });
            }
        }
    }
}
