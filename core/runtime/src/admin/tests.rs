use std::time::Duration;

use super::*;
use crate::client;

async fn started(readiness: Readiness) -> (tempfile::TempDir, std::path::PathBuf, broadcast::Sender<Arc<str>>) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("admin.sock");
    let (events, _) = broadcast::channel(16);
    let (_trigger, watch) = drain::channel();
    std::mem::forget(_trigger);
    Admin::new("test", readiness, Registry::new())
        .json("/status", || async { serde_json::json!({"node": "a"}) })
        .get("/clusters", |query| async move {
            if query == "format=json" {
                Reply::Json(serde_json::json!({"a": 1}))
            } else {
                Reply::Text("a::1\n".to_owned())
            }
        })
        .post("/level", |query| async move {
            if query == "level=debug" { Ok("set\n".to_owned()) } else { Err(format!("unknown {query}")) }
        })
        .stream("/flows", events.clone())
        .serve_unix(&socket, watch)
        .await
        .unwrap();
    (folder, socket, events)
}

#[tokio::test]
async fn json_and_readiness() {
    let readiness = Readiness::new();
    let guard = readiness.task("xds");
    let (_folder, socket, _) = started(readiness).await;
    assert_eq!(client::get_json(&socket, "/status").await.unwrap()["node"], "a");
    let error = client::get_text(&socket, "/healthz/ready").await.unwrap_err();
    assert!(error.to_string().contains("waiting for: xds"), "{error}");
    drop(guard);
    assert_eq!(client::get_text(&socket, "/healthz/ready").await.unwrap(), "ready\n");
}

#[tokio::test]
async fn a_path_with_a_query() {
    let (_folder, socket, _) = started(Readiness::new()).await;
    assert_eq!(client::get_text(&socket, "/clusters").await.unwrap(), "a::1\n");
    assert_eq!(client::get_json(&socket, "/clusters?format=json").await.unwrap()["a"], 1);
}

#[tokio::test]
async fn post_answers_or_says_why_not() {
    let (_folder, socket, _) = started(Readiness::new()).await;
    assert_eq!(client::post(&socket, "/level?level=debug").await.unwrap(), "set\n");
    assert!(client::post(&socket, "/level?level=x").await.unwrap_err().to_string().contains("unknown level=x"));
}

#[tokio::test]
async fn a_late_reader_gets_the_recent_lines_then_the_live_ones() {
    let (_folder, socket, events) = started(Readiness::new()).await;
    events.send(Arc::from("{\"n\":1}")).unwrap();
    // The keeper runs on this runtime: wait until it has seen the line.
    while client::get_text(&socket, "/flows").await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut lines = Box::pin(client::lines(&socket, "/flows?follow=true").await.unwrap());
    assert_eq!(lines.next().await.unwrap().unwrap(), "{\"n\":1}");
    events.send(Arc::from("{\"n\":2}")).unwrap();
    assert_eq!(lines.next().await.unwrap().unwrap(), "{\"n\":2}");
}
