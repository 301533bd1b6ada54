//! The admin interface: `/status`, ztunnel's `/config_dump` or Envoy's, `/requests`, `/logging`.
mod dump;
pub(crate) mod envoy;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
use serde_json::json;
use strata_runtime::admin::Admin;
use strata_runtime::{Readiness, drain, logging, metrics};

use crate::config::Flags;
use crate::node::Shared;

/// The node role's interface.
pub(crate) fn node(flags: &Flags, shared: &Arc<Shared>, readiness: Readiness, registry: metrics::Registry) -> Admin {
    // Weak: an admin handler must not keep the data plane's state alive past the drain.
    let (status, dump) = (Arc::downgrade(shared), Arc::downgrade(shared));
    let settings = dump::settings(flags);
    let pending = readiness.clone();
    Admin::new("strata-proxy", readiness, registry)
        .json("/status", move || {
            let (shared, pending) = (status.upgrade(), pending.pending());
            async move { shared.map_or(json!(null), |shared| dump::status(&shared, &pending)) }
        })
        .json("/config_dump", move || {
            let (shared, settings) = (dump.upgrade(), settings.clone());
            async move { shared.map_or(json!(null), |shared| dump::config(&shared, settings)) }
        })
        .stream("/requests", shared.telemetry.events())
}

/// Serves `admin` to whoever may open RUN-DIR's socket or a loopback address, and readiness and metrics to everybody.
///
/// Without a writable RUN-DIR there is no socket; then the address must serve.
///
/// # Errors
/// If neither the socket nor an address can be served, or an address is taken.
pub(crate) async fn serve(admin: Admin, public: Admin, flags: &Flags, watch: &drain::Watch) -> anyhow::Result<()> {
    for (flag, addr) in [("--readiness-addr", flags.readiness_addr()), ("--metrics-addr", flags.metrics_addr())] {
        if let Some(addr) = addr {
            serve_tcp(&public, addr, watch).await.with_context(|| format!("{flag} {addr}"))?;
        }
    }
    let admin = admin.post("/logging", |query| async move { logging::control(&query) });
    if let Some(addr) = flags.admin_addr {
        serve_tcp(&admin, addr, watch).await.with_context(|| format!("--admin-addr {addr}"))?;
    }
    let socket = flags.run_dir.join(&flags.admin_socket);
    match admin.serve_unix(&socket, watch.clone()).await {
        Ok(()) => Ok(()),
        Err(error) if flags.admin_addr.is_some() => {
            tracing::info!(socket = %socket.display(), %error, "no admin socket, only the admin address");
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("admin socket {}", socket.display())),
    }
}

/// `[::]` is every address of both families; on a host without IPv6 those of IPv4 are left.
async fn serve_tcp(admin: &Admin, addr: SocketAddr, watch: &drain::Watch) -> io::Result<()> {
    match admin.serve_tcp(addr, watch.clone()).await {
        Err(error) if addr.is_ipv6() && addr.ip().is_unspecified() && error.kind() != io::ErrorKind::AddrInUse => {
            let addr = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), addr.port());
            admin.serve_tcp(addr, watch.clone()).await.map(drop)
        }
        outcome => outcome.map(drop),
    }
}
