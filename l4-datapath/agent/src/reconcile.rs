//! Objects and pods -> maps, routes, enrolment, status: the agent's answer to every change.
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::agent::Agent;
use crate::derive::{self, Derived, Input};

impl Agent {
    /// Everything that follows from objects and pods, in order. Errors are kept for status and logged.
    pub(crate) async fn reconcile_and_report(&mut self) {
        if let Err(error) = self.reconcile() {
            tracing::error!(%error, "objects are not in force, the last good ones stay");
        }
        if !self.knows_objects {
            // Whatever an earlier agent put in force stays: nothing is known that could replace it.
            return;
        }
        self.take_over_orphans().await;
        self.announce_held_back().await;
        self.sync_routes().await;
        self.sync_edge().await;
        self.sync_mesh().await;
        self.write_status();
    }

    /// Brings the maps in line with objects and pods.
    ///
    /// # Errors
    /// If a compilation or a map write failed; what was in force stays as far as possible.
    pub(crate) fn reconcile(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        let result = self.try_reconcile();
        self.metrics.reconciled(start.elapsed(), result.is_ok());
        self.problem = result.as_ref().err().map(|error| format!("{error:#}"));
        result
    }

    fn try_reconcile(&mut self) -> anyhow::Result<()> {
        self.check_source()?;
        let derived = self.derive();
        if derived.facts.problems != self.facts.problems {
            derived.facts.problems.iter().for_each(|problem| tracing::warn!(%problem, "node"));
        }
        self.ipam.set_ranges(&derived.facts.pod_ranges);
        let objects = &derived.objects;
        let next = self.tables.compile(self.datapath.maps(), objects)?;
        // Before the maps: a crash in between must not give the same numbers to others.
        if self.tables.renumbers(&next) {
            let numbers = next.numbers();
            if numbers != self.saved_numbers {
                self.state.save_identities(&numbers)?;
                self.saved_numbers = numbers;
            }
        }
        for pod in self.pods.values_mut() {
            crate::mesh::describe(pod, objects, &self.node, next.identity_of(&pod.state.uid()));
        }
        let unmanaged: Vec<IpAddr> =
            self.pods.values().filter(|pod| !pod.described).flat_map(|pod| pod.state.addresses()).collect();
        let records = self.records();
        // Names first: the first packet that a new rule denies is reported by the rule's name.
        if self.tables.differs(&next) || derived.facts.names != self.facts.names {
            let names = crate::names::Names::build(objects, &next.contents(), derived.facts.names.clone());
            self.names.store(Arc::new(names));
        }
        let changed = self.tables.apply(self.datapath.maps(), next, &records, unmanaged)?;
        self.set_config(&derived.facts.addresses, changed)?;
        self.facts = derived.facts.clone();
        self.objects = derived.objects.clone();
        self.derived = Some(derived);
        self.knows_objects = true;
        self.ready = None;
        Ok(())
    }

    fn derive(&self) -> Derived {
        let local: Vec<crate::objects::LocalPod<'_>> = self
            .pods
            .values()
            .map(|pod| (pod.state.pod.namespace.as_str(), pod.state.pod.name.as_str(), &pod.state.lease))
            .collect();
        // What an API server took and this agent cannot read must not stop the node, nor mean nothing.
        let stand_ins = match self.waits_for_pods {
            true => derive::unread(&self.snapshot.objects, &self.snapshot.faults),
            false => Vec::new(),
        };
        let uplink = self.uplink.map(|(index, _)| index);
        let input = Input { objects: &self.snapshot.objects, node: &self.node, uplink, local: &local, stand_ins };
        Derived::next(self.derived.as_ref(), input)
    }

    /// Refuses a source that would make policy vanish for no other reason than that it cannot be read.
    fn check_source(&self) -> anyhow::Result<()> {
        if !self.snapshot.synced {
            let reasons: Vec<String> =
                self.snapshot.faults.iter().map(|f| format!("{}: {}", f.object, f.reason)).collect();
            anyhow::bail!("the objects are not known yet; what is in force stays: {}", reasons.join(", "));
        }
        if self.pods.is_empty() {
            return Ok(());
        }
        if self.snapshot.objects.is_empty() {
            anyhow::bail!("the sources hold no object at all; what is in force stays");
        }
        // Later, the source itself keeps the last good version of what is broken; a new agent has none. An API server
        // takes no such thing, but for policies it understands better than we do: see `derive`.
        let of_policy = |fault: &&compat_objects::Fault| {
            fault.object.is_empty()
                || ["NetworkPolicy ", "Namespace ", "Pod "].iter().any(|kind| fault.object.starts_with(kind))
        };
        match self.snapshot.errors().find(of_policy) {
            Some(fault) if !self.knows_objects && !self.waits_for_pods => {
                anyhow::bail!(
                    "since its start the agent knows no good version of this; what is in force stays: {fault}"
                )
            }
            _ => Ok(()),
        }
    }

    fn set_config(&self, addresses: &[IpAddr], policy_changed: bool) -> Result<(), l4_loader::Error> {
        let first = |v4: bool| addresses.iter().find(|address| address.is_ipv4() == v4).map(|a| (*a).into());
        let config = &self.datapath.maps().config;
        let present = config.get()?;
        let mut wanted = present;
        wanted.node_v4 = first(true).unwrap_or_default();
        wanted.node_v6 = first(false).unwrap_or_default();
        wanted.policy_generation += u64::from(policy_changed);
        if wanted != present { config.set(&wanted) } else { Ok(()) }
    }

    async fn sync_routes(&mut self) {
        if self.routes_in_place.as_ref() == Some(&self.facts.routes) {
            return;
        }
        self.routes_in_place = None;
        match l4_netns::sync_node_routes(&self.netlink, &self.facts.routes).await {
            Ok(changed) => {
                self.routes_in_place = Some(self.facts.routes.clone());
                if let (added, removed @ 1..) | (added @ 1.., removed) = changed {
                    tracing::info!(added, removed, "routes to other nodes' pods");
                }
            }
            Err(error) => tracing::warn!(%error, "routes to other nodes' pods are incomplete"),
        }
    }
}
