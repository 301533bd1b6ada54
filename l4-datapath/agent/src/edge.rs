//! What the table between the cluster and the outside should be, by the objects.
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

mod keeper;
use keeper::Keeper;

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

/// What is wanted, and who keeps it in force.
#[derive(Debug, Default)]
pub(crate) struct EdgeState {
    pub(crate) wanted: Wanted,
    /// What the table was last asked for from.
    asked: Option<(NodeFacts, Arc<l4_lb::Compiled>)>,
    keeper: Option<Keeper>,
    health: HealthChecks,
    /// Nothing is wanted, and what an earlier agent left was looked for.
    looked: bool,
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
        let outcome = self.keeper.as_ref().map(Keeper::outcome).unwrap_or_default();
        json!({
            "masquerade": self.wanted.masquerade,
            "node_ports": self.wanted.node_ports,
            "health_checks": self.health.len(),
            "published": outcome.published,
            "problem": outcome.problem,
        })
    }
}

impl Agent {
    /// Asks for the table that the objects in force want.
    pub(crate) async fn sync_edge(&mut self) {
        let services = &self.tables.in_force.services;
        if !self.edge.wanted.anything() {
            if !std::mem::replace(&mut self.edge.looked, true) {
                tokio::spawn(keeper::remove_leftover());
            }
            return;
        }
        if self.edge.wanted.node_ports {
            self.edge.health.sync(&services.health).await;
        }
        let same = |(facts, before): &(NodeFacts, Arc<l4_lb::Compiled>)| {
            *facts == self.facts && (Arc::ptr_eq(before, services) || before.outside == services.outside)
        };
        if self.edge.asked.as_ref().is_some_and(same) {
            return;
        }
        let edge = Arc::new(self.edge.edge(&self.facts, services));
        self.edge.asked = Some((self.facts.clone(), services.clone()));
        match &self.edge.keeper {
            Some(keeper) => keeper.ask(edge),
            None => self.edge.keeper = Some(Keeper::start(edge)),
        }
    }

    /// Takes the table away for good.
    pub(crate) async fn leave_edge(&mut self) {
        if let Some(keeper) = self.edge.keeper.take() {
            keeper.end().await;
        }
        if self.edge.wanted.anything()
            && let Err(error) = l4_edge::remove().await
        {
            tracing::error!(%error, "the table inet strata could not be removed");
        }
    }
}
