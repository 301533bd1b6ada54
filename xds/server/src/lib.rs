//! Delta ADS server over named resource sets: each stream gets what changed since what it holds, nothing
//! else. Where the resources come from, and who may see them, is the [`Source`]'s business.

mod clients;
mod resources;
mod session;

use std::pin::Pin;
use std::sync::Arc;

pub use clients::{ClientStatus, Clients, TypeStatus};
pub use resources::{Resource, Resources};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};
pub use xds_proto::envoy::envoy::config::core::v3::Node;
use xds_proto::envoy::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use xds_proto::envoy::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};

/// What is served, and to whom.
pub trait Source: Send + Sync + 'static {
    /// Who a client has shown to be.
    type Caller: Send + Sync + 'static;

    /// Changes whenever any resource may have changed.
    fn generation(&self) -> watch::Receiver<u64>;

    /// Who the caller is, if it may open a stream as this node.
    ///
    /// # Errors
    /// Sent to the client as they are: `Unauthenticated` or `PermissionDenied`, `Unavailable` if nobody knows now.
    fn authenticate(
        &self,
        metadata: &MetadataMap,
        node: &Node,
    ) -> impl Future<Output = Result<Self::Caller, Status>> + Send;

    /// What a caller sees of a type as this node; `None` if it is not served to it.
    fn resources(&self, caller: &Self::Caller, node: &Node, type_url: &str) -> Option<Resources>;
}

/// The service to add to a tonic server, and the view of its clients for status pages.
pub fn service<S: Source>(source: Arc<S>) -> (AggregatedDiscoveryServiceServer<Ads<S>>, Clients) {
    let clients = Clients::default();
    let server = AggregatedDiscoveryServiceServer::new(Ads { source, clients: clients.clone() });
    (server.max_decoding_message_size(64 * 1024 * 1024), clients)
}

/// The aggregated discovery service; delta only, as istiod's clients of this project use.
pub struct Ads<S> {
    source: Arc<S>,
    clients: Clients,
}

type ResponseStream<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl<S: Source> AggregatedDiscoveryService for Ads<S> {
    type StreamAggregatedResourcesStream = ResponseStream<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = ResponseStream<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("state-of-the-world xDS is not served, use DeltaAggregatedResources"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let peer = request.remote_addr().map_or_else(|| "unknown".to_owned(), |addr| addr.to_string());
        let metadata = request.metadata().clone();
        let (responses, outgoing) = mpsc::channel(16);
        let session = session::Session::new(self.source.clone(), self.clients.clone(), metadata, peer);
        tokio::spawn(session.run(request.into_inner(), responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

#[cfg(test)]
mod tests;
