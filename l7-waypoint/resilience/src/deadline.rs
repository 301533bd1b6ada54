//! `grpc-timeout` (gRPC over HTTP/2, "Requests"): at most eight digits and a unit.

use std::time::Duration;

/// The duration a `grpc-timeout` header asks for; `None` when it is malformed, which Envoy ignores too.
pub fn parse_grpc_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count = digits.iter().fold(0u64, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

/// The time a request may take: the route's timeout, lowered by `grpc-timeout` where the route honours it.
///
/// `route` is the route's timeout (`None`: unlimited). `grpc_max` is `max_stream_duration.grpc_timeout_header_max`
/// or the older `max_grpc_timeout`: `None` ignores the header, `Some(0)` takes it as it is, anything else caps it.
/// When the header applies it replaces the route's timeout, as in Envoy.
pub fn overall(route: Option<Duration>, grpc_max: Option<Duration>, header: Option<&[u8]>) -> Option<Duration> {
    let asked = grpc_max.and_then(|cap| Some((cap, parse_grpc_timeout(header?)?)));
    match asked {
        Some((Duration::ZERO, asked)) => Some(asked).filter(|timeout| !timeout.is_zero()),
        Some((cap, asked)) if asked.is_zero() => Some(cap),
        Some((cap, asked)) => Some(asked.min(cap)),
        None => route.filter(|timeout| !timeout.is_zero()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_malformed_values() {
        assert_eq!(parse_grpc_timeout(b"5S"), Some(Duration::from_secs(5)));
        assert_eq!(parse_grpc_timeout(b"100m"), Some(Duration::from_millis(100)));
        assert_eq!(parse_grpc_timeout(b"2H"), Some(Duration::from_secs(7200)));
        for bad in [&b""[..], b"S", b"123456789S", b"5", b"-5S", b"5s", b"5 S"] {
            assert_eq!(parse_grpc_timeout(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_header_applies_only_where_the_route_says_so() {
        let second = Duration::from_secs(1);
        assert_eq!(overall(None, None, Some(b"1S")), None);
        assert_eq!(overall(Some(second * 9), None, Some(b"1S")), Some(second * 9));
        assert_eq!(overall(None, Some(Duration::ZERO), Some(b"1S")), Some(second));
        assert_eq!(overall(Some(second * 3), Some(second * 3), Some(b"9S")), Some(second * 3));
        assert_eq!(overall(Some(second * 3), Some(second * 3), Some(b"1S")), Some(second));
        assert_eq!(overall(Some(Duration::ZERO), None, None), None);
    }
}
