//! What is served right now, and who may see it.
use std::collections::BTreeMap;
use std::mem::take;
use std::sync::Arc;

use arc_swap::ArcSwap;
use compat_objects::core::Pod;
use compat_objects::{HasMeta, ObjectSet};
use compat_translate::{MeshOutput, WaypointOutput};
use tokio::sync::watch;
use tonic::Status;
use tonic::metadata::MetadataMap;
use xds_proto::envoy::google::protobuf::value::Kind;
use xds_proto::type_url;
use xds_server::{Node, Resource, Resources, Source};

use crate::accounts::Accounts;
use crate::cluster::waypoint::{self, GATEWAY_NAME};
use crate::grants::{Account, Grant, Grants};
use crate::tokens::Holder;

/// One translation, ready to be served.
#[derive(Default)]
pub(crate) struct View {
    pub(crate) objects: ObjectSet,
    pub(crate) faults: Vec<String>,
    addresses: Resources,
    authorizations: Resources,
    workloads: Resources,
    waypoints: BTreeMap<String, WaypointView>,
}

#[derive(Default)]
struct WaypointView {
    listeners: Resources,
    clusters: Resources,
    endpoints: Resources,
    extensions: Resources,
    /// Of `secrets` what everybody may see.
    roots: Resources,
    /// Roots and, if there are any, certificates with their keys.
    secrets: Resources,
    has_keys: bool,
}

impl View {
    /// What is served after this one; takes the resources from the output.
    pub(crate) fn next(&self, objects: ObjectSet, output: &mut MeshOutput, faults: Vec<String>) -> Self {
        let (none, waypoints) = (WaypointView::default(), take(&mut output.waypoints).into_iter());
        let next = |(key, waypoint)| {
            let next = self.waypoints.get(&key).unwrap_or(&none).next(waypoint);
            (key, next)
        };
        Self {
            objects,
            faults,
            addresses: self.addresses.next(take(&mut output.addresses)),
            authorizations: self.authorizations.next(take(&mut output.authorizations)),
            workloads: self.workloads.next(take(&mut output.workloads)),
            waypoints: waypoints.map(next).collect(),
        }
    }

    /// Names and versions of everything, by set and type.
    pub(crate) fn dump(&self) -> serde_json::Value {
        let set = |resources: &Resources| -> serde_json::Value {
            let version = |(name, resource): (&String, &Resource)| (name.clone(), resource.version.clone().into());
            serde_json::Value::Object(resources.iter().map(version).collect())
        };
        let waypoint = |waypoint: &WaypointView| {
            serde_json::json!({
                "listeners": set(&waypoint.listeners), "clusters": set(&waypoint.clusters),
                "endpoints": set(&waypoint.endpoints), "extensions": set(&waypoint.extensions),
                "secrets": set(&waypoint.secrets),
            })
        };
        let waypoints: serde_json::Map<String, serde_json::Value> =
            self.waypoints.iter().map(|(key, view)| (key.clone(), waypoint(view))).collect();
        serde_json::json!({
            "addresses": set(&self.addresses), "authorizations": set(&self.authorizations), "waypoints": waypoints,
        })
    }
}

impl WaypointView {
    fn next(&self, output: WaypointOutput) -> Self {
        Self {
            has_keys: !output.certificates.is_empty(),
            roots: self.roots.next(output.roots.clone()),
            secrets: self.secrets.next(output.roots.into_iter().chain(output.certificates)),
            listeners: self.listeners.next(output.listeners),
            clusters: self.clusters.next(output.clusters),
            endpoints: self.endpoints.next(output.endpoints),
            extensions: self.extensions.next(output.extensions),
        }
    }
}

/// Shared by the xDS server, the certificate service and the admin pages.
pub(crate) struct State {
    view: ArcSwap<View>,
    generation: watch::Sender<u64>,
    accounts: Accounts,
    grants: Grants,
    trust_domain: String,
}

