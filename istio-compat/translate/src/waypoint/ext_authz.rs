//! CUSTOM AuthorizationPolicies -> an RBAC filter that only notes which policy asks, and an `ext_authz` filter that
//! asks the provider where one did, as istiod does it. Where the provider cannot be asked, what the policy asks about
//! is denied: letting requests through unasked is not an option.
use std::collections::BTreeMap;

use compat_objects::istio::{Action, AuthorizationPolicy};
use compat_objects::{HasMeta, Kind, ObjectKey};

use super::Builder;
use super::access::conditions::{self, Layer};
use super::access::{Target, deny_all, message};
use crate::mesh::providers::{Authorizer, Body, Grpc, Http};
use crate::pb::{self, any, core, exact, ext, http_filter, listener, matcher, network_filter, prefix, rbac, suffix};
use ext::filters::http::ext_authz::v3 as ext_authz;
use ext::filters::network::http_connection_manager::v3 as hcm;

/// Beginning of the metadata keys the noting filter writes.
const SHADOW_PREFIX: &str = "istio_ext_authz_";
/// Beginning of the names of policies it looks for.
const POLICY_PREFIX: &str = "istio-ext-authz";

type Policies<'p> = Vec<(ObjectKey, &'p AuthorizationPolicy)>;
type Refused = (String, String);

impl Builder<'_, '_> {
    /// Filters that come before everything else.
    pub(crate) fn custom_http_access(&self, target: &Target<'_>) -> Vec<hcm::HttpFilter> {
        if let Some(closed) = self.closed_by_extension(target) {
            return vec![rbac_filter(Some(closed), None)];
        }
        let by_provider = self.custom_policies(target);
        let only = by_provider.len() == 1;
        by_provider.into_iter().flat_map(|(name, policies)| self.ask(&name, only, policies)).collect()
    }

    /// Connections are not asked about: what is attached to a CUSTOM policy takes none.
    pub(crate) fn custom_network_access(&self, target: &Target<'_>) -> Option<listener::Filter> {
        let rules = self.closed_by_extension(target).or_else(|| {
            let policies = self.custom_policies(target);
            let (key, _) = policies.values().flatten().next()?;
            let reason = "external authorization of TCP connections is not supported; TCP ports that this policy is \
                          attached to are closed";
            self.error(key, "spec.action", reason);
            Some(deny_all(&format!("ns[{}]-policy[{}]-rule[custom]", key.namespace, key.name)))
        })?;
        let config = ext::filters::network::rbac::v3::Rbac {
            rules: Some(rules),
            stat_prefix: "tcp.".into(),
            ..Default::default()
        };
        Some(network_filter("envoy.filters.network.rbac", any(&config)))
    }

