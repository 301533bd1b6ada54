//! The admin interface: `/status`, ztunnel's `/config_dump`, `/requests`.
mod dump;

use std::sync::Arc;

use anyhow::Context;
use serde_json::json;
use strata_runtime::admin::Admin;
use strata_runtime::{Readiness, drain, metrics};

use crate::config::Flags;
use crate::node::Shared;

/// Serves the node role's interface on RUN-DIR and, where asked for, on TCP.
pub(crate) async fn serve_node(
    flags: &Flags,
    shared: &Arc<Shared>,
    readiness: Readiness,
    registry: metrics::Registry,
    watch: drain::Watch,
) -> anyhow::Result<()> {
    // Weak: an admin handler must not keep the data plane's state alive past the drain.
    let (status, dump) = (Arc::downgrade(shared), Arc::downgrade(shared));
    let settings = dump::settings(flags);
    let pending = readiness.clone();
    let admin = Admin::new("strata-proxy", readiness, registry)
        .json("/status", move || {
            let (shared, pending) = (status.upgrade(), pending.pending());
            async move { shared.map_or(json!(null), |shared| dump::status(&shared, &pending)) }
        })
        .json("/config_dump", move || {
            let (shared, settings) = (dump.upgrade(), settings.clone());
            async move { shared.map_or(json!(null), |shared| dump::config(&shared, settings)) }
        })
        .stream("/requests", shared.telemetry.events());
    let socket = flags.run_dir.join(&flags.admin_socket);
    std::fs::create_dir_all(&flags.run_dir).with_context(|| format!("creating {}", flags.run_dir.display()))?;
    admin.serve_unix(&socket, watch.clone()).await.with_context(|| format!("admin socket {}", socket.display()))?;
    if let Some(addr) = flags.admin_addr {
        admin.serve_tcp(addr, watch).await.with_context(|| format!("admin address {addr}"))?;
    }
    Ok(())
}
