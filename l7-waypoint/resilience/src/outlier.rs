//! Passive health checking: hosts that fail several times in a row are left out for a while (Envoy `outlier_detection`).
//!
//! There is no sweep: an ejection carries the time it ends, so a host returns by the clock alone and nothing runs
//! while no requests come. What Envoy's sweep does besides (letting the ejection time shrink again, one step per
//! interval) is computed when the next ejection needs it.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::host::HostState;

/// One cluster's settings; a threshold of `None` is switched off.
#[derive(Debug, Clone, PartialEq)]
pub struct OutlierConfig {
    /// 5xx responses in a row (local failures count as 5xx unless split).
    pub consecutive_5xx: Option<u32>,
    /// 502, 503, 504 in a row (local failures count unless split).
    pub consecutive_gateway: Option<u32>,
    /// Connect failures, resets and timeouts in a row; only with `split_local_origin`.
    pub consecutive_local: Option<u32>,
    /// Count local failures apart from responses.
    pub split_local_origin: bool,
    /// How often Envoy would sweep; here: how fast the ejection time shrinks again.
    pub interval: Duration,
    /// Length of the first ejection; the n-th lasts n times as long.
    pub base_ejection: Duration,
    /// Ceiling of the length.
    pub max_ejection: Duration,
    /// Share of the cluster's hosts that may be out at a time, 0 to 100.
    pub max_ejection_percent: u32,
    /// Eject one host even if that exceeds the share.
    pub always_eject_one: bool,
}

impl Default for OutlierConfig {
    /// Envoy's defaults (gateway errors are not enforced by default).
    fn default() -> Self {
        Self {
            consecutive_5xx: Some(5),
            consecutive_gateway: None,
            consecutive_local: Some(5),
            split_local_origin: false,
            interval: Duration::from_secs(10),
            base_ejection: Duration::from_secs(30),
            max_ejection: Duration::from_secs(300),
            max_ejection_percent: 10,
            always_eject_one: false,
        }
    }
}

/// How one attempt on a host ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A response with this status (for gRPC: the HTTP equivalent of the gRPC status when it says failure).
    Response(u16),
    /// No response: connect failure, reset, timeout.
    LocalFailure,
}

/// Counts the outcome; true when the host has just reached a threshold and should be ejected.
pub(crate) fn record(config: &OutlierConfig, host: &HostState, outcome: Outcome) -> bool {
    let status = match outcome {
        Outcome::LocalFailure if config.split_local_origin => {
            return bump(&host.consecutive_local, config.consecutive_local);
        }
        Outcome::LocalFailure => 503,
        Outcome::Response(status) => {
            if config.split_local_origin {
                clear(&host.consecutive_local);
            }
            status
        }
    };
    if status < 500 {
        clear(&host.consecutive_5xx);
        clear(&host.consecutive_gateway);
        return false;
    }
    let gateway = if matches!(status, 502..=504) {
        bump(&host.consecutive_gateway, config.consecutive_gateway)
    } else {
        clear(&host.consecutive_gateway);
        false
    };
    bump(&host.consecutive_5xx, config.consecutive_5xx) || gateway
}

/// Ejects the host at `now` and returns when it comes back. The caller has checked the ejection share.
pub(crate) fn eject(config: &OutlierConfig, host: &HostState, now: u64) -> u64 {
    let interval = (config.interval.as_millis() as u64).max(1);
    let calm = now.saturating_sub(host.returned_at.load(Relaxed)) / interval;
    let before = u64::from(host.ejections.load(Relaxed)).saturating_sub(calm);
    let count = before + 1;
    let base = config.base_ejection.as_millis() as u64;
    let length = base.saturating_mul(count).min((config.max_ejection.as_millis() as u64).max(base));
    let until = now + length;
    host.ejections.store(count.min(u64::from(u32::MAX)) as u32, Relaxed);
    host.returned_at.store(until, Relaxed);
    host.ejected_until.store(until, Relaxed);
    clear(&host.consecutive_5xx);
    clear(&host.consecutive_gateway);
    clear(&host.consecutive_local);
    until
}

fn bump(count: &std::sync::atomic::AtomicU32, threshold: Option<u32>) -> bool {
    let now = count.fetch_add(1, Relaxed) + 1;
    threshold.is_some_and(|threshold| threshold > 0 && now >= threshold)
}

/// Writes only when there is something to clear, so that healthy traffic doesn't share a dirty cache line.
fn clear(count: &std::sync::atomic::AtomicU32) {
    if count.load(Relaxed) != 0 {
        count.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> OutlierConfig {
        OutlierConfig { consecutive_5xx: Some(3), consecutive_gateway: Some(2), ..OutlierConfig::default() }
    }

    #[test]
    fn thresholds_count_consecutive_failures_only() {
        let host = HostState::default();
        for status in [500, 500, 200, 500, 500] {
            assert!(!record(&config(), &host, Outcome::Response(status)), "{status}");
        }
        assert!(record(&config(), &host, Outcome::Response(500)));
    }

    #[test]
    fn gateway_errors_have_their_own_count() {
        let host = HostState::default();
        assert!(!record(&config(), &host, Outcome::Response(503)));
        assert!(!record(&config(), &host, Outcome::Response(500)), "a 500 breaks the row of gateway errors");
        let host = HostState::default();
        assert!(!record(&config(), &host, Outcome::Response(502)));
        assert!(record(&config(), &host, Outcome::LocalFailure), "a connect failure counts as 503");
    }

    #[test]
    fn split_local_failures_leave_responses_alone() {
        let split = OutlierConfig { split_local_origin: true, consecutive_local: Some(2), ..config() };
        let host = HostState::default();
        assert!(!record(&split, &host, Outcome::LocalFailure));
        assert!(!record(&split, &host, Outcome::Response(200)));
        assert!(!record(&split, &host, Outcome::LocalFailure));
        assert!(record(&split, &host, Outcome::LocalFailure));
    }

    #[test]
    fn ejections_grow_and_shrink_again() {
        let (config, host) = (config(), HostState::default());
        assert_eq!(eject(&config, &host, 1_000), 31_000);
        assert!(host.ejected(30_999) && !host.ejected(31_000));
        assert_eq!(eject(&config, &host, 31_000), 91_000, "second time: twice as long");
        assert_eq!(eject(&config, &host, 101_000), 161_000, "one calm interval takes one step back");
        assert_eq!(eject(&config, &host, 1_000_000), 1_030_000, "long calm: as the first");
    }
}
