//! From xDS to the compiled snapshot: last good kept resource by resource, refusals named.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arc_swap::ArcSwap;
use l7_origination::Origination;
use l7_route::Snapshot;
use parking_lot::Mutex;
use prost::Message;
use serde_json::{Value, json};
use xds_client::{Rejected, Update};
use xds_model::envoy::{self, Effect, Notice, Rejection, Resources, Translation, WaypointConfig};
use xds_model::wds::MeshBuilder;
use xds_proto::envoy::envoy::config::core::v3::TypedExtensionConfig;
use xds_proto::envoy::envoy::extensions::transport_sockets::tls::v3::Secret;
use xds_proto::type_url;

use super::extensions::{self, Extensions};
use super::held::Held;

/// What a waypoint's configuration comes as, in the order it is asked for.
pub(crate) const TYPES: [&str; 5] =
    [type_url::CLUSTER, type_url::ENDPOINT, type_url::LISTENER, type_url::EXTENSION, type_url::SECRET];

/// What the admin interface shows of the configuration in force.
#[derive(Default)]
pub(crate) struct State {
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    held: Held,
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

    /// Reads the resources as they came.
    pub(crate) fn held<R>(&self, read: impl FnOnce(&Held) -> R) -> R {
        read(&self.shown.lock().held)
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
    origination: Arc<Origination>,
    resources: Resources,
    endpoints_wanted: BTreeSet<String>,
    secrets_wanted: BTreeSet<String>,
    extensions: Extensions,
    /// Names of extension configurations by the listener that asks for them.
    extensions_wanted: BTreeMap<String, BTreeSet<String>>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    state: Arc<State>,
}

impl Handler {
    pub(crate) fn new(
        mesh: Option<MeshBuilder>,
        engines: Arc<l7_http::Shared>,
        origination: Arc<Origination>,
        snapshot: Arc<ArcSwap<Snapshot>>,
    ) -> (Handler, Arc<State>) {
        let state = Arc::new(State::default());
        let handler = Handler {
            mesh,
            engines,
            origination,
            resources: Resources::default(),
            endpoints_wanted: BTreeSet::new(),
            secrets_wanted: BTreeSet::new(),
            extensions: Extensions::new(),
            extensions_wanted: BTreeMap::new(),
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
            self.remove(&update.type_url, name);
        }
        for resource in &update.resources {
            match self.insert(&update.type_url, &resource.name, &resource.body) {
                Ok(previous) => before.push((resource.name.as_str(), previous)),
                Err(rejection) => rejected.push(refused(rejection)),
            }
        }
        let mut translation = self.translate();
        let refused_whole: Vec<_> = translation.rejections.iter().filter(|r| !r.partial).cloned().collect();
        for rejection in refused_whole.iter().filter(|rejection| rejection.type_url == update.type_url) {
            let Some((name, previous)) = before.iter().find(|(name, _)| *name == rejection.name) else { continue };
            match previous {
                // It was taken before, so it decodes.
                Some(body) => drop(self.insert(&update.type_url, name, body)),
                None => self.remove(&update.type_url, name),
            }
        }
        if !refused_whole.is_empty() {
            let first = std::mem::take(&mut translation.rejections);
            translation = self.translate();
            translation.rejections = first;
        }
        let (snapshot, compile_rejections) = Snapshot::compile(&translation.config);
        translation.rejections.extend(compile_rejections);
        self.tell(&translation.notices);
        self.endpoints_wanted = translation.config.eds_names().map(str::to_owned).collect();
        let clusters = &translation.config.clusters;
        let tls = clusters.values().filter_map(|cluster| cluster.tls.as_ref());
        self.secrets_wanted = tls.flat_map(l7_origination::secret_names).map(str::to_owned).collect();
        self.origination.retain(|name| clusters.contains_key(name));
        let snapshot = Arc::new(snapshot);
        // Compiled here, so that no request waits for it.
        self.engines.warm(&snapshot);
        self.snapshot.store(snapshot);
        let undecoded = rejected.len();
        let of_this_update = translation.rejections.iter().filter(|rejection| rejection.type_url == update.type_url);
        rejected.extend(of_this_update.cloned().map(refused));
        let mut shown = self.state.shown.lock();
        shown.generation += 1;
        shown.held.take(update, &rejected, |name| {
            let is = |rejected: &Rejected| rejected.name == name;
            let whole = refused_whole.iter().any(|r| r.type_url == update.type_url && r.name == name);
            !whole && !rejected[..undecoded].iter().any(is)
        });
        shown.config = translation.config;
        shown.notices = translation.notices;
        shown.rejections = translation.rejections;
        rejected
    }

