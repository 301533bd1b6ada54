//! Headers that ride on a CONNECT. None of them is an identity.
use std::fmt::Write;
use std::net::SocketAddr;

use http::HeaderMap;

/// `forwarded` (RFC 7239): the client on whose behalf the tunnel is opened, and the host it asked for.
pub fn forwarded_value(client: SocketAddr, host: Option<&str>) -> String {
    let mut out = String::with_capacity(64);
    // Writing to a String cannot fail.
    let _ = write!(out, "for=\"{client}\"");
    if let Some(host) = host.filter(|host| host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._*".contains(&b))) {
        let _ = write!(out, ";host={host}");
    }
    out
}

/// The client in a `forwarded` header written by [`forwarded_value`] (ztunnel's form as well): the first
/// element's `for`, an address with or without port. Believe it only from a peer that may say so.
pub fn forwarded_for(headers: &HeaderMap) -> Option<SocketAddr> {
    let text = headers.get("forwarded")?.to_str().ok()?;
    let first = text.split(',').next()?;
    let value = first.split(';').find_map(|pair| {
        let (key, value) = pair.trim().split_once('=')?;
        key.eq_ignore_ascii_case("for").then_some(value)
    })?;
    let value = value.trim().trim_matches('"');
    value.parse().ok().or_else(|| {
        let bare = value.trim_start_matches('[').trim_end_matches(']');
        bare.parse().ok().map(|ip| SocketAddr::new(ip, 0))
    })
}

/// Telemetry about the sender (W3C baggage, ztunnel's keys). Never trust it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Baggage<'a> {
    pub cluster: &'a str,
    pub namespace: &'a str,
    /// `deployment`, `pod`, `job` or `cronjob`.
    pub workload_type: &'a str,
    pub workload_name: &'a str,
    pub service_name: &'a str,
    pub service_version: &'a str,
    pub region: &'a str,
    pub zone: &'a str,
}

impl Baggage<'_> {
    /// The header's value; parts that are empty are left out.
    pub fn value(&self) -> String {
        let mut out = String::with_capacity(160);
        let kind = format!("k8s.{}.name", self.workload_type);
        for (key, value) in [
            ("k8s.cluster.name", self.cluster),
            ("k8s.namespace.name", self.namespace),
            (kind.as_str(), self.workload_name),
            ("service.name", self.service_name),
            ("service.version", self.service_version),
            ("cloud.region", self.region),
            ("cloud.availability_zone", self.zone),
        ] {
            let clean = !value.is_empty() && value.bytes().all(|b| b.is_ascii_graphic() && !b"\",;\\=".contains(&b));
            if clean {
                let separator = if out.is_empty() { "" } else { "," };
                // Writing to a String cannot fail.
                let _ = write!(out, "{separator}{key}={value}");
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_comes_back() {
        for client in ["10.0.0.1:4711", "[fd00::1]:4711"] {
            let mut headers = HeaderMap::new();
            let value = forwarded_value(client.parse().unwrap(), Some("payments.shop.svc.cluster.local"));
            headers.insert("forwarded", value.parse().unwrap());
            assert_eq!(forwarded_for(&headers), client.parse().ok());
        }
    }

    #[test]
    fn forwarded_of_others() {
        for (text, expected) in [
            ("host=x;For=\"[fd00::2]\"", Some("[fd00::2]:0")),
            ("for=10.0.0.1, for=10.0.0.2:1", Some("10.0.0.1:0")),
            ("for=unknown", None),
            ("by=10.0.0.1", None),
            ("", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("forwarded", text.parse().unwrap());
            assert_eq!(forwarded_for(&headers), expected.map(|addr| addr.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn baggage_leaves_out_what_is_unknown_or_unsafe() {
        let baggage =
            Baggage { namespace: "shop", workload_type: "deployment", workload_name: "a,b=c", ..Default::default() };
        assert_eq!(baggage.value(), "k8s.namespace.name=shop");
    }
}
