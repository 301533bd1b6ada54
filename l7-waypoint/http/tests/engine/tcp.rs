use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use xds_model::envoy::chain::*;
use xds_model::envoy::matcher::StringMatcher;
use xds_model::envoy::rbac::*;

use crate::config::*;
use crate::support::*;

fn chain(rbac: Vec<Rbac>) -> TcpChain {
    TcpChain {
        rbac,
        target: TcpTarget::Cluster("c".into()),
        idle_timeout: Some(Duration::from_secs(3600)),
        max_connection_duration: None,
        hash_source_ip: false,
        max_connect_attempts: 2,
        access_logs: Vec::new(),
        stats: None,
    }
}

fn server_speaks_first(mesh: &Mesh) {
    *mesh.upstreams.raw.borrow_mut() = Some(Rc::new(|mut io| {
        Box::pin(async move {
            io.write_all(b"220 ready\r\n").await.unwrap();
            let mut all = Vec::new();
            io.read_to_end(&mut all).await.unwrap();
            io.write_all(&all).await.unwrap();
        })
    }));
}

#[test]
fn bytes_both_ways_with_half_close_and_a_second_host() {
    run(async || {
        let mesh = Mesh::new(&config(
            ChainKind::Tcp(Box::new(chain(Vec::new()))),
            vec![cluster("c", &["10.0.0.1:80", "10.0.0.2:80"])],
        ));
        server_speaks_first(&mesh);
        mesh.upstreams.down.borrow_mut().push("10.0.0.1:80".into());
        for _ in 0..4 {
            let mut io = mesh.connect(info());
            let mut banner = [0; 11];
            io.read_exact(&mut banner).await.unwrap();
            io.write_all(b"EHLO").await.unwrap();
            io.shutdown().await.unwrap();
            let mut rest = String::new();
            io.read_to_string(&mut rest).await.unwrap();
            assert_eq!(rest, "EHLO");
            let event = mesh.event();
            assert_eq!((event.kind.as_str(), event.bytes_received, event.bytes_sent), ("connection", 4, 15));
        }
        let metrics = mesh.registry.encode();
        assert!(
            metrics.lines().any(|line| line.starts_with("istio_tcp_connections_closed_total") && line.ends_with(" 4")),
            "{metrics}"
        );
    });
}

#[test]
fn rbac_judges_connections() {
    run(async || {
        let name = StringMatcher::exact("spiffe://cluster.local/ns/bank/sa/payments");
        let policy = RbacPolicy {
            name: "ns[bank]-policy[ledger-tcp]-rule[0]".into(),
            permissions: vec![Permission::DestinationPort(80)],
            principals: vec![Principal::Peer(Some(name.clone()))],
        };
        let rules = RbacRules { action: RbacAction::Allow, policies: vec![policy] };
        let rbac = Rbac { rules: Some(rules), shadow_rules: None, shadow_prefix: String::new() };
        let mesh =
            Mesh::new(&config(ChainKind::Tcp(Box::new(chain(vec![rbac]))), vec![cluster("c", &["10.0.0.1:80"])]));
        server_speaks_first(&mesh);
        let mut io = mesh.connect(info());
        let mut bytes = Vec::new();
        io.read_to_end(&mut bytes).await.unwrap();
        assert!(bytes.is_empty());
        assert_eq!(mesh.event().flags, ["DENY"]);
        let mut info = info();
        info.peer_principal = Some("spiffe://cluster.local/ns/bank/sa/payments".into());
        let mut io = mesh.connect(info);
        assert!(io.read(&mut [0; 16]).await.unwrap() > 0);
    });
}

#[test]
fn http_and_tcp_are_told_apart_on_one_port() {
    run(async || {
        let mut both = config(ChainKind::Tcp(Box::new(chain(Vec::new()))), vec![cluster("c", &["10.0.0.1:80"])]);
        let http = http_chain(vec![to("/", forward("c"))], Vec::new());
        both.chains.insert("http".into(), Chain { name: "http".into(), kind: ChainKind::Http(Box::new(http)) });
        let by = ByProtocol { http11: Some("http".into()), h2c: Some("http".into()), ..ByProtocol::always("chain") };
        both.dispatch[0].any_port = Some(by);
        let mesh = Mesh::new(&both);
        assert_eq!(mesh.send(get("/")).await.body, "10.0.0.1:80");
        assert_eq!(
            mesh.http2(info())
                .await
                .send_request(http::Request::get("http://x/").body(full("")).unwrap())
                .await
                .unwrap()
                .status(),
            200
        );
        server_speaks_first(&mesh);
        let mut silent = mesh.connect(info());
        let mut banner = [0; 11];
        silent.read_exact(&mut banner).await.unwrap();
        assert_eq!(&banner, b"220 ready\r\n");
    });
}
