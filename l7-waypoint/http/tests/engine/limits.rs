use std::time::Duration;

use http::Response;
use xds_model::envoy::chain::ChainKind;

use crate::config::*;
use crate::support::*;

const A: &str = "10.0.0.1:80";

#[test]
fn one_connection_one_pending_the_rest_overflow() {
    run(async || {
        let mut cluster = cluster("c", &[A]);
        cluster.limits.max_connections = 1;
        cluster.limits.max_pending_requests = 1;
        let mesh = Mesh::new(&http(vec![to("/", forward("c"))], vec![cluster]));
        mesh.handler(|_, _| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            status(200)
        });
        let mut answers = futures::future::join_all((0..5).map(|_| mesh.send(get("/")))).await;
        answers.sort_by_key(|answer| answer.status);
        let statuses: Vec<_> = answers.iter().map(|answer| answer.status.as_u16()).collect();
        assert_eq!(statuses, [200, 200, 503, 503, 503]);
        assert!(answers[4].body.ends_with("reset reason: overflow"), "{}", answers[4].body);
        assert_eq!(answers[4].header("x-envoy-overloaded"), "true");
        assert_eq!(mesh.upstreams.connections.get(), 1);
    });
}

#[test]
fn requests_are_bounded_too() {
    run(async || {
        let mut cluster = cluster("c", &[A]);
        cluster.limits.max_requests = 2;
        let mesh = Mesh::new(&http(vec![to("/", forward("c"))], vec![cluster]));
        mesh.handler(|_, _| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            status(200)
        });
        let answers = futures::future::join_all((0..5).map(|_| mesh.send(get("/")))).await;
        assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), 2);
        assert_eq!(mesh.send(get("/")).await.status, 200, "places are given back");
    });
}

#[test]
fn worn_out_connections_are_replaced() {
    run(async || {
        let mut cluster = cluster("c", &[A]);
        cluster.http.max_requests_per_connection = Some(3);
        let mesh = Mesh::new(&http(vec![to("/", forward("c"))], vec![cluster]));
        for _ in 0..7 {
            assert_eq!(mesh.send(get("/")).await.status, 200);
        }
        assert_eq!(mesh.upstreams.connections.get(), 3);
    });
}

#[test]
fn idle_clients_are_closed_and_drains_are_graceful() {
    run(async || {
        let mut chain = http_chain(vec![to("/", forward("c"))], Vec::new());
        chain.options.idle_timeout = Some(Duration::from_secs(60));
        let mesh = Mesh::new(&config(ChainKind::Http(Box::new(chain)), vec![cluster("c", &[A])]));
        let mut sender = mesh.http1(info()).await;
        Answer::read(sender.send_request(get("/")).await.unwrap()).await;
        tokio::time::sleep(Duration::from_secs(50)).await;
        assert!(sender.ready().await.is_ok());
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(sender.ready().await.is_err(), "idle for more than a minute");

        mesh.handler(|_, _| async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            Response::new(full("late"))
        });
        let mut busy = mesh.http1(info()).await;
        let mut idle = mesh.http2(info()).await;
        let (mut kept, mut quiet) = (mesh.http1(info()).await, mesh.http1(info()).await);
        let pending = busy.send_request(get("/"));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let trigger = mesh.trigger.borrow_mut().take().unwrap();
        let drained = tokio::task::spawn_local(async move { trigger.drain(Duration::from_secs(30)).await });
        let response = pending.await.unwrap();
        assert_eq!(response.headers()["connection"], "close");
        assert_eq!(Answer::read(response).await.body, "late");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(idle.ready().await.is_err(), "GOAWAY");
        // A request that comes meanwhile on a kept connection is answered, and the answer says that it was the last.
        let last = kept.send_request(get("/")).await.unwrap();
        assert_eq!(last.headers()["connection"], "close");
        Answer::read(last).await;
        assert!(kept.ready().await.is_err());
        assert!(quiet.ready().await.is_ok());
        tokio::time::sleep(Duration::from_secs(15)).await;
        assert!(quiet.ready().await.is_err(), "closed before the drain's deadline");
        let Mesh { watch, engine, .. } = mesh;
        drop((watch, engine));
        assert!(drained.await.unwrap());
    });
}

#[test]
fn idle_connections_to_one_host_never_lock_out_another() {
    run(async || {
        let mut cluster = cluster("c", &[A, "10.0.0.2:80"]);
        cluster.limits.max_connections = 1;
        let mesh = Mesh::new(&http(vec![to("/", forward("c"))], vec![cluster]));
        for _ in 0..6 {
            assert_eq!(mesh.send(get("/")).await.status, 200);
        }
        assert_eq!(mesh.upstreams.connections.get(), 2);
    });
}
