//! VirtualServices -> routes of a service port.
mod actions;
pub(crate) mod matches;
pub(crate) use matches as claims;

use compat_objects::istio::{HttpRoute, PortSelector, VirtualService};
use compat_objects::{HasMeta, Kind, ObjectKey};

use super::Builder;
use super::destinations::From;
use crate::mesh::{Service, ServicePort, exported, full_hostname, host_covers};
use crate::pb::{metadata, route, seconds, structure, text};
pub(crate) use actions::{default_retry, mirror, response_code};
pub(crate) use matches::valid_regex;

/// One rule's way into routes.
pub(crate) struct Rule<'a> {
    pub(crate) object: &'a ObjectKey,
    /// `spec.http[3]`
    pub(crate) field: String,
    pub(crate) port: u16,
}

impl Rule<'_> {
    pub(crate) fn at(&self, field: &str) -> String {
        format!("{}.{field}", self.field)
    }
}

impl Builder<'_, '_> {
    /// What users wrote for a port: Gateway API routes, then VirtualServices. `None`: nothing.
    pub(crate) fn routes(&self, service: &Service, port: &ServicePort) -> Option<Vec<route::Route>> {
        let from_gateway_api = self.gateway_routes(service, port);
        if from_gateway_api.is_some() {
            return from_gateway_api;
        }
        let mut routes = Vec::new();
        let mut any = false;
        for (key, virtual_service) in self.virtual_services(service) {
            if virtual_service.spec.http.is_empty() {
                continue;
            }
            match self.http_routes(service, port, &key, virtual_service) {
                Ok(found) => {
                    any = true;
                    routes.extend(found);
                }
                Err((field, reason)) => self.error(&key, &field, reason),
            }
        }
        any.then_some(routes)
    }

