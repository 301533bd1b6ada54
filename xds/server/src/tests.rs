use parking_lot::Mutex;
use tokio::net::TcpListener;
use xds_proto::envoy::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use xds_proto::envoy::google::protobuf::Any;

use super::*;

/// A set of resources that a test edits.
struct Editable {
    resources: Mutex<Resources>,
    generation: watch::Sender<u64>,
}

impl Editable {
    fn new(names: &[(&str, &str)]) -> Arc<Self> {
        let source = Arc::new(Self { resources: Mutex::default(), generation: watch::channel(0).0 });
        source.set(names);
        source
    }

    fn set(&self, names: &[(&str, &str)]) {
        let any = |text: &str| Any { type_url: "t".into(), value: text.as_bytes().to_vec() };
        let mut resources = self.resources.lock();
        *resources = resources.next(names.iter().map(|(name, text)| ((*name).to_owned(), any(text))));
        drop(resources);
        self.generation.send_modify(|generation| *generation += 1);
    }
}

impl Source for Editable {
    type Caller = ();

    fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    async fn authenticate(&self, metadata: &MetadataMap, _node: &Node) -> Result<(), Status> {
        match metadata.get("authorization") {
            Some(token) if token == "Bearer right" => Ok(()),
            _ => Err(Status::unauthenticated("token is not known")),
        }
    }

    fn resources(&self, _caller: &(), _node: &Node, type_url: &str) -> Option<Resources> {
        (type_url == "t").then(|| self.resources.lock().clone())
    }
}

struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Client {
    async fn open(source: Arc<Editable>, token: &str, first: DeltaDiscoveryRequest) -> (Self, Clients) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (service, clients) = service(source);
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        let mut client = AggregatedDiscoveryServiceClient::connect(format!("http://{address}")).await.unwrap();
        let (requests, outgoing) = mpsc::channel(8);
        requests.send(first).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(outgoing));
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let responses = client.delta_aggregated_resources(request).await.unwrap().into_inner();
        (Self { requests, responses }, clients)
    }

    async fn next(&mut self) -> (Vec<String>, Vec<String>, String) {
        let response = self.responses.message().await.unwrap().unwrap();
        let names = response.resources.into_iter().map(|resource| resource.name).collect();
        (names, response.removed_resources, response.nonce)
    }
}

fn first(names: &[&str], held: &[(&str, &str)]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        node: Some(Node { id: "ztunnel~10.0.0.1~a.b~c".into(), ..Default::default() }),
        type_url: "t".into(),
        resource_names_subscribe: names.iter().map(|&name| name.to_owned()).collect(),
        initial_resource_versions: held.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
        ..Default::default()
    }
}

#[tokio::test]
async fn sends_only_what_changed() {
    let source = Editable::new(&[("a", "1"), ("b", "1")]);
    let (mut client, _) = Client::open(source.clone(), "right", first(&[], &[])).await;
    assert_eq!(client.next().await.0, ["a", "b"]);
    source.set(&[("a", "1"), ("b", "2"), ("c", "1")]);
    assert_eq!(client.next().await.0, ["b", "c"]);
    source.set(&[("a", "1"), ("c", "1")]);
    let (changed, removed, _) = client.next().await;
    assert_eq!((changed.len(), removed), (0, vec!["b".to_owned()]));
}

#[tokio::test]
async fn a_reconnect_with_held_versions_gets_the_difference() {
    let source = Editable::new(&[("a", "1"), ("b", "2")]);
    let version = source.resources.lock().get("a").unwrap().version.clone();
    let held = [("a", version.as_str()), ("gone", "x")];
    let (mut client, _) = Client::open(source, "right", first(&[], &held)).await;
    let (changed, removed, _) = client.next().await;
    assert_eq!((changed, removed), (vec!["b".to_owned()], vec!["gone".to_owned()]));
}

#[tokio::test]
async fn names_subscribed_later_are_sent_and_others_are_not() {
    let source = Editable::new(&[("a", "1"), ("b", "1"), ("c", "1")]);
    let (mut client, _) = Client::open(source.clone(), "right", first(&["a"], &[])).await;
    assert_eq!(client.next().await.0, ["a"]);
    client.requests.send(DeltaDiscoveryRequest { node: None, ..first(&["b"], &[]) }).await.unwrap();
    assert_eq!(client.next().await.0, ["b"]);
    source.set(&[("a", "1"), ("b", "2"), ("c", "2")]);
    assert_eq!(client.next().await.0, ["b"]);
}

#[tokio::test]
async fn a_nack_is_visible_and_does_not_cause_a_resend() {
    let source = Editable::new(&[("a", "1")]);
    let (mut client, clients) = Client::open(source.clone(), "right", first(&[], &[])).await;
    let (_, _, nonce) = client.next().await;
    let detail = xds_proto::envoy::google::rpc::Status { code: 3, message: "a: no".into(), details: vec![] };
    let nack = DeltaDiscoveryRequest {
        type_url: "t".into(),
        response_nonce: nonce,
        error_detail: Some(detail),
        ..Default::default()
    };
    client.requests.send(nack).await.unwrap();
    source.set(&[("a", "1"), ("b", "1")]);
    assert_eq!(client.next().await.0, ["b"], "the refused version is not sent again");
    let status = &clients.snapshot()[0].types["t"];
    assert_eq!((status.nacked, status.error.as_deref()), (1, Some("a: no")));
}

#[tokio::test]
async fn a_wrong_token_is_refused() {
    let source = Editable::new(&[("a", "1")]);
    let (mut client, _) = Client::open(source, "wrong", first(&[], &[])).await;
    assert_eq!(client.responses.message().await.unwrap_err().code(), tonic::Code::Unauthenticated);
}
