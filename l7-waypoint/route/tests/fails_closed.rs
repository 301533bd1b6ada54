//! What is not understood never loosens anything: recorded configurations with something foreign put in.
mod support;

use l7_route::{ChainKind, Snapshot, Sniffed, Verdict};
use prost::Message;
use support::{Request, SHOP, get, http, resources};
use xds_model::envoy::{Effect, Resources, Translation, translate};
use xds_proto::envoy::envoy::config::core::v3::TypedExtensionConfig;
use xds_proto::envoy::envoy::config::listener::v3::{Listener, filter};
use xds_proto::envoy::envoy::config::rbac::v3::{permission, principal};
use xds_proto::envoy::envoy::config::route::v3::route::Action;
use xds_proto::envoy::envoy::config::route::v3::{Route, header_matcher, route_match};
use xds_proto::envoy::envoy::extensions::filters::http::rbac::v3::Rbac;
use xds_proto::envoy::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use xds_proto::envoy::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, http_filter,
};
use xds_proto::envoy::envoy::extensions::transport_sockets::tls::v3::DownstreamTlsContext;
use xds_proto::envoy::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher, string_matcher};
use xds_proto::envoy::google::protobuf::Any;

const REVIEWS: &str = "10.96.1.13:80";
const CHAIN: &str = "inbound-vip|80|http|reviews.shop.svc.cluster.local";

/// Changes the connection manager of one chain.
fn edit(resources: &mut Resources, listener: &str, chain: &str, f: impl FnOnce(&mut HttpConnectionManager)) {
    let listener: &mut Listener = resources.listeners.get_mut(listener).expect("a listener");
    let chain = listener.filter_chains.iter_mut().find(|one| one.name == chain).expect("a chain");
    let Some(filter::ConfigType::TypedConfig(any)) = chain.filters.last_mut().and_then(|one| one.config_type.as_mut())
    else {
        panic!("no configuration")
    };
    let mut manager = HttpConnectionManager::decode(any.value.as_slice()).expect("decodes");
    f(&mut manager);
    any.value = manager.encode_to_vec();
}

fn routes(manager: &mut HttpConnectionManager) -> &mut Vec<Route> {
    let Some(RouteSpecifier::RouteConfig(config)) = manager.route_specifier.as_mut() else { panic!("no routes") };
    &mut config.virtual_hosts[0].routes
}

fn compile(resources: &Resources) -> (Translation, Snapshot, Vec<String>) {
    let translation = translate(resources);
    let (snapshot, rejections) = Snapshot::compile(&translation.config);
    let reasons = translation.rejections.iter().chain(&rejections).map(|rejection| {
        assert!(rejection.partial, "{}", rejection.reason);
        rejection.reason.clone()
    });
    let reasons = reasons.collect();
    (translation, snapshot, reasons)
}

fn verdict(snapshot: &Snapshot, request: &Request) -> String {
    let chain = snapshot.chain(REVIEWS.parse().expect("an address"), Sniffed::Http11).expect("a chain");
    match http(chain).decide(&request.view(), 0).verdict {
        Verdict::Invalid { status, reason } => format!("{status} {reason}"),
        Verdict::Forward { cluster, .. } => cluster.name.to_string(),
        other => format!("{other:?}"),
    }
}

#[test]
fn an_unknown_filter_closes_its_chain_only() {
    let mut resources = resources("03-header-canary", SHOP);
    edit(&mut resources, "main_internal", CHAIN, |manager| {
        let any = Any { type_url: "type.googleapis.com/acme.Gatekeeper".to_owned(), value: Vec::new() };
        let filter = HttpFilter {
            name: "gatekeeper".to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(any)),
            ..HttpFilter::default()
        };
        manager.http_filters.insert(0, filter);
    });
    let (_, snapshot, reasons) = compile(&resources);
    assert_eq!(reasons.len(), 1);
    assert!(reasons[0].contains("gatekeeper") && reasons[0].contains("acme.Gatekeeper"), "{}", reasons[0]);
    let chain = |name| &snapshot.chain_named(name).expect("a chain").kind;
    assert!(matches!(chain(CHAIN), ChainKind::Closed { .. }));
    assert!(matches!(chain("inbound-vip|80|http|checkout.shop.svc.cluster.local"), ChainKind::Http(_)));
    assert!(snapshot.chain(REVIEWS.parse().expect("an address"), Sniffed::H2c).is_some());
}

