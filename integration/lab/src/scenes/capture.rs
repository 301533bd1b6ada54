//! Reads captured packets (classic pcap files, Ethernet) far enough to say who talked to which port in which protocol.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A TCP segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) src: (IpAddr, u16),
    pub(super) dst: (IpAddr, u16),
    pub(super) sequence: u32,
    /// Opens the connection, or answers what does.
    pub(super) syn: bool,
    pub(super) payload: Vec<u8>,
}

/// TCP segments of a pcap file, in order; other packets are left out.
///
/// # Errors
/// If it is no pcap file of Ethernet frames.
pub(super) fn tcp_segments(file: &[u8]) -> Result<Vec<Segment>, String> {
    // pcap file format: 24 bytes of header, its magic number in the writer's byte order.
    let magic = file.get(..4).ok_or("an empty capture")?;
    let little = match magic {
        [0xd4, 0xc3, 0xb2, 0xa1] | [0x4d, 0x3c, 0xb2, 0xa1] => true,
        [0xa1, 0xb2, 0xc3, 0xd4] | [0xa1, 0xb2, 0x3c, 0x4d] => false,
        _ => return Err("not a pcap file".to_owned()),
    };
    let number = |bytes: &[u8]| {
        let bytes: [u8; 4] = bytes.try_into().unwrap_or_default();
        if little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) }
    };
    if file.get(20..24).map(number) != Some(1) {
        return Err("not a capture of Ethernet frames".to_owned());
    }
    let mut segments = Vec::new();
    let mut rest = &file[24..];
    while let Some(header) = rest.get(..16) {
        let length = number(&header[8..12]) as usize;
        // The last packet may be cut short if the capture was stopped while writing.
        let Some(frame) = rest.get(16..16 + length) else { break };
        segments.extend(segment(frame));
        rest = &rest[16 + length..];
    }
    Ok(segments)
}

fn segment(frame: &[u8]) -> Option<Segment> {
    let kind = u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]);
    let packet = frame.get(14..)?;
    let (src, dst, tcp) = match kind {
        0x0800 => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            if *packet.get(9)? != 6 {
                return None;
            }
            let ip = |at: usize| packet.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok()).map(Ipv4Addr::from);
            // Total length 0: segmentation is left to the device, the frame's end is the packet's.
            let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
            (IpAddr::V4(ip(12)?), IpAddr::V4(ip(16)?), packet.get(header..end)?)
        }
        0x86dd => {
            if *packet.get(6)? != 6 {
                return None;
            }
            let length = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
            let ip = |at: usize| packet.get(at..at + 16).and_then(|b| <[u8; 16]>::try_from(b).ok()).map(Ipv6Addr::from);
            let end = if length == 0 { packet.len() } else { (40 + length).min(packet.len()) };
            (IpAddr::V6(ip(8)?), IpAddr::V6(ip(24)?), packet.get(40..end)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let sequence = tcp.get(4..8).and_then(|b| <[u8; 4]>::try_from(b).ok()).map(u32::from_be_bytes)?;
    let offset = usize::from(tcp.get(12)? >> 4) * 4;
    let syn = tcp.get(13)? & 0x02 != 0;
    Some(Segment { src: (src, port(0)?), dst: (dst, port(2)?), sequence, syn, payload: tcp.get(offset..)?.to_vec() })
}

/// Whether a text occurs in any segment.
pub(super) fn contains(segments: &[Segment], text: &str) -> bool {
    segments.iter().any(|segment| segment.payload.windows(text.len()).any(|window| window == text.as_bytes()))
}

/// What one direction of a connection starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opening {
    /// A TLS ClientHello.
    ClientHello,
    /// A TLS ServerHello that chose this version (supported_versions, RFC 8446 section 4.2.1), or has none.
    ServerHello(Option<u16>),
    /// Nothing of TLS.
    Other,
}

