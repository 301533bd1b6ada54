//! What a decision may look at: borrowed views, nothing is copied.
use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};

use http::HeaderMap;
use http::header::{HOST, HeaderName};

/// A request as routes and rules see it, after path normalisation.
#[derive(Debug, Clone, Copy)]
pub struct RequestView<'a> {
    pub method: &'a str,
    /// Without the query.
    pub path: &'a str,
    /// Without the `?`.
    pub query: Option<&'a str>,
    /// `:authority` or the `Host` header.
    pub authority: &'a str,
    pub scheme: &'a str,
    pub headers: &'a HeaderMap,
    pub source_ip: IpAddr,
    /// Payload of the verified JWT (as `jwt_authn` puts it into metadata), if there is one.
    pub claims: Option<&'a serde_json::Value>,
}

/// A header or pseudo-header to look up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderKey {
    Method,
    Authority,
    Scheme,
    /// Path with query, as on the wire.
    Path,
    Name(HeaderName),
}

impl HeaderKey {
    /// From the name in a configuration; `None` if it is no header name.
    pub fn new(name: &str) -> Option<Self> {
        Some(match name {
            ":method" => Self::Method,
            ":authority" => Self::Authority,
            ":scheme" => Self::Scheme,
            ":path" => Self::Path,
            name => match HeaderName::from_bytes(name.as_bytes()).ok()? {
                // Envoy knows the host by its pseudo-header only.
                HOST => Self::Authority,
                name => Self::Name(name),
            },
        })
    }
}

impl<'a> RequestView<'a> {
    /// The value of a header; several values are joined with `,`.
    pub fn header(&self, key: &HeaderKey) -> Option<Cow<'a, [u8]>> {
        let present = |text: &'a str| (!text.is_empty()).then_some(Cow::Borrowed(text.as_bytes()));
        match key {
            HeaderKey::Method => present(self.method),
            HeaderKey::Authority => present(self.authority),
            HeaderKey::Scheme => present(self.scheme),
            HeaderKey::Path => match self.query {
                None => present(self.path),
                Some(query) => Some(Cow::Owned(format!("{}?{query}", self.path).into_bytes())),
            },
            HeaderKey::Name(name) => joined(self.headers, name),
        }
    }

    /// The first value of a query parameter, percent-decoded.
    pub fn query_parameter(&self, name: &str) -> Option<Cow<'a, [u8]>> {
        self.query?.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let key = percent_encoding::percent_decode_str(key);
            key.eq(name.bytes()).then(|| percent_encoding::percent_decode_str(value).into())
        })
    }
}

/// All values of a header, joined with `,`.
pub fn joined<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.as_bytes();
    let mut all = Cow::Borrowed(first);
    for value in values {
        let all = all.to_mut();
        all.push(b',');
        all.extend_from_slice(value.as_bytes());
    }
    Some(all)
}

/// What authorization may look at.
#[derive(Debug, Clone, Copy)]
pub struct AuthzRequest<'a> {
    /// `None` for plain TCP: tests on headers and paths don't match then.
    pub http: Option<&'a RequestView<'a>>,
    /// The peer's SPIFFE URI, from its verified certificate.
    pub peer: Option<&'a str>,
    /// Address of the client (as HBONE's source says).
    pub direct_remote_ip: IpAddr,
    /// The same after `x-forwarded-for` handling.
    pub remote_ip: IpAddr,
    /// What the client wanted: on a waypoint the CONNECT authority (VIP and service port).
    pub destination: SocketAddr,
    /// SNI, where TLS was terminated or inspected.
    pub server_name: Option<&'a str>,
}
