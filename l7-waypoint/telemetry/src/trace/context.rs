//! Whose trace a request belongs to, as its headers tell: [W3C Trace Context](https://www.w3.org/TR/trace-context/) and
//! [B3](https://github.com/openzipkin/b3-propagation).

use http::header::{HeaderMap, HeaderName, HeaderValue};

pub(super) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(super) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// The headers in which traces are handed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Propagation {
    W3c,
    B3,
    /// Both are written; B3 is read first.
    B3AndW3c,
}

/// One request's place in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    pub(super) trace_id: u128,
    /// The caller's span; `None` where the trace begins here.
    pub(super) parent: Option<u64>,
    pub(super) span_id: u64,
    pub sampled: bool,
}

/// What a caller says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Caller {
    /// Its trace and its span.
    pub(super) span: Option<(u128, u64)>,
    /// Whether spans are kept; `None`: it has not decided.
    pub(super) sampled: Option<bool>,
}

impl Propagation {
    /// What the caller says of its trace. What cannot be read is as good as nothing.
    pub(super) fn caller(self, headers: &HeaderMap) -> Caller {
        let told = match self {
            Self::W3c => w3c(headers),
            Self::B3 => b3(headers),
            Self::B3AndW3c => b3(headers).or_else(|| w3c(headers)),
        };
        told.unwrap_or_default()
    }

    /// Tells the upstream.
    pub(super) fn tell(self, headers: &mut HeaderMap, context: TraceContext) {
        if self != Self::B3 {
            if context.parent.is_none() {
                // Of a trace that cannot be read (W3C Trace Context 4.3).
                headers.remove(TRACESTATE);
            }
            let TraceContext { trace_id, span_id, sampled, .. } = context;
            headers.insert(TRACEPARENT, value(&format!("00-{trace_id:032x}-{span_id:016x}-{:02x}", u8::from(sampled))));
        }
        if self != Self::W3c {
            context.tell_b3(headers);
        }
    }

    /// The trace's number in headers that the upstream was told by.
    pub(super) fn trace_id(self, headers: &HeaderMap) -> Option<&str> {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        if self == Self::W3c { text(TRACEPARENT)?.split('-').nth(1) } else { text(B3_TRACE) }
    }
}

impl TraceContext {
    fn tell_b3(self, headers: &mut HeaderMap) {
        let trace = b3_trace_id(self.trace_id);
        let span = format!("{:016x}", self.span_id);
        let sampled = if self.sampled { "1" } else { "0" };
        let parent = self.parent.map(|parent| format!("{parent:016x}"));
        // Whoever was told in one header reads that first.
        if headers.contains_key(B3) {
            let end = parent.as_ref().map_or(String::new(), |parent| format!("-{parent}"));
            headers.insert(B3, value(&format!("{trace}-{span}-{sampled}{end}")));
        }
        headers.insert(B3_TRACE, value(&trace));
        headers.insert(B3_SPAN, value(&span));
        headers.insert(B3_SAMPLED, HeaderValue::from_static(sampled));
        match parent {
            Some(parent) => headers.insert(B3_PARENT, value(&parent)),
            None => headers.remove(B3_PARENT),
        };
    }
}

/// Of 64 bits where the rest is nothing.
pub(super) fn b3_trace_id(id: u128) -> String {
    match u64::try_from(id) {
        Ok(short) => format!("{short:016x}"),
        Err(_) => format!("{id:032x}"),
    }
}

/// W3C Trace Context 2.2.
fn w3c(headers: &HeaderMap) -> Option<Caller> {
    let mut parts = only(headers, TRACEPARENT)?.split('-');
    let version = hex(parts.next()?, 2)?;
    let trace_id = hex(parts.next()?, 32).filter(|id| *id != 0)?;
    let span_id = span_id(parts.next()?)?;
    let flags = hex(parts.next()?, 2)?;
    // Later versions may say more; 255 is none.
    let known = version == 0 && parts.next().is_none() || (1..255).contains(&version);
    known.then_some(Caller { span: Some((trace_id, span_id)), sampled: Some(flags & 1 == 1) })
}

/// In one header or in several; the one is read first.
fn b3(headers: &HeaderMap) -> Option<Caller> {
    if let Some(told) = only(headers, B3).and_then(b3_single) {
        return Some(told);
    }
    let text = |name| only(headers, name);
    let span = || Some((b3_trace(text(B3_TRACE)?)?, span_id(text(B3_SPAN)?)?));
    let debug = || text(B3_FLAGS).is_some_and(|flags| flags == "1").then_some(true);
    let told = Caller { span: span(), sampled: text(B3_SAMPLED).and_then(b3_sampled).or_else(debug) };
    (told != Caller::default()).then_some(told)
}

/// `TRACE-SPAN[-SAMPLED[-PARENT]]`, or the decision alone.
fn b3_single(text: &str) -> Option<Caller> {
    let mut parts = text.split('-');
    let first = parts.next()?;
    let Some(span) = parts.next() else { return Some(Caller { span: None, sampled: Some(b3_sampled(first)?) }) };
    let span = (b3_trace(first)?, span_id(span)?);
    let sampled = match parts.next() {
        Some(sampled) => Some(b3_sampled(sampled)?),
        None => None,
    };
    if let Some(parent) = parts.next() {
        hex(parent, 16)?;
    }
    parts.next().is_none().then_some(Caller { span: Some(span), sampled })
}

fn b3_trace(text: &str) -> Option<u128> {
    hex(text, 32).or_else(|| hex(text, 16)).filter(|id| *id != 0)
}

/// `d` (debug) keeps spans too.
fn b3_sampled(text: &str) -> Option<bool> {
    match text {
        "1" | "d" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

fn span_id(text: &str) -> Option<u64> {
    hex(text, 16).and_then(|id| u64::try_from(id).ok()).filter(|id| *id != 0)
}

/// A header that is there once: more than one are as good as none.
fn only(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut given = headers.get_all(name).iter();
    let (first, None) = (given.next()?, given.next()) else { return None };
    first.to_str().ok()
}

/// Exactly `digits` lower-case hexadecimal digits.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (text.len() == digits && text.bytes().all(lower)).then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""))
}