/// What the first bytes of a direction are.
pub(super) fn opening(bytes: &[u8]) -> Opening {
    // Record: type 22 (handshake), legacy version 0x0301 to 0x0303, length; handshake: type, 3 bytes of length.
    let [22, 3, 1..=3, _, _, kind, ..] = bytes else { return Opening::Other };
    match kind {
        1 => Opening::ClientHello,
        2 => Opening::ServerHello(chosen_version(bytes.get(9..).unwrap_or_default())),
        _ => Opening::Other,
    }
}

/// The selected version in a ServerHello's body.
fn chosen_version(body: &[u8]) -> Option<u16> {
    // legacy_version 2, random 32, session id, cipher suite 2, compression 1, extensions.
    let session = usize::from(*body.get(34)?);
    let mut rest = body.get(35 + session + 3 + 2..)?;
    loop {
        let kind = u16::from_be_bytes([*rest.first()?, *rest.get(1)?]);
        let length = usize::from(u16::from_be_bytes([*rest.get(2)?, *rest.get(3)?]));
        let value = rest.get(4..4 + length)?;
        if kind == 43 {
            return Some(u16::from_be_bytes([*value.first()?, *value.get(1)?]));
        }
        rest = &rest[4 + length..];
    }
}

/// Whether a segment of an established TLS 1.3 connection starts with a record header as such a connection has
/// (alert, handshake, application data or the compatibility change_cipher_spec; version 0x0301 or 0x0303), or goes
/// on with a record, which can't be told from its bytes.
pub(super) fn record_type(bytes: &[u8]) -> Option<u8> {
    match bytes {
        [kind @ 20..=23, 3, 1 | 3, ..] => Some(*kind),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut out = vec![0xd4, 0xc3, 0xb2, 0xa1];
        out.resize(20, 0);
        out.extend(1_u32.to_le_bytes());
        for frame in frames {
            let length = u32::try_from(frame.len()).unwrap().to_le_bytes();
            out.extend([0; 8]);
            out.extend(length);
            out.extend(length);
            out.extend(frame);
        }
        out
    }

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut out = vec![0; 12];
        out.extend([8, 0, 0x45, 0]);
        out.extend(u16::try_from(40 + payload.len()).unwrap().to_be_bytes());
        out.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 8, 0, 2, 10, 8, 1, 3]);
        out.extend([0x9c, 0x40, 0x3a, 0xa0, 0, 0, 0, 7, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
        out.extend(payload);
        // Ethernet pads short frames.
        out.resize(out.len().max(60), 0);
        out
    }

    #[test]
    fn segments_are_read() {
        let segments = tcp_segments(&file(&[frame(b"hello"), vec![0; 20]])).unwrap();
        let [one] = &segments[..] else { panic!("{segments:?}") };
        assert_eq!((one.src, one.dst), (("10.8.0.2".parse().unwrap(), 40000), ("10.8.1.3".parse().unwrap(), 15008)));
        assert_eq!((one.sequence, one.payload.as_slice()), (7, &b"hello"[..]));
        assert!(contains(&segments, "hell") && !contains(&segments, "heaven"));
        assert!(tcp_segments(b"GIF89a").is_err());
    }

    #[test]
    fn hellos_are_told_apart() {
        assert_eq!(opening(&[22, 3, 1, 0, 5, 1, 0, 0, 1, 0]), Opening::ClientHello);
        let mut hello = vec![22, 3, 3, 0, 0, 2, 0, 0, 0, 3, 3];
        hello.resize(9 + 34, 7);
        hello.extend([0, 0x13, 0x01, 0, 0, 6, 0, 43, 0, 2, 3, 4]);
        assert_eq!(opening(&hello), Opening::ServerHello(Some(0x0304)));
        assert_eq!(opening(b"GET / HTTP/1.1\r\n"), Opening::Other);
        assert_eq!(record_type(&[23, 3, 3, 0, 9]), Some(23));
        assert_eq!(record_type(b"GET /"), None);
    }
}
