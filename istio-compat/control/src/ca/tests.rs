use super::*;

fn csr(key: &KeyPair) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    // What is asked for differs from what is granted, to see that the request's names are not used.
    params.subject_alt_names = vec![SanType::URI("spiffe://evil/ns/x/sa/y".try_into().unwrap())];
    params.serialize_request(key).unwrap().pem().unwrap()
}

#[test]
fn the_root_survives_and_signs_for_the_granted_identity_only() {
    let folder = tempfile::tempdir().unwrap();
    let first = Authority::open(folder.path()).unwrap();
    let second = Authority::open(folder.path()).unwrap();
    assert_eq!(first.root_pem(), second.root_pem());

    let identity = "spiffe://cluster.local/ns/shop/sa/frontend";
    let leaf = second.sign(&csr(&KeyPair::generate().unwrap()), identity, DEFAULT_TTL).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(leaf.as_bytes()).unwrap();
    let leaf = pem.parse_x509().unwrap();
    let (_, root_pem) = x509_parser::pem::parse_x509_pem(first.root_pem().as_bytes()).unwrap();
    assert_eq!(leaf.issuer(), root_pem.parse_x509().unwrap().subject());
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    let names: Vec<String> = names.value.general_names.iter().map(|name| format!("{name:?}")).collect();
    assert_eq!(names, [format!("URI({identity:?})")]);
    let lifetime = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert_eq!(lifetime, 24 * 3600 + 120);
}

#[test]
fn a_forged_request_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open(folder.path()).unwrap();
    assert!(matches!(authority.sign("not a request", "spiffe://a/ns/b/sa/c", DEFAULT_TTL), Err(CaError::Request(_))));
    let request = csr(&KeyPair::generate().unwrap());
    // One character of the body (which ends in the signature) changed.
    let at = request.len() - 60;
    let other = if request.as_bytes()[at] == b'A' { "B" } else { "A" };
    let forged = format!("{}{other}{}", &request[..at], &request[at + 1..]);
    assert!(matches!(authority.sign(&forged, "spiffe://a/ns/b/sa/c", DEFAULT_TTL), Err(CaError::Request(_))));
}

#[test]
fn a_certificate_without_its_key_stops_the_start() {
    let folder = tempfile::tempdir().unwrap();
    Authority::open(folder.path()).unwrap();
    fs::remove_file(folder.path().join("root-key.pem")).unwrap();
    assert!(matches!(Authority::open(folder.path()), Err(CaError::File { .. })));
}
