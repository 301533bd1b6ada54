//! The edge cases of xds-contract 2.2 as a table, and what must hold for any policy.
use proptest::prelude::*;
use prost::Message;
use xds_model::wds::{MeshBuilder, MeshConfig};
use xds_proto::istio::{security as s, workload as w};
use xds_proto::type_url;

use super::*;

fn exact(value: &str) -> s::StringMatch {
    s::StringMatch { match_type: Some(s::string_match::MatchType::Exact(value.to_owned())) }
}

fn rule(matches: Vec<s::Match>) -> s::Rule {
    s::Rule { clauses: vec![s::Clause { matches }] }
}

fn policy(name: &str, action: s::Action, rules: Vec<s::Rule>) -> s::Authorization {
    s::Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        scope: s::Scope::Namespace.into(),
        action: action.into(),
        rules,
        ..Default::default()
    }
}

fn decide_with(policies: &[s::Authorization], selected: &[&str], connection: &Connection<'_>) -> Decision {
    let (mut builder, view) = MeshBuilder::new(MeshConfig::default());
    let workload = w::Workload {
        uid: "Kubernetes//Pod/shop/payments".to_owned(),
        name: "payments".to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 0, 0, 2].into()],
        authorization_policies: selected.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    };
    let address = w::Address { r#type: Some(w::address::Type::Workload(workload)) }.encode_to_vec();
    let rejected =
        builder.apply(type_url::ADDRESS, [("Kubernetes//Pod/shop/payments", address.as_slice())], std::iter::empty());
    assert_eq!(rejected, []);
    let encoded: Vec<(String, Vec<u8>)> =
        policies.iter().map(|p| (format!("{}/{}", p.namespace, p.name), p.encode_to_vec())).collect();
    builder.apply(
        type_url::AUTHORIZATION,
        encoded.iter().map(|(name, body)| (name.as_str(), body.as_slice())),
        std::iter::empty(),
    );
    let mesh = view.load();
    let workload = mesh.workload("Kubernetes//Pod/shop/payments").unwrap();
    evaluate(&mesh, workload, connection)
}

fn decide(policies: &[s::Authorization], connection: &Connection<'_>) -> Decision {
    decide_with(policies, &[], connection)
}

fn from<'a>(identity: Option<&'a SpiffeId>) -> Connection<'a> {
    Connection { source_ip: "10.0.0.1".parse().unwrap(), identity, destination: "10.0.0.2:8080".parse().unwrap() }
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account).unwrap()
}

/// What, policies, caller, allowed, decided by.
type Case<'a> = (&'static str, Vec<s::Authorization>, Option<&'a SpiffeId>, bool, Option<&'static str>);

