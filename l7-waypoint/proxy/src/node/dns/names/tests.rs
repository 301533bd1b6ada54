use hickory_proto::op::Query;
use prost::Message as _;
use xds_model::wds::{MeshBuilder, MeshConfig};
use xds_proto::istio::workload as wire;
use xds_proto::type_url;

use super::*;

/// Services as `namespace/hostname` with addresses.
fn mesh(services: &[(&str, &[&str])]) -> Arc<Mesh> {
    let (mut builder, view) = MeshBuilder::new(MeshConfig::default());
    for (key, addresses) in services {
        let (namespace, hostname) = key.split_once('/').unwrap();
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let address = |text: &&str| {
            let (ip, length) = text.split_once('/').map_or((*text, None), |(ip, length)| (ip, length.parse().ok()));
            wire::NetworkAddress { address: octets(ip.parse().unwrap()).into(), length, ..Default::default() }
        };
        let service = wire::Service {
            name: hostname.split('.').next().unwrap().to_owned(),
            namespace: namespace.to_owned(),
            hostname: hostname.to_owned(),
            addresses: addresses.iter().map(address).collect(),
            ..Default::default()
        };
        let message = wire::Address { r#type: Some(wire::address::Type::Service(service)) }.encode_to_vec();
        let rejected = builder.apply(type_url::ADDRESS, [(*key, message.as_slice())], []);
        assert_eq!(rejected, []);
    }
    view.load_full()
}

fn shop() -> Arc<Mesh> {
    mesh(&[
        ("shop/cart.shop.svc.cluster.local", &["10.96.0.7", "fd00::7"]),
        ("shop/old.shop.svc.cluster.local", &["10.96.0.8"]),
        ("shop/headless.shop.svc.cluster.local", &[]),
        ("shop/api.example.com", &["240.240.0.1"]),
        ("shop/*.example.com", &["240.240.0.2"]),
        ("shop/*.deep.example.com", &["240.240.0.3"]),
        ("shop/range.example.com", &["10.1.0.0/24"]),
    ])
}

fn query(name: &str, of: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.id = 4711;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), of));
    message
}

const ASKER: Asker<'static> = Asker { namespace: "shop", cluster_domain: "cluster.local" };

/// The answer's records as text; `None` where the resolver is asked.
fn ask(mesh: &Mesh, name: &str, of: RecordType) -> Option<Vec<String>> {
    let answer = Message::from_vec(&answer(mesh, ASKER, &query(name, of).to_vec().unwrap())?).unwrap();
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (4711, ResponseCode::NoError));
    assert!(answer.metadata.recursion_desired && answer.metadata.recursion_available && answer.metadata.authoritative);
    assert_eq!(answer.queries, query(name, of).queries);
    Some(
        answer
            .answers
            .iter()
            .map(|record| format!("{} {} {}", record.name, record.record_type(), record.data))
            .collect(),
    )
}

#[test]
fn services_are_answered_by_their_addresses() {
    let mesh = shop();
    let cart = "cart.shop.svc.cluster.local.";
    assert_eq!(ask(&mesh, cart, RecordType::A).unwrap(), ["cart.shop.svc.cluster.local. A 10.96.0.7"]);
    assert_eq!(ask(&mesh, cart, RecordType::AAAA).unwrap(), ["cart.shop.svc.cluster.local. AAAA fd00::7"]);
    // The name as it was asked for, whatever its case (draft-vixie-dnsext-dns0x20).
    let mixed = ask(&mesh, "CaRt.shop.svc.cluster.local.", RecordType::A).unwrap();
    assert_eq!(mixed, ["CaRt.shop.svc.cluster.local. A 10.96.0.7"]);
    // There is the name, and no address of that family.
    assert_eq!(ask(&mesh, "old.shop.svc.cluster.local.", RecordType::AAAA).unwrap(), Vec::<String>::new());
}

#[test]
fn names_outside_the_cluster_and_wildcards() {
    let mesh = shop();
    let first = |name: &str| ask(&mesh, name, RecordType::A).map(|records| records.join("; "));
    assert_eq!(first("api.example.com.").unwrap(), "api.example.com. A 240.240.0.1");
    assert_eq!(first("other.example.com.").unwrap(), "other.example.com. A 240.240.0.2");
    assert_eq!(first("a.b.deep.example.com.").unwrap(), "a.b.deep.example.com. A 240.240.0.3");
    // A wildcard is no name of its own, and its parent is another.
    assert_eq!(first("example.com."), None);
    // As a resolver with search domains asks first.
    for domain in ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"] {
        let said = first(&format!("api.example.com.{domain}.")).unwrap();
        assert_eq!(said, format!("api.example.com.{domain}. CNAME api.example.com.; api.example.com. A 240.240.0.1"));
    }
    assert_eq!(first("api.example.com.other.svc.cluster.local."), None);
}

#[test]
fn what_is_not_the_meshs_is_the_resolvers() {
    let mesh = shop();
    for name in ["headless.shop.svc.cluster.local.", "nobody.shop.svc.cluster.local.", "range.example.org.", "."] {
        assert_eq!(ask(&mesh, name, RecordType::A), None, "{name}");
    }
    assert_eq!(ask(&mesh, "cart.shop.svc.cluster.local.", RecordType::SRV), None);
    for bytes in [&b""[..], b"\0", &[0xff; 40]] {
        assert_eq!(answer(&mesh, ASKER, bytes), None);
        assert_eq!(failure(bytes), None);
    }
    // An answer is not answered: two proxies would talk for ever.
    let mut response = query("cart.shop.svc.cluster.local.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert_eq!(answer(&mesh, ASKER, &response.to_vec().unwrap()), None);
    assert_eq!(failure(&response.to_vec().unwrap()), None);
}

#[test]
fn failures_and_edns() {
    let mut asked = query("nobody.example.org.", RecordType::A);
    asked.set_edns(Edns::new());
    let said = Message::from_vec(&failure(&asked.to_vec().unwrap()).unwrap()).unwrap();
    assert_eq!((said.metadata.id, said.metadata.response_code), (4711, ResponseCode::ServFail));
    assert_eq!(said.edns.unwrap().max_payload(), MAX_PAYLOAD);
}
