//! `strata-proxy request METHOD PATH`: one request to the admin interface of the proxy in this pod, as people know it from
//! `pilot-agent request GET config_dump`. An image has no other client; `kubectl exec POD -- pilot-agent request GET
//! /status` works by a link of that name.
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, bail};

/// Where the admin interface listens in a pod (ztunnel's, Envoy's and ours).
const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15000);
const PATIENCE: Duration = Duration::from_secs(10);

/// Does what the words after the program's name say, if they are a request.
pub(crate) fn asked_for(mut words: impl Iterator<Item = String>) -> Option<anyhow::Result<()>> {
    if words.next()? != "request" {
        return None;
    }
    Some(match (words.next(), words.next()) {
        (Some(method), Some(path)) => send(&method, &path),
        _ => Err(anyhow::anyhow!("usage: strata-proxy request GET|POST PATH, for example: request GET /config_dump")),
    })
}

fn send(method: &str, path: &str) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect_timeout(&ADMIN, PATIENCE)
        .with_context(|| format!("no admin interface on {ADMIN}: does the proxy run in this pod?"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let slash = if path.starts_with('/') { "" } else { "/" };
    // Version 1.0: the answer ends with the connection and comes in one piece.
    write!(stream, "{method} {slash}{path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).with_context(|| format!("{method} {path}"))?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").context("the answer has no head")?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    std::io::stdout().write_all(&answer[end + 4..])?;
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    if !status.starts_with('2') {
        bail!("{method} {path}: {}", head.lines().next().unwrap_or_default());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> impl Iterator<Item = String> + use<'_> {
        text.split_whitespace().map(str::to_owned)
    }

    #[test]
    fn only_a_request_is_one() {
        assert!(asked_for(words("")).is_none());
        assert!(asked_for(words("proxy waypoint")).is_none());
        assert!(asked_for(words("--role node")).is_none());
        let error = asked_for(words("request GET")).unwrap().unwrap_err().to_string();
        assert!(error.contains("usage"), "{error}");
    }
}
