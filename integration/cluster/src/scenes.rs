//! What is played on a cluster: the lab's scenes as they are, and scenes about what only a cluster has.
mod act;
mod bookinfo;
mod mistakes;
mod names;
mod nothing_lost;
mod outside;
mod probes;
mod tls;
mod tools;
mod tracing;
mod waypoints;

use strata_lab::Result;
use strata_lab::scenes::{self, Report};

use crate::Cluster;
use act::Act;

/// A scene of a cluster's own.
#[derive(Debug, Clone, Copy)]
pub struct Own {
    number: u8,
    title: &'static str,
    expect: &'static str,
    play: fn(&mut Act<'_>) -> Result<()>,
}

/// One scene.
#[derive(Debug, Clone, Copy)]
pub enum Scene {
    /// Of the lab, played on the cluster.
    Lab(scenes::Scene),
    Own(Own),
}

/// All scenes in order.
#[must_use]
pub fn all() -> Vec<Scene> {
    let lab = scenes::ALL.into_iter().filter(scenes::Scene::on_clusters).map(Scene::Lab);
    let own = [
        probes::SCENE,
        tools::SCENE,
        bookinfo::SCENE,
        tls::SCENE,
        outside::SCENE,
        names::SCENE,
        tracing::SCENE,
        waypoints::SCENE,
        mistakes::SCENE,
        nothing_lost::SCENE,
    ]
    .map(Scene::Own);
    lab.chain(own).collect()
}

impl Scene {
    /// As the user says which.
    #[must_use]
    pub fn number(&self) -> u8 {
        match self {
            Scene::Lab(scene) => scene.number,
            Scene::Own(scene) => scene.number,
        }
    }

    #[must_use]
    pub fn title(&self) -> &'static str {
        match self {
            Scene::Lab(scene) => scene.title,
            Scene::Own(scene) => scene.title,
        }
    }

    /// Plays it. What went wrong on the way is a check that failed.
    #[must_use]
    pub fn play(&self, cluster: &Cluster) -> Report {
        match self {
            Scene::Lab(scene) => scene.play(cluster),
            Scene::Own(scene) => {
                let mut act = Act::new(cluster, scene);
                if let Err(error) = (scene.play)(&mut act) {
                    act.check("the scene could be played to its end", false, error.to_string());
                }
                act.end()
            }
        }
    }
}
