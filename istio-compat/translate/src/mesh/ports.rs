//! What a service port speaks, read as Istio reads it: `appProtocol`, then the port's name, then known numbers.
use compat_objects::core::IntOrString;
use xds_proto::istio::workload as wds;

/// What is spoken on a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AppProtocol {
    Http,
    Http2,
    Grpc,
    GrpcWeb,
    Https,
    Tls,
    Tcp,
    Mongo,
    Redis,
    Mysql,
    Hbone,
    Udp,
    /// Not said: found out from the first bytes.
    Unknown,
}

impl AppProtocol {
    pub(crate) fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    pub(crate) fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    pub(crate) fn is_unknown(self) -> bool {
        matches!(self, Self::Unknown | Self::Hbone)
    }

    /// As the workload discovery service names it.
    pub(crate) fn wds(self) -> wds::AppProtocol {
        match self {
            Self::Http => wds::AppProtocol::Http11,
            Self::Http2 => wds::AppProtocol::Http2,
            Self::Grpc => wds::AppProtocol::Grpc,
            Self::Tcp => wds::AppProtocol::Tcp,
            Self::Tls | Self::Https => wds::AppProtocol::Tls,
            _ => wds::AppProtocol::Unknown,
        }
    }

    fn parse(name: &str) -> Self {
        match name.to_ascii_lowercase().as_str() {
            "http" => Self::Http,
            "http2" => Self::Http2,
            "grpc" => Self::Grpc,
            "grpc-web" => Self::GrpcWeb,
            "https" => Self::Https,
            "tls" => Self::Tls,
            "tcp" => Self::Tcp,
            "mongo" => Self::Mongo,
            "redis" => Self::Redis,
            "mysql" => Self::Mysql,
            "udp" => Self::Udp,
            "hbone" => Self::Hbone,
            _ => Self::Unknown,
        }
    }

    /// Where the protocol has a field of its own; without it the port's name counts.
    pub(crate) fn declared(protocol: &str, port: u16, name: &str) -> Self {
        if protocol.is_empty() { Self::detect(port, name, "TCP", None) } else { Self::parse(protocol) }
    }

    /// Istio's order (`kube.ConvertProtocol`).
    pub(crate) fn detect(port: u16, name: &str, transport: &str, app_protocol: Option<&str>) -> Self {
        if transport == "UDP" {
            return Self::Udp;
        }
        let name = match app_protocol {
            Some("kubernetes.io/h2c") => return Self::Http2,
            Some("kubernetes.io/ws") => return Self::Http,
            Some("kubernetes.io/wss") => return Self::Https,
            Some(other) => other,
            None => name,
        };
        let is_grpc_web = name.len() >= 8 && name.get(..8).is_some_and(|head| head.eq_ignore_ascii_case("grpc-web"));
        let found = if is_grpc_web { Self::GrpcWeb } else { Self::parse(name.split('-').next().unwrap_or_default()) };
        // SMTP, DNS, MySQL and MongoDB: the server speaks first, so looking at the client's bytes would hang.
        match found {
            Self::Unknown if matches!(port, 25 | 53 | 3306 | 27017) => Self::Tcp,
            found => found,
        }
    }
}

/// A port of a service.
#[derive(Debug, Clone)]
pub(crate) struct ServicePort {
    pub(crate) name: String,
    pub(crate) number: u16,
    pub(crate) target: Target,
    pub(crate) protocol: AppProtocol,
}

/// Where a service port leads in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    Number(u16),
    /// A container port's name.
    Name(String),
}

impl Target {
    /// Absent means "as the service port".
    pub(crate) fn read(target: Option<&IntOrString>, port: u16) -> Self {
        match target {
            Some(IntOrString::Int(number)) => match u16::try_from(*number) {
                Ok(0) | Err(_) => Self::Number(port),
                Ok(number) => Self::Number(number),
            },
            Some(IntOrString::String(name)) => name.parse().map_or_else(|_| Self::Name(name.clone()), Self::Number),
            None => Self::Number(port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_is_read_from_app_protocol_then_name_then_number() {
        let detect = AppProtocol::detect;
        assert_eq!(detect(80, "http", "TCP", None), AppProtocol::Http);
        assert_eq!(detect(80, "http-web", "TCP", None), AppProtocol::Http);
        assert_eq!(detect(9000, "grpc", "TCP", Some("kubernetes.io/h2c")), AppProtocol::Http2);
        assert_eq!(detect(80, "grpc-web-x", "TCP", None), AppProtocol::GrpcWeb);
        assert_eq!(detect(80, "web", "TCP", None), AppProtocol::Unknown);
        assert_eq!(detect(3306, "db", "TCP", None), AppProtocol::Tcp);
        assert_eq!(detect(53, "http", "UDP", None), AppProtocol::Udp);
    }
}
