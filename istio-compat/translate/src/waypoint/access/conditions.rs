//! One rule of an AuthorizationPolicy as permissions and principals.
//!
//! The order of conditions is Istio's (hosts, methods, paths, ports, then `when`), so that outputs can be compared.
use compat_objects::istio::{Action, Condition, Operation, Rule, Source};

use crate::node::block;
use crate::pb::{any, core, exact, ext, matcher, prefix, rbac, regex_match, route, suffix, typed, u32v};
use crate::waypoint::routes::claims::{any_value, either_list_or, payload};
use rbac::permission::Rule as P;
use rbac::principal::Identifier as I;

/// What is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layer {
    Http,
    /// Connections only: conditions on requests cannot be checked.
    Tcp,
}

/// Field (relative to the rule) and reason.
type Refused = (String, String);

/// Matches nothing.
pub(super) fn never() -> rbac::Policy {
    rbac::Policy {
        permissions: vec![rbac::Permission::not(rbac::Permission::all())],
        principals: vec![rbac::Principal::not(rbac::Principal::all())],
        ..Default::default()
    }
}

/// Matches everything.
pub(crate) fn always() -> rbac::Policy {
    rbac::Policy {
        permissions: vec![rbac::Permission::all()],
        principals: vec![rbac::Principal::all()],
        ..Default::default()
    }
}

/// Permissions and principals combine alike.
trait Node: Sized + Clone {
    fn all() -> Self;
    fn not(inner: Self) -> Self;
    fn and(of: Vec<Self>) -> Self;
    fn or(of: Vec<Self>) -> Self;
}

impl Node for rbac::Permission {
    fn all() -> Self {
        P::Any(true).wrap()
    }
    fn not(inner: Self) -> Self {
        P::NotRule(Box::new(inner)).wrap()
    }
    fn and(rules: Vec<Self>) -> Self {
        P::AndRules(rbac::permission::Set { rules }).wrap()
    }
    fn or(rules: Vec<Self>) -> Self {
        P::OrRules(rbac::permission::Set { rules }).wrap()
    }
}

impl Node for rbac::Principal {
    fn all() -> Self {
        I::Any(true).wrap()
    }
    fn not(inner: Self) -> Self {
        I::NotId(Box::new(inner)).wrap()
    }
    fn and(ids: Vec<Self>) -> Self {
        I::AndIds(rbac::principal::Set { ids }).wrap()
    }
    fn or(ids: Vec<Self>) -> Self {
        I::OrIds(rbac::principal::Set { ids }).wrap()
    }
}

trait Wrap<T> {
    fn wrap(self) -> T;
}
impl Wrap<rbac::Permission> for P {
    fn wrap(self) -> rbac::Permission {
        rbac::Permission { rule: Some(self) }
    }
}
impl Wrap<rbac::Principal> for I {
    fn wrap(self) -> rbac::Principal {
        rbac::Principal { identifier: Some(self) }
    }
}

/// Conditions that must all hold, being collected.
struct All<N>(Vec<N>);

impl<N: Node> All<N> {
    /// Any of `values` and none of `not`, each by `one`.
    fn add(
        &mut self,
        values: &[String],
        not: &[String],
        one: impl Fn(&str) -> Result<N, String>,
    ) -> Result<(), String> {
        let each = |values: &[String]| values.iter().map(|value| one(value)).collect::<Result<Vec<N>, String>>();
        if !values.is_empty() {
            self.0.push(N::or(each(values)?));
        }
        if !not.is_empty() {
            self.0.push(N::not(N::or(each(not)?)));
        }
        Ok(())
    }

    /// The same where all values together make one condition.
    fn add_whole(
        &mut self,
        values: &[String],
        not: &[String],
        all: impl Fn(&[String]) -> Result<N, String>,
    ) -> Result<(), String> {
        if !values.is_empty() {
            self.0.push(all(values)?);
        }
        if !not.is_empty() {
            self.0.push(N::not(all(not)?));
        }
        Ok(())
    }

    fn finish(self) -> N {
        N::and(if self.0.is_empty() { vec![N::all()] } else { self.0 })
    }
}

