//! Latency percentiles.
use std::time::Duration;

use serde::Serialize;

/// Milliseconds, nearest rank.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Latency {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Latency {
    /// Sorts `times`.
    pub(crate) fn of(times: &mut [Duration]) -> Latency {
        if times.is_empty() {
            return Latency::default();
        }
        times.sort_unstable();
        let millis = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let rank = |percent: usize| millis(times[(times.len() * percent).div_ceil(100).max(1) - 1]);
        let total: Duration = times.iter().sum();
        Latency {
            mean: millis(total / u32::try_from(times.len()).unwrap_or(u32::MAX)),
            p50: rank(50),
            p90: rank(90),
            p99: rank(99),
            max: rank(100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rank() {
        let mut times: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        let latency = Latency::of(&mut times);
        assert_eq!((latency.p50, latency.p90, latency.p99, latency.max), (50.0, 90.0, 99.0, 100.0));
        assert_eq!(Latency::of(&mut []), Latency::default());
        assert_eq!(Latency::of(&mut [Duration::from_millis(3)]).p50, 3.0);
    }
}
