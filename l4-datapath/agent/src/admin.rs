//! What `strata status` and a curious operator see.
use l4_policy::IdentitySource;
use serde_json::{Value, json};
use strata_abi::{identity, policy_verdict, stat};
use strata_runtime::admin::Admin;
use tokio::sync::{mpsc, oneshot};

use crate::agent::{Agent, Event, Pod, Query};

/// Adds the agent's paths.
pub(crate) fn with_queries(admin: Admin, events: &mpsc::Sender<Event>) -> Admin {
    let (status, dump) = (events.clone(), events.clone());
    admin
        .json("/status", move || ask(status.clone(), Query::Status))
        .json("/config_dump", move || ask(dump.clone(), Query::ConfigDump))
}

async fn ask(events: mpsc::Sender<Event>, query: Query) -> Value {
    let (reply, answer) = oneshot::channel();
    if events.send(Event::Query(query, reply)).await.is_err() {
        return json!({"error": "the agent is stopping"});
    }
    answer.await.unwrap_or_else(|_| json!({"error": "the agent is stopping"}))
}

impl Agent {
    /// `/status`.
    pub(crate) fn status(&self) -> Value {
        let faults = self.snapshot.faults.iter().chain(self.tables.in_force.faults());
        let statistics = self.datapath.maps().stats.all().unwrap_or_default();
        json!({
            "node": &*self.node,
            "addresses": self.facts.addresses,
            "pod_ranges": self.facts.pod_ranges,
            "ready": self.problem.is_none() && self.ipam.has_range(),
            "problem": self.problem,
            "source": {
                "generation": self.snapshot.generation,
                "objects": self.snapshot.objects.len(),
                "faults": faults.map(ToString::to_string).collect::<Vec<_>>(),
                "node_problems": self.facts.problems,
            },
            "edge": self.edge.status(),
            "proxy": self.proxy.as_ref().map(|proxy| json!({"connected": true, "pid": proxy.pid})),
            "pods": self.pods.values().map(pod_status).collect::<Vec<_>>(),
            "orphans": self.orphans.iter().map(|pod| json!({"attachment": pod.attachment.to_string(), "uid": pod.pod.uid, "addresses": pod.addresses().collect::<Vec<_>>()})).collect::<Vec<_>>(),
            "maps": self.tables.counts().into_iter().map(|(name, count)| (name.to_owned(), json!(count))).collect::<serde_json::Map<_, _>>(),
            "programs": self.datapath.instruction_counts(),
            "kernel": json!({"errno": self.datapath.features().errno, "tcx": self.datapath.features().tcx}),
            "statistics": statistics_json(&statistics),
        })
    }

    /// `/config_dump`.
    pub(crate) fn config_dump(&self) -> Value {
        let policy = &self.tables.in_force.policy;
        let name = |id: u32| {
            policy.identities.iter().find(|info| info.id == id).map(|info| match &info.source {
                IdentitySource::Pods => format!("{}/{}", info.namespace, labels(&info.labels)),
                IdentitySource::Cidr(block) => block.clone(),
                IdentitySource::Node(node) => format!("node {node}"),
                IdentitySource::Reserved(word) => (*word).to_owned(),
            })
        };
        let entries = policy.policy.iter().map(|((key, prefix), entry)| {
            json!({
                "subject": {"identity": key.subject, "name": name(key.subject)},
                "peer": if key.peer == identity::UNKNOWN { json!("any") } else { json!({"identity": key.peer, "name": name(key.peer)}) },
                "direction": if key.direction == strata_abi::direction::EGRESS { "egress" } else { "ingress" },
                "protocol": if *prefix > strata_abi::PolicyKey::PREFIX_ANY_PROTO { l4_flow::protocol(key.proto) } else { "any".into() },
                "ports": ports(key.port_be, *prefix),
                "verdict": match entry.verdict {
                    policy_verdict::ALLOW => "allow",
                    policy_verdict::DENY => "deny",
                    policy_verdict::AUDIT => "audit",
                    _ => "unknown",
                },
                "rule": policy.rules.get(entry.rule as usize).map(ToString::to_string),
            })
        });
        let services = &self.tables.in_force.services;
        let frontends = services.services.iter().map(|(key, service)| {
            let backends = (0..service.backend_count).filter_map(|slot| {
                let backend = services.backends.get(&strata_abi::BackendKey { backend_set: service.backend_set, slot })?;
                Some(json!({"ip": std::net::IpAddr::from(backend.addr), "port": backend.port, "local": backend.flags & strata_abi::backend_flag::LOCAL != 0}))
            });
            json!({
                "name": services.names.get(key),
                "ip": std::net::IpAddr::from(key.addr),
                "port": key.port,
                "protocol": l4_flow::protocol(key.proto),
                "affinity_seconds": service.affinity_seconds,
                "backends": backends.collect::<Vec<_>>(),
            })
        });
        let addresses = policy.by_address.iter().map(|((address, prefix), found)| {
            json!({"ip": std::net::IpAddr::from(*address), "prefix_of_128": prefix, "identity": found.security_id, "name": name(found.security_id)})
        });
        json!({
            "node": &*self.node,
            "pods": self.pods.values().map(pod_status).collect::<Vec<_>>(),
            "identities": addresses.collect::<Vec<_>>(),
            "policy": entries.collect::<Vec<_>>(),
            "services": frontends.collect::<Vec<_>>(),
            "grants": self.grants(),
            "listeners": self.listeners(),
            "routes": self.facts.routes.iter().map(|route| format!("{route:?}")).collect::<Vec<_>>(),
        })
    }