/// The rule; `None` if it can never hold on this layer: an ALLOW that asks for something only requests have.
pub(crate) fn policy(
    rule: &Rule,
    action: Action,
    layer: Layer,
    namespace: &str,
) -> Result<Option<rbac::Policy>, Refused> {
    if layer == Layer::Tcp && action == Action::Allow && needs_requests(rule) {
        return Ok(None);
    }
    let mut permissions = Vec::new();
    let operations: Vec<Operation> = rule.to.iter().map(|to| to.operation.clone().unwrap_or_default()).collect();
    let default = [Operation::default()];
    for (index, operation) in if operations.is_empty() { &default[..] } else { &operations }.iter().enumerate() {
        let mut all = All(Vec::new());
        permission(&mut all, operation, layer).map_err(|(f, r)| (format!(".to[{index}].operation.{f}"), r))?;
        for (index, condition) in rule.when.iter().enumerate() {
            permission_condition(&mut all, condition).map_err(|reason| (format!(".when[{index}]"), reason))?;
        }
        permissions.push(all.finish());
    }
    let mut principals = Vec::new();
    let sources: Vec<Source> = rule.from.iter().map(|from| from.source.clone().unwrap_or_default()).collect();
    let default = [Source::default()];
    for (index, source) in if sources.is_empty() { &default[..] } else { &sources }.iter().enumerate() {
        let mut all = All(Vec::new());
        principal(&mut all, source, layer, namespace).map_err(|(f, r)| (format!(".from[{index}].source.{f}"), r))?;
        for (index, condition) in rule.when.iter().enumerate() {
            principal_condition(&mut all, condition, layer, namespace)
                .map_err(|reason| (format!(".when[{index}]"), reason))?;
        }
        principals.push(all.finish());
    }
    Ok(Some(rbac::Policy { permissions, principals, ..Default::default() }))
}

fn needs_requests(rule: &Rule) -> bool {
    let operation = rule.to.iter().filter_map(|to| to.operation.as_ref()).any(|o| {
        [&o.hosts, &o.not_hosts, &o.methods, &o.not_methods, &o.paths, &o.not_paths].iter().any(|list| !list.is_empty())
    });
    let source = rule
        .from
        .iter()
        .filter_map(|from| from.source.as_ref())
        .any(|s| !s.request_principals.is_empty() || !s.not_request_principals.is_empty());
    operation || source || rule.when.iter().any(|condition| condition.key.starts_with("request."))
}

fn permission(all: &mut All<rbac::Permission>, operation: &Operation, layer: Layer) -> Result<(), Refused> {
    let at = |field: &'static str| move |reason: String| (field.to_owned(), reason);
    if layer == Layer::Http {
        all.add(&operation.hosts, &operation.not_hosts, |host| {
            let matched = matcher::StringMatcher { ignore_case: true, ..wildcard(host, "") };
            Ok(P::Header(header(":authority", matched)).wrap())
        })
        .map_err(at("hosts"))?;
        all.add(&operation.methods, &operation.not_methods, |method| {
            Ok(P::Header(header_or_present(":method", method)).wrap())
        })
        .map_err(at("methods"))?;
        all.add(&operation.paths, &operation.not_paths, |path| Ok(self::path(path)?.wrap())).map_err(at("paths"))?;
    }
    all.add(&operation.ports, &operation.not_ports, port).map_err(at("ports"))
}

fn permission_condition(all: &mut All<rbac::Permission>, condition: &Condition) -> Result<(), String> {
    let (values, not) = (&condition.values, &condition.not_values);
    match condition.key.as_str() {
        "destination.ip" => all.add(values, not, |value| Ok(P::DestinationIp(range(value)?).wrap())),
        "destination.port" => all.add(values, not, port),
        "connection.sni" => all.add(values, not, |value| Ok(P::RequestedServerName(wildcard(value, "")).wrap())),
        _ => Ok(()),
    }
}

fn principal(all: &mut All<rbac::Principal>, source: &Source, layer: Layer, own: &str) -> Result<(), Refused> {
    let at = |field: &'static str| move |reason: String| (field.to_owned(), reason);
    all.add(&source.principals, &source.not_principals, identity).map_err(at("principals"))?;
    if layer == Layer::Http {
        all.add_whole(&source.request_principals, &source.not_request_principals, request_principals)
            .map_err(at("requestPrincipals"))?;
    }
    all.add(&source.service_accounts, &source.not_service_accounts, |value| service_account(value, own))
        .map_err(at("serviceAccounts"))?;
    all.add(&source.namespaces, &source.not_namespaces, namespace).map_err(at("namespaces"))?;
    all.add(&source.trust_domains, &source.not_trust_domains, |domain| {
        Ok(peer(regex_match(&format!("spiffe://{}/.*", stars(domain)))))
    })
    .map_err(at("trustDomains"))?;
    all.add(&source.remote_ip_blocks, &source.not_remote_ip_blocks, |value| Ok(I::RemoteIp(range(value)?).wrap()))
        .map_err(at("remoteIpBlocks"))?;
    all.add(&source.ip_blocks, &source.not_ip_blocks, |value| Ok(I::DirectRemoteIp(range(value)?).wrap()))
        .map_err(at("ipBlocks"))
}

