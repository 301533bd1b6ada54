//! AuthorizationPolicy, RequestAuthentication, PeerAuthentication, after Istio's admission.
use super::Check;
use crate::istio::{
    Action, AuthorizationPolicySpec, Condition, JwtRule, Operation, PeerAuthenticationSpec, PolicyTargetReference,
    RequestAuthenticationSpec, Source,
};
use crate::path::FieldPath;

/// Attributes `when` may ask for; those that end in `[` take a name in brackets.
const KEYS: [&str; 15] = [
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "destination.ip",
    "destination.port",
    "connection.sni",
    "request.headers[",
    "request.auth.claims[",
    "experimental.envoy.filters.",
    "source.trustDomain",
];

/// How a policy chooses what it is for.
pub(super) fn attachment(
    c: &mut Check,
    selects: bool,
    one: Option<&PolicyTargetReference>,
    many: &[PolicyTargetReference],
) {
    let path = FieldPath::spec();
    c.at_most_one(&path, &[("selector", selects), ("targetRef", one.is_some()), ("targetRefs", !many.is_empty())]);
    let many = many.iter().enumerate().map(|(i, target)| (path.to("targetRefs").to(i), target));
    for (path, target) in one.map(|target| (path.to("targetRef"), target)).into_iter().chain(many) {
        c.require(&path.to("kind"), &target.kind);
        c.require(&path.to("name"), &target.name);
        if !target.namespace.is_empty() {
            c.error(&path.to("namespace"), "a policy is for objects of its own namespace: leave this out");
        }
        let known = matches!(
            (target.group.as_str(), target.kind.as_str()),
            ("" | "core", "Service")
                | ("gateway.networking.k8s.io", "Gateway" | "GatewayClass" | "ListenerSet" | "XListenerSet")
                | ("networking.istio.io", "ServiceEntry")
        );
        if !known && !target.kind.is_empty() {
            let reason = format!("{:?} of group {:?} is nothing a policy can be for", target.kind, target.group);
            c.error(&path.to("kind"), reason);
        }
    }
}

pub(super) fn authorization_policy(c: &mut Check, spec: &AuthorizationPolicySpec) {
    let path = FieldPath::spec();
    attachment(c, spec.selector.is_some(), spec.target_ref.as_ref(), &spec.target_refs);
    match (spec.action, &spec.provider) {
        (Action::Custom, None) => c.error(&path.to("provider"), "missing: action CUSTOM asks somebody"),
        (Action::Custom, Some(provider)) => c.require(&path.to("provider").to("name"), &provider.name),
        (_, Some(_)) => c.error(&path.to("provider"), "only action CUSTOM asks somebody"),
        (_, None) => {}
    }
    if spec.rules.is_empty() && spec.action == Action::Custom {
        c.error(&path.to("rules"), "missing: action CUSTOM without a rule never asks");
    }
    if spec.rules.is_empty() && spec.action == Action::Deny {
        c.warn(&path.to("rules"), "missing: action DENY without a rule denies nothing (write rules: [{}] to deny all)");
    }
    for (i, rule) in spec.rules.iter().enumerate() {
        let path = path.to("rules").to(i);
        for (j, from) in rule.from.iter().enumerate() {
            let path = path.to("from").to(j).to("source");
            match &from.source {
                Some(wanted) => source(c, &path, wanted),
                None => c.error(&path, "missing: a source is needed"),
            }
        }
        for (j, to) in rule.to.iter().enumerate() {
            let path = path.to("to").to(j).to("operation");
            match &to.operation {
                Some(wanted) => operation(c, &path, wanted),
                None => c.error(&path, "missing: an operation is needed"),
            }
        }
        rule.when.iter().enumerate().for_each(|(j, wanted)| condition(c, &path.to("when").to(j), wanted));
    }
}