impl State {
    pub(crate) fn new(accounts: Accounts, trust_domain: String) -> Self {
        let (view, generation, grants) = (ArcSwap::default(), watch::Sender::new(0), Grants::default());
        Self { view, generation, accounts, grants, trust_domain }
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    pub(crate) fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    pub(crate) fn grants(&self) -> &Grants {
        &self.grants
    }

    pub(crate) fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// Serves another view from now on.
    pub(crate) fn publish(&self, view: View) {
        self.view.store(Arc::new(view));
        self.serve_anew();
    }

    /// Makes every stream look at what it is to be sent.
    pub(crate) fn serve_anew(&self) {
        self.generation.send_modify(|generation| *generation += 1);
    }

    /// Who a request comes from.
    ///
    /// # Errors
    /// `Unauthenticated` without a token in force, `Unavailable` if that cannot be found out now.
    pub(crate) async fn holder(&self, metadata: &MetadataMap) -> Result<Holder, Status> {
        let header = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let token = header.and_then(|value| value.strip_prefix("Bearer "));
        let token = token.ok_or_else(|| Status::unauthenticated("no bearer token"))?;
        self.accounts.holder(token.trim(), &self.view().objects).await
    }

    /// Whether a node's proxy may act for a service account: one of its pods runs there, or the account is that of
    /// a waypoint whose Gateway asks to be placed in the nodes' proxies.
    pub(crate) fn runs_on(&self, node: &str, namespace: &str, account: &str) -> bool {
        let objects = &self.view.load().objects;
        let pod = objects.pods_in(namespace).any(|pod| {
            let here = pod.spec.as_ref().is_some_and(|spec| spec.node_name.as_deref() == Some(node));
            here && runs_as(pod, account) && !compat_objects::has_ended(pod)
        });
        pod || (placed_on_nodes(objects, namespace, account) && !has_pods(objects, namespace, account))
    }
}

/// Whether a waypoint is annotated to live inside the node proxies.
fn placed_on_nodes(objects: &ObjectSet, namespace: &str, name: &str) -> bool {
    objects.gateway(namespace, name).is_some_and(|gateway| waypoint::is_placed_on_nodes(gateway))
}

/// Whether pods have this account: then a Gateway of the same name does not open it to every node.
fn has_pods(objects: &ObjectSet, namespace: &str, account: &str) -> bool {
    objects.pods_in(namespace).any(|pod| runs_as(pod, account))
}

fn runs_as(pod: &Pod, account: &str) -> bool {
    pod.spec.as_ref().is_some_and(|spec| spec.service_account_name.as_deref().unwrap_or("default") == account)
}

/// A text of the node's metadata.
fn text<'n>(node: &'n Node, key: &str) -> Option<&'n str> {
    match node.metadata.as_ref()?.fields.get(key)?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text),
        _ => None,
    }
}

/// `TYPE~IP~NAME.NAMESPACE~DOMAIN`.
struct NodeId<'n> {
    kind: &'n str,
    name: &'n str,
    namespace: &'n str,
}

impl<'n> NodeId<'n> {
    fn parse(id: &'n str) -> Option<Self> {
        let mut parts = id.split('~');
        let (kind, _ip, name) = (parts.next()?, parts.next()?, parts.next()?);
        parts.next()?;
        let (name, namespace) = name.rsplit_once('.')?;
        parts.next().is_none().then_some(Self { kind, name, namespace })
    }
}

impl State {
    /// The Gateway a waypoint works for, as `namespace/name`.
    fn gateway(&self, node: &Node, id: &NodeId<'_>) -> Option<String> {
        let namespace = text(node, "NAMESPACE").unwrap_or(id.namespace);
        let labels = match node.metadata.as_ref()?.fields.get("LABELS").and_then(|value| value.kind.as_ref()) {
            Some(Kind::StructValue(labels)) => labels.fields.get(GATEWAY_NAME).and_then(|value| value.kind.as_ref()),
            _ => None,
        };
        let name = match labels {
            Some(Kind::StringValue(name)) => name.clone(),
            _ => self.view.load().objects.pod(id.namespace, id.name)?.label(GATEWAY_NAME)?.to_owned(),
        };
        Some(format!("{namespace}/{name}"))
    }

