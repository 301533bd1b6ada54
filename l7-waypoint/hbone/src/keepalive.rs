//! Pings on an idle connection (ztunnel: every 10 s, 20 s to answer).
use std::time::Duration;

use h2::{Ping, PingPong};

const INTERVAL: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(20);

/// Resolves when the peer stopped answering; never while it answers.
pub(crate) async fn unresponsive(ping_pong: Option<PingPong>) {
    let Some(mut ping_pong) = ping_pong else { return std::future::pending().await };
    loop {
        tokio::time::sleep(INTERVAL).await;
        match tokio::time::timeout(TIMEOUT, ping_pong.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection itself ends and says why.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}
