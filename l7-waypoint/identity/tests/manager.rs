//! The identity manager against a real certificate service over gRPC.
#[path = "support/ca.rs"]
mod ca;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ca::{TOKEN, TestCa};
use l7_identity::{CaClient, CaConfig, IdentityManager, TrustFiles, WorkloadCertificate, peer_identity};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use xds_model::spiffe::SpiffeId;

struct Setup {
    ca: Arc<TestCa>,
    manager: IdentityManager,
    token: tempfile::NamedTempFile,
}

async fn setup() -> Setup {
    setup_with(TestCa::new(), TrustFiles::default()).await
}

async fn setup_with(ca: Arc<TestCa>, files: TrustFiles) -> Setup {
    let addr = ca.serve().await;
    let mut token = tempfile::NamedTempFile::new().unwrap();
    token.write_all(TOKEN.as_bytes()).unwrap();
    let config = CaConfig {
        address: format!("http://{addr}"),
        root_ca: None,
        server_name: None,
        token: Some(token.path().to_owned()),
        cluster_id: "Kubernetes".to_owned(),
        impersonate: true,
        ttl: Duration::from_secs(86_400),
    };
    let manager = IdentityManager::new(CaClient::new(config).with_files(files), tokio::runtime::Handle::current());
    Setup { ca, manager, token }
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

#[tokio::test]
async fn one_request_serves_many_callers() {
    let setup = setup().await;
    assert!(setup.manager.cached(&id("checkout")).is_none());
    let waiting: Vec<_> = (0..20)
        .map(|_| {
            let manager = setup.manager.clone();
            tokio::spawn(async move { manager.certificate(&id("checkout")).await.unwrap().serial().to_owned() })
        })
        .collect();
    let mut serials = std::collections::BTreeSet::new();
    for caller in waiting {
        serials.insert(caller.await.unwrap());
    }
    assert_eq!((serials.len(), setup.ca.issued.load(Ordering::Relaxed)), (1, 1));
    let status = serde_json_like(&setup.manager);
    assert!(status.contains("Available") && status.contains("spiffe://cluster.local/ns/shop/sa/checkout"), "{status}");
}

fn serde_json_like(manager: &IdentityManager) -> String {
    format!("{:?}", manager.status())
}

#[tokio::test]
async fn renewal_replaces_and_an_outage_keeps_the_old_one() {
    let setup = setup().await;
    *setup.ca.ttl.lock().unwrap() = Duration::from_secs(4);
    let first = setup.manager.certificate(&id("checkout")).await.unwrap();
    let second = loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = setup.manager.certificate(&id("checkout")).await.unwrap();
        if now.serial() != first.serial() {
            break now;
        }
    };
    setup.ca.refuse.store(true, Ordering::Relaxed);
    // Past the next half-life: the refusal is seen, the certificate still served.
    while !serde_json_like(&setup.manager).contains("told to refuse") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(setup.manager.certificate(&id("checkout")).await.unwrap().serial(), second.serial());
}

