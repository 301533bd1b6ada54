//! One stream, from connect to its end.
use std::fmt;
use std::pin::pin;

use prost::Message;
use strata_runtime::{ReadyGuard, file};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use xds_proto::envoy::envoy::config::core::v3::Node;
use xds_proto::envoy::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use xds_proto::envoy::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use xds_proto::envoy::google::protobuf::{Struct, Value, value};
use xds_proto::envoy::google::rpc::Status as RpcStatus;

use crate::connect::{ConnectError, Connected, Endpoint};
use crate::state::State;
use crate::{Config, Handler, Metrics, Rejected, Resource, Update};

/// istiod's answers can be large; ztunnel accepts as much.
const MAX_MESSAGE: usize = 200 * 1024 * 1024;
/// gRPC INVALID_ARGUMENT, the code of a NACK.
const INVALID_ARGUMENT: i32 = 3;

/// Why a stream ended.
#[derive(Debug)]
pub(crate) enum Ended {
    Connect(ConnectError),
    Status(tonic::Status),
    /// Who we are was not accepted: what was shown, and the server's answer.
    Refused {
        shown: String,
        status: tonic::Status,
    },
    /// The server closed it in good order (its maximum age, a shutdown).
    Closed,
    /// The root certificates were replaced: the server has to prove itself by the new ones.
    Roots,
}

impl Ended {
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Ended::Connect(_) => "connection_error",
            Ended::Status(_) if self.is_graceful() => "reconnect",
            Ended::Status(_) | Ended::Refused { .. } => "error",
            Ended::Closed => "complete",
            Ended::Roots => "reconnect",
        }
    }

    /// Ends that say nothing about the server's health: no penalty.
    pub(crate) fn is_graceful(&self) -> bool {
        match self {
            Ended::Closed | Ended::Roots => true,
            Ended::Connect(_) | Ended::Refused { .. } => false,
            Ended::Status(status) => {
                use tonic::Code::{Cancelled, DeadlineExceeded, Unavailable, Unknown};
                matches!(status.code(), Unknown | Cancelled | DeadlineExceeded)
                    || (status.code() == Unavailable && status.message().contains("closing"))
            }
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ended::Connect(error) => error.fmt(f),
            Ended::Status(_) if self.is_graceful() => f.write_str("closed by the server"),
            Ended::Status(status) => write!(f, "{:?}: {}", status.code(), status.message()),
            Ended::Refused { shown, status } => {
                write!(f, "{shown} was refused: {:?}: {}", status.code(), status.message())
            }
            Ended::Closed => f.write_str("closed by the server"),
            Ended::Roots => f.write_str("the root certificates were replaced"),
        }
    }
}

pub(crate) async fn run(
    config: &Config,
    handler: &mut impl Handler,
    state: &mut State,
    metrics: &Metrics,
    ready: &mut Option<ReadyGuard>,
) -> Ended {
    let Open { requests, mut responses, roots } = match open(config, handler, state).await {
        Ok(open) => open,
        Err(ended) => return ended,
    };
    let mut replaced = pin!(replaced(&config.endpoint, roots));
    loop {
        let response = tokio::select! {
            response = responses.message() => response,
            () = &mut replaced => return Ended::Roots,
        };
        let response = match response {
            Ok(Some(response)) => response,
            Ok(None) => return Ended::Closed,
            Err(status) => return ended(&config.endpoint, status),
        };
        for request in answer(config, handler, state, metrics, response) {
            if requests.send(request).await.is_err() {
                return Ended::Closed;
            }
        }
        if state.all_answered() {
            ready.take();
        }
    }
}

/// Resolves when the file of root certificates holds others than `roots`; never for plaintext.
async fn replaced(endpoint: &Endpoint, roots: Option<String>) {
    match (&endpoint.root_ca, roots) {
        (Some(path), Some(roots)) => drop(file::changed(path, roots.as_bytes()).await),
        _ => std::future::pending().await,
    }
}

fn ended(endpoint: &Endpoint, status: tonic::Status) -> Ended {
    match status.code() {
        tonic::Code::Unauthenticated | tonic::Code::PermissionDenied => {
            Ended::Refused { shown: endpoint.shown(), status }
        }
        _ => {
            tracing::debug!(code = ?status.code(), message = status.message(), "xDS stream ended");
            Ended::Status(status)
        }
    }
}

type Requests = mpsc::Sender<DeltaDiscoveryRequest>;

struct Open {
    requests: Requests,
    responses: tonic::Streaming<DeltaDiscoveryResponse>,
    roots: Option<String>,
}

