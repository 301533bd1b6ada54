//! The hash that consistent load balancing goes by.
use http::HeaderMap;
use http::header::{COOKIE, HeaderName};
use l7_authz::l7::RequestView;
use xds_model::envoy::route::{HashKey, HashPolicy as Config};
use xxhash_rust::xxh64::xxh64;

use crate::CompileError;

/// Policies of one route.
#[derive(Debug, Clone, Default)]
pub struct HashPolicies(Box<[Policy]>);

#[derive(Debug, Clone)]
struct Policy {
    key: Key,
    terminal: bool,
}

#[derive(Debug, Clone)]
enum Key {
    Header(HeaderName),
    Cookie(Cookie),
    SourceIp,
    Query(Box<str>),
}

#[derive(Debug, Clone)]
struct Cookie {
    name: Box<str>,
    /// What follows `NAME="VALUE"` in `set-cookie`, if the cookie may be made.
    make: Option<Box<str>>,
}

/// What the policies say to one request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hashed {
    /// `None`: any endpoint will do.
    pub hash: Option<u64>,
    /// Values of `set-cookie` to put into the response.
    pub set_cookies: Vec<String>,
}

impl HashPolicies {
    pub(crate) fn compile(config: &[Config]) -> Result<Self, CompileError> {
        let policy = |config: &Config| {
            let key = match &config.key {
                HashKey::Header(name) => Key::Header(
                    HeaderName::from_bytes(name.as_bytes()).map_err(|_| CompileError::HeaderName(name.clone()))?,
                ),
                HashKey::SourceIp => Key::SourceIp,
                HashKey::Query(name) => Key::Query(name.as_str().into()),
                HashKey::Cookie { name, ttl, path, attributes } => {
                    let make = ttl.map(|ttl| {
                        let mut text = String::new();
                        if !ttl.is_zero() {
                            text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
                        }
                        if !path.is_empty() {
                            text.push_str(&format!("; Path={path}"));
                        }
                        for (name, value) in attributes {
                            let equals = if value.is_empty() { "" } else { "=" };
                            text.push_str(&format!("; {name}{equals}{value}"));
                        }
                        text.push_str("; HttpOnly");
                        text.into()
                    });
                    Key::Cookie(Cookie { name: name.as_str().into(), make })
                }
            };
            Ok(Policy { key, terminal: config.terminal })
        };
        config.iter().map(policy).collect::<Result<_, _>>().map(Self)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Hashes (XXH64). A cookie that has to be made gets a value derived from `seed`.
    pub fn hash(&self, request: &RequestView<'_>, seed: u64) -> Hashed {
        let mut out = Hashed::default();
        for policy in &self.0 {
            let hash = match &policy.key {
                Key::Header(name) => l7_authz::l7::request::joined(request.headers, name).map(|value| xxh64(&value, 0)),
                Key::SourceIp => Some(xxh64(request.source_ip.to_string().as_bytes(), 0)),
                Key::Query(name) => request.query_parameter(name).map(|value| xxh64(&value, 0)),
                Key::Cookie(cookie) => match (find_cookie(request.headers, &cookie.name), &cookie.make) {
                    (Some(value), _) => Some(xxh64(value.as_bytes(), 0)),
                    (None, Some(tail)) => {
                        let value = format!("{:016x}", crate::draw(seed, xxh64(cookie.name.as_bytes(), 0)));
                        out.set_cookies.push(format!("{}=\"{value}\"{tail}", cookie.name));
                        Some(xxh64(value.as_bytes(), 0))
                    }
                    (None, None) => None,
                },
            };
            if let Some(hash) = hash {
                out.hash = Some(out.hash.unwrap_or(0).rotate_left(1) ^ hash);
                if policy.terminal {
                    break;
                }
            }
        }
        out
    }
}

fn find_cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(key, value)| *key == name && !value.is_empty())
        .map(|(_, value)| value.trim_matches('"'))
}
