//! Client and server over real TLS on loopback, certificates from a real certificate service.
#[path = "../../identity/tests/support/ca.rs"]
mod ca;

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use ca::{TOKEN, TestCa};
use http::{HeaderMap, StatusCode};
use l7_hbone::{ConnectError, ConnectRequest, Pool, PoolConfig, PoolKey, Server, Tunnel, accept_tls};
use l7_identity::{CaClient, CaConfig, IdentityManager};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use xds_model::spiffe::SpiffeId;

struct Setup {
    manager: IdentityManager,
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    tunnels: mpsc::UnboundedReceiver<Tunnel>,
    drain: tokio::sync::watch::Sender<bool>,
    _token: tempfile::NamedTempFile,
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

/// A server with the identity `payments`: hands out accepted tunnels; authority `refuse:1` gets 401.
async fn setup() -> Setup {
    let ca = TestCa::new();
    let mut token = tempfile::NamedTempFile::new().unwrap();
    token.write_all(TOKEN.as_bytes()).unwrap();
    let config = CaConfig {
        address: format!("http://{}", ca.serve().await),
        root_ca: None,
        server_name: None,
        token: Some(token.path().to_owned()),
        cluster_id: "Kubernetes".to_owned(),
        impersonate: true,
        ttl: Duration::from_secs(3600),
    };
    let manager = IdentityManager::new(CaClient::new(config), tokio::runtime::Handle::current());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let (sender, tunnels) = mpsc::unbounded_channel();
    let (drain, drain_watch) = tokio::sync::watch::channel(false);
    let (identities, count) = (manager.clone(), connections.clone());
    tokio::spawn(async move {
        loop {
            let (tcp, peer_addr) = listener.accept().await.unwrap();
            count.fetch_add(1, Ordering::Relaxed);
            let (identities, sender, mut drain) = (identities.clone(), sender.clone(), drain_watch.clone());
            tokio::spawn(async move {
                let certificate = identities.certificate(&id("payments")).await.unwrap();
                let Ok((tls, peer)) = accept_tls(tcp, &certificate).await else { return };
                let mut server = Server::handshake(tls, peer, peer_addr).await.unwrap();
                let mut draining = false;
                loop {
                    let next = tokio::select! {
                        next = server.accept() => next,
                        _ = drain.wait_for(|on| *on), if !draining => { draining = true; server.drain(); continue }
                    };
                    let Ok(Some(inbound)) = next else { return };
                    match inbound.authority() {
                        None => inbound.refuse(StatusCode::BAD_REQUEST),
                        Some("10.0.0.2:1") => inbound.refuse(StatusCode::UNAUTHORIZED),
                        Some(_) => sender.send(inbound.accept(HeaderMap::new()).unwrap()).unwrap(),
                    }
                }
            });
        }
    });
    Setup { manager, addr, connections, tunnels, drain, _token: token }
}

impl Setup {
    fn pool(&self) -> Pool {
        Pool::new(self.manager.clone(), PoolConfig::default())
    }

    async fn connect(&self, pool: &Pool, authority: &str) -> Result<Tunnel, ConnectError> {
        self.connect_expecting(pool, authority, vec![id("payments")]).await
    }

    async fn connect_expecting(
        &self,
        pool: &Pool,
        authority: &str,
        expected: Vec<SpiffeId>,
    ) -> Result<Tunnel, ConnectError> {
        let addr = self.addr;
        let key = PoolKey::new(id("checkout"), expected, addr, None);
        let request = ConnectRequest { key, authority: authority.into(), headers: HeaderMap::new() };
        pool.connect(request, move || TcpStream::connect(addr)).await
    }

    async fn pair(&mut self, pool: &Pool, authority: &str) -> (Tunnel, Tunnel) {
        let client = self.connect(pool, authority).await.unwrap();
        (client, self.tunnels.recv().await.unwrap())
    }
}

#[tokio::test]
async fn a_tunnel_carries_bytes_identities_and_half_closes() {
    let mut setup = setup().await;
    let pool = setup.pool();
    let (mut client, mut server) = setup.pair(&pool, "10.0.0.2:8080").await;
    assert_eq!((client.peer(), server.peer()), (&id("payments"), &id("checkout")));
    assert_eq!(&**server.authority(), "10.0.0.2:8080");
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    server.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "question");
    // The other direction still works after the first was closed.
    server.write_all(b"answer").await.unwrap();
    server.shutdown().await.unwrap();
    text.clear();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "answer");
}

#[tokio::test]
async fn a_wrong_identity_is_refused_on_either_side() {
    let setup = setup().await;
    let error = setup.connect_expecting(&setup.pool(), "10.0.0.2:80", vec![id("other")]).await.unwrap_err();
    assert_eq!(error.response_flag(), "TLS_FAILURE");
    assert!(error.to_string().contains("sa/payments"), "{error}");
    // Somebody without a certificate of the mesh never gets a stream.
    let foreign = self::setup().await;
    let pool = foreign.pool();
    let key = PoolKey::new(id("checkout"), vec![id("payments")], setup.addr, None);
    let request = ConnectRequest { key, authority: "10.0.0.2:80".into(), headers: HeaderMap::new() };
    let addr = setup.addr;
    let error = pool.connect(request, move || TcpStream::connect(addr)).await.unwrap_err();
    assert_eq!(error.response_flag(), "TLS_FAILURE", "{error}");
}