    fn grants(&self) -> Value {
        let maps = self.datapath.maps();
        let generation = maps.config.get().map(|config| config.grant_generation).unwrap_or_default();
        let entries = maps.grants.entries().unwrap_or_default();
        let grants = entries.iter().map(|(key, grant)| {
            json!({
                "src": std::net::IpAddr::from(key.src),
                "dst": std::net::IpAddr::from(key.dst),
                "port": key.port,
                "in_force": grant.generation == generation,
            })
        });
        grants.collect()
    }

    fn listeners(&self) -> Value {
        let keys = self.datapath.maps().listeners.keys().unwrap_or_default();
        keys.iter().map(|key| json!({"pod_index": key.pod_index, "kind": key.kind})).collect()
    }
}

fn pod_status(pod: &Pod) -> Value {
    json!({
        "uid": pod.state.uid(),
        "namespace": pod.state.pod.namespace,
        "name": pod.state.pod.name,
        "attachment": pod.state.attachment.to_string(),
        "netns": pod.state.netns,
        "netns_cookie": pod.state.netns_cookie,
        "ips": pod.state.addresses().collect::<Vec<_>>(),
        "device": pod.state.host_device,
        "ifindex": pod.state.ifindex,
        "pod_index": pod.state.pod_index,
        "identity": pod.security_id,
        "described": pod.described,
        "mesh": {
            "wanted": pod.wanted,
            "state": pod.phase.name(),
            "enrolled": pod.phase.is_enrolled(),
            "reason": if let crate::enrolment::Phase::Failed { reason } = &pod.phase { Some(reason) } else { None },
        },
    })
}

fn statistics_json(counters: &[u64]) -> Value {
    let at = |index: u32| counters.get(index as usize).copied().unwrap_or_default();
    let drops =
        (0..strata_abi::stat::COUNT - stat::DROPS).filter(|reason| at(stat::DROPS + reason) != 0).map(|reason| {
            let word = u8::try_from(reason).map_or("unknown", l4_flow::drop_reason);
            (word.to_owned(), json!(at(stat::DROPS + reason)))
        });
    json!({
        "events_lost": at(stat::EVENTS_LOST),
        "connect_translated": at(stat::CONNECT_TRANSLATED),
        "connect_steered": at(stat::CONNECT_STEERED),
        "connect_direct": at(stat::CONNECT_DIRECT),
        "connect_denied": at(stat::CONNECT_DENIED),
        "packets_forwarded": at(stat::PACKETS_FORWARDED),
        "packets_dropped": at(stat::PACKETS_DROPPED),
        "bytes_forwarded": at(stat::BYTES_FORWARDED),
        "drops": drops.collect::<serde_json::Map<_, _>>(),
    })
}

/// A prefix of a port is a range of ports.
fn ports(port_be: [u8; 2], prefix: u32) -> String {
    let first = u16::from_be_bytes(port_be);
    let free = strata_abi::PolicyKey::PREFIX_FULL.saturating_sub(prefix).min(16);
    match free {
        0 => first.to_string(),
        16 => "any".into(),
        free => format!("{first}-{}", u32::from(first) + (1 << free) - 1),
    }
}

fn labels(labels: &std::collections::BTreeMap<String, String>) -> String {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}
