use proptest::prelude::*;
use strata_abi::{PolicyKey, direction, identity, policy_verdict::*, proto};

use super::*;
use crate::testing::Tables;

#[test]
fn precedence_table() {
    use Kind::*;
    type Case = (Option<Entry>, Option<Entry>, (Kind, u32));
    let cases: [Case; 15] = [
        (None, None, (NoPolicy, 0)),
        (Some((ALLOW, 1)), None, (Allowed, 1)),
        (None, Some((ALLOW, 2)), (Allowed, 2)),
        (Some((ALLOW, 1)), Some((ALLOW, 2)), (Allowed, 1)),
        (None, Some((DENY_DEFAULT, 9)), (DeniedByDefault, 9)),
        (Some((ALLOW, 1)), Some((DENY_DEFAULT, 9)), (Allowed, 1)),
        (Some((DENY, 1)), Some((ALLOW, 2)), (DeniedByRule, 1)),
        (Some((ALLOW, 1)), Some((DENY, 2)), (DeniedByRule, 2)),
        (Some((DENY, 1)), Some((DENY, 2)), (DeniedByRule, 1)),
        (Some((DENY_DEFAULT, 8)), Some((ALLOW, 2)), (Allowed, 2)),
        (None, Some((AUDIT, 3)), (Audited, 3)),
        (Some((ALLOW, 1)), Some((AUDIT, 3)), (Allowed, 1)),
        (Some((DENY, 1)), Some((AUDIT, 3)), (DeniedByRule, 1)),
        (Some((AUDIT, 4)), Some((DENY_DEFAULT, 9)), (DeniedByDefault, 9)),
        // A verdict of a newer agent fails closed.
        (Some((77, 1)), None, (DeniedByDefault, 0)),
    ];
    for (specific, any, expected) in cases {
        assert_eq!(decide(specific, any), expected, "{specific:?} {any:?}");
    }
}

fn key(peer: u32, proto: u8, port: u16) -> PolicyKey {
    PolicyKey { subject: 300, peer, direction: direction::INGRESS, proto, port_be: port.to_be_bytes() }
}

#[test]
fn the_trie_is_asked_for_the_peer_and_for_anyone() {
    let mut tables = Tables::default();
    tables.add_policy(PolicyKey::PREFIX_ANY_PROTO, key(0, 0, 0), DENY_DEFAULT, 1);
    tables.add_policy(PolicyKey::PREFIX_FULL, key(400, proto::TCP, 8080), ALLOW, 2);
    // Ports 8000..8015 for anyone: a prefix of 12 of the port's bits.
    tables.add_policy(PolicyKey::PREFIX_ANY_PORT + 12, key(0, proto::TCP, 8000), ALLOW, 3);
    tables.add_policy(PolicyKey::PREFIX_ANY_PORT, key(500, proto::UDP, 0), ALLOW, 4);
    let ask = |peer, proto, port| {
        let judged = ingress(&tables, 300, peer, proto, port);
        (judged.kind, judged.rule)
    };
    assert_eq!(ask(400, proto::TCP, 8080), (Kind::Allowed, 2));
    assert_eq!(ask(400, proto::TCP, 8081), (Kind::DeniedByDefault, 1));
    assert_eq!(ask(400, proto::UDP, 8080), (Kind::DeniedByDefault, 1));
    assert_eq!(ask(401, proto::TCP, 8080), (Kind::DeniedByDefault, 1));
    assert_eq!(ask(401, proto::TCP, 8015), (Kind::Allowed, 3));
    assert_eq!(ask(401, proto::TCP, 8016), (Kind::DeniedByDefault, 1));
    assert_eq!(ask(500, proto::UDP, 53), (Kind::Allowed, 4));
    assert_eq!(ask(identity::UNKNOWN, proto::TCP, 8015), (Kind::Allowed, 3));
    assert_eq!(ask(identity::HOST, proto::TCP, 1), (Kind::NoPolicy, 0));
    // Another direction and another subject are not isolated.
    assert_eq!(egress(&tables, 300, 400, proto::TCP, 1).kind, Kind::NoPolicy);
    assert_eq!(ingress(&tables, 301, 400, proto::TCP, 1).kind, Kind::NoPolicy);
}

fn entry() -> impl Strategy<Value = Option<Entry>> {
    prop::option::of((0u8..7, 0u32..5))
}

proptest! {
    /// What must hold whatever is in the table.
    #[test]
    fn invariants(specific in entry(), any in entry()) {
        let (kind, rule) = decide(specific, any);
        let entries = [specific, any];
        let has = |verdict| entries.iter().flatten().any(|e| e.0 == verdict);
        let allows = Judgement { kind, rule, direction: 0 }.allows();
        // A deny always denies; no entry never denies; a default never beats an allow.
        if has(DENY) { prop_assert_eq!(kind, Kind::DeniedByRule); }
        prop_assert_eq!(kind == Kind::NoPolicy, specific.is_none() && any.is_none());
        if has(ALLOW) && !has(DENY) { prop_assert_eq!(kind, Kind::Allowed); }
        if has(DENY_DEFAULT) && !has(ALLOW) { prop_assert!(!allows); }
        // A named rule is one of the entries'.
        if rule != 0 { prop_assert!(entries.iter().flatten().any(|e| e.1 == rule)); }
    }
}
