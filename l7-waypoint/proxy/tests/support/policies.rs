//! The shop's objects, as istiod would send them.
use std::io::ErrorKind;

use xds_proto::istio::{security as s, workload as w};

use crate::world::{Pod, workload};

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

pub fn is_cut(outcome: std::io::Result<usize>) -> bool {
    matches!(outcome.map_err(|error| error.kind()), Ok(0) | Err(ErrorKind::ConnectionReset))
}
