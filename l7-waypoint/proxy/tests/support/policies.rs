//! The shop's objects, as istiod would send them.
use std::io::{ErrorKind, Read};

use xds_proto::istio::{security as s, workload as w};

use crate::world::{Control, Pod, workload};

/// Denies whoever matches `one`, in namespace shop.
fn deny(name: &str, one: s::Match) -> s::Authorization {
    s::Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        scope: s::Scope::Namespace.into(),
        action: s::Action::Deny.into(),
        rules: vec![s::Rule { clauses: vec![s::Clause { matches: vec![one] }] }],
        ..Default::default()
    }
}

pub fn strict() -> s::Authorization {
    let presence = s::StringMatch { match_type: Some(s::string_match::MatchType::Presence(())) };
    deny("strict", s::Match { not_principals: vec![presence], ..Default::default() })
}

pub fn deny_checkout() -> s::Authorization {
    let kind = s::string_match::MatchType::Exact("cluster.local/ns/shop/sa/checkout".to_owned());
    let principal = s::StringMatch { match_type: Some(kind) };
    deny("no-checkout", s::Match { principals: vec![principal], ..Default::default() })
}

pub fn payments_service() -> w::Service {
    w::Service {
        name: "payments".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "payments.shop.svc.cluster.local".to_owned(),
        addresses: vec![w::NetworkAddress { network: String::new(), address: vec![10, 96, 0, 1].into(), length: None }],
        ports: vec![w::Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        ..Default::default()
    }
}

pub fn payments(pod: &Pod) -> w::Workload {
    let mut payments = workload(pod, "payments");
    payments.services.insert("shop/payments.shop.svc.cluster.local".to_owned(), w::PortList::default());
    payments
}

/// Plaintext from `stranger` is served until STRICT says otherwise, open connections included. `to` says `greeting` first.
pub fn plaintext_ends_with_strict(control: &Control, stranger: &Pod, to: &str, greeting: &str) {
    assert_eq!(stranger.ask(to, false, "plain").unwrap(), format!("{greeting}plain"));
    let mut open = stranger.connect(to, false).unwrap();
    let mut buf = [0; 10];
    open.read_exact(&mut buf).unwrap();
    control.policy(strict());
    assert!(is_cut(open.read(&mut buf)), "an open plaintext connection outlived STRICT");
    assert!(is_cut(stranger.connect(to, false).and_then(|mut stream| stream.read(&mut [0; 9]))));
}

/// A policy about the identity cuts the open tunnel of `checkout` and refuses the next.
pub fn denied_by_identity(control: &Control, checkout: &Pod, to: &str, captured: bool) {
    let mut open = checkout.connect(to, captured).unwrap();
    let mut buf = [0; 10];
    open.read_exact(&mut buf).unwrap();
    control.policy(deny_checkout());
    assert!(is_cut(open.read(&mut buf)), "an open tunnel outlived its permission");
    assert!(is_cut(checkout.connect(to, captured).and_then(|mut stream| stream.read(&mut [0; 9]))));
}

pub fn is_cut(outcome: std::io::Result<usize>) -> bool {
    matches!(outcome.map_err(|error| error.kind()), Ok(0) | Err(ErrorKind::ConnectionReset))
}
