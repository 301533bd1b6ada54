use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::BodyExt;
use tokio::time::Instant;
use xds_model::envoy::cluster::OutlierDetection;
use xds_model::envoy::route::*;

use crate::config::*;
use crate::support::*;

const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";

fn retrying(on: &[RetryOn], retries: u32) -> Forward {
    Forward { retry: Some(retry(on, retries)), ..forward("c") }
}

#[test]
fn connect_failures_are_retried_on_another_host() {
    run(async || {
        let mesh =
            Mesh::new(&http(vec![to("/", retrying(&[RetryOn::ConnectFailure], 2))], vec![cluster("c", &[A, B])]));
        mesh.upstreams.down.borrow_mut().push(A.into());
        for _ in 0..10 {
            assert_eq!(mesh.send(get("/")).await.body, B);
        }
        mesh.upstreams.down.borrow_mut().push(B.into());
        let answer = mesh.send(get("/")).await;
        // The idle connection to B still works; a request that needs a new one fails.
        assert_eq!(answer.body, B);
        let mesh =
            Mesh::new(&http(vec![to("/", retrying(&[RetryOn::ConnectFailure], 2))], vec![cluster("c", &[A, B])]));
        mesh.upstreams.down.borrow_mut().extend([A.to_owned(), B.to_owned()]);
        let answer = mesh.send(get("/")).await;
        assert_eq!(answer.status, 503);
        assert!(
            answer.body.starts_with("upstream connect error or disconnect/reset before headers"),
            "{}",
            answer.body
        );
        let event = mesh.event();
        assert_eq!((event.flags.join(","), event.attempts), ("UF,URX".into(), 3));
    });
}

#[test]
fn statuses_are_retried_as_listed_with_the_body_sent_again() {
    run(async || {
        let mut policy = retrying(&[RetryOn::RetriableStatusCodes], 3);
        policy.retry.as_mut().unwrap().retriable_status_codes = vec![503];
        let mesh = Mesh::new(&http(vec![to("/", policy)], vec![cluster("c", &[A])]));
        let calls = Rc::new(Cell::new(0));
        let count = calls.clone();
        mesh.handler(move |_, request| {
            count.set(count.get() + 1);
            let call = count.get();
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                if call < 3 { status(503) } else { Response::new(full(body)) }
            }
        });
        let request = Request::post("/").header("host", "x").body(full("x".repeat(30_000))).unwrap();
        let answer = mesh.send(request).await;
        assert_eq!((answer.status.as_u16(), answer.body.len(), calls.get()), (200, 30_000, 3));
        calls.set(0);
        let request = Request::post("/").header("host", "x").body(full("x".repeat(300_000))).unwrap();
        let answer = mesh.send(request).await;
        assert_eq!((answer.status.as_u16(), calls.get()), (503, 1), "too large to be kept");
    });
}

#[test]
fn istios_default_policy_leaves_503_alone_and_retries_grpc_unavailable() {
    run(async || {
        let on = [
            RetryOn::ConnectFailure,
            RetryOn::RefusedStream,
            RetryOn::Unavailable,
            RetryOn::Cancelled,
            RetryOn::RetriableStatusCodes,
        ];
        let mesh = Mesh::new(&http(vec![to("/", retrying(&on, 2))], vec![cluster("c", &[A, B])]));
        mesh.handler(|_, request| async move {
            if request.headers().contains_key("x-grpc") {
                return Response::builder()
                    .header("grpc-status", "14")
                    .header("content-type", "application/grpc")
                    .body(full(""))
                    .unwrap();
            }
            status(503)
        });
        let answer = mesh.send(get("/")).await;
        assert_eq!((answer.status.as_u16(), mesh.seen().len()), (503, 1));
        let answer = mesh.send(with(get("/"), "x-grpc", "1")).await;
        assert_eq!((answer.header("grpc-status"), mesh.seen().len()), ("14", 4));
    });
}

#[test]
fn timeouts_end_requests() {
    run(async || {
        let slow = Forward { timeout: Some(Duration::from_secs(3)), ..forward("c") };
        let mut tries = retrying(&[RetryOn::FiveXx], 2);
        tries.retry.as_mut().unwrap().per_try_timeout = Some(Duration::from_secs(1));
        let mut grpc = forward("c");
        grpc.grpc_timeout_max = Some(Duration::ZERO);
        let routes = vec![to("/slow", slow), to("/tries", tries), to("/grpc", grpc)];
        let mesh = Mesh::new(&http(routes, vec![cluster("c", &[A, B])]));
        mesh.handler(|_, _| async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            status(200)
        });
        let start = Instant::now();
        let answer = mesh.send(get("/slow")).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (504, "upstream request timeout"));
        assert_eq!(start.elapsed().as_secs(), 3);
        assert_eq!(mesh.event().flags, ["UT"]);
        let start = Instant::now();
        assert_eq!(mesh.send(get("/tries")).await.status, 504);
        assert_eq!(start.elapsed().as_secs(), 3, "three tries of a second");
        let start = Instant::now();
        mesh.send(with(get("/grpc"), "grpc-timeout", "5S")).await;
        assert_eq!(start.elapsed().as_secs(), 5);
        assert_eq!(mesh.seen()[0].headers["x-envoy-expected-rq-timeout-ms"], "3000");
    });
}