    /// VirtualServices for a service that hold inside the mesh: the waypoint's namespace, then the service's; the
    /// most exact host first, then the oldest.
    fn virtual_services<'s>(&'s self, service: &'s Service) -> Vec<(ObjectKey, &'s VirtualService)> {
        let mut namespaces = vec![self.waypoint.key.namespace.as_str()];
        if service.namespace != self.waypoint.key.namespace {
            namespaces.push(&service.namespace);
        }
        let mut found = Vec::new();
        for namespace in namespaces {
            for virtual_service in self.mesh.objects.virtual_services_in(namespace) {
                let gateways = &virtual_service.spec.gateways;
                if !gateways.is_empty() && !gateways.iter().any(|gateway| gateway == "mesh") {
                    continue;
                }
                if !exported(&virtual_service.spec.export_to, namespace, &self.waypoint.key.namespace) {
                    continue;
                }
                let hosts = virtual_service.spec.hosts.iter().map(|host| full_hostname(host, namespace));
                let best = hosts.filter(|host| host_covers(host, &service.hostname)).map(|host| host.len()).max();
                let Some(exactness) = best else { continue };
                let key = ObjectKey::new(Kind::VirtualService, namespace, virtual_service.name());
                found.push(((std::cmp::Reverse(exactness), virtual_service.created()), key, &**virtual_service));
            }
        }
        found.sort_by_key(|entry| entry.0);
        // A wildcard host gives way to an exact one; equally exact ones add up.
        let best = found.first().map(|entry| entry.0.0);
        found.into_iter().filter(|entry| Some(entry.0.0) == best).map(|(_, key, vs)| (key, vs)).collect()
    }

    fn http_routes(
        &self,
        service: &Service,
        port: &ServicePort,
        key: &ObjectKey,
        virtual_service: &VirtualService,
    ) -> Result<Vec<route::Route>, (String, String)> {
        let mut routes = Vec::new();
        for (index, rule) in virtual_service.spec.http.iter().enumerate() {
            let at = Rule { object: key, field: format!("spec.http[{index}]"), port: port.number };
            let found = match &rule.delegate {
                Some(delegate) => self.delegated(service, &at, rule, delegate)?,
                None => self.rule_routes(service, &at, rule)?,
            };
            let ends = found.iter().any(is_catch_all);
            routes.extend(found);
            if ends {
                break;
            }
        }
        Ok(routes)
    }

    /// The rules of the VirtualService a rule hands over to, each narrowed by the rule's own matches.
    fn delegated(
        &self,
        service: &Service,
        at: &Rule<'_>,
        rule: &HttpRoute,
        delegate: &compat_objects::istio::Delegate,
    ) -> Result<Vec<route::Route>, (String, String)> {
        let own = &at.object.namespace;
        let namespace = if delegate.namespace.is_empty() { own } else { &delegate.namespace };
        let Some(target) = self.mesh.objects.virtual_service(namespace, &delegate.name) else {
            let reason = format!("no VirtualService {namespace}/{}", delegate.name);
            return Err((at.at("delegate"), reason));
        };
        let key = ObjectKey::new(Kind::VirtualService, namespace.as_str(), delegate.name.as_str());
        if !target.spec.hosts.is_empty() {
            return Err((at.at("delegate"), format!("{key} has hosts of its own, so it cannot be delegated to")));
        }
        let mut routes = Vec::new();
        for (index, inner) in target.spec.http.iter().enumerate() {
            if inner.delegate.is_some() {
                return Err((at.at("delegate"), format!("{key} delegates on; one step is allowed")));
            }
            let merged = actions::merge_delegate(rule, inner).map_err(|reason| (at.at("delegate"), reason))?;
            let Some(merged) = merged else { continue };
            let inner_at = Rule { object: &key, field: format!("spec.http[{index}]"), port: at.port };
            routes.extend(self.rule_routes(service, &inner_at, &merged)?);
        }
        Ok(routes)
    }

    /// One route for every alternative of a rule's `match`.
    fn rule_routes(
        &self,
        service: &Service,
        at: &Rule<'_>,
        rule: &HttpRoute,
    ) -> Result<Vec<route::Route>, (String, String)> {
        if rule.matches.is_empty() {
            let found = matches::everything();
            return Ok(vec![self.route(service, at, rule, found, None)?]);
        }
        let mut routes = Vec::new();
        for (index, alternative) in rule.matches.iter().enumerate() {
            let field = at.at(&format!("match[{index}]"));
            if !self.applies(at, alternative, &field) {
                continue;
            }
            let found = matches::convert(alternative).map_err(|(part, reason)| (format!("{field}.{part}"), reason))?;
            let ends = matches::is_catch_all(&found);
            routes.push(self.route(service, at, rule, found, Some(alternative))?);
            if ends {
                break;
            }
        }
        Ok(routes)
    }

    /// Alternatives for other ports, gateways or callers have no place here.
    fn applies(&self, at: &Rule<'_>, found: &compat_objects::istio::HttpMatchRequest, field: &str) -> bool {
        if found.port.is_some_and(|port| port != at.port) {
            return false;
        }
        if !found.gateways.is_empty() && !found.gateways.iter().any(|gateway| gateway == "mesh") {
            return false;
        }
        if !found.source_labels.is_empty() {
            let reason = "a waypoint does not know its callers' labels: this alternative never matches";
            self.warning(at.object, &format!("{field}.sourceLabels"), reason);
            return false;
        }
        if !found.source_namespace.is_empty() && found.source_namespace != self.waypoint.key.namespace {
            let reason = "is compared with the waypoint's namespace: this alternative never matches";
            self.warning(at.object, &format!("{field}.sourceNamespace"), reason);
            return false;
        }
        true
    }

    /// Weighted clusters of the first TCP (or TLS) rule for a port; `None` without one.
    pub(crate) fn tcp_route(&self, service: &Service, port: &ServicePort) -> Option<Vec<(String, u32)>> {
        if let Some(clusters) = self.gateway_tcp_route(service, port) {
            return Some(clusters);
        }
        for (key, virtual_service) in self.virtual_services(service) {
            let spec = &virtual_service.spec;
            let tls = spec.tls.iter().enumerate().filter(|(_, rule)| {
                rule.matches.is_empty()
                    || rule.matches.iter().any(|m| {
                        let host = m.sni_hosts.iter().any(|sni| host_covers(sni, &service.hostname));
                        host && m.port.is_none_or(|wanted| wanted == port.number)
                    })
            });
            let tcp = spec.tcp.iter().enumerate().filter(|(_, rule)| {
                rule.matches.is_empty()
                    || rule.matches.iter().any(|m| m.port.is_none_or(|wanted| wanted == port.number))
            });
            let tls = tls.map(|(index, rule)| (format!("spec.tls[{index}]"), &rule.route));
            let tcp = tcp.map(|(index, rule)| (format!("spec.tcp[{index}]"), &rule.route));
            let Some((field, destinations)) = tls.chain(tcp).next() else { continue };
            let weights: Vec<i32> = destinations.iter().map(|d| d.weight).collect();
            let weights = match actions::weights(&weights) {
                Ok(weights) => weights,
                Err(reason) => {
                    self.error(&key, &format!("{field}.route"), reason);
                    continue;
                }
            };
            let clusters = destinations.iter().zip(weights).enumerate().filter(|(_, (_, weight))| *weight > 0);
            let clusters = clusters.map(|(index, (destination, weight))| {
                let field = format!("{field}.route[{index}].destination");
                let from = From { object: &key, field: &field };
                (self.cluster_for(&destination.destination, "tcp", port.number, from), weight)
            });
            return Some(clusters.collect());
        }
        None
    }

    /// What the clusters of a service and these subsets hash, each once.
    pub(crate) fn hash_policies(
        &self,
        service: &Service,
        port: u16,
        subsets: &[&str],
    ) -> Vec<route::route_action::HashPolicy> {
        let rule = self.rule(service);
        let mut found: Vec<route::route_action::HashPolicy> = Vec::new();
        for name in subsets {
            let subset = rule.subsets.iter().find(|subset| subset.name == *name);
            let policy = super::traffic_policy::effective(rule.policy.as_ref(), subset, port);
            let hash = policy.and_then(|policy| policy.load_balancer).and_then(|lb| lb.consistent_hash);
            if let Some(hash) = hash.as_ref().and_then(super::traffic_policy::hash_policy)
                && !found.contains(&hash)
            {
                found.push(hash);
            }
        }
        found
    }

    /// The service and port a destination leads to, for the destination's hash policies.
    pub(crate) fn service_of(
        &self,
        host: &str,
        asked: Option<PortSelector>,
        namespace: &str,
        listener_port: u16,
    ) -> Option<(&Service, u16)> {
        let service = self.mesh.service_by_hostname(&full_hostname(host, namespace), namespace)?;
        let mut ports = service.tcp_ports();
        let port = match (asked, ports.next(), ports.next()) {
            (Some(port), _, _) => port.number,
            (None, Some(only), None) => only.number,
            _ => listener_port,
        };
        Some((service, port))
    }
}

