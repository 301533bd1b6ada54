//! What becomes of one request.
use std::borrow::Cow;

use bytes::Bytes;
use http::HeaderMap;
use l7_authz::l7::RequestView;
use xds_model::envoy::ext_authz::ExtAuthzPerRoute;

use crate::chain::ClusterRef;
use crate::filter::{Cors, Fault, RouteFilters};
use crate::format::FormatContext;
use crate::headers::HeaderOps;
use crate::redirect::Redirect;
use crate::route::{Action, Forward, HostRewrite, Route, Share, VirtualHost};

/// Header changes of the whole chain, and the order of scopes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Global {
    pub(crate) request_headers: HeaderOps,
    pub(crate) response_headers: HeaderOps,
    pub(crate) most_specific_wins: bool,
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy)]
pub struct Decision<'a> {
    pub host: Option<&'a VirtualHost>,
    pub route: Option<&'a Route>,
    pub share: Option<&'a Share>,
    pub verdict: Verdict<'a>,
    pub(crate) global: &'a Global,
}

/// The action of a [`Decision`].
#[derive(Debug, Clone, Copy)]
pub enum Verdict<'a> {
    /// No route: answer 404.
    NotFound,
    /// Answer with the status; the route could not be honoured.
    Invalid { status: u16, reason: &'a str },
    /// Answer with this.
    Respond { status: u16, body: &'a Bytes },
    /// Answer with [`Redirect::status`] and [`Decision::location`].
    Redirect(&'a Redirect),
    /// Send it to the cluster.
    Forward { forward: &'a Forward, cluster: &'a ClusterRef },
}

/// What a rewrite changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rewritten<'a> {
    /// New path and query; `None`: as it was.
    pub path_and_query: Option<String>,
    pub authority: Option<Cow<'a, str>>,
    /// The authority is the chosen endpoint's host name.
    pub authority_from_endpoint: bool,
}

impl<'a> Decision<'a> {
    pub(crate) fn of(global: &'a Global, host: &'a VirtualHost, route: &'a Route, seed: u64) -> Self {
        let mut share = None;
        let verdict = match &route.action {
            Action::Forward(forward) => {
                let (cluster, chosen) = forward.choose(seed);
                share = chosen;
                Verdict::Forward { forward, cluster }
            }
            Action::Redirect(redirect) => Verdict::Redirect(redirect),
            Action::Respond { status, body } => Verdict::Respond { status: *status, body },
            Action::Invalid { status, reason } => Verdict::Invalid { status: *status, reason },
        };
        Self { host: Some(host), route: Some(route), share, verdict, global }
    }

    pub(crate) fn not_found(global: &'a Global, host: Option<&'a VirtualHost>) -> Self {
        Self { host, route: None, share: None, verdict: Verdict::NotFound, global }
    }

    /// The CORS policy: the weighted cluster's, else the route's, else the virtual host's.
    pub fn cors(&self) -> Option<&'a Cors> {
        self.filters().find_map(|filters| filters.cors.as_ref())
    }

    /// The faults; `None`: those of the chain's fault filter, if it has any.
    pub fn fault(&self) -> Option<&'a Fault> {
        self.filters().find_map(|filters| filters.fault.as_ref())
    }

    /// What the `ext_authz` filter does here; `None`: what it is configured to do.
    pub fn ext_authz(&self) -> Option<&'a ExtAuthzPerRoute> {
        self.filters().find_map(|filters| filters.ext_authz.as_ref())
    }

    fn filters(&self) -> impl Iterator<Item = &'a RouteFilters> {
        let share = self.share.map(|share| &share.filters);
        let route = self.route.map(|route| &route.filters);
        share.into_iter().chain(route).chain(self.host.map(|host| &host.filters))
    }

    /// `location` of a redirect.
    pub fn location(&self, request: &RequestView<'_>) -> Option<String> {
        match (self.verdict, self.route) {
            (Verdict::Redirect(redirect), Some(route)) => Some(redirect.location(request, &route.matcher.path)),
            _ => None,
        }
    }

    /// New path and authority of a forwarded request; `request` is the one that was decided.
    pub fn rewrite(&self, request: &RequestView<'_>) -> Rewritten<'a> {
        let (Verdict::Forward { forward, .. }, Some(route)) = (self.verdict, self.route) else {
            return Rewritten::default();
        };
        let path_and_query = forward.path_rewrite.as_ref().map(|rewrite| {
            let path = rewrite.apply(request.path, &route.matcher.path);
            match request.query {
                Some(query) => format!("{path}?{query}"),
                None => path,
            }
        });
        let mut out = Rewritten { path_and_query, ..Rewritten::default() };
        if let Some(host) = self.share.and_then(|share| share.host_rewrite.as_deref()) {
            out.authority = Some(Cow::Borrowed(host));
            return out;
        }
        match &forward.host_rewrite {
            None => {}
            Some(HostRewrite::Literal(host)) => out.authority = Some(Cow::Borrowed(host)),
            Some(HostRewrite::Auto) => out.authority_from_endpoint = true,
            Some(HostRewrite::Header(name)) => {
                let value = request.headers.get(name).and_then(|value| value.to_str().ok());
                out.authority = value.map(|host| Cow::Owned(host.to_owned()));
            }
            Some(HostRewrite::PathRegex(rewrite)) => {
                out.authority = Some(Cow::Owned(rewrite.apply(request.path)));
            }
        }
        out
    }

    /// Whether [`Self::apply_request_headers`] would do anything.
    pub fn changes_request_headers(&self) -> bool {
        let scopes = [
            self.share.map(|share| &share.request_headers),
            self.route.map(|route| &route.request_headers),
            self.host.map(|host| &host.request_headers),
            Some(&self.global.request_headers),
        ];
        scopes.into_iter().flatten().any(|ops| !ops.is_empty())
    }

    /// Applies the request header changes of all scopes, in Envoy's order: the narrowest scope first.
    pub fn apply_request_headers(&self, headers: &mut HeaderMap, context: &FormatContext<'_>) {
        let scopes = [
            self.share.map(|share| &share.request_headers),
            self.route.map(|route| &route.request_headers),
            self.host.map(|host| &host.request_headers),
            Some(&self.global.request_headers),
        ];
        self.apply(scopes, headers, context);
    }

    /// The same for the response.
    pub fn apply_response_headers(&self, headers: &mut HeaderMap, context: &FormatContext<'_>) {
        let scopes = [
            self.share.map(|share| &share.response_headers),
            self.route.map(|route| &route.response_headers),
            self.host.map(|host| &host.response_headers),
            Some(&self.global.response_headers),
        ];
        self.apply(scopes, headers, context);
    }

    fn apply(&self, mut scopes: [Option<&HeaderOps>; 4], headers: &mut HeaderMap, context: &FormatContext<'_>) {
        if self.global.most_specific_wins {
            scopes.reverse();
        }
        for ops in scopes.into_iter().flatten() {
            ops.apply(headers, context);
        }
    }
}