#[allow(deprecated, reason = "istiod sends it, and data planes read it")]
fn principal_condition(
    all: &mut All<rbac::Principal>,
    condition: &Condition,
    layer: Layer,
    own: &str,
) -> Result<(), String> {
    let (key, values, not) = (condition.key.as_str(), &condition.values, &condition.not_values);
    match key {
        "source.ip" => return all.add(values, not, |value| Ok(I::DirectRemoteIp(range(value)?).wrap())),
        "remote.ip" => return all.add(values, not, |value| Ok(I::RemoteIp(range(value)?).wrap())),
        "source.namespace" => return all.add(values, not, namespace),
        "source.principal" => return all.add(values, not, identity),
        "source.serviceAccount" => return all.add(values, not, |value| service_account(value, own)),
        "destination.ip" | "destination.port" | "connection.sni" => return Ok(()),
        _ => {}
    }
    if !key.starts_with("request.") {
        return Err(format!("key {key:?} is not known"));
    }
    if layer == Layer::Tcp {
        return Ok(());
    }
    if let Some(name) = bracketed(key, "request.headers") {
        return match name.as_slice() {
            [name] => all.add(values, not, |value| Ok(I::Header(header_or_present(name, value)).wrap())),
            _ => Err(format!("{key} names no header")),
        };
    }
    let claim = |path: &[&str], values: &[String]| {
        let each = values.iter().map(|value| matcher::ValueMatcher {
            match_pattern: Some(matcher::value_matcher::MatchPattern::StringMatch(wildcard(value, ""))),
        });
        let mut each: Vec<_> = each.collect();
        let value = if each.len() == 1 { each.remove(0) } else { any_value(each) };
        Ok(I::Metadata(payload(path, either_list_or(value))).wrap())
    };
    match key {
        "request.auth.principal" => all.add_whole(values, not, request_principals),
        "request.auth.audiences" => all.add_whole(values, not, |values| claim(&["aud"], values)),
        "request.auth.presenter" => all.add_whole(values, not, |values| claim(&["azp"], values)),
        _ => match bracketed(key, "request.auth.claims") {
            Some(path) => all.add_whole(values, not, |values| claim(&path, values)),
            None => Err(format!("key {key:?} is not known")),
        },
    }
}

/// The parts of `head[a][b]`.
fn bracketed<'k>(key: &'k str, head: &str) -> Option<Vec<&'k str>> {
    let inner = key.strip_prefix(head)?.strip_prefix('[')?.strip_suffix(']')?;
    let parts: Vec<&str> = inner.split("][").collect();
    parts.iter().all(|part| !part.is_empty()).then_some(parts)
}

/// `*`, `*suffix`, `prefix*` or the whole text, after a fixed beginning that is part of the value.
fn wildcard(value: &str, head: &str) -> matcher::StringMatcher {
    match (value, value.strip_prefix('*'), value.strip_suffix('*')) {
        ("*", _, _) => regex_match(".+"),
        (_, Some(tail), _) if head.is_empty() => suffix(tail),
        (_, Some(tail), _) => regex_match(&format!("{head}.*{}", quote(tail))),
        (_, _, Some(start)) => prefix(&format!("{head}{start}")),
        _ => exact(&format!("{head}{value}")),
    }
}

/// A text as a regular expression for itself (RE2's special characters only, as Go quotes).
fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// The same, but with stars meaning anything.
fn stars(text: &str) -> String {
    text.split('*').map(quote).collect::<Vec<_>>().join(".*")
}

fn peer(matched: matcher::StringMatcher) -> rbac::Principal {
    I::FilterState(matcher::FilterStateMatcher {
        key: "io.istio.peer_principal".into(),
        matcher: Some(matcher::filter_state_matcher::Matcher::StringMatch(matched)),
    })
    .wrap()
}

#[allow(clippy::unnecessary_wraps, reason = "one of several conversions, some of which can fail")]
fn identity(value: &str) -> Result<rbac::Principal, String> {
    Ok(peer(wildcard(value, "spiffe://")))
}

#[allow(clippy::unnecessary_wraps, reason = "one of several conversions, some of which can fail")]
fn namespace(value: &str) -> Result<rbac::Principal, String> {
    Ok(peer(regex_match(&format!(".*/ns/{}/.*", stars(value)))))
}

