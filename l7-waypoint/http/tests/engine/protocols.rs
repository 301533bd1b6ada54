use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use xds_model::envoy::cluster::{CertSource, LbPolicy, UpstreamTls};

use crate::config::*;
use crate::support::*;

const A: &str = "10.0.0.1:80";

fn mesh() -> Mesh {
    Mesh::new(&http(vec![to("/", forward("c"))], vec![cluster("c", &[A])]))
}

/// Of gRPC, the second one empty.
const TWO_MESSAGES: &str = "\0\0\0\0\u{4}ping\0\0\0\0\0";

#[test]
fn http2_with_trailers_both_ways() {
    run(async || {
        let mesh = mesh();
        mesh.handler(|_, request| async move {
            let collected = request.into_body().collect().await.unwrap();
            let asked = collected.trailers().map_or(String::new(), |trailers| format!("{:?}", trailers["x-end"]));
            let body = collected.to_bytes();
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "5".parse().unwrap());
            trailers.insert("x-asked", asked.trim_matches('"').parse().unwrap());
            let frames = [Ok(Frame::data(body)), Ok(Frame::trailers(trailers))];
            let body = StreamBody::new(futures::stream::iter(frames));
            Response::builder().header("content-type", "application/grpc").body(BodyExt::boxed(body)).unwrap()
        });
        let mut sender = mesh.http2(info()).await;
        let mut trailers = HeaderMap::new();
        trailers.insert("x-end", "here".parse().unwrap());
        let frames = [Ok(Frame::data(Bytes::from(TWO_MESSAGES))), Ok(Frame::trailers(trailers))];
        let body = BodyExt::boxed(StreamBody::new(futures::stream::iter(frames)));
        let request = Request::post("http://reviews/pkg.Svc/M")
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        let answer = Answer::read(sender.send_request(request.body(body).unwrap()).await.unwrap()).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, TWO_MESSAGES));
        let trailers = answer.trailers.unwrap();
        assert_eq!((&trailers["grpc-status"], &trailers["x-asked"]), (&"5".parse().unwrap(), &"here".parse().unwrap()));
        assert_eq!(mesh.seen()[0].headers["te"], "trailers");
        assert_eq!(mesh.event().grpc_status, Some(5));
        let metrics = mesh.registry.encode();
        assert!(
            metrics.contains(r#"request_protocol="grpc",response_code="200",grpc_response_status="5""#),
            "{metrics}"
        );
        for way in ["request", "response"] {
            let mut lines = metrics.lines().filter(|line| line.starts_with(&format!("istio_{way}_messages_total{{")));
            assert!(lines.next().is_some_and(|line| line.ends_with(" 2")), "{way}: {metrics}");
        }
    });
}

#[test]
fn many_streams_share_one_upstream_connection() {
    run(async || {
        let mesh = mesh();
        mesh.handler(|_, _| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            status(200)
        });
        let sender = mesh.http2(info()).await;
        let requests = (0..50).map(|n| {
            let mut sender = sender.clone();
            async move {
                sender
                    .send_request(Request::get(format!("http://reviews/{n}")).body(full("")).unwrap())
                    .await
                    .unwrap()
                    .status()
            }
        });
        let answers = futures::future::join_all(requests).await;
        assert!(answers.iter().all(|status| *status == 200));
        assert_eq!(mesh.upstreams.connections.get(), 1);
    });
}

#[test]
fn head_and_expect_continue_and_streaming() {
    run(async || {
        let mesh = mesh();
        mesh.handler(|_, request| async move {
            if request.method() == Method::HEAD {
                return Response::builder().header("content-length", "1234").body(full("")).unwrap();
            }
            assert!(!request.headers().contains_key("expect"));
            Response::new(full(request.into_body().collect().await.unwrap().to_bytes()))
        });
        let head = Request::head("/").header("host", "x").body(full("")).unwrap();
        let answer = mesh.send(head).await;
        assert_eq!((answer.header("content-length"), answer.body.as_str()), ("1234", ""));
        let mut raw = mesh.connect(info());
        raw.write_all(b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
            .await
            .unwrap();
        let mut buffer = vec![0; 4096];
        let count = raw.read(&mut buffer).await.unwrap();
        assert!(buffer[..count].starts_with(b"HTTP/1.1 100 Continue"));
        raw.write_all(b"hello").await.unwrap();
        let count = raw.read(&mut buffer).await.unwrap();
        let text = String::from_utf8_lossy(&buffer[..count]);
        assert!(text.starts_with("HTTP/1.1 200 OK") && text.ends_with("hello"), "{text}");
    });
}

/// An upstream that switches to an echo protocol.
fn echoing(mesh: &Mesh) {
    mesh.handler(|_, mut request| async move {
        let on = hyper::upgrade::on(&mut request);
        tokio::task::spawn_local(async move {
            let mut io = TokioIo::new(on.await.unwrap());
            let mut buffer = [0; 64];
            loop {
                match io.read(&mut buffer).await {
                    Ok(0) | Err(_) => return,
                    Ok(count) => io.write_all(&buffer[..count]).await.unwrap(),
                }
            }
        });
        let response = Response::builder().status(101).header("connection", "upgrade").header("upgrade", "websocket");
        response.header("sec-websocket-accept", "x").body(full("")).unwrap()
    });
}

#[test]
fn websockets_over_http1() {
    run(async || {
        let mesh = mesh();
        echoing(&mesh);
        let mut sender = mesh.http1(info()).await;
        let request =
            Request::get("/ws").header("host", "x").header("connection", "Upgrade").header("upgrade", "websocket");
        let request = request.header("sec-websocket-key", "k").body(full("")).unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 101);
        assert_eq!(
            (&response.headers()["upgrade"], &response.headers()["sec-websocket-accept"]),
            (&"websocket".parse().unwrap(), &"x".parse().unwrap())
        );
        let mut io = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
        for text in ["one", "two"] {
            io.write_all(text.as_bytes()).await.unwrap();
            let mut buffer = [0; 3];
            io.read_exact(&mut buffer).await.unwrap();
            assert_eq!(&buffer, text.as_bytes());
        }
        drop(io);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let event = mesh.event();
        assert_eq!((event.status, event.bytes_received, event.bytes_sent), (101, 6, 6));
    });
}

