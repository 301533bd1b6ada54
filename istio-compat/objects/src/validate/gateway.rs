//! Gateway API objects, after their CRDs' own rules.
use super::Check;
use crate::gateway::{
    BackendRef, BackendTlsPolicySpec, FilterType, GatewaySpec, GrpcRouteSpec, HttpHeaderMatch, HttpRouteRule,
    HttpRouteSpec, L4RouteRule, ParentReference, PathMatchType, PathModifier, PathModifierType, RouteFilter,
    SubjectAltNameType, ValueMatchType,
};
use crate::path::FieldPath;

pub(super) fn gateway(c: &mut Check, spec: &GatewaySpec) {
    let path = FieldPath::spec();
    c.require(&path.to("gatewayClassName"), &spec.gateway_class_name);
    for (i, listener) in spec.listeners.iter().enumerate() {
        let path = path.to("listeners").to(i);
        c.require(&path.to("name"), &listener.name);
        c.require(&path.to("protocol"), &listener.protocol);
        c.port(&path.to("port"), Some(listener.port));
        if spec.listeners[..i].iter().any(|other| other.name == listener.name) {
            c.error(&path.to("name"), format!("{:?} occurs twice", listener.name));
        }
    }
}

fn parents(c: &mut Check, parents: &[ParentReference]) {
    let path = FieldPath::spec().to("parentRefs");
    if parents.is_empty() {
        c.warn(&path, "missing: a route that attaches to nothing has no effect");
    }
    for (i, parent) in parents.iter().enumerate() {
        c.require(&path.to(i).to("name"), &parent.name);
        c.port(&path.to(i).to("port"), parent.port);
    }
}

fn backends(c: &mut Check, path: &FieldPath, backends: &[BackendRef]) {
    for (i, backend) in backends.iter().enumerate() {
        let path = path.to("backendRefs").to(i);
        c.require(&path.to("name"), &backend.name);
        let service = backend.kind.as_deref().unwrap_or("Service") == "Service"
            && backend.group.as_deref().unwrap_or_default().is_empty();
        if service && backend.port.is_none() {
            c.error(&path.to("port"), "missing: a Service needs a port");
        }
        c.port(&path.to("port"), backend.port);
        if let Some(weight) = backend.weight.filter(|weight| !(0..=1_000_000).contains(weight)) {
            c.error(&path.to("weight"), format!("{weight} is not between 0 and 1000000"));
        }
        filters(c, &path, &backend.filters);
    }
}

pub(super) fn http_route(c: &mut Check, spec: &HttpRouteSpec) {
    parents(c, &spec.parent_refs);
    for (i, rule) in spec.rules.iter().enumerate() {
        http_rule(c, &FieldPath::spec().to("rules").to(i), rule);
    }
}

fn http_rule(c: &mut Check, path: &FieldPath, rule: &HttpRouteRule) {
    for (i, wanted) in rule.matches.iter().enumerate() {
        let path = path.to("matches").to(i);
        if let Some(wanted) = &wanted.path {
            let value = path.to("path").to("value");
            match wanted.kind {
                PathMatchType::RegularExpression => c.pattern(&value, &wanted.value),
                _ if !wanted.value.starts_with('/') => {
                    c.error(&value, format!("{:?} does not start with /", wanted.value))
                }
                _ => {}
            }
        }
        values(c, &path.to("headers"), &wanted.headers);
        values(c, &path.to("queryParams"), &wanted.query_params);
    }
    filters(c, path, &rule.filters);
    backends(c, path, &rule.backend_refs);
    let redirects = rule.filters.iter().any(|filter| filter.kind == FilterType::RequestRedirect);
    if redirects && !rule.backend_refs.is_empty() {
        c.error(&path.to("backendRefs"), "a redirect is answered at once: no backend may stand beside it");
    }
    if let Some(timeouts) = &rule.timeouts
        && let (Some(request), Some(backend)) = (timeouts.request, timeouts.backend_request)
        && !request.is_zero()
        && backend > request
    {
        c.error(&path.to("timeouts").to("backendRequest"), format!("{backend} is longer than request, {request}"));
    }
    for (i, code) in rule.retry.iter().flat_map(|retry| retry.codes.iter().enumerate()) {
        if !(400..600).contains(code) {
            c.error(&path.to("retry").to("codes").to(i), format!("{code} is not between 400 and 599"));
        }
    }
}

fn values(c: &mut Check, path: &FieldPath, wanted: &[HttpHeaderMatch]) {
    for (i, wanted) in wanted.iter().enumerate() {
        c.require(&path.to(i).to("name"), &wanted.name);
        if wanted.kind == ValueMatchType::RegularExpression {
            c.pattern(&path.to(i).to("value"), &wanted.value);
        }
    }
}