#[tokio::test]
async fn refusals_name_their_reason() {
    let setup = setup().await;
    setup.ca.refuse.store(true, Ordering::Relaxed);
    let error = setup.manager.certificate(&id("checkout")).await.unwrap_err().to_string();
    assert!(error.contains("told to refuse") && error.contains("sa/checkout"), "{error}");
    setup.ca.refuse.store(false, Ordering::Relaxed);
    std::fs::write(setup.token.path(), "stolen").unwrap();
    let error = setup.manager.certificate(&id("payments")).await.unwrap_err().to_string();
    assert!(error.contains("wrong token"), "{error}");
    // The token is read again: the next attempt after the back-off succeeds.
    std::fs::write(setup.token.path(), TOKEN).unwrap();
    while setup.manager.certificate(&id("payments")).await.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn what_failed_before_a_caller_came_is_not_held_against_the_ca() {
    let setup = setup().await;
    setup.ca.refuse.store(true, Ordering::Relaxed);
    setup.manager.prefetch(&id("checkout"));
    while !serde_json_like(&setup.manager).contains("told to refuse") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Right after a failure; the pauses between attempts have no part in it.
    for _ in 0..3 {
        setup.manager.certificate(&id("checkout")).await.unwrap_err();
    }
    setup.ca.refuse.store(false, Ordering::Relaxed);
    setup.manager.certificate(&id("checkout")).await.expect("asked again for this caller");
}

#[tokio::test]
async fn a_certificate_for_somebody_else_is_refused() {
    let setup = setup().await;
    *setup.ca.lie.lock().unwrap() = Some("spiffe://cluster.local/ns/shop/sa/mallory".to_owned());
    let error = setup.manager.certificate(&id("checkout")).await.unwrap_err().to_string();
    assert!(error.contains("mallory"), "{error}");
}

#[tokio::test]
async fn forgetting_stops_the_renewal() {
    let setup = setup().await;
    setup.manager.certificate(&id("checkout")).await.unwrap();
    setup.manager.forget(&id("checkout"));
    assert!(setup.manager.cached(&id("checkout")).is_none());
    assert!(setup.manager.status().is_empty());
}

async fn handshake(
    client: &WorkloadCertificate,
    expected: &[SpiffeId],
    server: &WorkloadCertificate,
) -> Result<(SpiffeId, SpiffeId), String> {
    let (near, far) = duplex(1 << 16);
    let acceptor = TlsAcceptor::from(server.server_config());
    let connector = TlsConnector::from(client.client_config(expected).unwrap());
    let server = tokio::spawn(async move {
        let mut tls = acceptor.accept(far).await.map_err(|error| error.to_string())?;
        let peer = peer_identity(tls.get_ref().1.peer_certificates()).map_err(|error| error.to_string())?;
        tls.write_all(b"hi").await.map_err(|error| error.to_string())?;
        Ok::<_, String>(peer)
    });
    let name = std::net::IpAddr::from([10, 0, 0, 2]).into();
    let mut tls = connector.connect(name, near).await.map_err(|error| error.to_string())?;
    let mut text = [0; 2];
    tls.read_exact(&mut text).await.map_err(|error| error.to_string())?;
    assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(tls.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let server_identity = peer_identity(tls.get_ref().1.peer_certificates()).map_err(|error| error.to_string())?;
    let client_identity = server.await.unwrap()?;
    Ok((client_identity, server_identity))
}

#[tokio::test]
async fn both_ends_know_each_other_and_nobody_else_gets_in() {
    let setup = setup().await;
    let client = setup.manager.certificate(&id("checkout")).await.unwrap();
    let server = setup.manager.certificate(&id("payments")).await.unwrap();
    let seen = handshake(&client, &[id("x"), id("payments")], &server).await.unwrap();
    assert_eq!(seen, (id("checkout"), id("payments")));
    let error = handshake(&client, &[id("x")], &server).await.unwrap_err();
    assert!(error.contains("sa/payments") && error.contains("sa/x"), "{error}");
    assert!(handshake(&client, &[], &server).await.is_err(), "an empty set of identities accepts nobody");

    // A client of another trust domain, same CA.
    let stranger = SpiffeId::new("other.domain", "shop", "checkout").unwrap();
    let stranger = setup.manager.certificate(&stranger).await.unwrap();
    assert!(handshake(&stranger, &[id("payments")], &server).await.is_err());

    // The same names from another CA.
    let other = self::setup().await;
    let forged = other.manager.certificate(&id("checkout")).await.unwrap();
    assert!(handshake(&forged, &[id("payments")], &server).await.is_err());
    let forged = other.manager.certificate(&id("payments")).await.unwrap();
    assert!(handshake(&client, &[id("payments")], &forged).await.is_err());
}

/// The certificate once it is another than `old`.
async fn renewed(manager: &IdentityManager, account: &str, old: &WorkloadCertificate) -> Arc<WorkloadCertificate> {
    let wait = async {
        loop {
            let now = manager.certificate(&id(account)).await.unwrap();
            if now.serial() != old.serial() {
                return now;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("not renewed")
}

#[tokio::test]
async fn a_new_root_is_taken_up_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root-cert.pem");
    let ca = TestCa::new();
    let old_root = ca.root();
    std::fs::write(&file, &old_root).unwrap();
    let setup = setup_with(ca, TrustFiles { roots: Some(file.clone()), revocations: None }).await;
    let (old_client, old_server) = (
        setup.manager.certificate(&id("checkout")).await.unwrap(),
        setup.manager.certificate(&id("payments")).await.unwrap(),
    );
    // The manager has seen the file as it was.
    tokio::time::sleep(Duration::from_millis(100)).await;
    setup.ca.rotate();
    std::fs::write(&file, format!("{old_root}{}", setup.ca.root())).unwrap();
    let new_server = renewed(&setup.manager, "payments", &old_server).await;
    let new_client = renewed(&setup.manager, "checkout", &old_client).await;
    // Certificates of the old root get in while the file has it; whoever has not heard of the new one keeps it out.
    handshake(&new_client, &[id("payments")], &new_server).await.unwrap();
    let error = handshake(&new_client, &[id("payments")], &old_server).await.unwrap_err();
    assert!(error.contains("UnknownIssuer") || error.contains("UnknownCA"), "the old server knows one root: {error}");
    assert_eq!((old_server.roots().len(), new_server.roots().len()), (1, 2));

    // The old root goes: one more round, and nobody shows or takes it any more.
    std::fs::write(&file, setup.ca.root()).unwrap();
    let last = renewed(&setup.manager, "payments", &new_server).await;
    assert_eq!(last.roots().len(), 1);
    assert!(handshake(&old_client, &[id("payments")], &last).await.is_err());
    handshake(&new_client, &[id("payments")], &last).await.unwrap();
}

#[tokio::test]
async fn revoked_peers_are_refused_both_ways_and_a_broken_list_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca-crl.pem");
    let ca = TestCa::new();
    let (revoked_one, good) = {
        let plain = setup_with(ca.clone(), TrustFiles::default()).await;
        (
            plain.manager.certificate(&id("checkout")).await.unwrap(),
            plain.manager.certificate(&id("other")).await.unwrap(),
        )
    };
    let setup = setup_with(ca.clone(), TrustFiles { roots: None, revocations: Some(file.clone()) }).await;
    let own = setup.manager.certificate(&id("payments")).await.unwrap();
    handshake(&revoked_one, &[id("payments")], &own).await.unwrap();

    std::fs::write(&file, ca.revocations(&[revoked_one.serial()])).unwrap();
    let wait = async {
        while handshake(&revoked_one, &[id("payments")], &own).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("the list is not in force");
    let error = handshake(&own, &[id("checkout")], &revoked_one).await.unwrap_err();
    assert!(error.contains("Revoked"), "{error}");
    handshake(&good, &[id("payments")], &own).await.unwrap();

    std::fs::write(&file, "no list at all").unwrap();
    tokio::time::sleep(strata_runtime::file::LOOK_EVERY * 2).await;
    assert!(handshake(&revoked_one, &[id("payments")], &own).await.is_err(), "the last good list stays");
    handshake(&good, &[id("payments")], &own).await.unwrap();
}
