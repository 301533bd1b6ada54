//! The record users see.
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use strata_abi::{DropReason, FlowEvent, Verdict, hook, proto};

use crate::clock::format_time;
use crate::{BootClock, names};

/// Which layer decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    /// The kernel programs.
    Network,
    /// The node proxy's authorization, reported through the handoff.
    Mesh,
}

/// One decision. Serialises to the JSON of the agent's `/flows`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// RFC 3339, UTC.
    pub time: String,
    pub layer: Layer,
    pub node: Arc<str>,
    /// [`crate::verdict`].
    pub verdict: Cow<'static, str>,
    /// [`crate::drop_reason`]; empty if nothing was dropped.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub drop_reason: Cow<'static, str>,
    pub proto: Cow<'static, str>,
    pub src: Endpoint,
    pub dst: Endpoint,
    /// The service that was asked for (`namespace/name:port`), if the destination was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The address that was asked for, where it is not `dst`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_dst: Option<Endpoint>,
    /// What decided, if a policy did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyName>,
    /// [`crate::hook`].
    pub hook: Cow<'static, str>,
    /// Socket cookie, the id both layers report a connection under; 0 at hooks without a socket.
    pub cookie: u64,
}

/// One side of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub ip: IpAddr,
    /// 0: not known yet (the source's at connect).
    pub port: u16,
    /// Security identity.
    pub identity: u32,
    /// What a reserved identity is called (`world`, `host`, ...); empty for pods.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pod: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub workload: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

impl Endpoint {
    /// An endpoint nothing is known of but its address.
    pub fn unknown(ip: IpAddr, port: u16, identity: u32) -> Endpoint {
        Endpoint {
            ip,
            port,
            identity,
            kind: String::new(),
            namespace: String::new(),
            pod: String::new(),
            workload: String::new(),
            labels: BTreeMap::new(),
        }
    }
}

/// A policy's rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyName {
    pub namespace: String,
    /// Several if no rule matched: all policies that isolate the pod.
    pub names: Vec<String>,
    /// `ingress` or `egress`; empty for the mesh's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub direction: String,
    /// Index into the policy's rules of that direction; none: no rule matched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
    /// The whole in one line, as users read it.
    pub text: String,
}

/// Gives names to numbers and addresses.
pub trait Resolver {
    /// Who has this address, seen under this identity.
    fn endpoint(&self, ip: IpAddr, port: u16, identity: u32) -> Endpoint;
    /// `namespace/name:port` of the service at this address.
    fn service(&self, ip: IpAddr, port: u16, proto: u8) -> Option<String>;
    /// The rule of this number; see `strata_abi::PolicyEntry::rule`.
    fn rule(&self, rule: u32) -> Option<PolicyName>;
}

/// A kernel record with names.
pub fn resolve(event: &FlowEvent, node: &Arc<str>, clock: &BootClock, resolver: &dyn Resolver) -> Flow {
    let (src, dst, asked) = (IpAddr::from(event.src), IpAddr::from(event.dst), IpAddr::from(event.orig_dst));
    let differs = (asked, event.orig_dst_port) != (dst, event.dst_port);
    let service = resolver.service(asked, event.orig_dst_port, event.proto);
    let policy_dropped = [DropReason::PolicyDenied as u8, DropReason::PolicyDenyRule as u8].contains(&event.reason);
    let by_policy = event.rule != 0 || policy_dropped || event.verdict == Verdict::Audited as u8;
    Flow {
        time: clock.format(event.time_ns),
        layer: Layer::Network,
        node: node.clone(),
        verdict: names::verdict(event.verdict).into(),
        drop_reason: names::drop_reason(event.reason).into(),
        proto: names::protocol(event.proto),
        src: resolver.endpoint(src, event.src_port, event.src_id),
        dst: resolver.endpoint(dst, event.dst_port, event.dst_id),
        original_dst: differs.then(|| Endpoint::unknown(asked, event.orig_dst_port, 0)),
        service,
        policy: by_policy.then(|| resolver.rule(event.rule)).flatten(),
        hook: names::hook(event.hook).into(),
        cookie: event.cookie,
    }
}

/// A connection the proxy's authorization refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal<'a> {
    pub src: (IpAddr, u16),
    pub dst: (IpAddr, u16),
    /// `namespace/name`; empty if no policy did.
    pub policy: &'a str,
    pub reason: &'a str,
}

/// A refusal of the mesh with names.
pub fn resolve_refusal(refusal: &Refusal<'_>, node: &Arc<str>, resolver: &dyn Resolver) -> Flow {
    let plaintext = refusal.reason.contains("plaintext");
    let reason = if plaintext { DropReason::PlaintextRefused } else { DropReason::Unauthorized };
    let (namespace, name) = refusal.policy.split_once('/').unwrap_or(("", refusal.policy));
    let policy = (!refusal.policy.is_empty() || !refusal.reason.is_empty()).then(|| PolicyName {
        namespace: namespace.to_owned(),
        names: Some(name.to_owned()).filter(|name| !name.is_empty()).into_iter().collect(),
        direction: String::new(),
        rule: None,
        text: match refusal.policy {
            "" => refusal.reason.to_owned(),
            policy => format!("{policy}: {}", refusal.reason),
        },
    });
    Flow {
        time: format_time(SystemTime::now()),
        layer: Layer::Mesh,
        node: node.clone(),
        verdict: names::verdict(Verdict::Dropped as u8).into(),
        drop_reason: names::drop_reason(reason as u8).into(),
        proto: names::protocol(proto::TCP),
        src: resolver.endpoint(refusal.src.0, refusal.src.1, 0),
        dst: resolver.endpoint(refusal.dst.0, refusal.dst.1, 0),
        service: resolver.service(refusal.dst.0, refusal.dst.1, proto::TCP),
        original_dst: None,
        policy,
        hook: names::hook(hook::PROXY).into(),
        cookie: 0,
    }
}

#[cfg(test)]
mod tests;
