//! The engine over plain TCP, without HBONE and without a control plane: the subject of benches and of experiments by
//! hand. Routes as the measured spike did: header `x-user: jason` to the second cluster, everything else 90/10; adds a
//! request id and a response header.
//!
//! `plain_proxy LISTEN FIRST SECOND [h1|h2|same]`, for example `plain_proxy 127.0.0.1:8080 127.0.0.1:9001 127.0.0.1:9002`.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, bail};
use arc_swap::ArcSwap;
use l7_authn::JwksStore;
use l7_http::{ConnInfo, Engine, EngineConfig, PlainConnector, Shared};
use l7_route::Snapshot;
use l7_telemetry::Telemetry;
use strata_runtime::{drain, metrics};
use xds_model::envoy::matcher::{HeaderMatcher, HeaderTest, StringMatcher};
use xds_model::envoy::route::{AppendAction, HeaderAdd, HeaderMutations, RouteFilters, Target, WeightedCluster};

#[path = "../tests/engine/config.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod config;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, first, second, rest @ ..] = arguments.as_slice() else {
        bail!("usage: plain_proxy LISTEN FIRST SECOND [h1|h2|same]");
    };
    let version = match rest.first().map(String::as_str) {
        Some("h2") => xds_model::envoy::cluster::UpstreamVersion::Http2,
        Some("h1") => xds_model::envoy::cluster::UpstreamVersion::Http1,
        _ => xds_model::envoy::cluster::UpstreamVersion::SameAsDownstream,
    };
    let snapshot = snapshot(first, second, version);
    let listen: SocketAddr = listen.parse().context("LISTEN")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, serve(listen, snapshot))
}

fn snapshot(first: &str, second: &str, version: xds_model::envoy::cluster::UpstreamVersion) -> Snapshot {
    let share = |name: &str, weight| WeightedCluster {
        name: name.into(),
        weight,
        request_headers: HeaderMutations::default(),
        response_headers: HeaderMutations::default(),
        host_rewrite: None,
        filters: RouteFilters::default(),
    };
    let mut split = config::forward("first");
    split.target = Target::Weighted(vec![share("first", 90), share("second", 10)]);
    let mut jason = config::to("/", config::forward("second"));
    let test = HeaderTest::Value(StringMatcher::exact("jason"));
    jason.matcher.headers = vec![HeaderMatcher { name: "x-user".into(), test, invert: false, missing_as_empty: false }];
    let mut rest = config::to("/", split);
    let add = HeaderAdd {
        name: "x-served-by".into(),
        format: "strata".into(),
        action: AppendAction::OverwriteIfExistsOrAdd,
        keep_empty_value: false,
    };
    rest.response_headers.add.push(add);
    let clusters = [("first", first), ("second", second)].map(|(name, address)| {
        let mut cluster = config::cluster(name, &[address]);
        cluster.http.version = version;
        cluster
    });
    Snapshot::compile(&config::http(vec![jason, rest], clusters.into())).0
}

async fn serve(listen: SocketAddr, snapshot: Snapshot) -> anyhow::Result<()> {
    let telemetry = Telemetry::new(&metrics::Registry::new());
    let shared = Shared::new(telemetry, JwksStore::default(), None);
    let snapshot = Arc::new(ArcSwap::from_pointee(snapshot));
    let engine = Engine::new(EngineConfig::new(snapshot, shared, Rc::new(PlainConnector)));
    let listener = tokio::net::TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    let (_trigger, watch) = drain::channel();
    loop {
        let (stream, peer) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let info = ConnInfo::plain(peer, stream.local_addr()?);
        let (engine, watch) = (engine.clone(), watch.clone());
        tokio::task::spawn_local(async move { engine.serve(stream, info, watch).await });
    }
}