#[tokio::test]
async fn refusals_and_unreachable_peers_say_so() {
    let setup = setup().await;
    let pool = setup.pool();
    let error = setup.connect(&pool, "10.0.0.2:1").await.unwrap_err();
    assert!(matches!(error, ConnectError::Refused { status: StatusCode::UNAUTHORIZED, .. }), "{error}");
    assert_eq!(error.response_flag(), "DENY");
    // The refusal belongs to the tunnel, not to the connection.
    assert_eq!(pool.connections(), 1);
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let key = PoolKey::new(id("checkout"), vec![id("payments")], closed, None);
    let request = ConnectRequest { key, authority: "10.0.0.2:80".into(), headers: HeaderMap::new() };
    let error = pool.connect(request, move || TcpStream::connect(closed)).await.unwrap_err();
    assert_eq!(error.response_flag(), "CONNECT", "{error}");
}

#[tokio::test]
async fn a_hundred_tunnels_share_a_connection_and_the_next_gets_another() {
    let mut setup = setup().await;
    let pool = setup.pool();
    let mut open = Vec::new();
    for _ in 0..100 {
        open.push(setup.pair(&pool, "10.0.0.2:8080").await);
    }
    assert_eq!(setup.connections.load(Ordering::Relaxed), 1);
    open.push(setup.pair(&pool, "10.0.0.2:8080").await);
    assert_eq!((setup.connections.load(Ordering::Relaxed), pool.connections()), (2, 2));
    for (number, (client, server)) in open.iter_mut().enumerate() {
        client.write_all(format!("{number}").as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let mut text = String::new();
        server.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, number.to_string());
    }
}

#[tokio::test]
async fn many_at_once_make_one_connection() {
    let setup = setup().await;
    let pool = setup.pool();
    let all = (0..50).map(|_| setup.connect(&pool, "10.0.0.2:8080"));
    let opened = futures::future::try_join_all(all).await.unwrap();
    assert_eq!((opened.len(), setup.connections.load(Ordering::Relaxed)), (50, 1));
}

#[tokio::test]
async fn a_slow_reader_stalls_its_own_tunnel_only() {
    let mut setup = setup().await;
    let pool = setup.pool();
    let (slow_client, slow_server) = setup.pair(&pool, "10.0.0.2:8080").await;
    let (mut client, mut server) = setup.pair(&pool, "10.0.0.2:8080").await;
    let (_slow_reader, mut slow_writer) = slow_client.into_split();
    // Nobody reads the far end: the writer must come to a stop within the stream's window and buffers.
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = sent.clone();
    let flood = tokio::spawn(async move {
        let piece = Bytes::from(vec![7u8; 64 << 10]);
        while slow_writer.send(piece.clone()).await.is_ok() {
            counter.fetch_add(piece.len(), Ordering::Relaxed);
        }
    });
    let mut before = usize::MAX;
    while before != sent.load(Ordering::Relaxed) {
        before = sent.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!((4 << 20..8 << 20).contains(&before), "{before} bytes were taken for a reader who does not read");
    // The neighbour on the same connection moves far more than any window.
    let echo = tokio::spawn(async move {
        let mut total = 0;
        let mut buf = vec![0; 64 << 10];
        loop {
            let n = server.read(&mut buf).await.unwrap();
            if n == 0 {
                break total;
            }
            total += n;
        }
    });
    let piece = vec![1u8; 64 << 10];
    for _ in 0..1024 {
        client.write_all(&piece).await.unwrap();
    }
    client.shutdown().await.unwrap();
    assert_eq!(echo.await.unwrap(), 64 << 20);
    assert_eq!(setup.connections.load(Ordering::Relaxed), 1);
    drop(slow_server);
    flood.await.unwrap();
}

#[tokio::test]
async fn dropping_a_tunnel_resets_the_other_end() {
    let mut setup = setup().await;
    let pool = setup.pool();
    let (client, mut server) = setup.pair(&pool, "10.0.0.2:8080").await;
    drop(client);
    let mut buf = [0; 1];
    let error = server.read(&mut buf).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn draining_keeps_open_tunnels_and_sends_new_ones_elsewhere() {
    let mut setup = setup().await;
    let pool = setup.pool();
    let (mut client, mut server) = setup.pair(&pool, "10.0.0.2:8080").await;
    setup.drain.send_replace(true);
    // The GOAWAY must have arrived; a new tunnel then needs a new connection.
    while pool.connections() > 0 && setup.connections.load(Ordering::Relaxed) == 1 {
        let _ = setup.connect(&pool, "10.0.0.2:8080").await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
        if setup.connections.load(Ordering::Relaxed) > 1 {
            break;
        }
    }
    client.write_all(b"still here").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    server.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "still here");
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let mut setup = setup().await;
    let config = PoolConfig { idle_timeout: Duration::from_millis(100), ..PoolConfig::default() };
    let pool = Pool::new(setup.manager.clone(), config);
    let pair = setup.pair(&pool, "10.0.0.2:8080").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(pool.connections(), 1, "a connection with a tunnel is not idle");
    drop(pair);
    while pool.connections() > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
