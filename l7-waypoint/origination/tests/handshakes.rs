//! Handshakes with real servers: who is accepted, what is presented, what changes without a restart.
mod support;

use support::{Server, Setup, exact, named, tls};
use xds_model::envoy::cluster::CertSource;
use xds_model::envoy::matcher::{StringMatcher, StringPattern};

#[tokio::test]
async fn the_name_in_sni_is_sent_and_must_be_in_the_certificate() {
    let setup = Setup::new();
    let config = named(tls(setup.roots()), "psp.example");
    let seen = setup.connect(&config, None, &setup.server(&["psp.example"])).await.unwrap();
    assert_eq!(seen.sni.as_deref(), Some("psp.example"));
    let error = setup.connect(&config, None, &setup.server(&["other.example"])).await.unwrap_err();
    assert!(error.contains("TLS of outbound") && error.contains("not valid for name"), "{error}");
    // A chain to nobody's root, whatever its names say.
    let error = setup.connect(&config, None, &Setup::new().server(&["psp.example"])).await.unwrap_err();
    assert!(error.contains("UnknownIssuer") || error.contains("BadSignature"), "{error}");
}

#[tokio::test]
async fn one_of_the_subject_names_is_enough_and_the_name_in_sni_then_is_not_needed() {
    let setup = Setup::new();
    let mut config = named(tls(setup.roots()), "reviews.example");
    config.sans = vec![exact("alt.example"), exact("spiffe://x/y")];
    for names in [&["alt.example"][..], &["spiffe://x/y"], &["*.example"]] {
        setup.connect(&config, None, &setup.server(names)).await.unwrap_or_else(|error| panic!("{names:?}: {error}"));
    }
    for names in [&["reviews.example"][..], &["spiffe://x/z"], &["alt.example.org"], &["10.0.0.1"]] {
        let error = setup.connect(&config, None, &setup.server(names)).await.unwrap_err();
        assert!(error.contains("none of its names is expected"), "{names:?}: {error}");
    }
    config.sans =
        vec![StringMatcher { pattern: StringPattern::Prefix("spiffe://cluster.local/".into()), ignore_case: false }];
    setup.connect(&config, None, &setup.server(&["spiffe://cluster.local/ns/a/sa/b"])).await.unwrap();
    config.sans = vec![exact("10.0.0.1")];
    setup.connect(&config, None, &setup.server(&["10.0.0.1"])).await.unwrap();
}

#[tokio::test]
async fn without_a_name_the_request_s_host_counts() {
    let setup = Setup::new();
    let mut config = tls(setup.roots());
    (config.auto_sni, config.auto_san) = (true, true);
    let server = setup.server(&["shop.example", "10.0.0.7"]);
    let seen = setup.connect(&config, Some("shop.example"), &server).await.unwrap();
    assert_eq!(seen.sni.as_deref(), Some("shop.example"));
    // An address is looked for in the certificate and not sent.
    let seen = setup.connect(&config, Some("10.0.0.7"), &server).await.unwrap();
    assert_eq!(seen.sni, None);
    let error = setup.connect(&config, Some("bank.example"), &server).await.unwrap_err();
    assert!(error.contains("not valid for name"), "{error}");
    let error = setup.connect(&config, None, &server).await.unwrap_err();
    assert!(error.contains("sni or subjectAltNames is needed"), "{error}");
    let error = setup.connect(&config, Some("a b"), &server).await.unwrap_err();
    assert!(error.contains("\"a b\" is no server name"), "{error}");
}

#[tokio::test]
async fn without_roots_anybody_is_accepted_and_names_cannot_be_checked() {
    let setup = Setup::new();
    let mut config = tls(None);
    let stranger = Setup::new().server(&["whoever.example"]);
    let seen = setup.connect(&config, None, &stranger).await.unwrap();
    assert_eq!(seen.sni, None);
    config.sans = vec![exact("whoever.example")];
    let error = setup.connect(&config, None, &stranger).await.unwrap_err();
    assert!(error.contains("no roots to check them by"), "{error}");
}

