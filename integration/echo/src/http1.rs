//! A plain HTTP/1.1 server, for those parts that are no test's subject.
use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1::Builder;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// Before accepting again after it failed: out of descriptors, for one.
const PAUSE: Duration = Duration::from_millis(20);

/// Answers what comes to the listener, for as long as the process lives.
pub(crate) async fn serve<F>(listener: TcpListener, answer: impl Fn(Request<Incoming>) -> F + Clone + Send + 'static)
where
    F: Future<Output = Result<Response<Full<Bytes>>, Infallible>> + Send,
{
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let connection = Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer.clone()));
                tokio::spawn(connection);
            }
            Err(error) => {
                eprintln!("accept: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
