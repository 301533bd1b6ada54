//! Bounds for what is random.

/// Standard deviations a share may be off: once in 15,000 by chance.
const SIGMAS: f64 = 4.0;

/// How many of `total` independent requests may fall to a choice of probability `share`: lowest and highest count
/// within four standard deviations of the binomial distribution.
pub(super) fn bounds(total: u64, share: f64) -> (u64, u64) {
    let mean = total as f64 * share;
    let spread = SIGMAS * (mean * (1.0 - share)).sqrt();
    let low = (mean - spread).max(0.0).ceil();
    let high = (mean + spread).min(total as f64).floor();
    (low as u64, high as u64)
}

/// Whether the count is within [`bounds`], and the sentence that says so.
pub(super) fn judge(what: &str, count: u64, total: u64, share: f64) -> (bool, String) {
    let (low, high) = bounds(total, share);
    let percent = if total == 0 { 0.0 } else { count as f64 * 100.0 / total as f64 };
    let text =
        format!("{what}: {count} of {total} ({percent:.1} %), {low} to {high} expected at {:.0} %", share * 100.0);
    (total > 0 && (low..=high).contains(&count), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_sigma() {
        // 2,000 at 10 %: sigma is the square root of 180.
        assert_eq!(bounds(2000, 0.1), (147, 253));
        assert_eq!(bounds(2000, 0.0), (0, 0));
        assert_eq!(bounds(2000, 1.0), (2000, 2000));
        assert!(judge("v2", 200, 2000, 0.1).0);
        assert!(!judge("v2", 300, 2000, 0.1).0);
        assert!(!judge("v2", 0, 0, 0.0).0, "nothing measured shows nothing");
    }
}