#[test]
fn edges_of_the_logic() {
    use s::Action::{Allow, Deny};
    let checkout = id("checkout");
    let allow_checkout =
        s::Match { principals: vec![exact("cluster.local/ns/shop/sa/checkout")], ..Default::default() };
    let other_port = s::Match { destination_ports: vec![9], ..Default::default() };
    let same_port = s::Match { destination_ports: vec![8080], ..Default::default() };
    let cases: Vec<Case<'_>> = vec![
        ("no policy", vec![], None, true, None),
        ("ALLOW without rules denies all", vec![policy("a", Allow, vec![])], Some(&checkout), false, None),
        ("DENY without rules is a no-op", vec![policy("d", Deny, vec![])], None, true, None),
        (
            "rule without clauses matches all: ALLOW",
            vec![policy("a", Allow, vec![s::Rule::default()])],
            None,
            true,
            Some("shop/a"),
        ),
        (
            "rule without clauses matches all: DENY",
            vec![policy("d", Deny, vec![s::Rule::default()])],
            None,
            false,
            Some("shop/d"),
        ),
        ("clause without matches is true", vec![policy("d", Deny, vec![rule(vec![])])], None, false, Some("shop/d")),
        (
            "an all-empty match is skipped",
            vec![policy("d", Deny, vec![rule(vec![s::Match::default()])])],
            None,
            true,
            None,
        ),
        (
            "principal allowed",
            vec![policy("a", Allow, vec![rule(vec![allow_checkout.clone()])])],
            Some(&checkout),
            true,
            Some("shop/a"),
        ),
        (
            "no identity, no principal",
            vec![policy("a", Allow, vec![rule(vec![allow_checkout.clone()])])],
            None,
            false,
            None,
        ),
        (
            "all clauses must hold",
            vec![policy(
                "a",
                Allow,
                vec![s::Rule {
                    clauses: vec![
                        s::Clause { matches: vec![allow_checkout.clone()] },
                        s::Clause { matches: vec![other_port.clone()] },
                    ],
                }],
            )],
            Some(&checkout),
            false,
            None,
        ),
        (
            "any match of a clause",
            vec![policy("a", Allow, vec![rule(vec![other_port.clone(), same_port.clone()])])],
            None,
            true,
            Some("shop/a"),
        ),
        (
            "any rule",
            vec![policy("a", Allow, vec![rule(vec![other_port]), rule(vec![same_port])])],
            None,
            true,
            Some("shop/a"),
        ),
        (
            "DENY wins over ALLOW",
            vec![policy("a", Allow, vec![s::Rule::default()]), policy("d", Deny, vec![s::Rule::default()])],
            Some(&checkout),
            false,
            Some("shop/d"),
        ),
        (
            "STRICT: deny whoever has no principal",
            vec![policy(
                "strict",
                Deny,
                vec![rule(vec![s::Match {
                    not_principals: vec![s::StringMatch { match_type: Some(s::string_match::MatchType::Presence(())) }],
                    ..Default::default()
                }])],
            )],
            None,
            false,
            Some("shop/strict"),
        ),
        (
            "STRICT lets an identity pass",
            vec![policy(
                "strict",
                Deny,
                vec![rule(vec![s::Match {
                    not_principals: vec![s::StringMatch { match_type: Some(s::string_match::MatchType::Presence(())) }],
                    ..Default::default()
                }])],
            )],
            Some(&checkout),
            true,
            None,
        ),
        (
            "an unreadable address never matches in ALLOW",
            vec![policy(
                "a",
                Allow,
                vec![rule(vec![s::Match {
                    source_ips: vec![s::Address { address: vec![1, 2].into(), length: 8 }],
                    ..Default::default()
                }])],
            )],
            None,
            false,
            None,
        ),
        (
            "and always in DENY",
            vec![policy(
                "d",
                Deny,
                vec![rule(vec![s::Match {
                    principals: vec![s::StringMatch { match_type: None }, exact("nobody")],
                    ..Default::default()
                }])],
            )],
            Some(&checkout),
            false,
            Some("shop/d"),
        ),
        (
            "dry run decides nothing",
            vec![
                s::Authorization { dry_run: true, ..policy("d", Deny, vec![s::Rule::default()]) },
                s::Authorization { dry_run: true, ..policy("a", Allow, vec![]) },
            ],
            None,
            true,
            None,
        ),
        (
            "an unknown action with no version before denies",
            vec![s::Authorization { action: 7, ..policy("x", Allow, vec![]) }],
            Some(&checkout),
            false,
            Some("shop/x"),
        ),
        (
            "another namespace's policy does not apply",
            vec![s::Authorization { namespace: "bank".to_owned(), ..policy("d", Deny, vec![s::Rule::default()]) }],
            None,
            true,
            None,
        ),
        (
            "a global one does, whatever namespace it lives in",
            vec![s::Authorization {
                namespace: "istio-system".to_owned(),
                scope: s::Scope::Global.into(),
                ..policy("d", Deny, vec![s::Rule::default()])
            }],
            None,
            false,
            Some("istio-system/d"),
        ),
        (
            "an unselected selector policy does not apply",
            vec![s::Authorization {
                scope: s::Scope::WorkloadSelector.into(),
                ..policy("d", Deny, vec![s::Rule::default()])
            }],
            None,
            true,
            None,
        ),
    ];
    for (what, policies, identity, allowed, decided_by) in cases {
        let decision = decide(&policies, &from(identity));
        assert_eq!((decision.allowed, decision.policy.as_deref()), (allowed, decided_by), "{what}: {decision:?}");
    }
}

#[test]
fn selected_policies_apply_by_name() {
    let deny = s::Authorization {
        scope: s::Scope::WorkloadSelector.into(),
        ..policy("d", s::Action::Deny, vec![s::Rule::default()])
    };
    let decision = decide_with(&[deny], &["shop/unknown", "shop/d"], &from(None));
    assert_eq!((decision.allowed, decision.policy.as_deref()), (false, Some("shop/d")));
}