#[test]
fn a_route_with_an_unknown_condition_answers_500_wherever_it_might_have_matched() {
    let mut resources = resources("03-header-canary", SHOP);
    edit(&mut resources, "main_internal", CHAIN, |manager| {
        let matcher = routes(manager)[0].r#match.as_mut().expect("a match");
        matcher.tls_context = Some(route_match::TlsContextMatchOptions::default());
    });
    let (translation, snapshot, reasons) = compile(&resources);
    assert_eq!(reasons, Vec::<String>::new(), "one route does not hold up the listener");
    let closed: Vec<_> = translation.notices.iter().filter(|notice| notice.effect == Effect::FailsClosed).collect();
    assert_eq!(closed.len(), 1);
    assert!(closed[0].field.contains("route 0 (jason)") && closed[0].reason.contains("tls_context"), "{closed:?}");
    assert_eq!(verdict(&snapshot, &get("/").header("x-user", "jason")), "500 match.tls_context: not supported");
    // What was understood of its match still counts.
    assert!(verdict(&snapshot, &get("/")).contains("reviews"));
}

#[test]
fn an_unknown_path_condition_catches_everything() {
    let mut resources = resources("03-header-canary", SHOP);
    edit(&mut resources, "main_internal", CHAIN, |manager| {
        let matcher = routes(manager)[0].r#match.as_mut().expect("a match");
        matcher.headers.clear();
        let policy = TypedExtensionConfig {
            name: "acme.path".to_owned(),
            typed_config: Some(Any { type_url: "type.googleapis.com/acme.Path".to_owned(), value: Vec::new() }),
        };
        matcher.path_specifier = Some(route_match::PathSpecifier::PathMatchPolicy(policy));
    });
    let (_, snapshot, _) = compile(&resources);
    assert!(verdict(&snapshot, &get("/any")).starts_with("500 match.acme.path"));
}

#[test]
fn an_unknown_action_or_regex_spoils_its_route_only() {
    let mut resources = resources("03-header-canary", SHOP);
    edit(&mut resources, "main_internal", CHAIN, |manager| {
        let routes = routes(manager);
        let Some(Action::Route(action)) = routes[1].action.as_mut() else { panic!("no route") };
        action.append_x_forwarded_host = true;
        let header = &mut routes[0].r#match.as_mut().expect("a match").headers[0];
        let regex = RegexMatcher { regex: "(".to_owned(), ..RegexMatcher::default() };
        header.header_match_specifier = Some(header_matcher::HeaderMatchSpecifier::StringMatch(StringMatcher {
            match_pattern: Some(string_matcher::MatchPattern::SafeRegex(regex)),
            ..StringMatcher::default()
        }));
    });
    let (_, snapshot, reasons) = compile(&resources);
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert!(reasons[0].contains("route 0 (jason)") && reasons[0].contains("regex"), "{}", reasons[0]);
    // Without its header test the first route stands before the second.
    assert!(verdict(&snapshot, &get("/")).starts_with("500 regex"));
    let mut resources = support::resources("03-header-canary", SHOP);
    edit(&mut resources, "main_internal", CHAIN, |manager| {
        let Some(Action::Route(action)) = routes(manager)[1].action.as_mut() else { panic!("no route") };
        action.append_x_forwarded_host = true;
    });
    let (_, snapshot, _) = compile(&resources);
    assert_eq!(verdict(&snapshot, &get("/")), "500 route.append_x_forwarded_host: not supported");
    assert!(verdict(&snapshot, &get("/").header("x-user", "jason")).contains("v2"));
}

