//! A client's stream of aggregated discovery.
use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};
use xds_proto::envoy::envoy::config::core::v3::Node;
use xds_proto::envoy::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use xds_proto::envoy::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use xds_proto::envoy::google::protobuf::{Struct, Value, value::Kind};

/// Longer than anything here takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(30);

fn metadata(entries: &[(&str, &str)]) -> Option<Struct> {
    let text = |value: &str| Value { kind: Some(Kind::StringValue(value.to_owned())) };
    Some(Struct { fields: entries.iter().map(|(key, value)| ((*key).to_owned(), text(value))).collect() })
}

pub(crate) fn ztunnel(node: &str) -> Node {
    Node {
        id: "ztunnel~10.9.0.1~ztunnel-a.istio-system~istio-system.svc.cluster.local".into(),
        metadata: metadata(&[("NODE_NAME", node), ("NAMESPACE", "istio-system")]),
        ..Node::default()
    }
}

pub(crate) fn waypoint(namespace: &str, account: &str) -> Node {
    let mut node = Node {
        id: format!("waypoint~10.8.1.60~waypoint-1.{namespace}~{namespace}.svc.cluster.local"),
        metadata: metadata(&[("NAMESPACE", namespace), ("SERVICE_ACCOUNT", account)]),
        ..Node::default()
    };
    let labels = metadata(&[("gateway.networking.k8s.io/gateway-name", "waypoint")]).unwrap();
    let labels = Value { kind: Some(Kind::StructValue(labels)) };
    node.metadata.as_mut().unwrap().fields.insert("LABELS".into(), labels);
    node
}

/// A stream that subscribes to everything of one type, acknowledges, and remembers what it holds.
pub(crate) struct Stream {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    pub(crate) held: BTreeMap<String, Vec<u8>>,
}

impl Stream {
    pub(crate) async fn open(
        channel: Channel,
        token: Option<&str>,
        node: Node,
        type_url: &str,
    ) -> Result<Self, Status> {
        let (requests, outgoing) = mpsc::channel(8);
        let first = DeltaDiscoveryRequest { node: Some(node), type_url: type_url.into(), ..Default::default() };
        requests.send(first).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(outgoing));
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = client.delta_aggregated_resources(request).await?.into_inner();
        let mut stream = Self { requests, responses, held: BTreeMap::new() };
        stream.next().await?;
        Ok(stream)
    }

    /// The names that came or went.
    pub(crate) async fn next(&mut self) -> Result<Vec<String>, Status> {
        let message = tokio::time::timeout(PATIENCE, self.responses.message()).await.expect("an answer")?;
        let response = message.ok_or_else(|| Status::unavailable("stream ended"))?;
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce,
            ..Default::default()
        };
        self.requests.send(ack).await.unwrap();
        let mut changed = response.removed_resources.clone();
        for name in response.removed_resources {
            self.held.remove(&name);
        }
        for resource in response.resources {
            changed.push(resource.name.clone());
            self.held.insert(resource.name, resource.resource.unwrap().value);
        }
        Ok(changed)
    }
}