#[allow(clippy::unnecessary_wraps, reason = "one of several conversions, some of which can fail")]
fn service_account(value: &str, own: &str) -> Result<rbac::Principal, String> {
    let (namespace, account) = value.split_once('/').unwrap_or((own, value));
    let pattern = format!("spiffe://.+/ns/{}/(.+/|)sa/{}(/.+)?", quote(namespace), quote(account));
    Ok(peer(regex_match(&pattern)))
}

/// Issuer and subject, joined by a slash, of the request's token. Either may hold slashes itself, so a pattern that
/// could be split in several places is all of them.
fn request_principals(values: &[String]) -> Result<rbac::Principal, String> {
    let mut any: Vec<rbac::Principal> = Vec::new();
    for value in values {
        any.extend(request_principal(value));
    }
    match any.len() {
        0 => Err("names no issuer and subject".to_owned()),
        1 => Ok(any.remove(0)),
        _ => Ok(rbac::Principal::or(any)),
    }
}

#[allow(deprecated, reason = "istiod sends it, and data planes read it")]
fn request_principal(value: &str) -> Vec<rbac::Principal> {
    let claim = |name: &str, matched: matcher::StringMatcher| -> rbac::Principal {
        let value =
            matcher::ValueMatcher { match_pattern: Some(matcher::value_matcher::MatchPattern::StringMatch(matched)) };
        I::Metadata(payload(&[name], value)).wrap()
    };
    let both = |issuer, subject| rbac::Principal::and(vec![claim("iss", issuer), claim("sub", subject)]);
    let present = || regex_match(".+");
    let splits = |text: &str| -> Vec<(String, String)> {
        text.match_indices('/').map(|(at, _)| (text[..at].to_owned(), text[at + 1..].to_owned())).collect()
    };
    if value == "*" {
        return vec![both(present(), present())];
    }
    if let Some(tail) = value.strip_prefix('*') {
        let whole = (!tail.starts_with('/')).then(|| both(present(), suffix(tail)));
        let split = splits(tail).into_iter().map(|(issuer, subject)| {
            both(if issuer.is_empty() { present() } else { suffix(&issuer) }, exact(&subject))
        });
        return whole.into_iter().chain(split).collect();
    }
    if let Some(head) = value.strip_suffix('*') {
        // `ISSUER/*` is the form everybody writes.
        if let Some(issuer) = head.strip_suffix('/') {
            return vec![both(exact(issuer), present())];
        }
        let whole = std::iter::once(both(prefix(head), present()));
        let split = splits(head).into_iter().map(|(issuer, subject)| both(exact(&issuer), prefix(&subject)));
        return whole.chain(split).collect();
    }
    // A subject is rarely a path, an issuer usually is.
    match value.rsplit_once('/') {
        Some((issuer, subject)) => vec![both(exact(issuer), exact(subject))],
        None => vec![rbac::Principal::not(rbac::Principal::all())],
    }
}

fn range(value: &str) -> Result<core::CidrRange, String> {
    let net = block(value)?;
    Ok(core::CidrRange { address_prefix: net.addr().to_string(), prefix_len: u32v(u32::from(net.prefix_len())) })
}

fn port(value: &str) -> Result<rbac::Permission, String> {
    match value.parse::<u16>() {
        Ok(port) if port > 0 => Ok(P::DestinationPort(u32::from(port)).wrap()),
        _ => Err(format!("{value:?} is no port number")),
    }
}

fn header(name: &str, matched: matcher::StringMatcher) -> route::HeaderMatcher {
    route::HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::StringMatch(matched)),
        ..Default::default()
    }
}

fn header_or_present(name: &str, value: &str) -> route::HeaderMatcher {
    if value == "*" {
        return route::HeaderMatcher {
            name: name.to_owned(),
            header_match_specifier: Some(route::header_matcher::HeaderMatchSpecifier::PresentMatch(true)),
            ..Default::default()
        };
    }
    header(name, wildcard(value, ""))
}

fn path(value: &str) -> Result<P, String> {
    if value.contains('{') || value.contains('}') {
        let template = value.replace("{**}", "**").replace("{*}", "*");
        if template.contains('{') || template.contains('}') {
            return Err(format!("{value:?}: only {{*}} and {{**}} are templates"));
        }
        let config = ext::path::r#match::uri_template::v3::UriTemplateMatchConfig { path_template: template };
        return Ok(P::UriTemplate(typed("uri-template", any(&config))));
    }
    let matched = matcher::PathMatcher { rule: Some(matcher::path_matcher::Rule::Path(wildcard(value, ""))) };
    Ok(P::UrlPath(matched))
}
