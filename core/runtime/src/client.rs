//! Asks another process over its admin socket.
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use futures::Stream;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// Why a process did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("{}: {source} (is the process running?)", socket.display())]
    Connect { socket: PathBuf, source: std::io::Error },
    #[error("{}{path}: {source}", socket.display())]
    Http { socket: PathBuf, path: String, source: hyper::Error },
    #[error("{}{path}: {status}: {body}", socket.display())]
    Status { socket: PathBuf, path: String, status: u16, body: String },
    #[error("{}{path}: not JSON: {source}", socket.display())]
    Json { socket: PathBuf, path: String, source: serde_json::Error },
}

/// `GET path`, which must answer 200 with JSON.
///
/// # Errors
/// If the process is away, answers another status, or something that is not JSON.
pub async fn get_json(socket: &Path, path: &str) -> Result<serde_json::Value, ClientError> {
    let text = get_text(socket, path).await?;
    serde_json::from_str(&text).map_err(|source| ClientError::Json {
        socket: socket.to_owned(),
        path: path.to_owned(),
        source,
    })
}

/// `GET path`, which must answer 200.
///
/// # Errors
/// If the process is away or answers another status.
pub async fn get_text(socket: &Path, path: &str) -> Result<String, ClientError> {
    text(socket, path, request(socket, Method::GET, path).await?).await
}

/// `POST path`, which must answer 200.
///
/// # Errors
/// If the process is away or answers another status.
pub async fn post(socket: &Path, path: &str) -> Result<String, ClientError> {
    text(socket, path, request(socket, Method::POST, path).await?).await
}

/// `GET path` as a stream of lines, for the event streams.
///
/// # Errors
/// If the process is away or answers another status than 200; a broken stream ends with an error item.
pub async fn lines(
    socket: &Path,
    path: &str,
) -> Result<impl Stream<Item = std::io::Result<String>> + Send + use<>, ClientError> {
    let response = request(socket, Method::GET, path).await?;
    if !response.status().is_success() {
        return Err(match text(socket, path, response).await {
            Err(error) => error,
            Ok(body) => ClientError::Status { socket: socket.to_owned(), path: path.to_owned(), status: 0, body },
        });
    }
    let state = (response.into_body(), BytesMut::new());
    Ok(futures::stream::unfold(state, |(mut body, mut buffer)| async move {
        loop {
            if let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line = buffer.split_to(end + 1);
                return Some((Ok(String::from_utf8_lossy(&line[..end]).into_owned()), (body, buffer)));
            }
            match body.frame().await? {
                Ok(frame) => buffer.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new())),
                Err(error) => return Some((Err(std::io::Error::other(error)), (body, buffer))),
            }
        }
    }))
}

async fn request(socket: &Path, method: Method, path: &str) -> Result<Response<Incoming>, ClientError> {
    let connect = |source| ClientError::Connect { socket: socket.to_owned(), source };
    let http = |source| ClientError::Http { socket: socket.to_owned(), path: path.to_owned(), source };
    let io = UnixStream::connect(socket).await.map_err(connect)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.map_err(http)?;
    crate::task::spawn("admin-client", async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "admin client connection ended");
        }
    });
    let request = Request::builder().method(method).uri(path).header(http::header::HOST, "admin");
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| ClientError::Status {
        socket: socket.to_owned(),
        path: path.to_owned(),
        status: 0,
        body: error.to_string(),
    })?;
    sender.send_request(request).await.map_err(http)
}

async fn text(socket: &Path, path: &str, response: Response<Incoming>) -> Result<String, ClientError> {
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|source| ClientError::Http {
        socket: socket.to_owned(),
        path: path.to_owned(),
        source,
    })?;
    let body = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    if status.is_success() {
        return Ok(body);
    }
    Err(ClientError::Status { socket: socket.to_owned(), path: path.to_owned(), status: status.as_u16(), body })
}