#[test]
fn websockets_from_http2_to_http1() {
    run(async || {
        let mut cluster = cluster("c", &[A]);
        cluster.http.version = xds_model::envoy::cluster::UpstreamVersion::Http1;
        let mesh = Mesh::new(&http(vec![to("/", forward("c"))], vec![cluster]));
        echoing(&mesh);
        let mut sender = mesh.http2(info()).await;
        // The server's settings have to be there before the client may ask.
        tokio::time::sleep(Duration::from_millis(10)).await;
        let mut request = Request::builder().method(Method::CONNECT).uri("http://reviews/ws").body(full("")).unwrap();
        request.extensions_mut().insert(hyper::ext::Protocol::from_static("websocket"));
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        let mut io = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
        io.write_all(b"ping").await.unwrap();
        let mut buffer = [0; 4];
        io.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"ping");
        let seen = &mesh.seen()[0];
        assert_eq!((seen.method.as_str(), seen.path.as_str()), ("GET", "/ws"));
        assert!(seen.headers.contains_key("sec-websocket-key"));
    });
}

#[test]
fn other_upgrades_are_refused() {
    run(async || {
        let mesh = mesh();
        let request = Request::get("/").header("host", "x").header("connection", "upgrade").header("upgrade", "smb");
        assert_eq!(mesh.send(request.body(full("")).unwrap()).await.status, 403);
        assert!(mesh.seen().is_empty());
        // An upstream must not switch unasked.
        *mesh.upstreams.raw.borrow_mut() = Some(Rc::new(|mut io| {
            Box::pin(async move {
                let mut head = [0; 4096];
                let _ = io.read(&mut head).await.unwrap();
                io.write_all(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n")
                    .await
                    .unwrap();
                std::future::pending::<()>().await;
            })
        }));
        assert_eq!(mesh.send(get("/")).await.status, 502);
    });
}

#[test]
fn where_tls_takes_the_request_s_host_no_connection_serves_two_hosts() {
    run(async || {
        let mut config = http(vec![to("/", forward("c"))], vec![cluster("c", &[A])]);
        let tls = UpstreamTls {
            sni: None,
            auto_sni: true,
            alpn: Vec::new(),
            roots: Some(CertSource::System),
            sans: Vec::new(),
            auto_san: true,
            client_cert: None,
            crl: None,
        };
        config.clusters.get_mut("c").unwrap().tls = Some(tls.clone());
        let mesh = Mesh::new(&config);
        let ask = async |host: &str| {
            let request = Request::get("/").header("host", host).body(full("")).unwrap();
            assert_eq!(mesh.send(request).await.status, 200);
        };
        for host in ["a.example", "A.example:443", "b.example", "[fd00::1]:443", "a.example"] {
            ask(host).await;
        }
        let made = |host: &str| Some(host.to_owned());
        assert_eq!(*mesh.upstreams.hosts.borrow(), [made("a.example"), made("b.example"), made("fd00::1")]);
        // Another configuration that reaches the endpoint the same way keeps them all.
        config.clusters.get_mut("c").unwrap().lb = LbPolicy::Random;
        mesh.renew(&config);
        ask("b.example").await;
        assert_eq!(mesh.upstreams.connections.get(), 3);
        // A fixed name is for all.
        config.clusters.get_mut("c").unwrap().tls = Some(UpstreamTls { sni: Some("c.example".into()), ..tls });
        mesh.renew(&config);
        ask("a.example").await;
        ask("b.example").await;
        assert_eq!(mesh.upstreams.hosts.borrow()[3..], [None]);
    });
}
