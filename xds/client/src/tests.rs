use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use strata_runtime::Readiness;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tonic::metadata::MetadataMap;
use xds_proto::envoy::google::protobuf::Any;
use xds_server::{Node, Resources, Source};

use super::*;

const WILD: &str = "type.googleapis.com/wild";
const NAMED: &str = "type.googleapis.com/named";

struct Store {
    types: Mutex<BTreeMap<&'static str, Resources>>,
    generation: watch::Sender<u64>,
}

impl Store {
    fn new() -> Arc<Self> {
        Arc::new(Self { types: Mutex::default(), generation: watch::channel(0).0 })
    }

    fn set(&self, type_url: &'static str, entries: &[(&str, &str)]) {
        let any = |text: &str| Any { type_url: type_url.into(), value: text.as_bytes().to_vec() };
        let entries = entries.iter().map(|(name, text)| ((*name).to_owned(), any(text)));
        let mut types = self.types.lock().unwrap();
        let resources = types.entry(type_url).or_default();
        *resources = resources.next(entries);
        drop(types);
        self.generation.send_modify(|generation| *generation += 1);
    }

    async fn serve(self: &Arc<Self>, listener: TcpListener) -> tokio::task::JoinHandle<()> {
        let (service, _) = xds_server::service(self.clone());
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(async move {
            tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        })
    }
}

impl Source for Store {
    type Caller = ();

    fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    async fn authenticate(&self, metadata: &MetadataMap, node: &Node) -> Result<(), tonic::Status> {
        assert_eq!(metadata.get("clusterid").unwrap(), "Kubernetes");
        assert_eq!(node.id, "ztunnel~10.0.0.1~a.b~c");
        Ok(())
    }

    fn resources(&self, _caller: &(), _node: &Node, type_url: &str) -> Option<Resources> {
        self.types.lock().unwrap().get(type_url).cloned()
    }
}

/// Reports what it is told; refuses bodies that say "bad"; wants of NAMED what WILD names.
struct Recorder {
    updates: mpsc::UnboundedSender<Update>,
    wanted: BTreeSet<String>,
}

impl Handler for Recorder {
    fn apply(&mut self, update: Update) -> Vec<Rejected> {
        let bad = |r: &&Resource| r.body.as_ref() == b"bad";
        let rejected = update.resources.iter().filter(bad);
        let rejected =
            rejected.map(|r| Rejected { name: r.name.clone(), reason: "body is bad".into() }).collect::<Vec<_>>();
        if update.type_url == WILD {
            self.wanted.extend(update.resources.iter().map(|r| r.name.clone()));
            self.wanted.retain(|name| !update.removed.contains(name));
        }
        self.updates.send(update).unwrap();
        rejected
    }

    fn wanted(&self, type_url: &str) -> Option<BTreeSet<String>> {
        (type_url == NAMED).then(|| self.wanted.clone())
    }
}

struct Running {
    updates: mpsc::UnboundedReceiver<Update>,
    readiness: Readiness,
    _trigger: drain::Trigger,
}

fn start(address: std::net::SocketAddr) -> Running {
    let endpoint = Endpoint {
        address: format!("http://{address}"),
        root_ca: None,
        server_name: None,
        token: Token::None,
        cluster_id: "Kubernetes".into(),
    };
    let metadata = serde_json::json!({"NAMESPACE": "b"});
    let config = Config::new(endpoint, "ztunnel~10.0.0.1~a.b~c", metadata, &[WILD, NAMED]);
    let (updates_tx, updates) = mpsc::unbounded_channel();
    let readiness = Readiness::new();
    let (trigger, watch) = drain::channel();
    let handler = Recorder { updates: updates_tx, wanted: BTreeSet::new() };
    tokio::spawn(run(config, handler, Metrics::default(), readiness.task("xds"), watch));
    Running { updates, readiness, _trigger: trigger }
}

async fn names(running: &mut Running) -> (String, Vec<String>, Vec<String>) {
    let update = running.updates.recv().await.unwrap();
    (update.type_url, update.resources.into_iter().map(|r| r.name).collect(), update.removed)
}

#[tokio::test]
async fn wildcard_then_by_name_then_ready() {
    let store = Store::new();
    store.set(WILD, &[("a", "1"), ("b", "1")]);
    store.set(NAMED, &[("a", "x"), ("b", "y"), ("other", "z")]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut running = start(listener.local_addr().unwrap());
    assert_eq!(running.readiness.pending(), ["xds"]);
    store.serve(listener).await;
    assert_eq!(names(&mut running).await.1, ["a", "b"]);
    let (url, named, _) = names(&mut running).await;
    assert_eq!((url.as_str(), named), (NAMED, vec!["a".to_owned(), "b".to_owned()]));
    while !running.readiness.pending().is_empty() {
        tokio::task::yield_now().await;
    }
    store.set(WILD, &[("a", "1"), ("b", "1"), ("other", "1")]);
    assert_eq!(names(&mut running).await.1, ["other"]);
    assert_eq!(names(&mut running).await.1, ["other"], "the new name is subscribed to");
}

#[tokio::test]
async fn a_reconnect_gets_what_changed_and_what_was_refused() {
    let store = Store::new();
    store.set(WILD, &[("good", "1"), ("refused", "bad"), ("gone", "1")]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = store.serve(listener).await;
    let mut running = start(address);
    assert_eq!(names(&mut running).await.1, ["gone", "good", "refused"]);
    server.abort();
    assert!(server.await.is_err());
    store.set(WILD, &[("good", "1"), ("refused", "bad"), ("new", "1")]);
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    store.serve(listener).await;
    loop {
        // The aborted server's connection task may still answer once more.
        let (url, changed, removed) = names(&mut running).await;
        if url == WILD && !changed.is_empty() {
            if changed == ["new", "refused"] {
                assert_eq!(removed, ["gone"]);
                return;
            }
            assert_eq!(changed, ["new"], "from the old stream");
            return;
        }
    }
}
