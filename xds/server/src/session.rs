//! One client's stream: what it asked for, what it was sent, what it must be sent now.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::sync::mpsc;
use tonic::metadata::MetadataMap;
use tonic::{Status, Streaming};
use xds_proto::envoy::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource,
};

use crate::clients::ClientHandle;
use crate::resources::{News, SetId};
use crate::{Clients, Node, Resource, Resources, Source};

/// What the client asked for of a type.
#[derive(Debug, Default)]
struct Subscription {
    wildcard: bool,
    names: BTreeSet<String>,
    /// name -> version the client holds, as far as we know.
    sent: BTreeMap<String, String>,
    /// The set `sent` is up to date with.
    held: SetId,
    /// Nothing has been sent yet: the first answer goes out even if empty, since readiness waits for it.
    answered: bool,
}

impl Subscription {
    /// What the client must be sent to hold these, and what it must forget.
    fn difference(&self, resources: &Resources) -> (Vec<WireResource>, Vec<String>) {
        let sent = |(name, resource): (&String, &Resource)| {
            let is_seen = self.wildcard || self.names.contains(name);
            let is_new = is_seen && self.sent.get(name) != Some(&resource.version);
            is_new.then(|| WireResource {
                name: name.clone(),
                version: resource.version.clone(),
                resource: Some(resource.body.clone()),
                ..Default::default()
            })
        };
        match resources.since(&self.held) {
            News::Nothing => (Vec::new(), Vec::new()),
            News::Since(changes) => {
                let changed = changes.changed.iter().filter_map(|name| Some((name, resources.get(name)?)));
                let removed = changes.removed.iter().filter(|name| self.sent.contains_key(*name));
                (changed.filter_map(sent).collect(), removed.cloned().collect())
            }
            News::Unknown => {
                let removed = self.sent.keys().filter(|name| resources.get(name).is_none());
                (resources.iter().filter_map(sent).collect(), removed.cloned().collect())
            }
        }
    }
}

pub(crate) struct Session<S: Source> {
    source: Arc<S>,
    clients: Clients,
    metadata: MetadataMap,
    peer: String,
    client: Option<Client<S::Caller>>,
    /// In the order the client asked, which is the order pushes go out.
    subscriptions: Vec<(String, Subscription)>,
    nonce: u64,
}

/// Who is at the other end, known from its first request on.
struct Client<C> {
    caller: C,
    node: Node,
    handle: ClientHandle,
}

type Responses = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

impl<S: Source> Session<S> {
    pub(crate) fn new(source: Arc<S>, clients: Clients, metadata: MetadataMap, peer: String) -> Self {
        Self { source, clients, metadata, peer, client: None, subscriptions: Vec::new(), nonce: 0 }
    }

    pub(crate) async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>, responses: Responses) {
        let mut generation = self.source.generation();
        loop {
            let outcome = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.on_request(request).await,
                    Ok(None) => return,
                    Err(status) => {
                        tracing::debug!(peer = self.peer, %status, "xDS client gone");
                        return;
                    }
                },
                changed = generation.changed() => match changed {
                    Ok(()) => {
                        generation.mark_unchanged();
                        Ok(self.push_all())
                    }
                    Err(_) => return,
                },
            };
            match outcome {
                Ok(pushes) => {
                    for push in pushes {
                        if responses.send(Ok(push)).await.is_err() {
                            return;
                        }
                    }
                }
                Err(status) => {
                    tracing::warn!(peer = self.peer, %status, "xDS client refused");
                    // The client may be gone already: then there is nobody to tell.
                    let _gone = responses.send(Err(status)).await;
                    return;
                }
            }
        }
    }

    async fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Result<Vec<DeltaDiscoveryResponse>, Status> {
        if self.client.is_none() {
            let node = request.node.clone().ok_or_else(|| Status::invalid_argument("the first request has no node"))?;
            let caller = self.source.authenticate(&self.metadata, &node).await?;
            tracing::info!(node = node.id, peer = self.peer, "xDS client connected");
            let handle = self.clients.add(node.id.clone(), self.peer.clone());
            self.client = Some(Client { caller, node, handle });
        }
        if !request.response_nonce.is_empty() {
            self.on_answer(&request);
        }
        let type_url = request.type_url.clone();
        let changed = self.subscribe(request);
        Ok(if changed { self.push(&type_url).into_iter().collect() } else { Vec::new() })
    }

    fn on_answer(&self, request: &DeltaDiscoveryRequest) {
        let Some(Client { node, handle, .. }) = &self.client else { return };
        match &request.error_detail {
            Some(detail) => {
                tracing::warn!(node = node.id, type_url = request.type_url, error = detail.message, "NACK");
                handle.update(&request.type_url, |status| {
                    status.nacked += 1;
                    status.error = Some(detail.message.clone());
                });
            }
            None => handle.update(&request.type_url, |status| {
                status.acked += 1;
                status.error = None;
            }),
        }
    }

    /// Takes over the request's names; true if something may have to be sent.
    fn subscribe(&mut self, request: DeltaDiscoveryRequest) -> bool {
        let first = !self.subscriptions.iter().any(|(url, _)| *url == request.type_url);
        if first {
            self.subscriptions.push((request.type_url.clone(), Subscription::default()));
        }
        let Some((_, subscription)) = self.subscriptions.iter_mut().find(|(url, _)| *url == request.type_url) else {
            return false;
        };
        if first {
            // An empty first subscription is the wildcard (xDS protocol, "legacy wildcard").
            subscription.wildcard = request.resource_names_subscribe.is_empty();
            subscription.sent = request.initial_resource_versions.into_iter().collect();
        }
        let changed = first || !request.resource_names_subscribe.is_empty();
        if changed {
            subscription.held = SetId::default();
        }
        for name in request.resource_names_subscribe {
            if name == "*" {
                subscription.wildcard = true;
            } else {
                subscription.names.insert(name);
            }
        }
        for name in request.resource_names_unsubscribe {
            if name == "*" {
                subscription.wildcard = false;
            } else {
                subscription.names.remove(&name);
                subscription.sent.remove(&name);
            }
        }
        changed
    }

    fn push_all(&mut self) -> Vec<DeltaDiscoveryResponse> {
        let urls: Vec<String> = self.subscriptions.iter().map(|(url, _)| url.clone()).collect();
        urls.iter().filter_map(|url| self.push(url)).collect()
    }

    /// The difference between what the client holds and what it should see.
    fn push(&mut self, type_url: &str) -> Option<DeltaDiscoveryResponse> {
        let Client { caller, node, handle } = self.client.as_ref()?;
        let (_, subscription) = self.subscriptions.iter_mut().find(|(url, _)| url == type_url)?;
        let resources = self.source.resources(caller, node, type_url).unwrap_or_default();
        let (changed, removed) = subscription.difference(&resources);
        subscription.held = resources.id();
        if changed.is_empty() && removed.is_empty() && subscription.answered {
            return None;
        }
        subscription.answered = true;
        for resource in &changed {
            subscription.sent.insert(resource.name.clone(), resource.version.clone());
        }
        for name in &removed {
            subscription.sent.remove(name);
        }
        self.nonce += 1;
        handle.update(type_url, |status| status.sent += 1);
        Some(DeltaDiscoveryResponse {
            type_url: type_url.to_owned(),
            nonce: self.nonce.to_string(),
            resources: changed,
            removed_resources: removed,
            ..Default::default()
        })
    }
}