#[test]
fn a_failing_host_is_ejected_and_returns() {
    run(async || {
        let mut cluster = cluster("c", &[A, B]);
        cluster.outlier = Some(OutlierDetection {
            consecutive_5xx: 3,
            consecutive_gateway_failure: 0,
            consecutive_local_origin_failure: 5,
            split_external_local_origin: false,
            interval: Duration::from_secs(10),
            base_ejection: Duration::from_secs(30),
            max_ejection: Duration::from_secs(300),
            max_ejection_percent: 100,
        });
        let mesh = Mesh::new(&http(vec![to("/", forward("c"))], vec![cluster]));
        mesh.handler(|endpoint, _| async move { if endpoint == A { status(500) } else { status(200) } });
        for _ in 0..6 {
            mesh.send(get("/")).await;
        }
        let before = mesh.seen().len();
        for _ in 0..20 {
            assert_eq!(mesh.send(get("/")).await.status, 200);
        }
        assert!(mesh.seen()[before..].iter().all(|seen| seen.endpoint == B));
        tokio::time::sleep(Duration::from_secs(31)).await;
        let before = mesh.seen().len();
        for _ in 0..4 {
            mesh.send(get("/")).await;
        }
        assert!(mesh.seen()[before..].iter().any(|seen| seen.endpoint == A), "it is asked again");
    });
}

#[test]
fn closed_idle_connections_are_not_the_clients_problem() {
    run(async || {
        let mesh = Mesh::new(&http(vec![to("/", forward("c"))], vec![cluster("c", &[A])]));
        // An upstream that answers once and closes without saying so.
        *mesh.upstreams.raw.borrow_mut() = Some(Rc::new(|mut io| {
            Box::pin(async move {
                use tokio::io::{AsyncReadExt, AsyncWriteExt};
                let mut head = [0; 4096];
                let _ = io.read(&mut head).await.unwrap();
                io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
                // Reads the next request and goes away.
                let _ = io.read(&mut head).await;
            })
        }));
        for _ in 0..5 {
            let answer = mesh.send(get("/")).await;
            assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, "ok"));
        }
        assert_eq!(mesh.upstreams.connections.get(), 5);
    });
}

#[test]
fn an_upstream_that_resets_or_talks_nonsense() {
    run(async || {
        let mesh = Mesh::new(&http(vec![to("/", forward("c"))], vec![cluster("c", &[A])]));
        *mesh.upstreams.raw.borrow_mut() = Some(Rc::new(|io| Box::pin(async move { drop(io) })));
        let answer = mesh.send(get("/")).await;
        assert_eq!(answer.status, 503);
        assert!(answer.body.ends_with("reset reason: connection termination"), "{}", answer.body);
        assert_eq!(mesh.event().flags, ["UC"]);
        *mesh.upstreams.raw.borrow_mut() = Some(Rc::new(|mut io| {
            Box::pin(async move {
                let _ = tokio::io::AsyncReadExt::read(&mut io, &mut [0; 4096]).await.unwrap();
                tokio::io::AsyncWriteExt::write_all(&mut io, b"SSH-2.0-x\r\n\r\n").await.unwrap();
                std::future::pending::<()>().await;
            })
        }));
        let answer = mesh.send(get("/")).await;
        assert_eq!((answer.status.as_u16(), mesh.event().flags.join(",")), (502, "UPE".into()));
    });
}

#[test]
fn a_slow_upload_is_not_held_against_the_upstream() {
    run(async || {
        let slow = Forward { timeout: Some(Duration::from_secs(3)), ..forward("c") };
        let mesh = Mesh::new(&http(vec![to("/", slow)], vec![cluster("c", &[A])]));
        mesh.handler(|_, request| async move {
            let length = request.into_body().collect().await.unwrap().to_bytes().len();
            tokio::time::sleep(Duration::from_secs(2)).await;
            Response::new(full(length.to_string()))
        });
        let parts = futures::stream::unfold(0, |sent| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            (sent < 5).then(|| (Ok(hyper::body::Frame::data(bytes::Bytes::from("x"))), sent + 1))
        });
        let body = BodyExt::boxed(http_body_util::StreamBody::new(parts));
        let answer = mesh.send(Request::post("/").header("host", "x").body(body).unwrap()).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, "5"));
    });
}

#[test]
fn connections_of_retried_answers_are_kept() {
    run(async || {
        let mesh = Mesh::new(&http(vec![to("/", retrying(&[RetryOn::FiveXx], 3))], vec![cluster("c", &[A])]));
        let calls = Cell::new(0);
        mesh.handler(move |_, _| {
            calls.set(calls.get() + 1);
            let call = calls.get();
            async move { if call % 2 == 1 { status(500) } else { status(200) } }
        });
        for _ in 0..20 {
            assert_eq!(mesh.send(get("/")).await.status, 200);
        }
        assert!(mesh.upstreams.connections.get() <= 2, "{}", mesh.upstreams.connections.get());
    });
}
