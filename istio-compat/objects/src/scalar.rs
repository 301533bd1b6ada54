//! Scalars that Istio and the Gateway API write as text.
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error as _};

/// A length of time written as Go does: `1h30m`, `750ms`, `2.5s`, `0s`. Never negative.
///
/// Istio's CRDs and the Gateway API (GEP-2257) share this notation; the protobuf form (`2.5s`) is a subset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Duration(pub std::time::Duration);

impl Deref for Duration {
    type Target = std::time::Duration;
    fn deref(&self) -> &std::time::Duration {
        &self.0
    }
}

impl From<Duration> for std::time::Duration {
    fn from(value: Duration) -> Self {
        value.0
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// Why a text is no [`Duration`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no duration: {reason} (write for example 750ms, 2.5s, 1h30m)")]
pub struct DurationError {
    text: String,
    reason: &'static str,
}

impl FromStr for Duration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Duration, DurationError> {
        let fault = |reason| DurationError { text: text.to_owned(), reason };
        if text == "0" {
            return Ok(Duration::default());
        }
        if text.is_empty() {
            return Err(fault("it is empty"));
        }
        let mut nanos: u128 = 0;
        let mut rest = text;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or(fault("a unit is missing"))?;
            let (number, tail) = rest.split_at(digits);
            let (unit, after) = split_unit(tail).ok_or(fault("the unit is none of ns, us, ms, s, m, h"))?;
            nanos = scaled(number, unit).and_then(|n| nanos.checked_add(n)).ok_or(fault("the number is malformed"))?;
            rest = after;
        }
        let seconds = u64::try_from(nanos / 1_000_000_000).map_err(|_| fault("it is too long"))?;
        // The remainder is below 10^9, so it fits.
        Ok(Duration(std::time::Duration::new(seconds, (nanos % 1_000_000_000) as u32)))
    }
}

fn split_unit(tail: &str) -> Option<(u128, &str)> {
    const UNITS: [(&str, u128); 7] = [
        ("ns", 1),
        ("us", 1_000),
        ("µs", 1_000),
        ("ms", 1_000_000),
        ("s", 1_000_000_000),
        ("m", 60_000_000_000),
        ("h", 3_600_000_000_000),
    ];
    UNITS.iter().find_map(|(name, nanos)| tail.strip_prefix(name).map(|after| (*nanos, after)))
}

/// `number` (digits with at most one point) times `unit` in whole nanoseconds, rounded down.
fn scaled(number: &str, unit: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut nanos = whole.checked_mul(unit)?;
    let mut place = unit;
    for digit in fraction.bytes() {
        place /= 10;
        nanos = nanos.checked_add(place * u128::from(digit - b'0'))?;
    }
    Some(nanos)
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Bytes written in base64, as protobuf's JSON form does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Base64(pub Vec<u8>);

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Base64, D::Error> {
        use base64::Engine as _;
        let text = String::deserialize(deserializer)?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(&text);
        bytes.map(Base64).map_err(|error| D::Error::custom(format!("no base64: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(text: &str) -> u128 {
        text.parse::<Duration>().unwrap().as_millis()
    }

    #[test]
    fn durations_as_go_writes_them() {
        assert_eq!(millis("750ms"), 750);
        assert_eq!(millis("2.5s"), 2_500);
        assert_eq!(millis("1h30m"), 5_400_000);
        assert_eq!(millis("0s"), 0);
        assert_eq!("1.5us".parse::<Duration>().unwrap().as_nanos(), 1_500);
    }

    #[test]
    fn malformed_durations_say_why() {
        for text in ["", "5", "1.2.3s", "3 s", "-1s", "1y", ".s"] {
            let error = text.parse::<Duration>().unwrap_err().to_string();
            assert!(error.contains("is no duration"), "{text}: {error}");
        }
    }
}