    /// Secrets are kept apart: nothing of them is ever shown.
    fn apply_secrets(&self, update: &Update) -> Vec<Rejected> {
        let secrets = self.origination.secrets();
        update.removed.iter().for_each(|name| secrets.remove(name));
        let take = |resource: &xds_client::Resource| {
            let decoded = Secret::decode(resource.body.clone()).map_err(|error| format!("does not decode: {error}"));
            let reason = decoded.and_then(|secret| secrets.insert(&resource.name, secret)).err()?;
            let (type_url, name) = (update.type_url.clone(), resource.name.clone());
            Some(refused(Rejection { type_url, name, reason, partial: false }))
        };
        update.resources.iter().filter_map(take).collect()
    }

    /// Notices, once; what closes a part of the configuration is a warning.
    fn tell(&self, notices: &[Notice]) {
        let shown = self.state.shown.lock();
        for notice in notices.iter().filter(|notice| !shown.notices.contains(notice)) {
            let Notice { resource, field, reason, effect } = notice;
            match effect {
                Effect::Ignored => tracing::debug!(resource, field, reason, "has no effect"),
                Effect::FailsClosed => tracing::warn!(resource, field, reason, "fails closed"),
            }
        }
    }

    /// Keeps a resource; returns what was there before. Nothing changes if it does not decode.
    fn insert(&mut self, type_url: &str, name: &str, body: &[u8]) -> Result<Option<Vec<u8>>, Rejection> {
        if type_url == type_url::EXTENSION {
            let (type_url, name) = (type_url.to_owned(), name.to_owned());
            return match TypedExtensionConfig::decode(body) {
                Ok(extension) => Ok(self.extensions.insert(name, extension).map(|before| before.encode_to_vec())),
                Err(error) => {
                    Err(Rejection { type_url, name, reason: format!("does not decode: {error}"), partial: false })
                }
            };
        }
        let before = self.resources.insert(type_url, name, body)?;
        if type_url == type_url::LISTENER {
            let names = self.resources.listeners.get(name).map(extensions::wanted).unwrap_or_default();
            self.extensions_wanted.insert(name.to_owned(), names);
        }
        Ok(before)
    }

    fn remove(&mut self, type_url: &str, name: &str) {
        self.resources.remove(type_url, name);
        match type_url {
            type_url::LISTENER => drop(self.extensions_wanted.remove(name)),
            type_url::EXTENSION => drop(self.extensions.remove(name)),
            _ => {}
        }
    }

    fn translate(&self) -> Translation {
        let asking = || self.extensions_wanted.iter().filter(|(_, names)| !names.is_empty());
        if asking().next().is_none() {
            return envoy::translate(&self.resources);
        }
        let mut resources = self.resources.clone();
        let mut notices = Vec::new();
        for (name, _) in asking() {
            if let Some(listener) = resources.listeners.get_mut(name) {
                *listener = extensions::resolve(listener, &self.extensions, &mut notices);
            }
        }
        let mut translation = envoy::translate(&resources);
        notices.sort();
        notices.dedup();
        translation.notices.extend(notices);
        translation
    }
}

fn refused(rejection: Rejection) -> Rejected {
    let Rejection { type_url, name, reason, partial } = rejection;
    tracing::warn!(type_url, name, reason, partial, "resource refused");
    Rejected { name, reason }
}

impl xds_client::Handler for Handler {
    fn apply(&mut self, update: Update) -> Vec<Rejected> {
        match update.type_url.as_str() {
            type_url::WORKLOAD => {}
            type_url::SECRET => return self.apply_secrets(&update),
            _ => return self.apply_config(&update),
        }
        let Some(mesh) = &mut self.mesh else { return Vec::new() };
        let resources = update.resources.iter().map(|resource| (resource.name.as_str(), resource.body.as_ref()));
        mesh.apply(&update.type_url, resources, update.removed.iter().map(String::as_str))
            .into_iter()
            .map(|rejected| Rejected { name: rejected.name, reason: rejected.reason })
            .collect()
    }

    fn wanted(&self, type_url: &str) -> Option<BTreeSet<String>> {
        match type_url {
            type_url::ENDPOINT => Some(self.endpoints_wanted.clone()),
            type_url::SECRET => Some(self.secrets_wanted.clone()),
            type_url::EXTENSION => Some(self.extensions_wanted.values().flatten().cloned().collect()),
            _ => None,
        }
    }
}
