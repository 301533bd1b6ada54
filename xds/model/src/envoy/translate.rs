//! Messages to [`WaypointConfig`].
#![allow(deprecated, reason = "istiod still sets deprecated fields, and those it may set must not be lost")]
mod action;
mod cluster;
mod common;
mod dispatch;
mod endpoint;
mod ext_authz;
mod filter;
mod hcm;
mod headers;
mod listener;
mod rbac;
mod report;
mod route;
mod telemetry;
mod tls;

use std::collections::BTreeMap;

use prost::Message;
use xds_proto::envoy::envoy::config::cluster::v3::Cluster;
use xds_proto::envoy::envoy::config::endpoint::v3::ClusterLoadAssignment;
use xds_proto::envoy::envoy::config::listener::v3::Listener;
use xds_proto::type_url;

pub use self::report::{Effect, Notice, Rejection};
use self::report::{Refusal, Report};
use super::chain::WaypointConfig;
use super::cluster::Discovery;

/// Metadata namespace of verified JWT payloads.
pub const JWT_AUTHN: &str = "envoy.filters.http.jwt_authn";

/// The messages a waypoint holds, by name; the caller adds and removes as updates come.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resources {
    pub listeners: BTreeMap<String, Listener>,
    pub clusters: BTreeMap<String, Cluster>,
    pub endpoints: BTreeMap<String, ClusterLoadAssignment>,
}

impl Resources {
    /// Decodes a resource and keeps it under its name. Returns what was there before, encoded again, so that a
    /// rejected resource can be put back.
    ///
    /// # Errors
    /// If the type is not a listener, cluster or endpoint, or the payload does not decode; nothing is changed then.
    pub fn insert(&mut self, type_url: &str, name: &str, body: &[u8]) -> Result<Option<Vec<u8>>, Rejection> {
        fn put<M: Message + Default>(
            map: &mut BTreeMap<String, M>,
            name: &str,
            body: &[u8],
        ) -> Result<Option<Vec<u8>>, String> {
            let message = M::decode(body).map_err(|error| format!("does not decode: {error}"))?;
            Ok(map.insert(name.to_owned(), message).map(|before| before.encode_to_vec()))
        }
        match type_url {
            type_url::LISTENER => put(&mut self.listeners, name, body),
            type_url::CLUSTER => put(&mut self.clusters, name, body),
            type_url::ENDPOINT => put(&mut self.endpoints, name, body),
            _ => Err("type is not served by a waypoint".to_owned()),
        }
        .map_err(|reason| rejection(type_url, name, reason, false))
    }

    /// Forgets a resource; unknown ones are no matter.
    pub fn remove(&mut self, type_url: &str, name: &str) {
        match type_url {
            type_url::LISTENER => drop(self.listeners.remove(name)),
            type_url::CLUSTER => drop(self.clusters.remove(name)),
            type_url::ENDPOINT => drop(self.endpoints.remove(name)),
            _ => {}
        }
    }
}

/// Outcome of [`translate`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Translation {
    pub config: WaypointConfig,
    pub rejections: Vec<Rejection>,
    /// Sorted, without repetitions.
    pub notices: Vec<Notice>,
}

/// Translates everything a waypoint holds. Never fails as a whole: see [`Rejection`] for what a caller does with
/// resources that could not be taken.
pub fn translate(resources: &Resources) -> Translation {
    let mut out = Translation::default();
    for (name, message) in &resources.clusters {
        read(&mut out, type_url::CLUSTER, name, |config, report| {
            match cluster::cluster(message.clone(), report).map_err(|refusal| (refusal, false))? {
                cluster::Read::Cluster(cluster) => drop(config.clusters.insert(name.clone(), *cluster)),
                cluster::Read::Originate(originate) => config.originate = Some(originate),
                cluster::Read::Internal => {}
            }
            Ok(())
        });
    }
    for (name, message) in &resources.endpoints {
        read(&mut out, type_url::ENDPOINT, name, |config, report| {
            let assignment = endpoint::assignment(message.clone(), report).map_err(|refusal| (refusal, false))?;
            config.endpoints.insert(name.clone(), assignment);
            Ok(())
        });
    }
    for (name, message) in &resources.listeners {
        read(&mut out, type_url::LISTENER, name, |config, report| listener::listener(message.clone(), config, report));
    }
    out.notices.sort();
    out.notices.dedup();
    out
}

fn read(
    out: &mut Translation,
    type_url: &str,
    name: &str,
    f: impl FnOnce(&mut WaypointConfig, &mut Report) -> Result<(), (Refusal, bool)>,
) {
    let mut report = Report::new(name);
    if let Err((Refusal(reason), partial)) = f(&mut out.config, &mut report) {
        out.rejections.push(rejection(type_url, name, reason, partial));
    }
    out.notices.append(&mut report.notices);
}

fn rejection(type_url: &str, name: &str, reason: String, partial: bool) -> Rejection {
    Rejection { type_url: type_url.to_owned(), name: name.to_owned(), reason, partial }
}

impl WaypointConfig {
    /// EDS names the clusters ask for; what a client without wildcard subscription must watch.
    pub fn eds_names(&self) -> impl Iterator<Item = &str> {
        self.clusters.values().filter_map(|cluster| match &cluster.discovery {
            Discovery::Eds(name) => Some(name.as_str()),
            _ => None,
        })
    }
}