#[test]
fn string_kinds_and_accounts() {
    use s::string_match::MatchType;
    let checkout = id("checkout");
    let allow = |one: s::Match| decide(&[policy("a", s::Action::Allow, vec![rule(vec![one])])], &from(Some(&checkout)));
    let principal =
        |kind| s::Match { principals: vec![s::StringMatch { match_type: Some(kind) }], ..Default::default() };
    for (kind, expected) in [
        (MatchType::Prefix("cluster.local/ns/shop".to_owned()), true),
        (MatchType::Prefix("spiffe://cluster.local".to_owned()), false),
        (MatchType::Suffix("/checkout".to_owned()), true),
        (MatchType::Suffix("/payments".to_owned()), false),
        (MatchType::Presence(()), true),
        (MatchType::Exact("cluster.local/ns/shop/sa/check".to_owned()), false),
    ] {
        assert_eq!(allow(principal(kind.clone())).allowed, expected, "{kind:?}");
    }
    let account = |namespace: &str| s::Match {
        service_accounts: vec![s::ServiceAccountMatch {
            namespace: namespace.to_owned(),
            service_account: "checkout".to_owned(),
        }],
        ..Default::default()
    };
    assert!(allow(account("shop")).allowed);
    assert!(!allow(account("bank")).allowed);
}

fn any_string() -> impl Strategy<Value = s::StringMatch> {
    use s::string_match::MatchType;
    prop_oneof![
        Just(Some(MatchType::Exact("cluster.local/ns/shop/sa/checkout".to_owned()))),
        Just(Some(MatchType::Exact("shop".to_owned()))),
        Just(Some(MatchType::Prefix("clu".to_owned()))),
        Just(Some(MatchType::Suffix("out".to_owned()))),
        Just(Some(MatchType::Presence(()))),
        Just(None),
    ]
    .prop_map(|match_type| s::StringMatch { match_type })
}

fn any_match() -> impl Strategy<Value = s::Match> {
    let strings = || prop::collection::vec(any_string(), 0..2);
    (
        strings(),
        strings(),
        strings(),
        strings(),
        prop::collection::vec(prop_oneof![Just(8080u32), Just(9), Just(70_000)], 0..2),
    )
        .prop_map(|(namespaces, not_namespaces, principals, not_principals, destination_ports)| s::Match {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            destination_ports,
            ..Default::default()
        })
}

fn any_policy(name: &'static str) -> impl Strategy<Value = s::Authorization> {
    let rules = prop::collection::vec(
        prop::collection::vec(prop::collection::vec(any_match(), 0..3), 0..3).prop_map(|clauses| s::Rule {
            clauses: clauses.into_iter().map(|matches| s::Clause { matches }).collect(),
        }),
        0..3,
    );
    (any::<bool>(), rules)
        .prop_map(move |(deny, rules)| policy(name, if deny { s::Action::Deny } else { s::Action::Allow }, rules))
}

proptest! {
    #[test]
    fn a_further_deny_never_opens(a in any_policy("a"), b in any_policy("b"), c in any_policy("c"), with_id in any::<bool>()) {
        let checkout = id("checkout");
        let connection = from(with_id.then_some(&checkout));
        let before = decide(&[a.clone(), b.clone()], &connection);
        let deny = s::Authorization { action: s::Action::Deny.into(), ..c };
        let after = decide(&[a, b, deny], &connection);
        prop_assert!(before.allowed || !after.allowed);
    }

    #[test]
    fn breaking_a_match_never_opens(mut a in any_policy("a"), b in any_policy("b"), with_id in any::<bool>()) {
        let checkout = id("checkout");
        let connection = from(with_id.then_some(&checkout));
        let before = decide(&[a.clone(), b.clone()], &connection);
        let Some(one) = a.rules.iter_mut().flat_map(|r| &mut r.clauses).flat_map(|c| &mut c.matches).next() else {
            return Ok(());
        };
        // A match that was empty is skipped by design; breaking it is another policy.
        prop_assume!(*one != s::Match::default());
        one.source_ips.push(s::Address { address: vec![1].into(), length: 8 });
        let after = decide(&[a, b], &connection);
        prop_assert!(before.allowed || !after.allowed);
    }

    #[test]
    fn order_of_policies_does_not_matter(a in any_policy("a"), b in any_policy("b"), with_id in any::<bool>()) {
        let checkout = id("checkout");
        let connection = from(with_id.then_some(&checkout));
        let one = decide(&[a.clone(), b.clone()], &connection);
        let other = decide(&[b, a], &connection);
        prop_assert_eq!(one.allowed, other.allowed);
    }
}
