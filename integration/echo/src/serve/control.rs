//! How a request asks the server to misbehave: by query or by `x-echo-*` header.
use std::time::Duration;

use http::request::Parts;

/// What a request asks for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wish {
    pub status: u16,
    pub delay: Duration,
    /// Fails with 503 at this chance.
    pub fail_percent: f64,
    /// Fails with 503 if the server's name or version is this one.
    pub fail_on: Option<String>,
    /// Closes the connection with RST instead of answering.
    pub reset: bool,
    /// Answers with this many bytes instead of JSON.
    pub body: Option<usize>,
    /// Sends a trailer `grpc-status` with this value.
    pub grpc_status: Option<String>,
}

impl Wish {
    /// # Errors
    /// The parameter that cannot be understood.
    pub(super) fn of(parts: &Parts) -> Result<Wish, String> {
        let mut wish = Wish {
            status: 200,
            delay: Duration::ZERO,
            fail_percent: 0.0,
            fail_on: None,
            reset: false,
            body: None,
            grpc_status: None,
        };
        let query = parts.uri.query().unwrap_or_default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            wish.take(key, value)?;
        }
        for (name, value) in &parts.headers {
            if let Some(key) = name.as_str().strip_prefix("x-echo-") {
                wish.take(&key.replace('-', "_"), value.to_str().unwrap_or_default())?;
            }
        }
        Ok(wish)
    }

    fn take(&mut self, key: &str, value: &str) -> Result<(), String> {
        let bad = || format!("{key}={value}: not understood");
        match key {
            "status" => self.status = value.parse().ok().filter(|code| (200..600).contains(code)).ok_or_else(bad)?,
            "delay" => self.delay = duration(value).ok_or_else(bad)?,
            "fail_percent" => {
                self.fail_percent = value.parse().ok().filter(|p| (0.0..=100.0).contains(p)).ok_or_else(bad)?;
            }
            "fail_on" => self.fail_on = Some(value.to_owned()),
            "reset" => self.reset = value != "0",
            "body" => self.body = Some(value.parse().ok().filter(|n| *n <= 64 << 20).ok_or_else(bad)?),
            "grpc_status" => self.grpc_status = Some(value.to_owned()),
            // Anything else is the user's own.
            _ => {}
        }
        Ok(())
    }
}

/// `200ms`, `1.5s`, or milliseconds without a unit.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    let (number, scale) = match text {
        text if text.ends_with("ms") => (text.strip_suffix("ms")?, 1e-3),
        text if text.ends_with('s') => (text.strip_suffix('s')?, 1.0),
        text => (text, 1e-3),
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * scale).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(uri: &str, header: Option<(&str, &str)>) -> Result<Wish, String> {
        let mut request = http::Request::builder().uri(uri);
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        Wish::of(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn query_and_headers_say_the_same() {
        let asked = wish("/x?status=503&delay=200ms&fail_percent=50&reset=1&body=9&mine=1", None).unwrap();
        assert_eq!((asked.status, asked.delay), (503, Duration::from_millis(200)));
        assert_eq!((asked.fail_percent, asked.reset, asked.body), (50.0, true, Some(9)));
        assert_eq!(wish("/", Some(("x-echo-fail-on", "v1"))).unwrap().fail_on.as_deref(), Some("v1"));
    }

    #[test]
    fn nonsense_is_named() {
        assert_eq!(wish("/?status=9", None).unwrap_err(), "status=9: not understood");
        assert_eq!(wish("/?delay=soon", None).unwrap_err(), "delay=soon: not understood");
    }

    #[test]
    fn durations() {
        assert_eq!(duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(duration("20"), Some(Duration::from_millis(20)));
        assert_eq!(duration("-1s"), None);
    }
}
