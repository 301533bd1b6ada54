//! Redirects.
use l7_authz::l7::RequestView;
use xds_model::envoy::route::{Redirect as Config, RedirectPath};

use crate::CompileError;
use crate::matching::PathMatch;
use crate::rewrite::{Substitution, replace_prefix};

/// A compiled redirect.
#[derive(Debug, Clone)]
pub struct Redirect {
    config: Config,
    regex: Option<Substitution>,
}

impl Redirect {
    pub(crate) fn compile(config: &Config) -> Result<Self, CompileError> {
        let regex = match &config.path {
            Some(RedirectPath::Regex { pattern, substitution }) => Some(Substitution::compile(pattern, substitution)?),
            _ => None,
        };
        Ok(Self { config: config.clone(), regex })
    }

    /// Status of the answer.
    pub fn status(&self) -> u16 {
        self.config.status
    }

    /// The `location` for a request whose path `matched` matched.
    pub(crate) fn location(&self, request: &RequestView<'_>, matched: &PathMatch) -> String {
        let config = &self.config;
        let scheme = match &config.scheme {
            Some(scheme) => scheme.as_str(),
            None if config.https => "https",
            None => request.scheme,
        };
        let host = config.host.as_deref().unwrap_or_else(|| self.request_host(request, scheme));
        let port = config.port.map(|port| format!(":{port}")).unwrap_or_default();
        let path = match (&config.path, &self.regex) {
            (Some(RedirectPath::Full(path)), _) => path.clone(),
            (Some(RedirectPath::Prefix(prefix)), _) => replace_prefix(request.path, matched, prefix),
            (Some(RedirectPath::Regex { .. }), Some(regex)) => regex.apply(request.path),
            _ => request.path.to_owned(),
        };
        // A configured path may bring its own query.
        let query = match request.query {
            Some(query) if !config.strip_query && !path.contains('?') => format!("?{query}"),
            _ => String::new(),
        };
        format!("{scheme}://{host}{port}{path}{query}")
    }

    /// The host asked for; its port goes when another one is set, or when it is the old scheme's default and the
    /// scheme changes.
    fn request_host<'a>(&self, request: &RequestView<'a>, scheme: &str) -> &'a str {
        let (host, port) = split_port(request.authority);
        let default =
            matches!((port, request.scheme, scheme), (Some("80"), "http", "https") | (Some("443"), "https", "http"));
        if self.config.port.is_some() || default { host } else { request.authority }
    }
}

/// Host (with the brackets of IPv6) and port of an authority.
pub(crate) fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => {
            // In "[::1" or "::1" the colon belongs to the address.
            let v6 = host.contains(':') && !host.ends_with(']');
            if v6 { (authority, None) } else { (host, Some(port)) }
        }
        _ => (authority, None),
    }
}
