//! Takes Strata off the node while its pods run on.
//!
//! Order: no new pod meets the plugin, captured pods leave the mesh, programs and maps go. What carries packets stays:
//! the pods' devices and routes need no program, and go with the pods.
use std::path::Path;
use std::time::Duration;

use crate::agent::Agent;

/// How long connections that a proxy carries may go on after the pods' capture ended.
const REQUESTS_UNDER_WAY: Duration = Duration::from_secs(5);

impl Agent {
    /// Undoes everything but the devices and routes of running pods. Each step is worth doing without the others:
    /// errors are logged.
    pub(crate) async fn take_back(&mut self, bpffs: &Path, run_dir: &Path) {
        if let Some(installation) = &self.installation
            && let Err(error) = installation.remove()
        {
            tracing::error!(%error, "the CNI plugin could not be removed from the node");
        }
        self.leave_mesh(REQUESTS_UNDER_WAY).await;
        self.leave_edge().await;
        if let Err(error) = l4_loader::unload(bpffs) {
            tracing::error!(%error, "kernel programs and maps could not be removed");
        }
        // The node proxy's socket too: it goes when the agent does, and nobody else cleans up after it.
        for entry in std::fs::read_dir(run_dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            if let Err(error) = removed
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::error!(path = %path.display(), %error, "could not be removed");
            }
        }
        tracing::info!(pods = self.pods.len(), "Strata is off this node; pods keep their devices and routes");
    }
}
