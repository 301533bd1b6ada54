//! PeerAuthentication -> denials of callers without an identity (xds-contract 2.3).
//!
//! Node proxies know no mTLS mode: STRICT is a policy that denies whoever has no principal, named on every workload
//! it holds for. PERMISSIVE and DISABLE are the absence of one.
use std::collections::BTreeMap;

use compat_objects::HasMeta;
use compat_objects::istio::{MutualTlsMode, PeerAuthentication};
use xds_proto::istio::security as sec;
use xds_proto::type_url;

use super::authorization::no_identity;
use crate::mesh::{Mesh, Workload};
use crate::{MeshOutput, wire};

const STATIC_STRICT: &str = "istio_converted_static_strict";

/// Which of the converted policies holds for each workload, by uid.
pub(super) struct Strict(BTreeMap<String, String>);

impl Strict {
    pub(super) fn names_for(&self, workload: &Workload) -> Option<String> {
        self.0.get(&workload.uid).cloned()
    }
}

/// What a workload's policies come to.
enum Effective {
    Open,
    Strict,
    /// By a policy of its own: some ports differ from the rest.
    ByPort(sec::Authorization),
}

/// Fills in the converted policies that are in use.
pub(super) fn build(mesh: &Mesh<'_>, output: &mut MeshOutput) -> Strict {
    let mut names = BTreeMap::new();
    for workload in mesh.workloads.values() {
        let (name, message) = match effective(mesh, workload) {
            Effective::Open => continue,
            Effective::Strict => {
                let clause = sec::Clause { matches: vec![no_identity()] };
                (STATIC_STRICT, denial(&mesh.options.root_namespace, STATIC_STRICT, vec![clause]))
            }
            Effective::ByPort(message) => ("", message),
        };
        let name = if name.is_empty() { message.name.clone() } else { name.to_owned() };
        let name = format!("{}/{name}", message.namespace);
        output.authorizations.entry(name.clone()).or_insert_with(|| wire::pack(type_url::AUTHORIZATION, &message));
        names.insert(workload.uid.clone(), name);
    }
    Strict(names)
}

fn denial(namespace: &str, name: &str, clauses: Vec<sec::Clause>) -> sec::Authorization {
    sec::Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: sec::Scope::WorkloadSelector as i32,
        action: sec::Action::Deny as i32,
        rules: vec![sec::Rule { clauses }],
        ..sec::Authorization::default()
    }
}

/// Mesh, namespace, workload: the narrower replaces the wider unless it says nothing; of equals the oldest counts.
fn effective(mesh: &Mesh<'_>, workload: &Workload) -> Effective {
    let root = &mesh.options.root_namespace;
    let mut strict = false;
    for namespace in [root.as_str(), workload.namespace.as_str()] {
        match oldest(mesh, namespace, |policy| labels(policy).is_empty()).map(mode) {
            None | Some(MutualTlsMode::Unset) => {}
            Some(mode) => strict = mode == MutualTlsMode::Strict,
        }
    }
    let own = oldest(mesh, &workload.namespace, |policy| {
        !labels(policy).is_empty() && crate::mesh::selects(&labels(policy), &workload.labels)
    });
    let Some(own) = own else { return if strict { Effective::Strict } else { Effective::Open } };
    match mode(own) {
        MutualTlsMode::Unset => {}
        mode => strict = mode == MutualTlsMode::Strict,
    }
    by_port(own, strict)
}

fn by_port(policy: &PeerAuthentication, strict: bool) -> Effective {
    let ports = |wanted: fn(MutualTlsMode) -> bool| {
        let fitting = policy.spec.port_level_mtls.iter().filter(move |(_, tls)| wanted(tls.mode));
        fitting.map(|(port, _)| u32::from(*port)).collect::<Vec<u32>>()
    };
    let open = ports(|mode| matches!(mode, MutualTlsMode::Permissive | MutualTlsMode::Disable));
    let closed = ports(|mode| mode == MutualTlsMode::Strict);
    let clauses = match (strict, open.is_empty(), closed.is_empty()) {
        (true, true, _) => return Effective::Strict,
        (false, _, true) => return Effective::Open,
        (true, false, _) => {
            let exempt =
                open.into_iter().map(|port| sec::Match { not_destination_ports: vec![port], ..Default::default() });
            let mut clauses = vec![sec::Clause { matches: vec![no_identity()] }];
            for exemption in exempt {
                clauses.push(sec::Clause { matches: vec![exemption] });
            }
            clauses.push(sec::Clause { matches: vec![no_identity()] });
            clauses
        }
        (false, _, false) => {
            vec![sec::Clause { matches: vec![sec::Match { destination_ports: closed, ..no_identity() }] }]
        }
    };
    let name = format!("converted_peer_authentication_{}", policy.name());
    Effective::ByPort(denial(policy.namespace(), &name, clauses))
}

fn mode(policy: &PeerAuthentication) -> MutualTlsMode {
    policy.spec.mtls.map(|tls| tls.mode).unwrap_or_default()
}

fn labels(policy: &PeerAuthentication) -> BTreeMap<String, String> {
    policy.spec.selector.as_ref().map(|selector| selector.match_labels.clone()).unwrap_or_default()
}

fn oldest<'m>(
    mesh: &'m Mesh<'_>,
    namespace: &'m str,
    fits: impl Fn(&PeerAuthentication) -> bool,
) -> Option<&'m PeerAuthentication> {
    let fitting = mesh.objects.peer_authentications_in(namespace).filter(|policy| fits(policy));
    fitting.map(|policy| &**policy).min_by_key(|policy| (policy.created(), policy.name()))
}
