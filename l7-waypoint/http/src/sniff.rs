//! What a client speaks, told from its first bytes.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use l7_route::Sniffed;
use tokio::io::{AsyncRead, AsyncReadExt};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A request line longer than this is not taken for HTTP.
const LONGEST_LINE: usize = 64 * 1024;
/// Method names Envoy's inspector knows; others are not taken for HTTP.
const METHODS: [&[u8]; 10] =
    [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH", b"PROPFIND"];

/// Reads until it is clear what is spoken; gives what was read. `None` when nothing is decided yet: the caller reads on.
pub(crate) fn inspect(bytes: &[u8]) -> Option<Sniffed> {
    if bytes.is_empty() {
        return None;
    }
    if PREFACE.starts_with(&bytes[..bytes.len().min(PREFACE.len())]) {
        return (bytes.len() >= PREFACE.len()).then_some(Sniffed::H2c);
    }
    let Some(space) = bytes.iter().position(|byte| *byte == b' ') else {
        let could_be = METHODS.iter().any(|method| method.starts_with(bytes));
        return (!could_be).then_some(Sniffed::Other);
    };
    if !METHODS.contains(&&bytes[..space]) {
        return Some(Sniffed::Other);
    }
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return (bytes.len() > LONGEST_LINE).then_some(Sniffed::Other);
    };
    let line = bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]);
    Some(if line.ends_with(b" HTTP/1.1") {
        Sniffed::Http11
    } else if line.ends_with(b" HTTP/1.0") {
        Sniffed::Http10
    } else {
        Sniffed::Other
    })
}

/// Reads from `io` until the protocol is known. With `patience`, a client silent for that long speaks [`Sniffed::Other`];
/// without, it may take its time.
pub(crate) async fn sniff(
    io: &mut (impl AsyncRead + Unpin),
    patience: Option<Duration>,
) -> std::io::Result<(Sniffed, Bytes)> {
    let mut bytes = BytesMut::with_capacity(4096);
    let read = async {
        loop {
            if io.read_buf(&mut bytes).await? == 0 {
                return Ok(Sniffed::Other);
            }
            if let Some(protocol) = inspect(&bytes) {
                return Ok(protocol);
            }
        }
    };
    let outcome: std::io::Result<Sniffed> = match patience {
        Some(patience) => tokio::time::timeout(patience, read).await.unwrap_or(Ok(Sniffed::Other)),
        None => read.await,
    };
    Ok((outcome?, bytes.freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_are_told_apart_from_any_split() {
        for (text, protocol) in [
            (&b"GET / HTTP/1.1\r\n"[..], Sniffed::Http11),
            (b"POST /x HTTP/1.0\n", Sniffed::Http10),
            (PREFACE, Sniffed::H2c),
            (b"PROPFIND / HTTP/1.1\r\n", Sniffed::Http11),
            (b"\x16\x03\x01\x02\x00", Sniffed::Other),
            (b"SELECT 1;\n", Sniffed::Other),
            (b"GET / RTSP/1.0\r\n", Sniffed::Other),
            (b"PRIV x y\n", Sniffed::Other),
        ] {
            for cut in 1..text.len() {
                let early = inspect(&text[..cut]);
                assert!(early.is_none() || early == Some(protocol), "{:?}", &text[..cut]);
            }
            assert_eq!(inspect(text), Some(protocol), "{text:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_other_after_a_while() {
        let (mut near, far) = tokio::io::duplex(64);
        let (protocol, bytes) = sniff(&mut near, Some(Duration::from_secs(1))).await.unwrap();
        assert_eq!((protocol, bytes.len()), (Sniffed::Other, 0));
        drop(far);
        assert_eq!(sniff(&mut near, None).await.unwrap().0, Sniffed::Other);
    }
}
