//! Whether a failed attempt is tried again, and after how long (Envoy `RetryPolicy`).

use std::time::Duration;

use crate::random::Rng;

/// What `retry_on` lists, as a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RetryOn(u32);

/// Tokens of `retry_on`, in Envoy's spelling, with the bit that stands for each.
const TOKENS: [(&str, u32); 16] = [
    ("5xx", RetryOn::SERVER_ERROR),
    ("gateway-error", RetryOn::GATEWAY_ERROR),
    ("reset", RetryOn::RESET),
    ("reset-before-request", RetryOn::RESET_BEFORE_REQUEST),
    ("connect-failure", RetryOn::CONNECT_FAILURE),
    ("envoy-ratelimited", RetryOn::RATE_LIMITED),
    ("retriable-4xx", RetryOn::RETRIABLE_4XX),
    ("refused-stream", RetryOn::REFUSED_STREAM),
    ("retriable-status-codes", RetryOn::STATUS_CODES),
    ("retriable-headers", RetryOn::HEADERS),
    ("http3-post-connect-failure", 0),
    ("cancelled", RetryOn::GRPC_CANCELLED),
    ("deadline-exceeded", RetryOn::GRPC_DEADLINE_EXCEEDED),
    ("internal", RetryOn::GRPC_INTERNAL),
    ("resource-exhausted", RetryOn::GRPC_RESOURCE_EXHAUSTED),
    ("unavailable", RetryOn::GRPC_UNAVAILABLE),
];

impl RetryOn {
    /// `5xx`
    pub const SERVER_ERROR: u32 = 1;
    /// `gateway-error`
    pub const GATEWAY_ERROR: u32 = 1 << 1;
    /// `reset`
    pub const RESET: u32 = 1 << 2;
    /// `reset-before-request`
    pub const RESET_BEFORE_REQUEST: u32 = 1 << 3;
    /// `connect-failure`
    pub const CONNECT_FAILURE: u32 = 1 << 4;
    /// `envoy-ratelimited`
    pub const RATE_LIMITED: u32 = 1 << 5;
    /// `retriable-4xx`
    pub const RETRIABLE_4XX: u32 = 1 << 6;
    /// `refused-stream`
    pub const REFUSED_STREAM: u32 = 1 << 7;
    /// `retriable-status-codes`
    pub const STATUS_CODES: u32 = 1 << 8;
    /// `retriable-headers`
    pub const HEADERS: u32 = 1 << 9;
    /// gRPC status 1
    pub const GRPC_CANCELLED: u32 = 1 << 10;
    /// gRPC status 4
    pub const GRPC_DEADLINE_EXCEEDED: u32 = 1 << 11;
    /// gRPC status 13
    pub const GRPC_INTERNAL: u32 = 1 << 12;
    /// gRPC status 8
    pub const GRPC_RESOURCE_EXHAUSTED: u32 = 1 << 13;
    /// gRPC status 14
    pub const GRPC_UNAVAILABLE: u32 = 1 << 14;

    /// Reads a comma-separated list; bare numbers are status codes and returned beside the set. Unknown tokens
    /// come back as the third part, for the caller to report: Envoy ignores them.
    pub fn parse(list: &str) -> (Self, Vec<u16>, Vec<String>) {
        let (mut set, mut codes, mut unknown) = (0, Vec::new(), Vec::new());
        for token in list.split(',').map(str::trim).filter(|token| !token.is_empty()) {
            if let Some((_, bit)) = TOKENS.iter().find(|(name, _)| *name == token) {
                set |= bit;
            } else if let Some(code) = token.parse().ok().filter(|code| (100..600).contains(code)) {
                set |= Self::STATUS_CODES;
                codes.push(code);
            } else {
                unknown.push(token.to_owned());
            }
        }
        (Self(set), codes, unknown)
    }

    /// The set of the bits in `mask`.
    pub fn of(mask: u32) -> Self {
        Self(mask)
    }

    /// Whether any bit of `mask` is in the set.
    pub fn has(self, mask: u32) -> bool {
        self.0 & mask != 0
    }

    /// Whether a response with `grpc-status` in its headers or trailers can matter.
    pub fn any_grpc(self) -> bool {
        self.has(0x1f << 10)
    }
}

/// How an attempt failed without a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// The connection could not be made (refused, timed out, tunnel refused).
    ConnectFailure,
    /// HTTP/2 `REFUSED_STREAM`: the peer says it did nothing.
    Refused,
    /// The connection or stream ended before any of the request was sent.
    BeforeRequest,
    /// The connection or stream ended later, before response headers.
    Remote,
    /// The attempt's own timeout.
    PerTryTimeout,
    /// A circuit breaker of ours; never retried.
    Overflow,
}

/// One route's policy. `Default`: never retries.
#[derive(Debug, Clone, Default)]
pub struct RetryPolicy {
    /// What is retried.
    pub on: RetryOn,
    /// Retries after the first attempt.
    pub retries: u32,
    /// Statuses for `retriable-status-codes`.
    pub codes: Vec<u16>,
    /// Waits between attempts.
    pub backoff: Backoff,
    /// Time for one attempt.
    pub per_try: Option<Duration>,
    /// Don't pick hosts that failed already (Envoy `previous_hosts`), this many picks at most.
    pub other_hosts: Option<u32>,
    /// Move to priorities not tried yet after this many attempts (Envoy `previous_priorities`).
    pub other_priorities: Option<u32>,
}

