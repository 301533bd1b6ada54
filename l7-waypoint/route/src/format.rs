//! Header values with Envoy's command operators, parsed once.
use std::fmt::Write as _;
use std::net::SocketAddr;

use l7_authz::l7::{HeaderKey, RequestView};

use crate::CompileError;

/// What operators may read; whatever is not known yet is `None` and formats as nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct FormatContext<'a> {
    pub request: Option<&'a RequestView<'a>>,
    pub response_headers: Option<&'a http::HeaderMap>,
    pub response_code: Option<u16>,
    /// The client, as HBONE's source says.
    pub downstream_remote: Option<SocketAddr>,
    /// What the client connected to: the VIP and service port.
    pub downstream_local: Option<SocketAddr>,
    /// SPIFFE URIs.
    pub peer: Option<&'a str>,
    pub local: Option<&'a str>,
    /// `HTTP/1.1`, `HTTP/2`.
    pub protocol: Option<&'a str>,
    pub server_name: Option<&'a str>,
    pub upstream_host: Option<SocketAddr>,
    pub upstream_cluster: Option<&'a str>,
    pub route_name: Option<&'a str>,
    pub hostname: Option<&'a str>,
}

/// A parsed text.
#[derive(Debug, Clone)]
pub struct Format {
    parts: Box<[Part]>,
}

#[derive(Debug, Clone)]
enum Part {
    Literal(Box<str>),
    Operator(Operator),
}

#[derive(Debug, Clone)]
enum Operator {
    DownstreamRemote(Piece),
    DownstreamLocal(Piece),
    UpstreamHost(Piece),
    PeerUriSan,
    LocalUriSan,
    Protocol,
    ServerName,
    UpstreamCluster,
    RouteName,
    Hostname,
    ResponseCode,
    Request { header: HeaderKey, otherwise: Option<HeaderKey>, max: Option<usize> },
    Response { header: HeaderKey, otherwise: Option<HeaderKey>, max: Option<usize> },
}

/// Part of an address.
#[derive(Debug, Clone, Copy)]
enum Piece {
    Whole,
    Ip,
    Port,
}

impl Format {
    /// Parses `%OPERATOR(arguments):length%`; `%%` is a percent sign.
    ///
    /// # Errors
    /// If an operator is not closed or not known.
    pub fn parse(text: &str) -> Result<Self, CompileError> {
        let wrong = |reason: String| CompileError::Format { format: text.to_owned(), reason };
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('%') {
            literal.push_str(before);
            if let Some(after) = after.strip_prefix('%') {
                literal.push('%');
                rest = after;
                continue;
            }
            let (operator, after) = after.split_once('%').ok_or_else(|| wrong("a % is not closed".to_owned()))?;
            if !literal.is_empty() {
                parts.push(Part::Literal(std::mem::take(&mut literal).into()));
            }
            let parsed = parse_operator(operator).ok_or_else(|| wrong(format!("%{operator}% is not supported")))?;
            parts.push(Part::Operator(parsed));
            rest = after;
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal.into()));
        }
        Ok(Self { parts: parts.into() })
    }

    /// The text if there are no operators.
    pub fn literal(&self) -> Option<&str> {
        match &*self.parts {
            [] => Some(""),
            [Part::Literal(text)] => Some(text),
            _ => None,
        }
    }

    /// Formats; what is not known is empty.
    pub fn format(&self, context: &FormatContext<'_>) -> String {
        let mut out = String::new();
        for part in &self.parts {
            match part {
                Part::Literal(text) => out.push_str(text),
                Part::Operator(operator) => operator.format(context, &mut out),
            }
        }
        out
    }
}

fn parse_operator(text: &str) -> Option<Operator> {
    Some(match text {
        "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Operator::DownstreamRemote(Piece::Whole),
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
            Operator::DownstreamRemote(Piece::Ip)
        }
        "DOWNSTREAM_REMOTE_PORT" | "DOWNSTREAM_DIRECT_REMOTE_PORT" => Operator::DownstreamRemote(Piece::Port),
        "DOWNSTREAM_LOCAL_ADDRESS" => Operator::DownstreamLocal(Piece::Whole),
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Operator::DownstreamLocal(Piece::Ip),
        "DOWNSTREAM_LOCAL_PORT" => Operator::DownstreamLocal(Piece::Port),
        "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Operator::UpstreamHost(Piece::Whole),
        "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Operator::UpstreamHost(Piece::Ip),
        "UPSTREAM_REMOTE_PORT" => Operator::UpstreamHost(Piece::Port),
        // The filter states are what the chain's own set_filter_state made of the same values.
        "DOWNSTREAM_PEER_URI_SAN" | "FILTER_STATE(io.istio.peer_principal:PLAIN)" => Operator::PeerUriSan,
        "DOWNSTREAM_LOCAL_URI_SAN" | "FILTER_STATE(io.istio.local_principal:PLAIN)" => Operator::LocalUriSan,
        "PROTOCOL" => Operator::Protocol,
        "REQUESTED_SERVER_NAME" => Operator::ServerName,
        "UPSTREAM_CLUSTER" => Operator::UpstreamCluster,
        "ROUTE_NAME" => Operator::RouteName,
        "HOSTNAME" => Operator::Hostname,
        "RESPONSE_CODE" => Operator::ResponseCode,
        _ => return header_operator(text),
    })
}

