//! CUSTOM AuthorizationPolicies. The outside authorizers they name are not called here yet, so their targets are
//! closed: letting requests through unasked is not an option.
use compat_objects::istio::Action;
use compat_objects::{HasMeta, Kind, ObjectKey};

use super::Builder;
use super::access::{Target, deny_all};
use crate::pb::{any, ext, http_filter, listener, network_filter, rbac};
use ext::filters::network::http_connection_manager::v3 as hcm;

impl Builder<'_, '_> {
    pub(crate) fn custom_http_access(&self, target: &Target<'_>) -> Vec<hcm::HttpFilter> {
        let Some(rules) = self.custom(target) else { return Vec::new() };
        let config = ext::filters::http::rbac::v3::Rbac { rules: Some(rules), ..Default::default() };
        vec![http_filter("envoy.filters.http.rbac", any(&config))]
    }

    pub(crate) fn custom_network_access(&self, target: &Target<'_>) -> Option<listener::Filter> {
        let config = ext::filters::network::rbac::v3::Rbac {
            rules: Some(self.custom(target)?),
            stat_prefix: "tcp.".into(),
            ..Default::default()
        };
        Some(network_filter("envoy.filters.network.rbac", any(&config)))
    }

    fn custom(&self, target: &Target<'_>) -> Option<rbac::Rbac> {
        if let Some(key) = self.security_extension(target) {
            let reason = "WebAssembly cannot be run here; everything this plugin protects is denied \
                          (failStrategy: FAIL_OPEN would let it through)";
            self.error(&key, "spec.phase", reason);
            return Some(deny_all(&format!("ns[{}]-wasm[{}]", key.namespace, key.name)));
        }
        let policies = self.policies(target);
        let (key, _) = policies.iter().find(|(_, policy)| policy.spec.action == Action::Custom)?;
        let reason = "external authorization is not supported yet; everything this policy is attached to is denied";
        self.error(key, "spec.action", reason);
        Some(deny_all(&format!("ns[{}]-policy[{}]-rule[custom]", key.namespace, key.name)))
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
