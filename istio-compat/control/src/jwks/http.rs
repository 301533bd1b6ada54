//! One GET, over HTTP or HTTPS.
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, HOST};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// For the whole exchange.
const TIMEOUT: Duration = Duration::from_secs(5);
/// No key set is near this.
const LARGEST: usize = 1024 * 1024;
/// Where distributions keep the public roots.
const ROOTS: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// The body of a 200 answer; `at` replaces resolving the host.
pub(super) async fn get(uri: &str, at: Option<SocketAddr>) -> Result<String, String> {
    tokio::time::timeout(TIMEOUT, fetch(uri, at)).await.map_err(|_| format!("no answer within {TIMEOUT:?}"))?
}

async fn fetch(uri: &str, at: Option<SocketAddr>) -> Result<String, String> {
    let uri: http::Uri = uri.parse().map_err(|error| format!("not a URI: {error}"))?;
    let host = uri.host().ok_or("the URI has no host")?.trim_start_matches('[').trim_end_matches(']').to_owned();
    let tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        other => return Err(format!("scheme {} is neither http nor https", other.unwrap_or("missing"))),
    };
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let stream = match at {
        Some(address) => TcpStream::connect(address).await,
        None => TcpStream::connect((host.as_str(), port)).await,
    };
    let stream = stream.map_err(|error| format!("connecting: {error}"))?;
    if !tls {
        return exchange(&uri, stream).await;
    }
    let name = ServerName::try_from(host).map_err(|error| error.to_string())?;
    let stream = connector()?.connect(name, stream).await.map_err(|error| format!("TLS: {error}"))?;
    exchange(&uri, stream).await
}

async fn exchange(uri: &http::Uri, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<String, String> {
    let failed = |error: hyper::Error| format!("HTTP: {error}");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.map_err(failed)?;
    let connection = tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let authority = uri.authority().map_or("", http::uri::Authority::as_str);
    let request = http::Request::get(path)
        .header(HOST, authority)
        .header(ACCEPT, "application/json")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(failed)?;
    let status = response.status();
    if status != http::StatusCode::OK {
        connection.abort();
        return Err(format!("answered {status}"));
    }
    let body = Limited::new(response.into_body(), LARGEST).collect().await;
    connection.abort();
    let body = body.map_err(|error| format!("reading the body: {error}"))?.to_bytes();
    String::from_utf8(body.to_vec()).map_err(|_| "the body is not text".to_owned())
}

fn connector() -> Result<TlsConnector, String> {
    let configured = std::env::var("SSL_CERT_FILE").ok();
    let path = configured.as_deref().or_else(|| ROOTS.into_iter().find(|path| std::path::Path::new(path).exists()));
    let path = path.ok_or("no file of public roots is installed (set SSL_CERT_FILE)")?;
    let mut roots = rustls::RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| format!("{path}: {error}"))?;
    let (added, _) = roots.add_parsable_certificates(certificates.filter_map(Result::ok));
    if added == 0 {
        return Err(format!("{path} holds no certificate"));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}