/// `REQ(X?Y):Z` and `RESP(X?Y):Z`.
fn header_operator(text: &str) -> Option<Operator> {
    let (name, rest) = text.split_once('(')?;
    let (names, length) = rest.split_once(')')?;
    let max = match length.strip_prefix(':') {
        Some(length) => Some(length.parse().ok()?),
        None if length.is_empty() => None,
        None => return None,
    };
    let (first, second) = names.split_once('?').map_or((names, None), |(first, second)| (first, Some(second)));
    let header = HeaderKey::new(&first.to_ascii_lowercase())?;
    let otherwise = match second {
        Some(second) => Some(HeaderKey::new(&second.to_ascii_lowercase())?),
        None => None,
    };
    match name {
        "REQ" => Some(Operator::Request { header, otherwise, max }),
        "RESP" => Some(Operator::Response { header, otherwise, max }),
        _ => None,
    }
}

impl Operator {
    fn format(&self, context: &FormatContext<'_>, out: &mut String) {
        let text = |out: &mut String, text: Option<&str>| out.push_str(text.unwrap_or_default());
        match self {
            Self::DownstreamRemote(piece) => piece.format(context.downstream_remote, out),
            Self::DownstreamLocal(piece) => piece.format(context.downstream_local, out),
            Self::UpstreamHost(piece) => piece.format(context.upstream_host, out),
            Self::PeerUriSan => text(out, context.peer),
            Self::LocalUriSan => text(out, context.local),
            Self::Protocol => text(out, context.protocol),
            Self::ServerName => text(out, context.server_name),
            Self::UpstreamCluster => text(out, context.upstream_cluster),
            Self::RouteName => text(out, context.route_name),
            Self::Hostname => text(out, context.hostname),
            Self::ResponseCode => {
                if let Some(code) = context.response_code {
                    // Writing to a String cannot fail.
                    let _ = write!(out, "{code}");
                }
            }
            Self::Request { header, otherwise, max } => {
                let get = |key: &HeaderKey| context.request.and_then(|request| request.header(key));
                push(get(header).or_else(|| otherwise.as_ref().and_then(get)).as_deref(), *max, out);
            }
            Self::Response { header, otherwise, max } => {
                let get = |key: &HeaderKey| match key {
                    HeaderKey::Name(name) => {
                        context.response_headers.and_then(|headers| l7_authz::l7::request::joined(headers, name))
                    }
                    _ => None,
                };
                push(get(header).or_else(|| otherwise.as_ref().and_then(get)).as_deref(), *max, out);
            }
        }
    }
}

fn push(value: Option<&[u8]>, max: Option<usize>, out: &mut String) {
    let text = String::from_utf8_lossy(value.unwrap_or_default());
    out.extend(text.chars().take(max.unwrap_or(usize::MAX)));
}

impl Piece {
    fn format(self, address: Option<SocketAddr>, out: &mut String) {
        let Some(address) = address else { return };
        // Writing to a String cannot fail.
        let _ = match self {
            Self::Whole => write!(out, "{address}"),
            Self::Ip => write!(out, "{}", address.ip()),
            Self::Port => write!(out, "{}", address.port()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_and_literals() {
        let mut headers = http::HeaderMap::new();
        headers.insert("x-user", http::HeaderValue::from_static("jason"));
        let source: SocketAddr = "10.8.0.10:4711".parse().expect("address");
        let request = RequestView {
            method: "GET",
            path: "/a",
            query: Some("b=c"),
            authority: "reviews",
            scheme: "http",
            headers: &headers,
            source_ip: source.ip(),
            claims: None,
        };
        let context =
            FormatContext { request: Some(&request), downstream_remote: Some(source), ..FormatContext::default() };
        for (text, wanted) in [
            ("%DOWNSTREAM_REMOTE_ADDRESS%", "10.8.0.10:4711"),
            ("ip=%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%!", "ip=10.8.0.10!"),
            ("100%%", "100%"),
            ("%REQ(X-NONE?X-User):3%", "jas"),
            ("%REQ(:PATH)%", "/a?b=c"),
            ("%RESP(x-user)%", ""),
            ("", ""),
        ] {
            assert_eq!(Format::parse(text).expect(text).format(&context), wanted, "{text}");
        }
        assert!(Format::parse("%CEL(request.path)%").is_err());
        assert!(Format::parse("50%").is_err());
    }
}
