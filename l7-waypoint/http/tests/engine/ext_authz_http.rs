//! External authorization by an HTTP server behind the engine's own connections.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use http::{HeaderMap, Response};
use http_body_util::BodyExt;
use xds_model::envoy::ext_authz::*;
use xds_model::envoy::matcher::StringMatcher;
use xds_model::envoy::route::{AppendAction, HeaderAdd};

use crate::ext_authz::{APP, AUTHZ, filter, post, with_filter};
use crate::support::*;

fn exact(names: &[&str]) -> Vec<StringMatcher> {
    names.iter().map(|name| StringMatcher { ignore_case: true, ..StringMatcher::exact(*name) }).collect()
}

fn http() -> ExtAuthz {
    let add = HeaderAdd {
        name: "x-add".into(),
        format: "v".into(),
        action: AppendAction::OverwriteIfExistsOrAdd,
        keep_empty_value: false,
    };
    ExtAuthz {
        allowed_headers: Some(exact(&["x-ext", "cookie"])),
        ..filter(ExtAuthzService::Http {
            uri: "http://authz".into(),
            cluster: "authz".into(),
            timeout: Duration::from_secs(1),
            path_prefix: "/check".into(),
            headers_to_add: vec![add],
            allowed_upstream_headers: exact(&["x-user", "authorization"]),
            allowed_upstream_headers_to_append: exact(&["x-groups"]),
            allowed_client_headers: exact(&["set-cookie"]),
            allowed_client_headers_on_success: exact(&["x-ok"]),
        })
    }
}

/// What the service was asked: first line and host, headers, body.
type Asked = Rc<RefCell<Vec<(String, HeaderMap, String)>>>;

/// The application echoes; the service answers as the test says.
fn serve(mesh: &Mesh, answer: impl Fn(&str) -> Response<Body> + 'static) -> Asked {
    let (asked, answer) = (Asked::default(), Rc::new(answer));
    let seen = asked.clone();
    mesh.handler(move |endpoint, request| {
        let (seen, answer) = (seen.clone(), answer.clone());
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            if endpoint != AUTHZ {
                return Response::new(full([endpoint.as_bytes(), b"|", &body].concat()));
            }
            let path = parts.uri.path().to_owned();
            if path.ends_with("/slow") {
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
            let host = parts.headers.get("host").map_or("", |host| host.to_str().unwrap());
            let line = format!("{} {} {host}", parts.method, parts.uri);
            seen.borrow_mut().push((line, parts.headers, String::from_utf8(body.to_vec()).unwrap()));
            answer(&path)
        }
    });
    asked
}

fn respond(status: u16, headers: &[(&str, &str)], body: &str) -> Response<Body> {
    let response = Response::builder().status(status);
    let response = headers.iter().fold(response, |response, (name, value)| response.header(*name, *value));
    response.body(full(body.to_owned())).unwrap()
}

#[test]
fn the_request_goes_to_the_service_and_its_headers_come_back() {
    run(async || {
        let mesh = Mesh::new(&with_filter(http()));
        let asked = serve(&mesh, |_| {
            let headers = [
                ("x-user", "jason"),
                ("x-groups", "b"),
                ("x-other", "no"),
                ("x-ok", "1"),
                ("x-envoy-auth-headers-to-remove", "cookie, host"),
            ];
            respond(200, &headers, "ignored")
        });
        let request = with(with(with(post("/p?q=1", "body"), "x-ext", "e"), "cookie", "c"), "x-private", "p");
        let request = with(with(with(request, "authorization", "Bearer t"), "x-user", "forged"), "x-groups", "a");
        let answer = mesh.send(request).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, "10.0.0.1:80|body"));
        assert_eq!((answer.header("x-ok"), answer.header("x-other")), ("1", ""));
        let asked = asked.borrow();
        let (line, headers, body) = &asked[0];
        assert_eq!((line.as_str(), body.as_str()), ("POST /check/p?q=1 reviews", ""));
        assert_eq!(headers["content-length"], "0");
        for (name, wanted) in [("x-ext", "e"), ("cookie", "c"), ("authorization", "Bearer t"), ("x-add", "v")] {
            assert_eq!(headers[name], wanted);
        }
        assert!(!headers.contains_key("x-private"));
        let seen = mesh.seen().into_iter().find(|seen| seen.endpoint == APP).unwrap();
        assert_eq!(seen.headers.get_all("x-user").iter().collect::<Vec<_>>(), ["jason"]);
        assert_eq!(seen.headers.get_all("x-groups").iter().count(), 2);
        assert!(!seen.headers.contains_key("cookie") && !seen.headers.contains_key("x-other"));
        assert_eq!(seen.authority, "reviews");
    });
}

#[test]
fn anything_but_200_refuses_and_a_failing_service_is_an_error() {
    run(async || {
        let mesh = Mesh::new(&with_filter(ExtAuthz { status_on_error: 503, ..http() }));
        serve(&mesh, |path| match path {
            "/check/login" => respond(302, &[("location", "https://idp/"), ("set-cookie", "a=1"), ("x-no", "1")], ""),
            "/check/204" => respond(204, &[], ""),
            "/check/500" => respond(500, &[], "broken"),
            _ => respond(401, &[("www-authenticate", "Basic")], "who are you"),
        });
        let answer = mesh.send(get("/login")).await;
        assert_eq!((answer.status.as_u16(), answer.header("location")), (302, "https://idp/"));
        assert_eq!((answer.header("set-cookie"), answer.header("x-no")), ("a=1", ""));
        assert_eq!(mesh.event().flags, ["UAEX"]);
        let answer = mesh.send(get("/")).await;
        let told = (answer.status.as_u16(), answer.header("www-authenticate"), answer.body.as_str());
        assert_eq!(told, (401, "Basic", "who are you"));
        assert_eq!(mesh.send(get("/204")).await.status, 204);
        let answer = mesh.send(get("/500")).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (503, ""));
        let start = tokio::time::Instant::now();
        assert_eq!(mesh.send(get("/slow")).await.status, 503);
        assert_eq!(start.elapsed().as_secs(), 1);
        assert!(mesh.seen().iter().all(|seen| seen.endpoint == AUTHZ));
    });
}

#[test]
fn the_body_goes_along_where_configured() {
    run(async || {
        let mut filter = http();
        filter.body = Some(ExtAuthzBody { max_request_bytes: 4, allow_partial: true, pack_as_bytes: false });
        let mesh = Mesh::new(&with_filter(filter));
        let asked = serve(&mesh, |_| respond(200, &[], ""));
        assert_eq!(mesh.send(post("/", "123456")).await.body, "10.0.0.1:80|123456");
        assert_eq!(mesh.send(post("/", "12")).await.body, "10.0.0.1:80|12");
        let seen: Vec<_> = asked
            .borrow()
            .iter()
            .map(|(_, headers, body)| (body.clone(), headers["x-envoy-auth-partial-body"].to_str().unwrap().to_owned()))
            .collect();
        assert_eq!(seen, [("1234".to_owned(), "true".to_owned()), ("12".to_owned(), "false".to_owned())]);
    });
}

#[test]
fn connections_to_the_service_are_kept() {
    run(async || {
        let mesh = Mesh::new(&with_filter(http()));
        serve(&mesh, |_| respond(200, &[], ""));
        for _ in 0..10 {
            assert_eq!(mesh.send(get("/")).await.status, 200);
        }
        assert_eq!(mesh.upstreams.connections.get(), 2, "one to the service, one to the application");
    });
}