/// Puts something unknown into the first policy of the n-th RBAC filter of a chain.
fn spoil_rbac(resources: &mut Resources, chain: &str, index: usize, spoil: impl FnOnce(&mut Rbac)) {
    edit(resources, "main_internal", chain, |manager| {
        let mut filters: Vec<_> =
            manager.http_filters.iter_mut().filter(|one| one.name == "envoy.filters.http.rbac").collect();
        let Some(http_filter::ConfigType::TypedConfig(any)) = filters[index].config_type.as_mut() else {
            panic!("no configuration")
        };
        let mut rbac = Rbac::decode(any.value.as_slice()).expect("decodes");
        spoil(&mut rbac);
        any.value = rbac.encode_to_vec();
    });
}

#[test]
fn an_unknown_rule_denies() {
    let catalog = "inbound-vip|9000|http|catalog.shop.svc.cluster.local";
    let mut resources = resources("09-l7-authorization", SHOP);
    spoil_rbac(&mut resources, catalog, 0, |rbac| {
        for policy in rbac.rules.as_mut().expect("rules").policies.values_mut() {
            let custom = TypedExtensionConfig { name: "acme".to_owned(), typed_config: None };
            policy.permissions[0].rule = Some(permission::Rule::Matcher(custom.clone()));
            policy.principals[0].identifier = Some(principal::Identifier::Custom(custom));
        }
    });
    let (translation, snapshot, _) = compile(&resources);
    assert!(translation.notices.iter().any(|notice| notice.reason.contains("acme")));
    let chain = http(snapshot.chain_named(catalog).expect("a chain"));
    let l7_route::FilterKind::Rbac(rbac) = &chain.filters[0].kind else { panic!("not RBAC") };
    let request = get("/");
    let view = request.view();
    let ip = view.source_ip;
    let authz = l7_route::AuthzRequest {
        http: Some(&view),
        peer: Some("spiffe://cluster.local/ns/shop/sa/frontend"),
        direct_remote_ip: ip,
        remote_ip: ip,
        destination: (ip, 9000).into(),
        server_name: None,
    };
    let outcome = rbac.evaluate(&authz);
    assert!(!outcome.allowed && outcome.policy.is_some(), "{outcome:?}");
}

#[test]
fn the_hbone_listener_stays_closed_without_client_certificates() {
    let mut resources = resources("00-base", SHOP);
    let listener = resources.listeners.get_mut("connect_terminate").expect("there");
    let socket = listener.filter_chains[0].transport_socket.as_mut().expect("TLS");
    let Some(xds_proto::envoy::envoy::config::core::v3::transport_socket::ConfigType::TypedConfig(any)) =
        socket.config_type.as_mut()
    else {
        panic!("no configuration")
    };
    let mut context = DownstreamTlsContext::decode(any.value.as_slice()).expect("decodes");
    context.require_client_certificate = None;
    any.value = context.encode_to_vec();
    let (_, snapshot, reasons) = compile(&resources);
    assert!(reasons[0].contains("require_client_certificate"), "{reasons:?}");
    let terminate = snapshot.terminate.expect("known, but closed");
    assert!(terminate.config.closed.is_some());
    assert!(!terminate.accepts("spiffe://cluster.local/ns/shop/sa/frontend"));
}

#[test]
fn foreign_listeners_and_clusters_are_refused_whole() {
    let mut resources = resources("00-base", SHOP);
    resources.listeners.insert("acme".to_owned(), Listener { name: "acme".to_owned(), ..Listener::default() });
    let name = "inbound-vip|80|http|reviews.shop.svc.cluster.local";
    let cluster = resources.clusters.get_mut(name).expect("reviews");
    cluster.lb_subset_config = Some(Default::default());
    let translation = translate(&resources);
    let refused: Vec<_> =
        translation.rejections.iter().map(|one| (one.name.as_str(), one.partial, one.reason.as_str())).collect();
    assert_eq!(
        refused,
        [(name, false, "lb_subset_config: not supported"), ("acme", false, "name: a listener acme is not known"),]
    );
    let (snapshot, _) = Snapshot::compile(&translation.config);
    assert!(snapshot.clusters.get(name).is_none());
    // The route is there; its cluster is unknown until it is.
    assert!(verdict(&snapshot, &get("/")).contains("reviews"));
}
