//! From xDS to the compiled snapshot: last good kept resource by resource, refusals named.
use std::collections::BTreeSet;
use std::sync::Arc;

use arc_swap::ArcSwap;
use l7_route::Snapshot;
use parking_lot::Mutex;
use serde_json::{Value, json};
use xds_client::{Rejected, Update};
use xds_model::envoy::{self, Notice, Rejection, Resources, WaypointConfig};
use xds_model::wds::MeshBuilder;
use xds_proto::type_url;

/// What the admin interface shows of the configuration in force.
#[derive(Default)]
pub(crate) struct State {
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    generation: u64,
    config: WaypointConfig,
    notices: Vec<Notice>,
    rejections: Vec<Rejection>,
}

impl State {
    pub(crate) fn status(&self) -> Value {
        let shown = self.shown.lock();
        json!({
            "component": "strata-proxy",
            "role": "waypoint",
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "generation": shown.generation,
            "chains": shown.config.chains.len(),
            "clusters": shown.config.clusters.len(),
            "rejections": shown.rejections,
        })
    }

    pub(crate) fn dump(&self) -> Value {
        let shown = self.shown.lock();
        json!({
            "generation": shown.generation,
            "config": shown.config,
            "notices": shown.notices,
            "rejections": shown.rejections,
        })
    }
}

/// The xDS handler of a waypoint.
pub(crate) struct Handler {
    /// Where workloads go; `None` if they come from elsewhere.
    mesh: Option<MeshBuilder>,
    engines: Arc<l7_http::Shared>,
    resources: Resources,
    endpoints_wanted: BTreeSet<String>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    state: Arc<State>,
}

impl Handler {
    pub(crate) fn new(
        mesh: Option<MeshBuilder>,
        engines: Arc<l7_http::Shared>,
        snapshot: Arc<ArcSwap<Snapshot>>,
    ) -> (Handler, Arc<State>) {
        let state = Arc::new(State::default());
        let handler = Handler {
            mesh,
            engines,
            resources: Resources::default(),
            endpoints_wanted: BTreeSet::new(),
            snapshot,
            state: state.clone(),
        };
        (handler, state)
    }

    fn apply_config(&mut self, update: &Update) -> Vec<Rejected> {
        let mut rejected = Vec::new();
        // What was there before each resource, to be put back if the new one cannot be taken.
        let mut before = Vec::with_capacity(update.resources.len());
        for name in &update.removed {
            self.resources.remove(&update.type_url, name);
        }
        for resource in &update.resources {
            match self.resources.insert(&update.type_url, &resource.name, &resource.body) {
                Ok(previous) => before.push((resource.name.as_str(), previous)),
                Err(rejection) => rejected.push(refused(rejection)),
            }
        }
        let mut translation = envoy::translate(&self.resources);
        let refused_whole: Vec<_> = translation.rejections.iter().filter(|r| !r.partial).cloned().collect();
        for rejection in refused_whole.iter().filter(|rejection| rejection.type_url == update.type_url) {
            let Some((name, previous)) = before.iter().find(|(name, _)| *name == rejection.name) else { continue };
            match previous {
                // It was taken before, so it decodes.
                Some(body) => drop(self.resources.insert(&update.type_url, name, body)),
                None => self.resources.remove(&update.type_url, name),
            }
        }
        if !refused_whole.is_empty() {
            let first = std::mem::take(&mut translation.rejections);
            translation = envoy::translate(&self.resources);
            translation.rejections = first;
        }
        let (snapshot, compile_rejections) = Snapshot::compile(&translation.config);
        translation.rejections.extend(compile_rejections);
        for notice in &translation.notices {
            tracing::debug!(resource = notice.resource, field = notice.field, reason = notice.reason, "notice");
        }
        self.endpoints_wanted = translation.config.eds_names().map(str::to_owned).collect();
        let snapshot = Arc::new(snapshot);
        // Compiled here, so that no request waits for it.
        self.engines.warm(&snapshot);
        self.snapshot.store(snapshot);
        let of_this_update = translation.rejections.iter().filter(|rejection| rejection.type_url == update.type_url);
        rejected.extend(of_this_update.cloned().map(refused));
        let mut shown = self.state.shown.lock();
        shown.generation += 1;
        shown.config = translation.config;
        shown.notices = translation.notices;
        shown.rejections = translation.rejections;
        rejected
    }
}

fn refused(rejection: Rejection) -> Rejected {
    let Rejection { type_url, name, reason, partial } = rejection;
    tracing::warn!(type_url, name, reason, partial, "resource refused");
    Rejected { name, reason }
}

impl xds_client::Handler for Handler {
    fn apply(&mut self, update: Update) -> Vec<Rejected> {
        if update.type_url != type_url::WORKLOAD {
            return self.apply_config(&update);
        }
        let Some(mesh) = &mut self.mesh else { return Vec::new() };
        let resources = update.resources.iter().map(|resource| (resource.name.as_str(), resource.body.as_ref()));
        mesh.apply(&update.type_url, resources, update.removed.iter().map(String::as_str))
            .into_iter()
            .map(|rejected| Rejected { name: rejected.name, reason: rejected.reason })
            .collect()
    }

    fn wanted(&self, type_url: &str) -> Option<BTreeSet<String>> {
        (type_url == type_url::ENDPOINT).then(|| self.endpoints_wanted.clone())
    }
}