impl RetryPolicy {
    /// Whether a response is one to retry. `grpc_status` is set for trailers-only gRPC responses.
    pub fn retries_response(&self, status: u16, grpc_status: Option<u8>, rate_limited: bool) -> bool {
        let on = self.on;
        if rate_limited {
            return on.has(RetryOn::RATE_LIMITED);
        }
        (on.has(RetryOn::SERVER_ERROR) && status >= 500)
            || (on.has(RetryOn::GATEWAY_ERROR) && matches!(status, 502..=504))
            || (on.has(RetryOn::RETRIABLE_4XX) && status == 409)
            || (on.has(RetryOn::STATUS_CODES) && self.codes.contains(&status))
            || grpc_status.is_some_and(|code| on.has(grpc_bit(code)))
    }

    /// Whether an attempt that ended so is one to retry.
    pub fn retries_reset(&self, reset: Reset) -> bool {
        let any = RetryOn::RESET | RetryOn::SERVER_ERROR | RetryOn::GATEWAY_ERROR;
        match reset {
            Reset::Overflow => false,
            Reset::ConnectFailure => self.on.has(any | RetryOn::CONNECT_FAILURE | RetryOn::RESET_BEFORE_REQUEST),
            Reset::Refused => self.on.has(any | RetryOn::REFUSED_STREAM),
            Reset::BeforeRequest => self.on.has(any | RetryOn::RESET_BEFORE_REQUEST),
            Reset::Remote | Reset::PerTryTimeout => self.on.has(any),
        }
    }
}

fn grpc_bit(code: u8) -> u32 {
    match code {
        1 => RetryOn::GRPC_CANCELLED,
        4 => RetryOn::GRPC_DEADLINE_EXCEEDED,
        8 => RetryOn::GRPC_RESOURCE_EXHAUSTED,
        13 => RetryOn::GRPC_INTERNAL,
        14 => RetryOn::GRPC_UNAVAILABLE,
        _ => 0,
    }
}

/// Fully jittered exponential backoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// Upper bound of the first wait.
    pub base: Duration,
    /// Upper bound of any wait.
    pub max: Duration,
}

impl Default for Backoff {
    /// Envoy's: 25 ms, at most ten times that.
    fn default() -> Self {
        Self { base: Duration::from_millis(25), max: Duration::from_millis(250) }
    }
}

impl Backoff {
    /// The wait before retry number `retry` (from 1): uniform below `base * (2^retry - 1)`, capped.
    pub fn wait(&self, retry: u32, rng: &mut Rng) -> Duration {
        let factor = 2u64.saturating_pow(retry.clamp(1, 32)) - 1;
        let bound = (self.base.as_micros() as u64).saturating_mul(factor).min(self.max.as_micros() as u64);
        Duration::from_micros(rng.below(bound))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(on: &str) -> RetryPolicy {
        let (on, codes, unknown) = RetryOn::parse(on);
        assert!(unknown.is_empty(), "{unknown:?}");
        RetryPolicy { on, codes, retries: 2, ..RetryPolicy::default() }
    }

    #[test]
    fn istio_default_retries_no_plain_503() {
        let policy = policy("connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes");
        assert!(!policy.retries_response(503, None, false));
        assert!(policy.retries_response(200, Some(14), false));
        assert!(policy.retries_response(200, Some(1), false));
        assert!(!policy.retries_response(200, Some(13), false));
        assert!(policy.retries_reset(Reset::ConnectFailure));
        assert!(policy.retries_reset(Reset::Refused));
        assert!(!policy.retries_reset(Reset::Remote));
        assert!(!policy.retries_reset(Reset::PerTryTimeout));
    }

    #[test]
    fn every_token_does_what_it_says() {
        assert!(policy("5xx").retries_response(500, None, false) && policy("5xx").retries_reset(Reset::PerTryTimeout));
        assert!(!policy("gateway-error").retries_response(500, None, false));
        assert!(policy("gateway-error").retries_response(504, None, false));
        assert!(policy("retriable-4xx").retries_response(409, None, false));
        assert!(policy("503,5xx").codes == [503]);
        assert!(policy("429").retries_response(429, None, false));
        assert!(policy("reset-before-request").retries_reset(Reset::BeforeRequest));
        assert!(!policy("reset-before-request").retries_reset(Reset::Remote));
        assert!(!policy("5xx").retries_response(503, None, true), "rate limited is its own token");
        assert!(policy("envoy-ratelimited").retries_response(429, None, true));
        for on in ["5xx", "reset", "connect-failure"] {
            assert!(!policy(on).retries_reset(Reset::Overflow), "{on}");
        }
        assert_eq!(RetryOn::parse("5xx, nonsense,9999").2, ["nonsense", "9999"]);
    }

    #[test]
    fn waits_stay_below_their_bound() {
        let (backoff, mut rng) = (Backoff::default(), Rng::new(1));
        for retry in 1..40 {
            let bound = Duration::from_millis(25 * (2u64.pow(retry.min(10)) - 1)).min(Duration::from_millis(250));
            for _ in 0..50 {
                assert!(backoff.wait(retry, &mut rng) < bound);
            }
        }
    }
}