fn is_catch_all(found: &route::Route) -> bool {
    found.r#match.as_ref().is_some_and(matches::is_catch_all)
}

/// Everything to one cluster, as istiod does where nobody wrote a route.
#[allow(deprecated, reason = "istiod sends it, and data planes read it")]
pub(crate) fn default_route(
    cluster: &str,
    operation: &str,
    hash_policy: Vec<route::route_action::HashPolicy>,
) -> route::Route {
    let action = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(cluster.to_owned())),
        timeout: seconds(0),
        max_grpc_timeout: seconds(0),
        retry_policy: Some(default_retry()),
        hash_policy,
        ..Default::default()
    };
    route::Route {
        name: "default".into(),
        r#match: Some(matches::everything()),
        decorator: Some(decorator(operation.to_owned())),
        action: Some(route::route::Action::Route(action)),
        ..Default::default()
    }
}

pub(crate) fn decorator(operation: String) -> route::Decorator {
    route::Decorator { operation, propagate: None }
}

/// Which object a route comes from.
pub(crate) fn origin(key: &ObjectKey) -> crate::pb::core::Metadata {
    let group = key.kind.group();
    let plural = match key.kind {
        Kind::VirtualService => "virtual-service",
        Kind::GRPCRoute => "grpcroute",
        _ => "httproute",
    };
    let path = format!("/apis/{group}/v1/namespaces/{}/{plural}/{}", key.namespace, key.name);
    metadata([("istio", structure([("config", text(&path))]))])
}

/// `HOST:PORT/PATH` as the decorator has it.
pub(crate) fn operation(subject: &str, port: u16, found: &route::RouteMatch) -> String {
    use route::route_match::PathSpecifier;
    let path = match &found.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) => format!("{prefix}*"),
        Some(PathSpecifier::Path(path)) => path.clone(),
        Some(PathSpecifier::SafeRegex(regex)) => regex.regex.clone(),
        _ => "/*".to_owned(),
    };
    format!("{subject}:{port}{path}")
}
