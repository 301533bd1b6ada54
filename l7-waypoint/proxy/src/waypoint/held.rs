//! The configuration as it came, for admin interfaces that show it as Envoy does.
use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;
use xds_client::{Rejected, Update};

/// Resources by type and name.
#[derive(Debug, Default)]
pub(crate) struct Held {
    types: BTreeMap<String, BTreeMap<String, Entry>>,
}

/// One resource: what is in force, and the latest one if it was refused.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    pub accepted: Option<Version>,
    pub refused: Option<(Version, String)>,
}

#[derive(Debug, Clone)]
pub(crate) struct Version {
    pub name: String,
    pub at: SystemTime,
    pub body: Bytes,
}

impl Held {
    /// Takes over an update. `kept` says of a refused resource whether parts of it are in force all the same.
    pub(crate) fn take(&mut self, update: &Update, rejected: &[Rejected], kept: impl Fn(&str) -> bool) {
        let of_type = self.types.entry(update.type_url.clone()).or_default();
        for name in &update.removed {
            of_type.remove(name);
        }
        for resource in &update.resources {
            let version =
                Version { name: resource.version.clone(), at: SystemTime::now(), body: resource.body.clone() };
            let reason = rejected.iter().find(|rejected| rejected.name == resource.name).map(|r| r.reason.clone());
            let entry = of_type.entry(resource.name.clone()).or_default();
            if reason.is_none() || kept(&resource.name) {
                entry.accepted = Some(version.clone());
            }
            entry.refused = reason.map(|reason| (version, reason));
        }
    }

    /// The resources of a type, by name.
    pub(crate) fn of(&self, type_url: &str) -> impl Iterator<Item = (&str, &Entry)> {
        self.types.get(type_url).into_iter().flatten().map(|(name, entry)| (name.as_str(), entry))
    }
}