impl Check {
    /// Lists of which at least one must have entries, all of them non-empty.
    fn lists(&mut self, path: &FieldPath, lists: &[(&str, &Vec<String>)]) {
        if lists.iter().all(|(_, values)| values.is_empty()) {
            self.error(path, "says nothing: at least one field is needed");
        }
        for (name, values) in lists {
            for (i, _) in values.iter().enumerate().filter(|(_, value)| value.is_empty()) {
                self.error(&path.to(*name).to(i), "is empty, which matches nothing");
            }
        }
    }
}

fn source(c: &mut Check, path: &FieldPath, source: &Source) {
    let lists = [
        ("principals", &source.principals),
        ("notPrincipals", &source.not_principals),
        ("requestPrincipals", &source.request_principals),
        ("notRequestPrincipals", &source.not_request_principals),
        ("namespaces", &source.namespaces),
        ("notNamespaces", &source.not_namespaces),
        ("serviceAccounts", &source.service_accounts),
        ("notServiceAccounts", &source.not_service_accounts),
        ("ipBlocks", &source.ip_blocks),
        ("notIpBlocks", &source.not_ip_blocks),
        ("remoteIpBlocks", &source.remote_ip_blocks),
        ("notRemoteIpBlocks", &source.not_remote_ip_blocks),
        ("trustDomains", &source.trust_domains),
        ("notTrustDomains", &source.not_trust_domains),
    ];
    c.lists(path, &lists);
    for (name, blocks) in lists.iter().filter(|(name, _)| name.to_lowercase().ends_with("ipblocks")) {
        blocks.iter().enumerate().for_each(|(i, block)| c.block(&path.to(*name).to(i), block));
    }
    let accounts = !source.service_accounts.is_empty() || !source.not_service_accounts.is_empty();
    let others = [&source.principals, &source.not_principals, &source.namespaces, &source.not_namespaces];
    if accounts && others.iter().any(|list| !list.is_empty()) {
        c.error(path, "serviceAccounts cannot stand beside principals or namespaces");
    }
    for (name, list) in
        [("serviceAccounts", &source.service_accounts), ("notServiceAccounts", &source.not_service_accounts)]
    {
        for (i, account) in list.iter().enumerate() {
            if account.contains('*') || account.matches('/').count() > 1 {
                c.error(
                    &path.to(name).to(i),
                    format!("{account:?} is neither ACCOUNT nor NAMESPACE/ACCOUNT (no wildcards)"),
                );
            }
        }
    }
}

fn operation(c: &mut Check, path: &FieldPath, operation: &Operation) {
    let lists = [
        ("hosts", &operation.hosts),
        ("notHosts", &operation.not_hosts),
        ("ports", &operation.ports),
        ("notPorts", &operation.not_ports),
        ("methods", &operation.methods),
        ("notMethods", &operation.not_methods),
        ("paths", &operation.paths),
        ("notPaths", &operation.not_paths),
    ];
    c.lists(path, &lists);
    for (name, ports) in [("ports", &operation.ports), ("notPorts", &operation.not_ports)] {
        ports.iter().enumerate().for_each(|(i, port)| port_text(c, &path.to(name).to(i), port));
    }
    for (name, paths) in [("paths", &operation.paths), ("notPaths", &operation.not_paths)] {
        paths.iter().enumerate().for_each(|(i, text)| path_template(c, &path.to(name).to(i), text));
    }
}

fn port_text(c: &mut Check, path: &FieldPath, port: &str) {
    if !port.parse::<u16>().is_ok_and(|port| port > 0) {
        c.error(path, format!("{port:?} is no port"));
    }
}

/// Templates: `{*}` is one path element, `{**}` any number, which nothing with an asterisk may follow.
fn path_template(c: &mut Check, path: &FieldPath, text: &str) {
    if !text.contains("{*}") && !text.contains("{**}") {
        return;
    }
    let mut elements = text.split('/').peekable();
    while let Some(element) = elements.next() {
        let braces = element.contains(['{', '}']);
        if braces && element != "{*}" && element != "{**}" {
            c.error(path, format!("{text:?}: {{*}} and {{**}} stand for whole path elements"));
        }
        if element == "{**}" && elements.clone().any(|after| after == "{*}" || after == "{**}") {
            c.error(path, format!("{text:?}: no further {{*}} or {{**}} may follow {{**}}"));
        }
        if !braces && element.contains('*') {
            c.error(path, format!("{text:?}: templates and * do not mix"));
        }
    }
}

