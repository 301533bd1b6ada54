//! The command operators of Envoy's access log and header formats.

use std::fmt::Write;

use http::{HeaderMap, HeaderName, Version};

use crate::format::write_timestamp;
use crate::peer::Peer;
use crate::record::{Record, Upstream};

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Operator {
    StartTime(Option<TimeFormat>),
    /// Header of the request, response or trailers, with an alternative.
    Header {
        from: From,
        name: Name,
        alternative: Option<Name>,
        without_query: bool,
    },
    Protocol,
    ResponseCode,
    ResponseCodeDetails,
    ResponseFlags,
    ConnectionTerminationDetails,
    TransportFailure,
    BytesReceived,
    BytesSent,
    Duration,
    UpstreamHost {
        port: bool,
    },
    UpstreamCluster,
    UpstreamLocalAddress,
    Attempts,
    DownstreamLocal(Part),
    DownstreamRemote(Part),
    PeerUri,
    LocalUri,
    Peer(End, PeerField),
    RouteName,
    GrpcStatus {
        number: bool,
    },
    TraceId,
    RequestId,
    Environment(String),
    /// Always `-`.
    Absent,
    /// Not known; always `-`.
    Unknown(String),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum From {
    Request,
    Response,
    Trailer,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Part {
    Both,
    Ip,
    Port,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum TimeFormat {
    Seconds,
    Millis,
    Micros,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Name {
    Method,
    Path,
    OriginalPath,
    Authority,
    Scheme,
    Status,
    Header(HeaderName),
}

/// Whose workload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum End {
    Source,
    Destination,
}

impl End {
    fn of<'r>(self, record: &'r Record<'_>) -> &'r Peer {
        match self {
            End::Source => record.source,
            End::Destination => record.destination,
        }
    }
}

/// What Istio's peer metadata filter keeps of a workload (`%FILTER_STATE(upstream_peer_obj:FIELD:workload)%`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum PeerField {
    App,
    Version,
    Revision,
    Service,
    Cluster,
    Namespace,
    Workload,
}

impl PeerField {
    /// `None` for what is not known of a workload here (its type, the pod's name).
    fn parse(args: &str) -> Option<(End, Self)> {
        let (object, field) = args.split_once(":FIELD:")?;
        let end = match object {
            "downstream_peer_obj" => End::Source,
            "upstream_peer_obj" => End::Destination,
            _ => return None,
        };
        let field = match field {
            "app" => Self::App,
            "version" => Self::Version,
            "revision" => Self::Revision,
            "service" => Self::Service,
            "cluster" => Self::Cluster,
            "namespace" => Self::Namespace,
            "workload" => Self::Workload,
            _ => return None,
        };
        Some((end, field))
    }

    fn of(self, peer: &Peer) -> Option<&str> {
        let value = match self {
            Self::App => &peer.app,
            Self::Version => &peer.version,
            Self::Revision => &peer.canonical_revision,
            Self::Service => &peer.canonical_service,
            Self::Cluster => &peer.cluster,
            Self::Namespace => &peer.namespace,
            Self::Workload => &peer.workload,
        };
        Some(&**value).filter(|value| *value != "unknown")
    }
}

impl Operator {
    /// Reads `NAME(args):max`.
    pub(crate) fn parse(text: &str) -> Result<(Self, Option<usize>), &'static str> {
        let (name, args, max) = split(text)?;
        let header = |from, without_query| -> Result<Self, &'static str> {
            let args = args.ok_or("a header name is missing")?;
            let (first, second) = args.split_once('?').map_or((args, None), |(first, second)| (first, Some(second)));
            let alternative = second.map(Name::parse).transpose()?;
            Ok(Self::Header { from, name: Name::parse(first)?, alternative, without_query })
        };
        let operator = match name {
            "START_TIME" => Self::StartTime(match args {
                Some("%s") => Some(TimeFormat::Seconds),
                Some("%s%3f") => Some(TimeFormat::Millis),
                Some("%s%6f") => Some(TimeFormat::Micros),
                _ => None,
            }),
            "REQ" => header(From::Request, false)?,
            "REQ_WITHOUT_QUERY" => header(From::Request, true)?,
            "RESP" => header(From::Response, false)?,
            "TRAILER" => header(From::Trailer, false)?,
            "PROTOCOL" => Self::Protocol,
            "RESPONSE_CODE" => Self::ResponseCode,
            "RESPONSE_CODE_DETAILS" => Self::ResponseCodeDetails,
            "RESPONSE_FLAGS" => Self::ResponseFlags,
            "CONNECTION_TERMINATION_DETAILS" => Self::ConnectionTerminationDetails,
            "UPSTREAM_TRANSPORT_FAILURE_REASON" => Self::TransportFailure,
            "BYTES_RECEIVED" => Self::BytesReceived,
            "BYTES_SENT" => Self::BytesSent,
            "DURATION" | "RESPONSE_DURATION" => Self::Duration,
            "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Self::UpstreamHost { port: true },
            "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Self::UpstreamHost { port: false },
            "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Self::UpstreamCluster,
            "UPSTREAM_LOCAL_ADDRESS" => Self::UpstreamLocalAddress,
            "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Self::Attempts,
            "DOWNSTREAM_LOCAL_ADDRESS" => Self::DownstreamLocal(Part::Both),
            "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Self::DownstreamLocal(Part::Ip),
            "DOWNSTREAM_LOCAL_PORT" => Self::DownstreamLocal(Part::Port),
            "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Self::DownstreamRemote(Part::Both),
            "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
                Self::DownstreamRemote(Part::Ip)
            }
            "DOWNSTREAM_REMOTE_PORT" | "DOWNSTREAM_DIRECT_REMOTE_PORT" => Self::DownstreamRemote(Part::Port),
            "DOWNSTREAM_PEER_URI_SAN" => Self::PeerUri,
            "DOWNSTREAM_LOCAL_URI_SAN" => Self::LocalUri,
            "FILTER_STATE" if args.is_some_and(|args| args.starts_with("io.istio.peer_principal")) => Self::PeerUri,
            "FILTER_STATE" if args.is_some_and(|args| args.starts_with("io.istio.local_principal")) => Self::LocalUri,
            "FILTER_STATE" => {
                args.and_then(PeerField::parse).map_or(Self::Absent, |(end, field)| Self::Peer(end, field))
            }
            "ROUTE_NAME" => Self::RouteName,
            "GRPC_STATUS" => Self::GrpcStatus { number: false },
            "GRPC_STATUS_NUMBER" => Self::GrpcStatus { number: true },
            "TRACE_ID" => Self::TraceId,
            "STREAM_ID" => Self::RequestId,
            "HOSTNAME" => Self::Environment("HOSTNAME".into()),
            "ENVIRONMENT" => Self::Environment(args.unwrap_or_default().to_owned()),
            "REQUESTED_SERVER_NAME" | "VIRTUAL_CLUSTER_NAME" => Self::Absent,
            other => Self::Unknown(other.to_owned()),
        };
        Ok((operator, max))
    }

    /// Whether JSON logs show it as a number.
    pub(crate) fn is_number(&self) -> bool {
        matches!(
            self,
            Self::ResponseCode
                | Self::BytesReceived
                | Self::BytesSent
                | Self::Duration
                | Self::Attempts
                | Self::GrpcStatus { number: true }
                | Self::DownstreamLocal(Part::Port)
                | Self::DownstreamRemote(Part::Port)
        )
    }

    /// Appends the value; false when there is none.
    pub(crate) fn write(&self, record: &Record<'_>, out: &mut String) -> bool {
        let upstream = record.upstream.as_ref();
        match self {
            Self::StartTime(format) => write_start(record, *format, out),
            Self::Header { from, name, alternative, without_query } => {
                let start = out.len();
                let found = name.write(*from, record, out)
                    || alternative.as_ref().is_some_and(|alternative| alternative.write(*from, record, out));
                if *without_query && let Some(query) = out[start..].find('?') {
                    out.truncate(start + query);
                }
                return found;
            }
            Self::Protocol => return record.version.is_some_and(|version| text(out, protocol(version))),
            Self::ResponseCode => number(out, u64::from(record.status)),
            Self::ResponseCodeDetails => return text(out, record.details),
            Self::ResponseFlags => return display(out, record.flags),
            Self::BytesReceived => number(out, record.bytes_received),
            Self::BytesSent => number(out, record.bytes_sent),
            Self::Duration => number(out, u64::try_from(record.duration.as_millis()).unwrap_or(u64::MAX)),
            Self::TransportFailure => {
                return upstream.and_then(|u| u.transport_failure).is_some_and(|why| text(out, why));
            }
            Self::UpstreamHost { port } => {
                return upstream.and_then(|u| u.host).is_some_and(|host| write_host(out, host, *port));
            }
            Self::UpstreamCluster => return upstream.is_some_and(|u| text(out, u.cluster)),
            Self::UpstreamLocalAddress => {
                return upstream.and_then(|u| u.local).is_some_and(|local| display(out, local));
            }
            Self::Attempts => number(out, u64::from(upstream.map_or(0, |u: &Upstream<'_>| u.attempts))),
            Self::DownstreamLocal(part) => write_address(out, record.downstream_local, *part),
            Self::DownstreamRemote(part) => write_address(out, record.downstream_remote, *part),
            Self::PeerUri => return record.peer_principal.is_some_and(|principal| text(out, principal)),
            Self::LocalUri => return record.local_principal.is_some_and(|principal| text(out, principal)),
            Self::Peer(end, field) => return field.of(end.of(record)).is_some_and(|value| text(out, value)),
            Self::RouteName => return text(out, record.route_name),
            Self::GrpcStatus { number: as_number } => return write_grpc(record, *as_number, out),
            Self::TraceId => return record.trace_id.is_some_and(|id| text(out, id)),
            Self::RequestId => return record.request_id.is_some_and(|id| text(out, id)),
            Self::Environment(name) => return std::env::var(name).is_ok_and(|value| text(out, &value)),
            Self::ConnectionTerminationDetails | Self::Absent | Self::Unknown(_) => return false,
        };
        true
    }
}

/// Splits `NAME(args):max`.
fn split(text: &str) -> Result<(&str, Option<&str>, Option<usize>), &'static str> {
    let (head, args, tail) = match text.find('(') {
        None => {
            let (head, max) = text.split_once(':').map_or((text, None), |(head, max)| (head, Some(max)));
            (head, None, max)
        }
        Some(open) => {
            let close = text.rfind(')').ok_or("`(` is not closed")?;
            let args = text.get(open + 1..close).ok_or("`)` stands before `(`")?;
            (&text[..open], Some(args), text[close + 1..].strip_prefix(':'))
        }
    };
    let max = tail.map(|max| max.parse().map_err(|_| "the length after `:` is no number")).transpose()?;
    Ok((head, args, max))
}

impl Name {
    fn parse(text: &str) -> Result<Self, &'static str> {
        Ok(match text.to_ascii_lowercase().as_str() {
            ":method" => Self::Method,
            ":path" => Self::Path,
            "x-envoy-original-path" => Self::OriginalPath,
            ":authority" | "host" => Self::Authority,
            ":scheme" => Self::Scheme,
            ":status" => Self::Status,
            name => Self::Header(HeaderName::from_bytes(name.as_bytes()).map_err(|_| "not a header name")?),
        })
    }

    fn write(&self, from: From, record: &Record<'_>, out: &mut String) -> bool {
        match self {
            Self::Method => record.method.is_some_and(|method| text(out, method.as_str())),
            Self::Path => text(out, record.path),
            Self::OriginalPath => record.original_path.is_some_and(|path| text(out, path)),
            Self::Authority => text(out, record.authority),
            Self::Scheme => text(out, record.scheme),
            Self::Status => display(out, record.status),
            Self::Header(name) if from == From::Response && name == "x-envoy-upstream-service-time" => {
                let measured = record.upstream.as_ref().and_then(|upstream| upstream.service_time);
                measured.is_some_and(|time| display(out, time.as_millis()))
            }
            Self::Header(name) => {
                let headers = match from {
                    From::Request => Some(record.request_headers),
                    From::Response => record.response_headers,
                    From::Trailer => record.trailers,
                };
                headers.is_some_and(|headers| write_header(headers, name, out))
            }
        }
    }
}