async fn open(config: &Config, handler: &impl Handler, state: &mut State) -> Result<Open, Ended> {
    let Connected { channel, roots } = config.endpoint.connect().await.map_err(Ended::Connect)?;
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    state.reset_stream();
    let first: Vec<_> = config.types.iter().filter_map(|url| subscription(config, handler, state, url)).collect();
    // Never blocks the stream: at most one answer and one subscription a type are under way.
    let (requests, outgoing) = mpsc::channel(first.len() + 4 * config.types.len() + 1);
    for request in first {
        if requests.send(request).await.is_err() {
            return Err(Ended::Closed);
        }
    }
    let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
    config.endpoint.authorize(&mut request).await.map_err(Ended::Connect)?;
    let responses = client.delta_aggregated_resources(request).await;
    let responses = responses.map_err(|status| ended(&config.endpoint, status))?.into_inner();
    tracing::info!(address = %config.endpoint.address, node = %config.node_id, "xDS stream open");
    Ok(Open { requests, responses, roots })
}

/// The request that brings a type's subscription up to date, if one is needed.
fn subscription(
    config: &Config,
    handler: &impl Handler,
    state: &mut State,
    type_url: &str,
) -> Option<DeltaDiscoveryRequest> {
    let of_type = state.get_mut(type_url)?;
    let first = !of_type.asked;
    let change = of_type.subscribe(handler.wanted(type_url))?;
    let initial_resource_versions = if first { of_type.held.clone().into_iter().collect() } else { Default::default() };
    Some(DeltaDiscoveryRequest {
        node: first.then(|| node(config)),
        type_url: type_url.to_owned(),
        resource_names_subscribe: change.subscribe,
        resource_names_unsubscribe: change.unsubscribe,
        initial_resource_versions,
        ..Default::default()
    })
}

/// Applies a response; returns its ACK or NACK, followed by the subscriptions it caused.
fn answer(
    config: &Config,
    handler: &mut impl Handler,
    state: &mut State,
    metrics: &Metrics,
    response: DeltaDiscoveryResponse,
) -> Vec<DeltaDiscoveryRequest> {
    let DeltaDiscoveryResponse { type_url, nonce, resources, removed_resources, .. } = response;
    let Some(of_type) = state.get_mut(&type_url) else {
        tracing::warn!(type_url, "response of a type that was not asked for");
        return Vec::new();
    };
    let bytes = resources.iter().map(Message::encoded_len).sum();
    let resources: Vec<Resource> = resources
        .into_iter()
        .map(|resource| {
            let any = resource.resource.unwrap_or_default();
            Resource { name: resource.name, version: resource.version, type_url: any.type_url, body: any.value.into() }
        })
        .collect();
    let versions: Vec<_> = resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect();
    for name in &removed_resources {
        of_type.held.remove(name);
    }
    let (changed, removed) = (resources.len(), removed_resources.len());
    let rejected = handler.apply(Update { type_url: type_url.clone(), resources, removed: removed_resources });
    for (name, version) in versions {
        if !rejected.iter().any(|r| r.name == name) {
            of_type.held.insert(name, version);
        }
    }
    of_type.answered = true;
    metrics.received(&type_url, bytes, rejected.len());
    tracing::debug!(type_url, changed, removed, rejected = rejected.len(), "xDS update");
    let mut requests = vec![acknowledgement(type_url, nonce, &rejected)];
    requests.extend(config.types.iter().filter_map(|url| subscription(config, handler, state, url)));
    requests
}

fn acknowledgement(type_url: String, nonce: String, rejected: &[Rejected]) -> DeltaDiscoveryRequest {
    let error_detail = (!rejected.is_empty()).then(|| {
        let message = rejected.iter().map(|r| format!("{}: {}", r.name, r.reason)).collect::<Vec<_>>().join("; ");
        tracing::warn!(type_url, message, "refused resources, the last good ones stay");
        RpcStatus { code: INVALID_ARGUMENT, message, details: Vec::new() }
    });
    DeltaDiscoveryRequest { type_url, response_nonce: nonce, error_detail, ..Default::default() }
}

fn node(config: &Config) -> Node {
    let metadata = match to_value(&config.metadata).kind {
        Some(value::Kind::StructValue(fields)) => Some(fields),
        _ => None,
    };
    Node { id: config.node_id.clone(), metadata, ..Default::default() }
}

fn to_value(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match json {
        Json::Null => value::Kind::NullValue(0),
        Json::Bool(bool) => value::Kind::BoolValue(*bool),
        Json::Number(number) => value::Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Json::String(text) => value::Kind::StringValue(text.clone()),
        Json::Array(items) => value::Kind::ListValue(xds_proto::envoy::google::protobuf::ListValue {
            values: items.iter().map(to_value).collect(),
        }),
        Json::Object(fields) => value::Kind::StructValue(Struct {
            fields: fields.iter().map(|(key, field)| (key.clone(), to_value(field))).collect(),
        }),
    };
    Value { kind: Some(kind) }
}