fn condition(c: &mut Check, path: &FieldPath, condition: &Condition) {
    c.require(&path.to("key"), &condition.key);
    let key = condition.key.as_str();
    let known = KEYS.iter().any(|known| match known.ends_with(['[', '.']) {
        true => key.starts_with(known) && (!known.ends_with('[') || key.ends_with(']')),
        false => key == *known,
    });
    if !known && !key.is_empty() {
        c.error(&path.to("key"), format!("{key:?} is no attribute Istio knows"));
    }
    c.lists(path, &[("values", &condition.values), ("notValues", &condition.not_values)]);
    for (name, values) in [("values", &condition.values), ("notValues", &condition.not_values)] {
        for (i, value) in values.iter().enumerate().filter(|(_, value)| !value.is_empty()) {
            match key {
                "source.ip" | "remote.ip" | "destination.ip" => c.block(&path.to(name).to(i), value),
                "destination.port" => port_text(c, &path.to(name).to(i), value),
                _ => {}
            }
        }
    }
}

pub(super) fn request_authentication(c: &mut Check, spec: &RequestAuthenticationSpec) {
    attachment(c, spec.selector.is_some(), spec.target_ref.as_ref(), &spec.target_refs);
    for (i, rule) in spec.jwt_rules.iter().enumerate() {
        jwt_rule(c, &FieldPath::spec().to("jwtRules").to(i), rule);
    }
}

fn jwt_rule(c: &mut Check, path: &FieldPath, rule: &JwtRule) {
    c.require(&path.to("issuer"), &rule.issuer);
    c.at_most_one(path, &[("jwks", !rule.jwks.is_empty()), ("jwksUri", !rule.jwks_uri.is_empty())]);
    if !rule.jwks.is_empty() {
        let keys = serde_json::from_str::<serde_json::Value>(&rule.jwks);
        if !keys.is_ok_and(|keys| keys.get("keys").is_some_and(serde_json::Value::is_array)) {
            c.error(&path.to("jwks"), "is no JSON Web Key Set (RFC 7517: {\"keys\": [...]})");
        }
    }
    let uri = rule.jwks_uri.as_str();
    if !uri.is_empty() && !uri.starts_with("https://") && !uri.starts_with("http://") {
        c.error(&path.to("jwksUri"), format!("{uri:?} is no http or https URL"));
    }
    for (i, header) in rule.from_headers.iter().enumerate() {
        c.require(&path.to("fromHeaders").to(i).to("name"), &header.name);
    }
    for (name, list) in
        [("fromParams", &rule.from_params), ("fromCookies", &rule.from_cookies), ("audiences", &rule.audiences)]
    {
        list.iter().enumerate().for_each(|(i, value)| c.require(&path.to(name).to(i), value));
    }
    for (i, output) in rule.output_claim_to_headers.iter().enumerate() {
        let path = path.to("outputClaimToHeaders").to(i);
        c.require(&path.to("header"), &output.header);
        c.require(&path.to("claim"), &output.claim);
    }
}

pub(super) fn peer_authentication(c: &mut Check, spec: &PeerAuthenticationSpec) {
    let path = FieldPath::spec().to("portLevelMtls");
    let selects = spec.selector.as_ref().is_some_and(|selector| !selector.match_labels.is_empty());
    if !spec.port_level_mtls.is_empty() && !selects {
        c.error(&path, "needs a selector: ports are those of chosen workloads");
    }
    if spec.port_level_mtls.contains_key(&0) {
        c.error(&path.to("0"), "0 is no port");
    }
}
