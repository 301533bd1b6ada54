//! Checks that need nothing but the object itself: required fields, ranges, what excludes what, patterns that
//! compile. What they refuse, Istio's or Kubernetes' admission refuses too; whether a name exists is asked elsewhere.
mod gateway;
mod kubernetes;
mod security;
mod service_entry;
mod traffic;
mod virtual_service;

use std::net::IpAddr;

use ipnet::IpNet;

use crate::fault::Severity;
use crate::istio::StringMatch;
use crate::object::Object;
use crate::path::FieldPath;
use crate::read::Mistake;

/// Longest pattern Istio takes.
const MAX_PATTERN: usize = 1024;

/// Compiles a pattern as Istio's match fields mean it: RE2, over the whole value.
///
/// # Errors
/// Why it is no pattern, on one line.
pub fn full_match(pattern: &str) -> Result<regex::Regex, String> {
    if pattern.len() > MAX_PATTERN {
        return Err(format!("the pattern has {} bytes, at most {MAX_PATTERN} are taken", pattern.len()));
    }
    regex::Regex::new(&format!("^(?:{pattern})$")).map_err(|error| {
        // The parser draws an arrow over several lines; its last line is the reason.
        let text = error.to_string();
        let reason = text.lines().last().unwrap_or_default().trim().trim_start_matches("error: ");
        format!("{pattern:?} is no regular expression: {reason}")
    })
}

/// An address or a block of addresses, as `ipBlocks` and `addresses` take them.
///
/// # Errors
/// The text is neither.
pub fn address_or_block(text: &str) -> Result<IpNet, String> {
    let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    net.map_err(|_| format!("{text:?} is neither an IP address nor a block such as 10.0.0.0/8"))
}

/// Collects the mistakes of one object.
pub(crate) struct Check {
    mistakes: Vec<Mistake>,
}

impl Check {
    fn error(&mut self, path: &FieldPath, reason: impl Into<String>) {
        self.mistakes.push(Mistake { severity: Severity::Error, path: path.clone(), reason: reason.into() });
    }

    fn warn(&mut self, path: &FieldPath, reason: impl Into<String>) {
        self.mistakes.push(Mistake { severity: Severity::Warning, path: path.clone(), reason: reason.into() });
    }

    fn require(&mut self, path: &FieldPath, text: &str) {
        if text.is_empty() {
            self.error(path, "missing: a value is needed");
        }
    }

    fn pattern(&mut self, path: &FieldPath, pattern: &str) {
        if let Err(reason) = full_match(pattern) {
            self.error(path, reason);
        }
    }

    fn block(&mut self, path: &FieldPath, text: &str) {
        if let Err(reason) = address_or_block(text) {
            self.error(path, reason);
        }
    }

    /// A port that may be left out but not be 0.
    fn port(&mut self, path: &FieldPath, port: Option<u16>) {
        if port == Some(0) {
            self.error(path, "0 is no port");
        }
    }

    fn percent(&mut self, path: &FieldPath, value: f64) {
        if !(0.0..=100.0).contains(&value) {
            self.error(path, format!("{value} is not between 0 and 100"));
        }
    }

    /// A host of the registry: a DNS name, with a leading `*` where `wildcard`.
    fn host(&mut self, path: &FieldPath, host: &str, wildcard: bool) {
        if host.is_empty() {
            return self.require(path, host);
        }
        let name = host.strip_prefix("*.").filter(|_| wildcard).unwrap_or(host);
        if wildcard && host == "*" {
            return;
        }
        let label = |label: &str| {
            let fine = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            !label.is_empty()
                && label.len() <= 63
                && label.chars().all(fine)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if name.parse::<IpAddr>().is_err() && (name.len() > 253 || !name.trim_end_matches('.').split('.').all(label)) {
            self.error(path, format!("{host:?} is no host name"));
        }
    }

    fn string_match(&mut self, path: &FieldPath, condition: &StringMatch) {
        let set = [&condition.exact, &condition.prefix, &condition.regex].into_iter().flatten().count();
        if set > 1 {
            self.error(path, "only one of exact, prefix and regex may be set");
        }
        if let Some(pattern) = &condition.regex {
            self.pattern(&path.to("regex"), pattern);
        }
        if condition.prefix.as_deref() == Some("") {
            self.error(&path.to("prefix"), "an empty prefix matches everything: leave the condition out instead");
        }
    }

    /// At most one of several alternatives.
    fn at_most_one(&mut self, path: &FieldPath, alternatives: &[(&str, bool)]) {
        let set: Vec<&str> = alternatives.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
        if set.len() > 1 {
            self.error(path, format!("{} exclude each other", set.join(" and ")));
        }
    }

    /// Weights of the destinations of one rule.
    fn weights(&mut self, path: &FieldPath, weights: &[i32]) {
        for (i, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight < 0) {
            self.error(&path.to(i).to("weight"), format!("{weight} is negative"));
        }
        let sum: i64 = weights.iter().map(|weight| i64::from(*weight)).sum();
        if weights.len() > 1 && sum == 0 {
            self.error(path, "the weights of several destinations sum up to 0: nothing would be reached");
        }
        if sum > i64::from(u32::MAX) {
            self.error(path, format!("the weights sum up to {sum}, more than {}", u32::MAX));
        }
    }
}

/// Everything wrong with one object.
pub(crate) fn object(object: &Object) -> Vec<Mistake> {
    let mut check = Check { mistakes: Vec::new() };
    let c = &mut check;
    match object {
        Object::Pod(pod) => kubernetes::pod(c, pod),
        Object::Service(service) => kubernetes::service(c, service),
        Object::EndpointSlice(slice) => kubernetes::endpoint_slice(c, slice),
        Object::NetworkPolicy(policy) => kubernetes::network_policy(c, policy),
        Object::Gateway(gateway) => gateway::gateway(c, &gateway.spec),
        Object::HTTPRoute(route) => gateway::http_route(c, &route.spec),
        Object::GRPCRoute(route) => gateway::grpc_route(c, &route.spec),
        Object::TCPRoute(route) => gateway::l4_route(c, &route.spec.parent_refs, &route.spec.rules),
        Object::TLSRoute(route) => gateway::l4_route(c, &route.spec.parent_refs, &route.spec.rules),
        Object::BackendTLSPolicy(policy) => gateway::backend_tls_policy(c, &policy.spec),
        Object::VirtualService(service) => virtual_service::virtual_service(c, &service.spec),
        Object::DestinationRule(rule) => traffic::destination_rule(c, &rule.spec),
        Object::ServiceEntry(entry) => service_entry::service_entry(c, &entry.spec),
        Object::WorkloadEntry(entry) => service_entry::workload_entry(c, &FieldPath::spec(), &entry.spec),
        Object::AuthorizationPolicy(policy) => security::authorization_policy(c, &policy.spec),
        Object::RequestAuthentication(policy) => security::request_authentication(c, &policy.spec),
        Object::PeerAuthentication(policy) => security::peer_authentication(c, &policy.spec),
        Object::Telemetry(telemetry) => security::attachment(
            c,
            telemetry.spec.selector.is_some(),
            telemetry.spec.target_ref.as_ref(),
            &telemetry.spec.target_refs,
        ),
        Object::Namespace(_)
        | Object::Node(_)
        | Object::ServiceAccount(_)
        | Object::ConfigMap(_)
        | Object::Secret(_)
        | Object::GatewayClass(_)
        | Object::ReferenceGrant(_)
        | Object::Sidecar(_)
        | Object::EnvoyFilter(_)
        | Object::WasmPlugin(_) => {}
    }
    check.mistakes
}

#[cfg(test)]
mod tests;
