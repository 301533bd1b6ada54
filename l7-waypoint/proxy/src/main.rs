//! `strata-proxy`: the node proxy and the waypoint, one binary, two roles.
//!
//! Data-plane threads share nothing but immutable views; configuration, certificates and the admin interface
//! live on a runtime of their own, so that none of them delays traffic.

mod admin;
mod config;
mod copy;
mod mesh;
mod netns;
mod node;
mod request;
mod sockets;
mod telemetry;
mod waypoint;
mod workers;

use config::{Role, Started};

/// Every request allocates and frees: docs/benchmarks.md says what it gives.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    if let Some(done) = request::asked_for(std::env::args().skip(1)) {
        return done;
    }
    let Started { flags, logging, remarks } = Started::of_process();
    let component = match flags.role {
        Role::Node => "proxy-node",
        Role::Waypoint => "proxy-waypoint",
    };
    strata_runtime::logging::init_with(component, &logging);
    for remark in remarks {
        tracing::warn!("{remark}");
    }
    l7_identity::install_provider();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("control").enable_all().build()?;
    runtime.block_on(async {
        match flags.role {
            Role::Node => node::run(flags).await,
            Role::Waypoint => waypoint::run(flags).await,
        }
    })
}