    /// The CUSTOM policies of a target, by the provider they name.
    fn custom_policies(&self, target: &Target<'_>) -> BTreeMap<String, Policies<'_>> {
        let mut out: BTreeMap<String, Policies<'_>> = BTreeMap::new();
        for (key, policy) in self.policies(target).into_iter().filter(|(_, p)| p.spec.action == Action::Custom) {
            let provider = policy.spec.provider.as_ref().map(|provider| provider.name.clone()).unwrap_or_default();
            out.entry(provider).or_default().push((key, policy));
        }
        out
    }

    fn ask(&self, name: &str, only: bool, policies: Policies<'_>) -> Vec<hcm::HttpFilter> {
        let provider = self.mesh.providers.authorizer(name).and_then(|provider| self.config(provider));
        let (suffix, config) = match provider {
            Ok(config) => ("", Some(config)),
            Err(reason) => {
                for (key, _) in &policies {
                    let reason = format!("{reason}; what this policy asks about is denied");
                    self.error(key, "spec.provider.name", reason);
                }
                ("-deny-due-to-bad-CUSTOM-action", None)
            }
        };
        let mut rules = BTreeMap::new();
        for (key, policy) in &policies {
            let named = |rule: &str| {
                format!("{POLICY_PREFIX}-{name}-ns[{}]-policy[{}]-rule[{rule}]{suffix}", key.namespace, key.name)
            };
            match custom_rules(policy, &named) {
                Ok(converted) => rules.extend(converted),
                Err((field, reason)) => {
                    // Asked about everything: the provider may know better, nobody else can say more.
                    let reason = format!("{reason}; the provider is asked about every request until it is corrected");
                    self.error(key, &field, reason);
                    rules.insert(named("invalid"), conditions::always());
                }
            }
        }
        let rules = message(rbac::rbac::Action::Deny, rules);
        let Some(mut config) = config else { return vec![rbac_filter(Some(rules), None)] };
        config.filter_enabled_metadata = Some(asked_for(name, only));
        vec![rbac_filter(None, Some(rules)), http_filter("envoy.filters.http.ext_authz", any(&config))]
    }

    fn config(&self, provider: &Authorizer) -> Result<ext_authz::ExtAuthz, String> {
        match provider {
            Authorizer::Http(provider) => {
                let (host, cluster) = self.provider_cluster(&provider.service, provider.port)?;
                Ok(http(provider, &host, cluster))
            }
            Authorizer::Grpc(provider) => {
                let (host, cluster) = self.provider_cluster(&provider.service, provider.port)?;
                Ok(grpc(provider, host, cluster))
            }
        }
    }

    /// Host and cluster of a provider; `service` is a host or `namespace/host`.
    pub(super) fn provider_cluster(&self, service: &str, port: u16) -> Result<(String, String), String> {
        let root = self.mesh.options.root_namespace.as_str();
        let (namespace, host) = service.split_once('/').unwrap_or((root, service));
        let found = self.mesh.service_by_hostname(host, namespace);
        let found = found.ok_or_else(|| format!("no Service or ServiceEntry has the provider's host {host}"))?;
        if found.port(port).is_none() {
            return Err(format!("the provider's service {host} has no port {port}"));
        }
        Ok((host.to_owned(), self.outbound_cluster(found, port, "")))
    }

    fn closed_by_extension(&self, target: &Target<'_>) -> Option<rbac::Rbac> {
        let key = self.security_extension(target)?;
        let reason = "WebAssembly cannot be run here; everything this plugin protects is denied \
                      (failStrategy: FAIL_OPEN would let it through)";
        self.error(&key, "spec.phase", reason);
        Some(deny_all(&format!("ns[{}]-wasm[{}]", key.namespace, key.name)))
    }

    /// A WasmPlugin of the authentication or authorization phase that is not allowed to fail open. Others are
    /// named and left out.
    fn security_extension(&self, target: &Target<'_>) -> Option<ObjectKey> {
        let mut closing = None;
        for plugin in self.mesh.objects.wasm_plugins() {
            let spec = &plugin.spec;
            if !self.attached(plugin.namespace(), spec.target_ref.as_ref(), &spec.target_refs, target) {
                continue;
            }
            let key = ObjectKey::new(Kind::WasmPlugin, plugin.namespace(), plugin.name());
            if matches!(spec.phase.as_str(), "AUTHN" | "AUTHZ") && spec.fail_strategy != "FAIL_OPEN" {
                closing = Some(key);
            } else {
                self.warning(&key, "", "WebAssembly cannot be run here: the plugin is left out");
            }
        }
        closing
    }
}

fn custom_rules(
    found: &AuthorizationPolicy,
    named: &dyn Fn(&str) -> String,
) -> Result<BTreeMap<String, rbac::Policy>, Refused> {
    let mut rules = BTreeMap::new();
    for (index, rule) in found.spec.rules.iter().enumerate() {
        let at = |(field, reason): Refused| (format!("spec.rules[{index}]{field}"), reason);
        if let Some(found) = conditions::policy(rule, Action::Deny, Layer::Http, found.namespace()).map_err(at)? {
            rules.insert(named(&index.to_string()), found);
        }
    }
    Ok(rules)
}

fn rbac_filter(rules: Option<rbac::Rbac>, shadow: Option<rbac::Rbac>) -> hcm::HttpFilter {
    let prefix = if shadow.is_some() { SHADOW_PREFIX } else { "" };
    let config = ext::filters::http::rbac::v3::Rbac {
        rules,
        shadow_rules: shadow,
        shadow_rules_stat_prefix: prefix.into(),
        ..Default::default()
    };
    http_filter("envoy.filters.http.rbac", any(&config))
}

/// True where a policy of this provider asked. Names of providers may begin alike; alone, a provider gets istiod's
/// own matcher.
fn asked_for(provider: &str, only: bool) -> matcher::MetadataMatcher {
    use matcher::metadata_matcher::{PathSegment, path_segment::Segment};
    let end = if only { "" } else { "-ns[" };
    let value = matcher::value_matcher::MatchPattern::StringMatch(prefix(&format!("{POLICY_PREFIX}-{provider}{end}")));
    matcher::MetadataMatcher {
        filter: "envoy.filters.http.rbac".into(),
        path: vec![PathSegment { segment: Some(Segment::Key(format!("{SHADOW_PREFIX}shadow_effective_policy_id"))) }],
        value: Some(matcher::ValueMatcher { match_pattern: Some(value) }),
        ..Default::default()
    }
}

fn common(body: Option<Body>, status_on_error: Option<u16>) -> ext_authz::ExtAuthz {
    ext_authz::ExtAuthz {
        transport_api_version: core::ApiVersion::V3 as i32,
        with_request_body: body.map(|body| ext_authz::BufferSettings {
            max_request_bytes: body.max_request_bytes,
            allow_partial_message: body.allow_partial_message,
            pack_as_bytes: body.pack_as_bytes,
        }),
        status_on_error: status_on_error.map(|code| pb::types::v3::HttpStatus { code: code.into() }),
        ..Default::default()
    }
}

fn grpc(provider: &Grpc, authority: String, cluster_name: String) -> ext_authz::ExtAuthz {
    use core::grpc_service::{EnvoyGrpc, TargetSpecifier};
    let envoy = EnvoyGrpc { cluster_name, authority, ..Default::default() };
    let service = core::GrpcService {
        target_specifier: Some(TargetSpecifier::EnvoyGrpc(envoy)),
        timeout: pb::duration(provider.timeout()),
        ..Default::default()
    };
    ext_authz::ExtAuthz {
        services: Some(ext_authz::ext_authz::Services::GrpcService(service)),
        failure_mode_allow: provider.fail_open,
        clear_route_cache: provider.clear_route_cache,
        ..common(provider.include_request_body_in_check, provider.status_on_error)
    }
}

fn http(provider: &Http, host: &str, cluster: String) -> ext_authz::ExtAuthz {
    let add = provider.include_additional_headers_in_check.iter().map(|(key, value)| core::HeaderValue {
        key: key.clone(),
        value: value.clone(),
        ..Default::default()
    });
    let add: Vec<_> = add.collect();
    let request =
        (!add.is_empty()).then(|| ext_authz::AuthorizationRequest { headers_to_add: add, ..Default::default() });
    let (upstream, deny) = (&provider.headers_to_upstream_on_allow, &provider.headers_to_downstream_on_deny);
    let allow = &provider.headers_to_downstream_on_allow;
    let any_response = [upstream, deny, allow].iter().any(|list| !list.is_empty());
    let response = any_response.then(|| ext_authz::AuthorizationResponse {
        allowed_upstream_headers: headers(upstream),
        allowed_client_headers: headers(deny),
        allowed_client_headers_on_success: headers(allow),
        ..Default::default()
    });
    let service = ext_authz::HttpService {
        server_uri: Some(core::HttpUri {
            uri: format!("http://{host}"),
            timeout: pb::duration(provider.timeout()),
            http_upstream_type: Some(core::http_uri::HttpUpstreamType::Cluster(cluster)),
        }),
        path_prefix: provider.path_prefix.clone(),
        authorization_request: request,
        authorization_response: response,
        ..Default::default()
    };
    ext_authz::ExtAuthz {
        services: Some(ext_authz::ext_authz::Services::HttpService(service)),
        allowed_headers: headers(provider.request_headers()),
        failure_mode_allow: provider.fail_open,
        clear_route_cache: provider.clear_route_cache,
        ..common(provider.include_request_body_in_check, provider.status_on_error)
    }
}

/// Names, `beginning*` or `*end`, whatever their case.
fn headers(names: &[String]) -> Option<matcher::ListStringMatcher> {
    let one = |name: &String| {
        let found = match (name.strip_prefix('*'), name.strip_suffix('*')) {
            (Some(end), _) => suffix(end),
            (None, Some(beginning)) => prefix(beginning),
            (None, None) => exact(name),
        };
        matcher::StringMatcher { ignore_case: true, ..found }
    };
    (!names.is_empty()).then(|| matcher::ListStringMatcher { patterns: names.iter().map(one).collect() })
}
