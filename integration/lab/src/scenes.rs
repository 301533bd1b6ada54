//! The ten scenes of the demo: each puts its YAML in place, makes real traffic, measures, judges and cleans up.
//!
//! A scene shows only what it measured. What it needs from the one before it makes itself, so that any scene can be
//! played alone and in any order.
mod capture;
mod record;
mod stage;
mod statistics;

mod s01_service_access;
mod s02_policy;
mod s03_enrolment;
mod s04_header_routing;
mod s05_canary;
mod s06_resilience;
mod s07_zero_trust;
mod s08_short_cut;
mod s09_nothing_lost;
mod s10_seen;

use serde::Serialize;

use crate::{Ground, Result};
pub use record::Record;
use stage::Stage;

/// One thing that had to hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub what: String,
    pub ok: bool,
    /// The numbers it was judged by.
    pub detail: String,
}

/// What a scene showed.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub number: u8,
    pub title: String,
    /// What a user would type to see the same.
    pub type_this: Vec<String>,
    pub expect: String,
    pub measured: Vec<String>,
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether every check held; a scene without checks shows nothing.
    #[must_use]
    pub fn ok(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.ok)
    }
}

/// One scene.
#[derive(Debug, Clone, Copy)]
pub struct Scene {
    pub number: u8,
    pub title: &'static str,
    pub expect: &'static str,
    play: fn(&mut Stage<'_>) -> Result<()>,
}

/// All scenes in order.
pub const ALL: [Scene; 10] = [
    s01_service_access::SCENE,
    s02_policy::SCENE,
    s03_enrolment::SCENE,
    s04_header_routing::SCENE,
    s05_canary::SCENE,
    s06_resilience::SCENE,
    s07_zero_trust::SCENE,
    s08_short_cut::SCENE,
    s09_nothing_lost::SCENE,
    s10_seen::SCENE,
];

impl Scene {
    /// Whether it plays on a cluster too: it is not about processes the lab itself keeps.
    #[must_use]
    pub fn on_clusters(&self) -> bool {
        ![s09_nothing_lost::SCENE.number, s10_seen::SCENE.number].contains(&self.number)
    }

    /// Plays it on a running shop. What went wrong on the way is a check that failed.
    pub fn play(&self, ground: &dyn Ground) -> Report {
        let mut stage = Stage::new(ground, self);
        let played = stage.start().and_then(|()| (self.play)(&mut stage));
        if let Err(error) = played {
            stage.check("the scene could be played to its end", false, error.to_string());
        }
        stage.end()
    }
}
