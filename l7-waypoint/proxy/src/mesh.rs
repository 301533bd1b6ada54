//! From xDS updates to the mesh view.
use xds_client::{Handler, Rejected, Update};
use xds_model::wds::MeshBuilder;

/// Applies `Address`, `Workload` and `Authorization` updates.
pub(crate) struct MeshHandler {
    pub builder: MeshBuilder,
}

impl Handler for MeshHandler {
    fn apply(&mut self, update: Update) -> Vec<Rejected> {
        let resources = update.resources.iter().map(|resource| (resource.name.as_str(), resource.body.as_ref()));
        let rejected = self.builder.apply(&update.type_url, resources, update.removed.iter().map(String::as_str));
        rejected
            .into_iter()
            .map(|rejected| {
                tracing::warn!(
                    type_url = update.type_url,
                    name = rejected.name,
                    reason = rejected.reason,
                    "resource refused"
                );
                Rejected { name: rejected.name, reason: rejected.reason }
            })
            .collect()
    }
}