#[tokio::test]
async fn key_material_comes_by_name_and_changes_without_a_restart() {
    let setup = Setup::new();
    let mut config = named(tls(Some(CertSource::Sds("kubernetes://psp-cacert".into()))), "psp.example");
    config.client_cert = Some(CertSource::Sds("kubernetes://psp".into()));
    let names: Vec<_> = l7_origination::secret_names(&config).collect();
    assert_eq!(names, ["kubernetes://psp-cacert", "kubernetes://psp"]);
    let server = setup.server(&["psp.example"]).asking_for_certificates();
    let error = setup.connect(&config, None, &server).await.unwrap_err();
    assert!(error.contains("secret kubernetes://psp-cacert has not come"), "{error}");
    setup.send_roots("kubernetes://psp-cacert", &setup.ca_pem);
    let error = setup.connect(&config, None, &server).await.unwrap_err();
    assert!(error.contains("secret kubernetes://psp has not come"), "{error}");
    setup.send_roots("kubernetes://psp", &setup.ca_pem);
    let error = setup.connect(&config, None, &server).await.unwrap_err();
    assert!(error.contains("kubernetes://psp holds no certificate with its key"), "{error}");
    for client in ["first.example", "second.example"] {
        setup.send_certificate("kubernetes://psp", client).unwrap();
        let seen = setup.connect(&config, None, &server).await.unwrap();
        assert_eq!(seen.client.as_deref(), Some(client));
    }
    // What cannot be used is refused, and the one before stays.
    let reason = setup.send_certificate_of("kubernetes://psp", "no key").unwrap_err();
    assert!(reason.contains("private key"), "{reason}");
    assert_eq!(setup.connect(&config, None, &server).await.unwrap().client.as_deref(), Some("second.example"));
    let status = format!("{:?}", setup.secrets().status());
    assert!(status.contains("kubernetes://psp-cacert") && !status.contains("PRIVATE"), "{status}");
    setup.secrets().remove("kubernetes://psp-cacert");
    assert!(setup.connect(&config, None, &server).await.is_err());
}

#[tokio::test]
async fn files_are_read_again_when_they_change() {
    let setup = Setup::new();
    let other = Setup::new();
    let path = setup.write("ca.pem", &other.ca_pem);
    let (cert, key) = (setup.write("c.pem", ""), setup.write("k.pem", ""));
    let mut config = named(tls(Some(CertSource::File(path.clone()))), "psp.example");
    let server = setup.server(&["psp.example"]).asking_for_certificates();
    assert!(setup.connect(&config, None, &server).await.is_err(), "roots of another");
    setup.write("ca.pem", &setup.ca_pem);
    config.client_cert = Some(CertSource::Files { cert: cert.clone(), key });
    let error = setup.connect(&config, None, &server).await.unwrap_err();
    assert!(error.contains(&cert) && error.contains("no PEM certificate"), "{error}");
    let (chain, pem) = setup.certificate(&["client.example"]);
    setup.write("c.pem", &chain);
    setup.write("k.pem", &pem);
    assert_eq!(setup.connect(&config, None, &server).await.unwrap().client.as_deref(), Some("client.example"));
    std::fs::remove_file(&path).unwrap();
    let error = setup.connect(&config, None, &server).await.unwrap_err();
    assert!(error.contains(&path) && error.contains("No such file"), "{error}");
}

#[tokio::test]
async fn a_revoked_server_is_refused_and_tls_1_2_is_spoken_where_nothing_newer_is() {
    let setup = Setup::new();
    let mut config = named(tls(setup.roots()), "psp.example");
    config.alpn = vec!["h2".into()];
    let server = setup.server(&["psp.example"]);
    let old = setup.server(&["psp.example"]).with_tls12_only();
    let seen = setup.connect(&config, None, &old).await.unwrap();
    assert_eq!((seen.version, seen.alpn.as_deref()), ("TLSv1_2".to_owned(), Some("h2")));
    assert_eq!(setup.connect(&config, None, &server).await.unwrap().version, "TLSv1_3");
    config.crl = Some(CertSource::File(setup.write("crl.pem", &setup.revocations(&[]))));
    setup.connect(&config, None, &server).await.unwrap();
    setup.write("crl.pem", &setup.revocations(&[&server]));
    let error = setup.connect(&config, None, &server).await.unwrap_err();
    assert!(error.contains("Revoked"), "{error}");
}

#[tokio::test]
async fn the_mesh_s_own_certificate_is_presented_by_its_istio_names() {
    let setup = Setup::in_mesh().await;
    let mut config = tls(Some(CertSource::Sds("ROOTCA".into())));
    config.client_cert = Some(CertSource::Sds("default".into()));
    config.sans = vec![exact("spiffe://cluster.local/ns/outside/sa/default")];
    assert_eq!(l7_origination::secret_names(&config).count(), 0);
    let sidecar: Server = setup.sidecar("spiffe://cluster.local/ns/outside/sa/default").await;
    let seen = setup.connect(&config, None, &sidecar).await.unwrap();
    assert_eq!(seen.client.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/waypoint"));
    let error =
        setup.connect(&config, None, &setup.sidecar("spiffe://cluster.local/ns/x/sa/y").await).await.unwrap_err();
    assert!(error.contains("none of its names"), "{error}");
}