fn write_header(headers: &HeaderMap, name: &HeaderName, out: &mut String) -> bool {
    let start = out.len();
    for (position, value) in headers.get_all(name).iter().enumerate() {
        if position > 0 {
            out.push(',');
        }
        out.push_str(&String::from_utf8_lossy(value.as_bytes()));
    }
    out.len() > start
}

fn text(out: &mut String, value: &str) -> bool {
    out.push_str(value);
    !value.is_empty()
}

fn number(out: &mut String, value: u64) {
    display(out, value);
}

fn display(out: &mut String, value: impl std::fmt::Display) -> bool {
    // Writing to a String can't fail.
    let _ = write!(out, "{value}");
    true
}

pub(crate) fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        _ => "HTTP/1.1",
    }
}

fn write_start(record: &Record<'_>, format: Option<TimeFormat>, out: &mut String) {
    let Some(format) = format else { return write_timestamp(record.start, out) };
    let since = record.start.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    match format {
        TimeFormat::Seconds => display(out, since.as_secs()),
        TimeFormat::Millis => display(out, since.as_millis()),
        TimeFormat::Micros => display(out, since.as_micros()),
    };
}

fn write_address(out: &mut String, address: std::net::SocketAddr, part: Part) {
    match part {
        Part::Both => display(out, address),
        Part::Ip => display(out, address.ip()),
        Part::Port => display(out, address.port()),
    };
}

fn write_host(out: &mut String, host: &str, port: bool) -> bool {
    text(out, if port { host } else { host.rsplit_once(':').map_or(host, |(ip, _)| ip) })
}

fn write_grpc(record: &Record<'_>, as_number: bool, out: &mut String) -> bool {
    const NAMES: [&str; 17] = [
        "OK",
        "Canceled",
        "Unknown",
        "InvalidArgument",
        "DeadlineExceeded",
        "NotFound",
        "AlreadyExists",
        "PermissionDenied",
        "ResourceExhausted",
        "FailedPrecondition",
        "Aborted",
        "OutOfRange",
        "Unimplemented",
        "Internal",
        "Unavailable",
        "DataLoss",
        "Unauthenticated",
    ];
    let Some(code) = record.grpc_status.filter(|_| record.grpc) else { return false };
    match NAMES.get(code as usize).filter(|_| !as_number) {
        Some(name) => text(out, name),
        None => display(out, code),
    }
}
