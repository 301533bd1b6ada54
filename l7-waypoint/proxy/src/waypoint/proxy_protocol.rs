//! The PROXY protocol's header (HAProxy, `proxy-protocol.txt`, versions 1 and 2): tells a service who its client is.
use std::net::{IpAddr, SocketAddr};

/// Starts a header of version 2.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
/// TCP over IPv4 and over IPv6.
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// The header for a TCP connection of `client` to `destination`. Addresses of two families are both told as IPv6.
pub(super) fn header(version: u8, client: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let (client, destination) = match (client.ip(), destination.ip()) {
        (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => (client, destination),
        _ => (mapped(client), mapped(destination)),
    };
    if version == 1 {
        let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
        let (from, to) = (client.ip(), destination.ip());
        return format!("PROXY {family} {from} {to} {} {}\r\n", client.port(), destination.port()).into_bytes();
    }
    let addresses = [octets(client.ip()), octets(destination.ip())].concat();
    let length = u16::try_from(addresses.len() + 4).unwrap_or_default();
    let mut header = SIGNATURE.to_vec();
    header.extend([PROXY, if client.is_ipv4() { TCP4 } else { TCP6 }]);
    header.extend(length.to_be_bytes());
    header.extend(addresses);
    header.extend(client.port().to_be_bytes());
    header.extend(destination.port().to_be_bytes());
    header
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn version_1_is_a_line() {
        let line = |client, destination| String::from_utf8(header(1, at(client), at(destination))).unwrap();
        assert_eq!(line("10.0.0.1:5000", "10.96.0.2:3306"), "PROXY TCP4 10.0.0.1 10.96.0.2 5000 3306\r\n");
        assert_eq!(line("[fd00::1]:5000", "[fd00::2]:80"), "PROXY TCP6 fd00::1 fd00::2 5000 80\r\n");
        assert_eq!(line("10.0.0.1:5000", "[fd00::2]:80"), "PROXY TCP6 ::ffff:10.0.0.1 fd00::2 5000 80\r\n");
    }

    #[test]
    fn version_2_is_binary() {
        let header = header(2, at("10.0.0.1:5000"), at("10.96.0.2:3306"));
        assert_eq!(header[..12], SIGNATURE);
        assert_eq!(header[12..16], [0x21, 0x11, 0, 12]);
        assert_eq!(header[16..], [10, 0, 0, 1, 10, 96, 0, 2, 0x13, 0x88, 0x0c, 0xea]);
        let header = super::header(2, at("[fd00::1]:5000"), at("10.96.0.2:3306"));
        assert_eq!((header[13], header.len()), (0x21, 16 + 36));
    }
}
