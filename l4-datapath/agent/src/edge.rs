//! Keeps the table between the cluster and the outside as objects want it.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use l4_edge::Edge;
use l4_netns::NodeRoute;
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::health::HealthChecks;
use crate::objects::NodeFacts;

/// What the agent was told to do at the edge.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    pub(crate) masquerade: bool,
    pub(crate) except: BTreeSet<IpNet>,
    pub(crate) node_ports: bool,
}

impl Wanted {
    pub(crate) fn anything(&self) -> bool {
        self.masquerade || self.node_ports
    }
}

/// What is wanted, and what is in force.
#[derive(Debug, Default)]
pub(crate) struct EdgeState {
    pub(crate) wanted: Wanted,
    in_force: Option<(NodeFacts, Arc<l4_lb::Compiled>)>,
    problem: Option<String>,
    health: HealthChecks,
    /// Nothing is wanted, and nothing is left of earlier agents.
    dropped: bool,
}

impl EdgeState {
    pub(crate) fn new(wanted: Wanted) -> EdgeState {
        EdgeState { wanted, ..EdgeState::default() }
    }

    fn edge(&self, facts: &NodeFacts, services: &l4_lb::Compiled) -> Edge {
        let pods = facts.routes.iter().map(|route| match route {
            NodeRoute::Own { pods } | NodeRoute::Via { pods, .. } => *pods,
        });
        let nodes: BTreeSet<IpAddr> = facts.names.keys().copied().collect();
        Edge {
            pods: pods.collect(),
            own_pods: facts.pod_ranges.iter().copied().collect(),
            nodes,
            own_addresses: facts.addresses.iter().copied().collect(),
            masquerade: self.wanted.masquerade,
            except: self.wanted.except.clone(),
            published: if self.wanted.node_ports { services.outside.clone() } else { Default::default() },
        }
    }

    /// For `/status`.
    pub(crate) fn status(&self) -> Value {
        let published = self.in_force.as_ref().filter(|_| self.wanted.node_ports);
        json!({
            "masquerade": self.wanted.masquerade,
            "node_ports": self.wanted.node_ports,
            "health_checks": self.health.len(),
            "published": published.map_or(0, |(_, services)| services.outside.len()),
            "problem": self.problem,
        })
    }
}

impl Agent {
    /// Brings the table in line with the objects in force.
    pub(crate) async fn sync_edge(&mut self) {
        if !self.edge.wanted.anything() {
            return self.drop_edge().await;
        }
        let services = &self.tables.in_force.services;
        if self.edge.wanted.node_ports {
            self.edge.health.sync(&services.health).await;
        }
        let same = |(facts, before): &(NodeFacts, Arc<l4_lb::Compiled>)| {
            *facts == self.facts && (Arc::ptr_eq(before, services) || before.outside == services.outside)
        };
        if self.edge.in_force.as_ref().is_some_and(same) {
            return;
        }
        let ruleset = self.edge.edge(&self.facts, services).ruleset();
        let problem = l4_edge::apply(&ruleset).await.err().map(|error| error.to_string());
        match &problem {
            None => self.edge.in_force = Some((self.facts.clone(), services.clone())),
            Some(problem) if self.edge.problem.as_ref() != Some(problem) => {
                tracing::error!(problem, "callers outside the cluster, and pods that call there, are served as before");
            }
            Some(_) => {}
        }
        self.edge.problem = problem;
    }

    /// An earlier agent was told otherwise: its table goes, once.
    async fn drop_edge(&mut self) {
        if std::mem::replace(&mut self.edge.dropped, true) || !l4_edge::is_there().await.unwrap_or(false) {
            return;
        }
        match l4_edge::remove().await {
            Ok(()) => tracing::info!("the table inet strata is gone: nothing is wanted of it any more"),
            Err(error) => tracing::error!(%error, "the table inet strata could not be removed"),
        }
    }

    /// Puts the table back should somebody have taken it away.
    pub(crate) async fn verify_edge(&mut self) {
        if self.edge.wanted.anything() && !l4_edge::is_there().await.unwrap_or(true) {
            tracing::warn!("the table inet strata was gone, it is made anew");
            self.edge.in_force = None;
        }
    }
}
