//! Arbitrary requests and configurations never make anything panic.
mod support;

use std::sync::LazyLock;

use l7_route::{AuthzRequest, ChainKind, FilterKind, FormatContext, Snapshot, Verdict, normalize_path};
use proptest::prelude::*;
use prost::Message;
use support::{Request, SHOP, cases, resources, snapshot};
use xds_model::envoy::chain::{EscapedSlashes, PathOptions};
use xds_model::envoy::translate;
use xds_proto::type_url::{CLUSTER, LISTENER};

static SNAPSHOTS: LazyLock<Vec<Snapshot>> = LazyLock::new(|| cases().iter().map(|case| snapshot(case)).collect());

fn request() -> impl Strategy<Value = Request> {
    let name = prop_oneof![
        Just("x-user".to_owned()),
        Just("cookie".to_owned()),
        Just("content-type".to_owned()),
        "[a-z-]{1,8}"
    ];
    let target = prop_oneof!["/(re|old|headers|split|fault|prefix|a|c)?[ -~]{0,20}", "\\PC{0,12}"];
    (target, "[A-Z]{0,7}", "\\PC{0,20}", proptest::collection::vec((name, "[ -~äö]{0,12}"), 0..5)).prop_map(
        |(target, method, authority, headers)| {
            let mut request = support::get(&target).method(&method).authority(&authority);
            for (name, value) in headers {
                request = request.header(&name, &value);
            }
            request.claims = (method.len() == 3).then(|| serde_json::json!({"sub": authority, "groups": [target]}));
            request
        },
    )
}

proptest! {
    #[test]
    fn requests_never_panic(request in request(), seed: u64) {
        let view = request.view();
        let context = FormatContext { request: Some(&view), ..FormatContext::default() };
        let ip = view.source_ip;
        let authz = AuthzRequest {
            http: Some(&view),
            peer: Some(&request.authority),
            direct_remote_ip: ip,
            remote_ip: ip,
            destination: (ip, 80).into(),
            server_name: None,
        };
        for chain in SNAPSHOTS.iter().flat_map(|snapshot| snapshot.chains()) {
            let ChainKind::Http(chain) = &chain.kind else { continue };
            for filter in &chain.filters {
                if let FilterKind::Rbac(rbac) = &filter.kind {
                    rbac.evaluate(&authz);
                }
            }
            let decision = chain.decide(&view, seed);
            let mut headers = request.headers.clone();
            decision.apply_request_headers(&mut headers, &context);
            decision.apply_response_headers(&mut headers, &context);
            decision.rewrite(&view);
            prop_assert_eq!(
                decision.location(&view).is_some(),
                matches!(decision.verdict, Verdict::Redirect(_))
            );
            if let Verdict::Forward { forward, .. } = decision.verdict {
                forward.hash.hash(&view, seed);
            }
            chain.explain(&view, seed);
        }
    }

    #[test]
    fn paths_never_panic(path in "\\PC{0,40}", normalize: bool, merge_slashes: bool) {
        for escaped_slashes in [
            EscapedSlashes::Keep,
            EscapedSlashes::Reject,
            EscapedSlashes::UnescapeAndRedirect,
            EscapedSlashes::UnescapeAndForward,
        ] {
            normalize_path(&path, &PathOptions { normalize, merge_slashes, escaped_slashes });
        }
    }

    /// Bytes of a recorded resource are changed: it decodes or not, is taken or refused, never a panic.
    #[test]
    fn damaged_resources_never_panic(case in 0..25usize, at: prop::sample::Index, with: u8, cut: bool) {
        let case = &cases()[case];
        let mut resources = resources(case, SHOP);
        let listener = resources.listeners["main_internal"].encode_to_vec();
        let cluster = resources.clusters.values().next().expect("one").encode_to_vec();
        for (type_url, name, mut bytes) in [(LISTENER, "main_internal", listener), (CLUSTER, "damaged", cluster)] {
            let at = at.index(bytes.len());
            bytes[at] = with;
            if cut {
                bytes.truncate(at);
            }
            // Err: it does not decode, and what was there stays.
            let _ = resources.insert(type_url, name, &bytes);
        }
        Snapshot::compile(&translate(&resources).config);
    }
}
