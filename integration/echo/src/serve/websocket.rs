//! A WebSocket that echoes (RFC 6455): text and binary come back as they are, pings are answered.
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest message taken.
const MAX_FRAME: u64 = 1 << 20;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// Whether the request wants to become a WebSocket.
pub(super) fn asked_for(request: &Request<Incoming>) -> bool {
    let upgrade = request.headers().get("upgrade");
    upgrade.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
        && request.headers().contains_key("sec-websocket-key")
}

/// Accepts; the echo goes on once the answer is out.
pub(super) fn accept(request: Request<Incoming>) -> Response<()> {
    let key = request.headers().get("sec-websocket-key").map(|key| key.as_bytes().to_vec()).unwrap_or_default();
    tokio::spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => {
                let _ = echo(TokioIo::new(upgraded)).await;
            }
            Err(error) => eprintln!("WebSocket upgrade: {error}"),
        }
    });
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert("upgrade", HeaderValue::from_static("websocket"));
    headers.insert("connection", HeaderValue::from_static("Upgrade"));
    if let Ok(value) = HeaderValue::from_str(&accept_key(&key)) {
        headers.insert("sec-websocket-accept", value);
    }
    response
}

async fn echo(mut io: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<()> {
    loop {
        let first = io.read_u8().await?;
        let second = io.read_u8().await?;
        let length = match second & 0x7f {
            126 => u64::from(io.read_u16().await?),
            127 => io.read_u64().await?,
            short => u64::from(short),
        };
        if length > MAX_FRAME {
            return Err(std::io::Error::other("message too long"));
        }
        let mut mask = [0; 4];
        if second & 0x80 != 0 {
            io.read_exact(&mut mask).await?;
        }
        let mut payload = vec![0; usize::try_from(length).unwrap_or(0)];
        io.read_exact(&mut payload).await?;
        for (byte, key) in payload.iter_mut().zip(mask.iter().cycle()) {
            *byte ^= key;
        }
        let opcode = first & 0x0f;
        let answer = if opcode == PING { first & 0xf0 | PONG } else { first };
        if opcode != PONG {
            io.write_all(&frame(answer, &payload)).await?;
            io.flush().await?;
        }
        if opcode == CLOSE {
            return io.shutdown().await;
        }
    }
}

/// One frame without a mask, as servers send them.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    match payload.len() {
        short @ 0..=125 => out.push(u8::try_from(short).unwrap_or(0)),
        long => {
            out.push(127);
            out.extend((long as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
    out
}

/// `Sec-WebSocket-Accept` (RFC 6455, 4.2.2).
fn accept_key(key: &[u8]) -> String {
    let mut input = key.to_vec();
    input.extend_from_slice(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(sha1(&input))
}

/// SHA-1 (FIPS 180-4): the handshake demands it; it protects nothing.
fn sha1(input: &[u8]) -> [u8; 20] {
    let mut state: [u32; 5] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    let mut message = input.to_vec();
    message.push(0x80);
    while message.len() % 64 != 56 {
        message.push(0);
    }
    message.extend((input.len() as u64 * 8).to_be_bytes());
    for block in message.chunks_exact(64) {
        let mut words = [0_u32; 80];
        for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
            *word = bytes.iter().fold(0, |word, byte| word << 8 | u32::from(*byte));
        }
        for i in 16..80 {
            words[i] = (words[i - 3] ^ words[i - 8] ^ words[i - 14] ^ words[i - 16]).rotate_left(1);
        }
        let [mut a, mut b, mut c, mut d, mut e] = state;
        for (i, word) in words.iter().enumerate() {
            let (f, k) = match i / 20 {
                0 => ((b & c) | (!b & d), 0x5a82_7999),
                1 => (b ^ c ^ d, 0x6ed9_eba1),
                2 => ((b & c) | (b & d) | (c & d), 0x8f1b_bcdc_u32),
                _ => (b ^ c ^ d, 0xca62_c1d6),
            };
            let next = a.rotate_left(5).wrapping_add(f).wrapping_add(e).wrapping_add(k).wrapping_add(*word);
            (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
        }
        for (sum, part) in state.iter_mut().zip([a, b, c, d, e]) {
            *sum = sum.wrapping_add(part);
        }
    }
    let mut out = [0; 20];
    for (to, word) in out.chunks_exact_mut(4).zip(state) {
        to.copy_from_slice(&word.to_be_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rfc_example() {
        assert_eq!(accept_key(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[tokio::test]
    async fn masked_text_comes_back_unmasked() {
        let (mut client, server) = tokio::io::duplex(256);
        tokio::spawn(echo(server));
        client.write_all(&[0x81, 0x82, 1, 2, 3, 4, b'h' ^ 1, b'i' ^ 2]).await.unwrap();
        let mut answer = [0; 4];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"\x81\x02hi");
    }
}
