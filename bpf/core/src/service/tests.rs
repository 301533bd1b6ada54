use strata_abi::proto;

use super::*;
use crate::testing::{Tables, addr};

const VIP: &str = "10.96.0.1";

fn backend(target: Target) -> (Addr, u16) {
    match target {
        Target::Backend(backend) => (backend.addr, backend.port),
        other => panic!("{other:?}"),
    }
}

#[test]
fn plain_unknown_port_and_empty() {
    let mut tables = Tables::default();
    tables.add_service(VIP, 80, proto::TCP, 1, &[("10.0.0.1", 8080)]);
    tables.add_service("fd00::1", 80, proto::UDP, 2, &[]);
    let ask = |ip: &str, port, proto| resolve(&tables, &addr(ip), port, proto, 0);
    assert_eq!(ask("10.96.0.2", 80, proto::TCP), Target::Plain);
    assert_eq!(backend(ask(VIP, 80, proto::TCP)), (addr("10.0.0.1"), 8080));
    assert_eq!(ask(VIP, 80, proto::UDP), Target::UnknownPort);
    assert_eq!(ask(VIP, 81, proto::TCP), Target::UnknownPort);
    assert_eq!(ask("fd00::1", 80, proto::UDP), Target::NoBackend);
}

#[test]
fn every_slot_is_reached_and_none_beyond() {
    let mut tables = Tables::default();
    tables.add_service(VIP, 80, proto::TCP, 1, &[("10.0.0.1", 1), ("10.0.0.2", 2), ("10.0.0.3", 3)]);
    let mut seen = std::collections::BTreeSet::new();
    for random in [0, 1, u32::MAX / 3 + 1, u32::MAX / 2, u32::MAX / 3 * 2 + 2, u32::MAX] {
        tables.random.set(random);
        seen.insert(backend(resolve(&tables, &addr(VIP), 80, proto::TCP, 0)).1);
    }
    assert_eq!(seen.into_iter().collect::<std::vec::Vec<_>>(), [1, 2, 3]);
}

#[test]
fn a_set_that_vanished_under_us_refuses() {
    let mut tables = Tables::default();
    tables.add_service(VIP, 80, proto::TCP, 1, &[("10.0.0.1", 1)]);
    tables.backends.clear();
    assert_eq!(resolve(&tables, &addr(VIP), 80, proto::TCP, 0), Target::NoBackend);
}

#[test]
fn affinity_binds_a_client_until_it_expires_or_the_backend_goes() {
    let mut tables = Tables::default();
    let key = ServiceKey { addr: addr(VIP), port: 80, proto: proto::TCP, _pad: 0 };
    tables.add_service(VIP, 80, proto::TCP, 1, &[("10.0.0.1", 1), ("10.0.0.2", 2)]);
    tables.services.get_mut(&key).unwrap().affinity_seconds = 10;
    tables.now.set(1_000_000_000);
    let ask = |tables: &Tables, client| backend(resolve(tables, &addr(VIP), 80, proto::TCP, client)).1;
    tables.random.set(u32::MAX);
    assert_eq!(ask(&tables, 7), 2);
    tables.random.set(0);
    assert_eq!(ask(&tables, 7), 2);
    assert_eq!(ask(&tables, 8), 1);
    // Each connection renews it.
    for _ in 0..3 {
        tables.now.set(tables.now.get() + 9 * SECOND_NS);
        assert_eq!(ask(&tables, 7), 2);
    }
    // A new set in which the backend has another slot: still bound.
    tables.add_service(VIP, 80, proto::TCP, 2, &[("10.0.0.2", 2), ("10.0.0.3", 3), ("10.0.0.4", 4)]);
    tables.services.get_mut(&key).unwrap().affinity_seconds = 10;
    tables.random.set(u32::MAX);
    assert_eq!(ask(&tables, 7), 2);
    // Gone: another is chosen, and kept.
    tables.add_service(VIP, 80, proto::TCP, 3, &[("10.0.0.3", 3), ("10.0.0.4", 4)]);
    tables.services.get_mut(&key).unwrap().affinity_seconds = 10;
    assert_eq!(ask(&tables, 7), 4);
    tables.random.set(0);
    assert_eq!(ask(&tables, 7), 4);
    // Expired.
    tables.now.set(tables.now.get() + 10 * SECOND_NS);
    assert_eq!(ask(&tables, 7), 3);
}
