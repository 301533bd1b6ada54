//! Attempts that came to nothing, and what the client is told then.

use http::header::{HeaderName, HeaderValue};
use l7_resilience::Reset;
use l7_telemetry::Flags;

use crate::exchange::Exchange;
use crate::reply::Reply;

const OVERLOADED: HeaderName = HeaderName::from_static("x-envoy-overloaded");

/// Why an attempt came to nothing.
pub(super) enum Failed {
    NoHost,
    ClientGone,
    Reset { reset: Reset, transport: Option<String> },
    Protocol(String),
}

impl Failed {
    pub(super) fn of(error: &hyper::Error, unsent: bool) -> Self {
        if error.is_parse() {
            return Self::Protocol(error.to_string());
        }
        let h2 = std::error::Error::source(error).and_then(|source| source.downcast_ref::<h2::Error>());
        let reset = match h2.and_then(h2::Error::reason) {
            Some(h2::Reason::REFUSED_STREAM) => Reset::Refused,
            _ if unsent => Reset::BeforeRequest,
            _ => Reset::Remote,
        };
        Self::Reset { reset, transport: None }
    }

    pub(super) fn reply(self, exchange: &mut Exchange) -> Reply {
        match self {
            Self::NoHost => {
                exchange.reasons.push("no healthy upstream".to_owned());
                Reply::new(503, "no healthy upstream", Flags::NO_HEALTHY_UPSTREAM, "no_healthy_upstream")
            }
            Self::ClientGone => Reply::new(400, "", Flags::DOWNSTREAM_TERMINATION, "downstream_remote_disconnect"),
            Self::Protocol(text) => {
                exchange.failure = Some(text);
                let reason = "protocol error";
                reset_reply(
                    502,
                    reason,
                    None,
                    Flags::UPSTREAM_PROTOCOL_ERROR,
                    "upstream_reset_before_response_started{protocol_error}",
                )
            }
            Self::Reset { reset: Reset::Overflow, .. } => overflow(),
            Self::Reset { reset: Reset::PerTryTimeout, .. } => timed_out("upstream_per_try_timeout"),
            Self::Reset { reset: Reset::ConnectFailure, transport } => {
                exchange.failure.clone_from(&transport);
                let details = "upstream_reset_before_response_started{remote_connection_failure}";
                reset_reply(503, "remote connection failure", transport, Flags::UPSTREAM_CONNECTION_FAILURE, details)
            }
            Self::Reset { reset: Reset::Refused, .. } => {
                let details = "upstream_reset_before_response_started{remote_refused_stream_reset}";
                reset_reply(503, "remote refused stream reset", None, Flags::UPSTREAM_RESET, details)
            }
            Self::Reset { reset: Reset::Remote | Reset::BeforeRequest, .. } => {
                let details = "upstream_reset_before_response_started{connection_termination}";
                reset_reply(503, "connection termination", None, Flags::UPSTREAM_TERMINATION, details)
            }
        }
    }
}

fn reset_reply(status: u16, reason: &str, transport: Option<String>, flags: Flags, details: &'static str) -> Reply {
    let transport = transport.map(|text| format!(", transport failure reason: {text}")).unwrap_or_default();
    let body = format!("upstream connect error or disconnect/reset before headers. reset reason: {reason}{transport}");
    Reply::new(status, body, flags, details)
}

pub(super) fn overflow() -> Reply {
    let reply = reset_reply(
        503,
        "overflow",
        None,
        Flags::UPSTREAM_OVERFLOW,
        "upstream_reset_before_response_started{overflow}",
    );
    reply.header(OVERLOADED, HeaderValue::from_static("true"))
}

pub(super) fn timed_out(details: &'static str) -> Reply {
    Reply::new(504, "upstream request timeout", Flags::UPSTREAM_TIMEOUT, details)
}
