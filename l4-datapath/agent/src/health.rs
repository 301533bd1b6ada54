//! What load balancers ask at a Service's `healthCheckNodePort` (`externalTrafficPolicy: Local`): has this node ready pods of
//! it? Answered as kube-proxy answers, so that balancers leave nodes out that would drop what they send.
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use l4_lb::HealthCheck;
use strata_runtime::task;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// For a question and its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// A question's most: who asks for more than a path is not a health check.
const MOST: usize = 8 << 10;

/// The ports that are answered.
#[derive(Debug, Default)]
pub(crate) struct HealthChecks {
    serving: BTreeMap<u16, Serving>,
    /// Ports that could not be opened, said once.
    refused: BTreeMap<u16, String>,
}

#[derive(Debug)]
struct Serving {
    answer: watch::Sender<HealthCheck>,
    task: JoinHandle<()>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl HealthChecks {
    /// Answers at these ports, and no others. One that cannot be opened is tried again with the next change.
    pub(crate) async fn sync(&mut self, wanted: &BTreeMap<u16, HealthCheck>) {
        self.serving.retain(|port, _| wanted.contains_key(port));
        self.refused.retain(|port, _| wanted.contains_key(port));
        for (port, check) in wanted {
            if let Some(serving) = self.serving.get(port) {
                serving.answer.send_if_modified(|known| std::mem::replace(known, check.clone()) != *check);
                continue;
            }
            match listen(*port).await {
                Ok(listener) => {
                    let (answer, receiver) = watch::channel(check.clone());
                    let task = task::spawn("health-check", serve(listener, receiver));
                    self.serving.insert(*port, Serving { answer, task });
                    self.refused.remove(port);
                }
                Err(error) => {
                    let (error, service) = (error.to_string(), format!("{}/{}", check.namespace, check.name));
                    if self.refused.insert(*port, error.clone()).as_ref() != Some(&error) {
                        tracing::error!(
                            port,
                            service,
                            error,
                            "healthCheckNodePort is not answered: balancers pass this node by"
                        );
                    }
                }
            }
        }
    }

    /// How many are answered, for `/status`.
    pub(crate) fn len(&self) -> usize {
        self.serving.len()
    }
}

/// On every address of the node, of both families where it has them.
async fn listen(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        // A node without IPv6.
        Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
            TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await
        }
        outcome => outcome,
    }
}

async fn serve(listener: TcpListener, check: watch::Receiver<HealthCheck>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let text = answer(&check.borrow());
                task::spawn("health-answer", async move {
                    // Whoever asked and did not wait asks again.
                    drop(tokio::time::timeout(PATIENCE, tell(stream, &text)).await);
                });
            }
            // Out of descriptors or the like.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Reads the question to its end, whatever it is: kube-proxy answers any path.
async fn tell(mut stream: TcpStream, text: &str) -> std::io::Result<()> {
    let mut question = Vec::with_capacity(512);
    while !question.windows(4).any(|end| end == b"\r\n\r\n") {
        if question.len() > MOST || stream.read_buf(&mut question).await? == 0 {
            return Ok(());
        }
    }
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}

fn answer(check: &HealthCheck) -> String {
    let HealthCheck { namespace, name, local } = check;
    let status = if *local > 0 { "200 OK" } else { "503 Service Unavailable" };
    let body = serde_json::json!({
        "service": { "namespace": namespace, "name": name },
        "localEndpoints": local,
        "serviceProxyHealthy": true,
    })
    .to_string();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: {local}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
