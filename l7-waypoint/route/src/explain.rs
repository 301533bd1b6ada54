//! Why routes matched or did not; for tools, not for the request path.
use l7_authz::l7::RequestView;
use serde::Serialize;

use crate::chain::HttpChain;
use crate::matching::Mismatch;
use crate::route::Route;

/// One route and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explained {
    pub virtual_host: String,
    pub index: usize,
    pub name: String,
    /// The Istio object it came from.
    pub config: Option<String>,
    pub why: Why,
}

/// What became of a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Why {
    Matched,
    /// An earlier route matched.
    NotReached,
    /// This part of its match does not fit the request.
    Mismatch(String),
}

impl HttpChain {
    /// All routes of the request's virtual host, in order. Empty if no virtual host has the request's authority.
    pub fn explain(&self, request: &RequestView<'_>, seed: u64) -> Vec<Explained> {
        let Some(host) = self.host(request.authority) else { return Vec::new() };
        let mut matched = false;
        host.routes
            .iter()
            .map(|route| {
                let why = match route.matcher.mismatch(request, seed) {
                    _ if matched => Why::NotReached,
                    None => {
                        matched = true;
                        Why::Matched
                    }
                    Some(mismatch) => Why::Mismatch(text(route, mismatch)),
                };
                Explained {
                    virtual_host: host.name.to_string(),
                    index: route.index,
                    name: route.name.to_string(),
                    config: route.config.as_deref().map(str::to_owned),
                    why,
                }
            })
            .collect()
    }
}

fn text(route: &Route, mismatch: Mismatch) -> String {
    let source = &route.source;
    match mismatch {
        Mismatch::Path => format!("path is not {:?}", source.path),
        Mismatch::Header(index) => source.headers.get(index).map_or_else(String::new, |test| {
            let not = if test.invert { "must not be" } else { "is not" };
            format!("header {} {not} {:?}", test.name, test.test)
        }),
        Mismatch::Query(index) => source
            .query
            .get(index)
            .map_or_else(String::new, |test| format!("query parameter {} is not {:?}", test.name, test.test)),
        Mismatch::Claim(index) => source.metadata.get(index).map_or_else(String::new, |test| {
            let not = if test.invert { "must not be" } else { "is not" };
            format!("claim {} {not} {:?}", test.path.join("."), test.value)
        }),
        Mismatch::Grpc => "the content type is not gRPC".to_owned(),
        Mismatch::Fraction => "the request is not in the share drawn".to_owned(),
    }
}