fn filters(c: &mut Check, path: &FieldPath, filters: &[RouteFilter]) {
    for (i, filter) in filters.iter().enumerate() {
        let path = path.to("filters").to(i);
        let members = [
            (FilterType::RequestHeaderModifier, "requestHeaderModifier", filter.request_header_modifier.is_some()),
            (FilterType::ResponseHeaderModifier, "responseHeaderModifier", filter.response_header_modifier.is_some()),
            (FilterType::RequestMirror, "requestMirror", filter.request_mirror.is_some()),
            (FilterType::RequestRedirect, "requestRedirect", filter.request_redirect.is_some()),
            (FilterType::UrlRewrite, "urlRewrite", filter.url_rewrite.is_some()),
            (FilterType::Cors, "cors", filter.cors.is_some()),
            (FilterType::ExternalAuth, "externalAuth", filter.external_auth.is_some()),
            (FilterType::ExtensionRef, "extensionRef", filter.extension_ref.is_some()),
        ];
        for (kind, name, set) in members {
            match (kind == filter.kind, set) {
                (true, false) => c.error(&path.to(name), "missing: the filter's type needs it"),
                (false, true) => c.error(&path.to(name), "does not belong to the filter's type"),
                _ => {}
            }
        }
        if let Some(mirror) = &filter.request_mirror {
            let path = path.to("requestMirror");
            c.require(&path.to("backendRef").to("name"), &mirror.backend_ref.name);
            c.at_most_one(&path, &[("percent", mirror.percent.is_some()), ("fraction", mirror.fraction.is_some())]);
            if let Some(percent) = mirror.percent {
                c.percent(&path.to("percent"), f64::from(percent));
            }
            if let Some(fraction) = mirror.fraction {
                let whole = fraction.denominator.unwrap_or(100);
                if whole < 1 || !(0..=whole).contains(&fraction.numerator) {
                    c.error(&path.to("fraction"), format!("{} of {whole} is no share", fraction.numerator));
                }
            }
        }
        if let Some(redirect) = &filter.request_redirect {
            let path = path.to("requestRedirect");
            if redirect.status_code.is_some_and(|code| ![301, 302, 303, 307, 308].contains(&code)) {
                c.error(&path.to("statusCode"), "is none of 301, 302, 303, 307, 308");
            }
            modifier(c, &path.to("path"), redirect.path.as_ref());
        }
        modifier(
            c,
            &path.to("urlRewrite").to("path"),
            filter.url_rewrite.as_ref().and_then(|rewrite| rewrite.path.as_ref()),
        );
    }
}

fn modifier(c: &mut Check, path: &FieldPath, modifier: Option<&PathModifier>) {
    let Some(modifier) = modifier else { return };
    let (full, prefix) = (modifier.replace_full_path.is_some(), modifier.replace_prefix_match.is_some());
    let fits = match modifier.kind {
        PathModifierType::ReplaceFullPath => full && !prefix,
        PathModifierType::ReplacePrefixMatch => prefix && !full,
    };
    if !fits {
        c.error(path, "exactly the member that type names is needed");
    }
}

pub(super) fn grpc_route(c: &mut Check, spec: &GrpcRouteSpec) {
    parents(c, &spec.parent_refs);
    for (i, rule) in spec.rules.iter().enumerate() {
        let path = FieldPath::spec().to("rules").to(i);
        for (j, wanted) in rule.matches.iter().enumerate() {
            let path = path.to("matches").to(j);
            if let Some(method) = &wanted.method {
                let path = path.to("method");
                if method.service.is_none() && method.method.is_none() {
                    c.error(&path, "service or method is needed");
                }
                for (name, value) in [("service", &method.service), ("method", &method.method)] {
                    if let (ValueMatchType::RegularExpression, Some(value)) = (method.kind, value) {
                        c.pattern(&path.to(name), value);
                    }
                }
            }
            values(c, &path.to("headers"), &wanted.headers);
        }
        for (j, filter) in rule.filters.iter().enumerate() {
            if matches!(filter.kind, FilterType::RequestRedirect | FilterType::UrlRewrite | FilterType::Cors) {
                c.error(&path.to("filters").to(j).to("type"), "gRPC routes have no such filter");
            }
        }
        filters(c, &path, &rule.filters);
        backends(c, &path, &rule.backend_refs);
    }
}

pub(super) fn l4_route(c: &mut Check, parent_refs: &[ParentReference], rules: &[L4RouteRule]) {
    parents(c, parent_refs);
    let path = FieldPath::spec().to("rules");
    if rules.is_empty() {
        c.error(&path, "missing: a rule is needed");
    }
    for (i, rule) in rules.iter().enumerate() {
        if rule.backend_refs.is_empty() {
            c.error(&path.to(i).to("backendRefs"), "missing: a backend is needed");
        }
        if rule.backend_refs.iter().any(|backend| !backend.filters.is_empty()) {
            c.error(&path.to(i).to("backendRefs"), "backends of connections have no filters");
        }
        backends(c, &path.to(i), &rule.backend_refs);
    }
}

pub(super) fn backend_tls_policy(c: &mut Check, spec: &BackendTlsPolicySpec) {
    let path = FieldPath::spec();
    if spec.target_refs.is_empty() {
        c.error(&path.to("targetRefs"), "missing: whom does the policy concern?");
    }
    let validation = path.to("validation");
    c.host(&validation.to("hostname"), &spec.validation.hostname, false);
    let (refs, system) =
        (!spec.validation.ca_certificate_refs.is_empty(), spec.validation.well_known_ca_certificates.as_deref());
    if refs == system.is_some_and(|value| !value.is_empty()) {
        c.error(&validation, "exactly one of caCertificateRefs and wellKnownCACertificates is needed");
    }
    if let Some(other) = system.filter(|value| !value.is_empty() && *value != "System") {
        c.error(&validation.to("wellKnownCACertificates"), format!("{other:?} is not System"));
    }
    for (i, name) in spec.validation.subject_alt_names.iter().enumerate() {
        let fits = match name.kind {
            SubjectAltNameType::Hostname => name.hostname.is_some() && name.uri.is_none(),
            SubjectAltNameType::Uri => name.uri.is_some() && name.hostname.is_none(),
        };
        if !fits {
            c.error(&validation.to("subjectAltNames").to(i), "exactly the member that type names is needed");
        }
    }
}
