//! The four services of Istio's bookinfo sample, as far as its routing samples show: which version of reviews answers
//! whom, and whether it has ratings. Our own image plays them, so that the sample's manifests run unmodified.
use std::convert::Infallible;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

use crate::http1;

/// Which service to be. The sample's manifests give neither arguments nor variables: the image does.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    #[arg(long, env = "BOOKINFO_SERVICE", value_enum)]
    service: Service,
    #[arg(long, env = "BOOKINFO_VERSION", default_value = "v1")]
    version: String,
    #[arg(long, default_value_t = 9080)]
    port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Service {
    Productpage,
    Details,
    Reviews,
    Ratings,
}

/// What the sample's services hand on from request to request.
const FORWARDED: [&str; 7] =
    ["end-user", "x-request-id", "traceparent", "tracestate", "authorization", "cookie", "user-agent"];
/// productpage's patience with reviews; the sample's fault scenes play with it.
const PATIENCE: Duration = Duration::from_secs(3);

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("::", args.port)).await.with_context(|| format!("port {}", args.port))?;
    eprintln!("bookinfo {:?} {} serves on {}", args.service, args.version, listener.local_addr()?);
    http1::serve(listener, move |request| answer(args.clone(), request)).await;
    Ok(())
}

async fn answer(args: Args, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let path = request.uri().path().trim_end_matches('/').to_owned();
    let headers = forwarded(request.headers());
    if path == "/health" {
        return Ok(json_body(StatusCode::OK, &json!({"status": "healthy"})));
    }
    Ok(match (args.service, path.as_str()) {
        (Service::Details, "/details/0") => json_body(StatusCode::OK, &details()),
        (Service::Ratings, "/ratings/0") => json_body(StatusCode::OK, &ratings()),
        (Service::Reviews, "/reviews/0") => json_body(StatusCode::OK, &reviews(&args.version, &headers).await),
        (Service::Productpage, "" | "/productpage") => productpage(&headers).await,
        _ => json_body(StatusCode::NOT_FOUND, &json!({"error": "no such page"})),
    })
}

fn forwarded(headers: &HeaderMap) -> HeaderMap {
    let pick = |name: &'static str| Some((HeaderName::from_static(name), headers.get(name)?.clone()));
    FORWARDED.into_iter().filter_map(pick).collect()
}

fn details() -> Value {
    json!({"id": 0, "title": "The Comedy of Errors", "author": "William Shakespeare", "pages": 200, "type": "paperback"})
}

fn ratings() -> Value {
    json!({"id": 0, "ratings": {"Reviewer1": 5, "Reviewer2": 4}})
}

/// v1 has no ratings, v2 black stars, v3 red ones.
async fn reviews(version: &str, headers: &HeaderMap) -> Value {
    let rated = match version {
        "v1" => None,
        _ => Some(fetch("ratings", "/ratings/0", headers).await),
    };
    let colour = if version == "v3" { "red" } else { "black" };
    let review = |reviewer: &str| {
        let mut review = json!({"reviewer": reviewer, "text": format!("{reviewer} read it to the end.")});
        match &rated {
            None => {}
            Some(Ok(found)) => review["rating"] = json!({"stars": found["ratings"][reviewer], "color": colour}),
            Some(Err(error)) => review["rating"] = json!({"error": error}),
        }
        review
    };
    let pod = std::env::var("HOSTNAME").unwrap_or_default();
    json!({"id": "0", "podname": pod, "version": version, "reviews": [review("Reviewer1"), review("Reviewer2")]})
}

/// The page as text: what a browser would show of the two services behind it.
async fn productpage(headers: &HeaderMap) -> Response<Full<Bytes>> {
    let (details, reviews) =
        tokio::join!(fetch("details", "/details/0", headers), fetch("reviews", "/reviews/0", headers));
    let part = |title: &str, result: &Result<Value, String>| match result {
        Ok(value) => format!("<h2>Book {title}</h2><pre>{value}</pre>"),
        Err(error) => format!("<h2>Error fetching product {title}!</h2><pre>{error}</pre>"),
    };
    let page = format!(
        "<html><head><title>Simple Bookstore App</title></head><body>{}{}</body></html>\n",
        part("details", &details),
        part("reviews", &reviews)
    );
    let mut response = Response::new(Full::new(page.into()));
    response.headers_mut().insert("content-type", HeaderValue::from_static("text/html; charset=utf-8"));
    response
}

/// A GET of another service by its name, with the caller's headers.
async fn fetch(host: &str, path: &str, headers: &HeaderMap) -> Result<Value, String> {
    let asked = async {
        let stream = TcpStream::connect((host, 9080)).await.map_err(|error| format!("connect: {error}"))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| format!("handshake: {error}"))?;
        tokio::spawn(connection);
        let mut request = Request::new(Full::new(Bytes::new()));
        *request.uri_mut() = path.parse().map_err(|error| format!("{path}: {error}"))?;
        *request.headers_mut() = headers.clone();
        let authority = format!("{host}:9080");
        request.headers_mut().insert("host", HeaderValue::from_str(&authority).map_err(|error| error.to_string())?);
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
        if !status.is_success() {
            return Err(format!("{host} answered {status}: {}", String::from_utf8_lossy(&body)));
        }
        serde_json::from_slice(&body).map_err(|error| format!("{host}: {error}"))
    };
    tokio::time::timeout(PATIENCE, asked).await.map_err(|_| format!("{host} did not answer in time"))?
}

fn json_body(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(value.to_string().into()));
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_v1_of_reviews_has_no_ratings() {
        let plain = reviews("v1", &HeaderMap::new()).await;
        assert!(plain["reviews"][0].get("rating").is_none());
        // Here no host is called ratings: what failed is told in the page, not as a failed page.
        let rated = reviews("v2", &HeaderMap::new()).await;
        assert!(rated["reviews"][0]["rating"]["error"].is_string(), "{rated}");
    }

    #[test]
    fn only_the_known_headers_are_handed_on() {
        let mut headers = HeaderMap::new();
        headers.insert("end-user", HeaderValue::from_static("jason"));
        headers.insert("x-other", HeaderValue::from_static("no"));
        assert_eq!(forwarded(&headers).keys().collect::<Vec<_>>(), ["end-user"]);
    }
}
