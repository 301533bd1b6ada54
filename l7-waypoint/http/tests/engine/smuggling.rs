use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::config::*;
use crate::support::*;

/// Sends bytes and reads all answers there are.
async fn raw(mesh: &Mesh, bytes: &[u8]) -> String {
    let mut io = mesh.connect(info());
    // The engine may answer and close before it has read everything.
    let _ = io.write_all(bytes).await;
    let mut answer = Vec::new();
    let read = io.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_secs(5), read).await;
    String::from_utf8_lossy(&answer).into_owned()
}

fn mesh() -> Mesh {
    Mesh::new(&http(vec![to("/", forward("c"))], vec![cluster("c", &["10.0.0.1:80"])]))
}

#[test]
fn ambiguous_requests_never_reach_an_upstream() {
    run(async || {
        for (what, bytes) in [
            ("two lengths", &b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde"[..]),
            ("strange coding", b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
            (
                "chunked not last",
                b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
            ),
            ("negative length", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n"),
            ("plus in length", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nabcde"),
            ("space before colon", b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n"),
            ("folded header", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n folded\r\n\r\n"),
            ("no host", b"GET / HTTP/1.1\r\n\r\n"),
            ("two hosts", b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"),
            ("user in host", b"GET / HTTP/1.1\r\nHost: x@y\r\n\r\n"),
            ("NUL in header", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: a\0b\r\n\r\n"),
            (
                "a body under an upgrade",
                b"POST / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\nabcde",
            ),
            ("bare CR", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: a\rb: c\r\n\r\n"),
        ] {
            let mesh = mesh();
            let answer = raw(&mesh, bytes).await;
            assert!(answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 501"), "{what}: {answer:?}");
            assert!(mesh.seen().is_empty(), "{what}: {:?}", mesh.seen());
            assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{what}: the connection must end: {answer:?}");
        }
    });
}

/// Length and chunked together: what hyper makes of it is chunked alone (RFC 9112, 6.3), and the connection ends. So
/// what follows is never taken for a request, and no upstream sees the length.
#[test]
fn a_length_beside_chunked_smuggles_nothing() {
    run(async || {
        for framing in
            ["Content-Length: 4\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 4"]
        {
            let mesh = mesh();
            let bytes = format!(
                "POST / HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
            );
            let answer = raw(&mesh, bytes.as_bytes()).await;
            assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
            assert!(answer.contains("connection: close") || answer.starts_with("HTTP/1.1 400"), "{answer}");
            assert!(mesh.seen().iter().all(|seen| seen.path == "/" && !seen.headers.contains_key("content-length")));
        }
    });
}

#[test]
fn too_many_or_too_large_headers() {
    run(async || {
        let mesh = mesh();
        let many: String = (0..150).map(|n| format!("x-{n}: 1\r\n")).collect();
        let answer = raw(&mesh, format!("GET / HTTP/1.1\r\nHost: x\r\n{many}\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer:?}");
        let answer =
            raw(&mesh, format!("GET / HTTP/1.1\r\nHost: x\r\nX-A: {}\r\n\r\n", "a".repeat(100_000)).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer:?}");
        assert!(mesh.seen().is_empty());
    });
}

#[test]
fn pipelined_requests_are_answered_in_order_and_http10_is_refused() {
    run(async || {
        let mesh = mesh();
        let answer =
            raw(&mesh, b"GET /1 HTTP/1.1\r\nHost: x\r\n\r\nGET /2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                .await;
        assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 2, "{answer}");
        let paths: Vec<_> = mesh.seen().iter().map(|seen| seen.path.clone()).collect();
        assert_eq!(paths, ["/1", "/2"]);
        assert!(!mesh.seen()[1].headers.contains_key("connection"));
        let answer = raw(&mesh, b"GET / HTTP/1.0\r\nHost: x\r\n\r\n").await;
        assert!(answer.contains(" 426 "), "{answer}");
    });
}