    fn may_be(&self, holder: &Holder, node: &Node) -> Result<(), Status> {
        let id = NodeId::parse(&node.id)
            .ok_or_else(|| Status::invalid_argument(format!("node id {:?} is not TYPE~IP~NAME.NS~DOMAIN", node.id)))?;
        match (id.kind, holder) {
            ("ztunnel", Holder::Node(own)) => match text(node, "NODE_NAME") {
                Some(name) if name == own => Ok(()),
                name => Err(Status::permission_denied(format!(
                    "the token is node {own}'s, metadata NODE_NAME is {}",
                    name.unwrap_or("missing")
                ))),
            },
            ("waypoint", Holder::ServiceAccount { namespace, name }) => {
                let claimed = text(node, "NAMESPACE").unwrap_or(id.namespace);
                if claimed != namespace {
                    let reason = format!("the token is of namespace {namespace}, the node says {claimed}");
                    return Err(Status::permission_denied(reason));
                }
                match text(node, "SERVICE_ACCOUNT") {
                    Some(account) if account != name => {
                        let reason = format!("the token is service account {name}'s, the node says {account}");
                        Err(Status::permission_denied(reason))
                    }
                    _ => Ok(()),
                }
            }
            ("waypoint", Holder::Node(own)) => {
                let gateway = self.gateway(node, &id).unwrap_or_default();
                let (namespace, name) = gateway.split_once('/').unwrap_or_default();
                if placed_on_nodes(&self.view.load().objects, namespace, name) {
                    return Ok(());
                }
                let reason = format!("node {own} may only be a waypoint whose Gateway has strata.io/placement: node");
                Err(Status::permission_denied(reason))
            }
            (kind, _) => Err(Status::permission_denied(format!("this token is not for node type {kind}"))),
        }
    }

    /// What a waypoint's account may have. Without a cluster nobody says which accounts may read Secrets: there it is the
    /// one that has the name of its Gateway.
    async fn grant(&self, holder: Holder, node: &Node) -> Result<Option<Arc<Grant>>, Status> {
        let Some(id) = NodeId::parse(&node.id).filter(|id| id.kind == "waypoint") else { return Ok(None) };
        let gateway = || {
            let gateway = self.gateway(node, &id)?;
            let (namespace, name) = gateway.split_once('/')?;
            Some(Account { namespace: namespace.to_owned(), name: name.to_owned() })
        };
        let account = match holder {
            Holder::ServiceAccount { namespace, name } => Some(Account { namespace, name }),
            Holder::Node(_) => gateway(),
        };
        let Some(account) = account else { return Ok(None) };
        match &self.accounts {
            Accounts::Files(_) => {
                let allowed = gateway().as_ref() == Some(&account);
                Ok(Some(Grant::new(account, allowed)))
            }
            Accounts::Cluster(accounts) => {
                let asked = self.grants.asked(account, &accounts.access).await;
                asked.map(Some).map_err(|reason| Status::unavailable(format!("access to Secrets: {reason}")))
            }
        }
    }
}

/// Who a client has shown to be.
pub(crate) struct Caller {
    /// None: no private keys are for it.
    grant: Option<Arc<Grant>>,
}

impl Source for State {
    type Caller = Caller;

    fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    async fn authenticate(&self, metadata: &MetadataMap, node: &Node) -> Result<Caller, Status> {
        let holder = self.holder(metadata).await?;
        self.may_be(&holder, node)?;
        Ok(Caller { grant: self.grant(holder, node).await? })
    }

    fn resources(&self, caller: &Caller, node: &Node, type_url: &str) -> Option<Resources> {
        let id = NodeId::parse(&node.id)?;
        let view = self.view.load();
        match (id.kind, type_url) {
            ("ztunnel", type_url::ADDRESS) => Some(view.addresses.clone()),
            ("ztunnel", type_url::AUTHORIZATION) => Some(view.authorizations.clone()),
            ("waypoint", type_url::WORKLOAD) => Some(view.workloads.clone()),
            // The engine's own L4 view, which istiod would give to anyone who asks.
            ("waypoint", type_url::ADDRESS) => Some(view.addresses.clone()),
            ("waypoint", _) => {
                let waypoint = view.waypoints.get(&self.gateway(node, &id)?)?;
                match type_url {
                    type_url::LISTENER => Some(waypoint.listeners.clone()),
                    type_url::CLUSTER => Some(waypoint.clusters.clone()),
                    type_url::ENDPOINT => Some(waypoint.endpoints.clone()),
                    type_url::EXTENSION => Some(waypoint.extensions.clone()),
                    type_url::SECRET => {
                        let grant = caller.grant.as_ref().filter(|_| waypoint.has_keys);
                        Some(if grant.is_some_and(|grant| grant.allows()) {
                            waypoint.secrets.clone()
                        } else {
                            waypoint.roots.clone()
                        })
                    }
                    _ => None,
                }
            }
            _ => None,
        }
    }
}
