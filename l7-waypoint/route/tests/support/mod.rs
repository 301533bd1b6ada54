//! Loads what istiod said.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
use std::path::{Path, PathBuf};

use http::{HeaderMap, HeaderName, HeaderValue};
use l7_route::{Chain, ChainKind, HttpChain, RequestView, Snapshot};
use prost::Message;
use xds_model::envoy::{Rejection, Resources, Translation, translate};
use xds_proto::envoy::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use xds_proto::type_url::{CLUSTER, ENDPOINT, LISTENER};

pub const SHOP: &str = "waypoint-shop-waypoint";
pub const BANK: &str = "waypoint-bank-payments-waypoint";

pub fn recorded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/testdata/istiod/recorded")
}

/// Names of all recorded cases.
pub fn cases() -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(recorded())
        .expect("the recorded data is there")
        .map(|entry| entry.expect("entry").file_name().into_string().expect("UTF-8"))
        .filter(|name| name.chars().next().is_some_and(|c| c.is_ascii_digit()))
        .collect();
    names.sort();
    names
}

/// What a waypoint holds in a case; a file that is absent is the same as in the base.
pub fn resources(case: &str, waypoint: &str) -> Resources {
    let mut resources = Resources::default();
    for (file, type_url) in [("clusters", CLUSTER), ("endpoints", ENDPOINT), ("listeners", LISTENER)] {
        let path = |case: &str| recorded().join(case).join(waypoint).join(format!("{file}.binpb"));
        let bytes = std::fs::read(path(case)).or_else(|_| std::fs::read(path("00-base"))).expect(file);
        let response = DeltaDiscoveryResponse::decode(bytes.as_slice()).expect("a response");
        for resource in response.resources {
            let any = resource.resource.expect("a body");
            resources.insert(type_url, &resource.name, &any.value).expect("decodes");
        }
    }
    resources
}

pub fn load(case: &str, waypoint: &str) -> (Translation, Snapshot, Vec<Rejection>) {
    let translation = translate(&resources(case, waypoint));
    let (snapshot, rejections) = Snapshot::compile(&translation.config);
    (translation, snapshot, rejections)
}

pub fn snapshot(case: &str) -> Snapshot {
    load(case, SHOP).1
}

pub fn http(chain: &Chain) -> &HttpChain {
    match &chain.kind {
        ChainKind::Http(chain) => chain,
        other => panic!("{} is {other:?}", chain.name),
    }
}

/// Owns what a [`RequestView`] borrows.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub target: String,
    pub authority: String,
    pub headers: HeaderMap,
    pub claims: Option<serde_json::Value>,
}

pub fn get(target: &str) -> Request {
    Request {
        method: "GET".into(),
        target: target.into(),
        authority: "reviews.shop.svc.cluster.local".into(),
        headers: HeaderMap::new(),
        claims: None,
    }
}

impl Request {
    pub fn header(mut self, name: &str, value: &str) -> Self {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
        self.headers.append(name, HeaderValue::from_str(value).expect("a value"));
        self
    }

    pub fn method(mut self, method: &str) -> Self {
        self.method = method.into();
        self
    }

    pub fn authority(mut self, authority: &str) -> Self {
        self.authority = authority.into();
        self
    }

    pub fn claims(mut self, claims: serde_json::Value) -> Self {
        self.claims = Some(claims);
        self
    }

    pub fn view(&self) -> RequestView<'_> {
        let (path, query) = match self.target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (self.target.as_str(), None),
        };
        RequestView {
            method: &self.method,
            path,
            query,
            authority: &self.authority,
            scheme: "http",
            headers: &self.headers,
            source_ip: "10.8.0.10".parse().expect("an address"),
            claims: self.claims.as_ref(),
        }
    }
}
