//! `strata-engine`: the waypoint's engine alone, one worker behind plain TCP, for the HTTP benchmark. What it serves
//! takes the product's whole way: YAML -> xDS resources -> snapshot.
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use arc_swap::ArcSwap;
use clap::Parser;
use compat_translate::{MeshOptions, translate};
use l7_authn::JwksStore;
use l7_http::{ConnInfo, Engine, EngineConfig, PlainConnector, Shared};
use l7_route::Snapshot;
use l7_telemetry::Telemetry;
use strata_runtime::{drain, metrics::Registry};
use tokio::net::TcpListener;
use xds_model::envoy::Resources;
use xds_proto::type_url;

/// strata-proxy's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The service's address; connections are dispatched as if they had been made to it.
const VIP: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 96, 9, 9), 80);

const OBJECTS: &str = include_str!("engine.yaml");

#[derive(Parser)]
struct Arguments {
    #[arg(long)]
    listen: SocketAddr,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, serve(arguments.listen))
}

fn snapshot() -> Result<Snapshot> {
    let (objects, faults) = compat_objects::read_str(OBJECTS, Path::new("engine.yaml"));
    ensure!(faults.is_empty(), "{faults:?}");
    let output = translate(&objects, &MeshOptions::default());
    let waypoint = output.waypoints.get("bench/waypoint").context("no waypoint came of engine.yaml")?;
    let mut resources = Resources::default();
    let sets = [
        (type_url::LISTENER, &waypoint.listeners),
        (type_url::CLUSTER, &waypoint.clusters),
        (type_url::ENDPOINT, &waypoint.endpoints),
    ];
    for (type_url, set) in sets {
        for (name, any) in set {
            let inserted = resources.insert(type_url, name, &any.value);
            ensure!(inserted.is_ok(), "{name}: {inserted:?}");
        }
    }
    let translation = xds_model::envoy::translate(&resources);
    ensure!(translation.rejections.is_empty(), "{:?}", translation.rejections);
    let (snapshot, rejections) = Snapshot::compile(&translation.config);
    ensure!(rejections.is_empty(), "{rejections:?}");
    Ok(snapshot)
}

async fn serve(listen: SocketAddr) -> Result<()> {
    let shared = Shared::new(Telemetry::new(&Registry::new()), JwksStore::default(), None);
    let snapshot = Arc::new(ArcSwap::from_pointee(snapshot()?));
    let engine = Engine::new(EngineConfig::new(snapshot, shared, Rc::new(PlainConnector)));
    let listener = TcpListener::bind(listen).await.with_context(|| listen.to_string())?;
    let (_trigger, watch) = drain::channel();
    loop {
        let (stream, peer) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let (engine, watch) = (engine.clone(), watch.clone());
        tokio::task::spawn_local(async move { engine.serve(stream, ConnInfo::plain(peer, VIP.into()), watch).await });
    }
}
