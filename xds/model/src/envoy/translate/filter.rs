//! Configurations of single HTTP filters: cors, fault, jwt_authn.
use std::collections::HashMap;
use std::mem::take;
use std::time::Duration;

use xds_proto::envoy::envoy::extensions::filters::common::fault::v3 as common_fault;
use xds_proto::envoy::envoy::extensions::filters::http::cors::v3 as cors;
use xds_proto::envoy::envoy::extensions::filters::http::fault::v3 as fault_v3;
use xds_proto::envoy::envoy::extensions::filters::http::jwt_authn::v3 as jwt;

use super::common::{
    fraction, header, http_uri, inline_text, is_true, opt_duration, runtime_fraction, strings, u32_of,
};
use super::report::{At, Refusable, Refusal, Report, refuse_rest};
use super::route::route_match;
use crate::envoy::filter::{Abort, AbortWith, CorsPolicy, Delay, Fault};
use crate::envoy::jwt::{ClaimToHeader, Jwks, JwtAuthn, JwtHeader, JwtProvider, JwtRequirement, JwtRule, JwtRuleMatch};
use crate::envoy::matcher::Fraction;

/// A route's CORS policy.
pub(super) fn cors_policy(message: cors::CorsPolicy) -> Refusable<CorsPolicy> {
    let cors::CorsPolicy {
        allow_origin_string_match,
        allow_methods,
        allow_headers,
        expose_headers,
        max_age,
        allow_credentials,
        filter_enabled,
        shadow_enabled,
        allow_private_network_access,
        forward_not_matching_preflights,
    } = message;
    Ok(CorsPolicy {
        allow_origins: strings(allow_origin_string_match)?,
        allow_methods,
        allow_headers,
        expose_headers,
        max_age,
        allow_credentials: is_true(allow_credentials),
        enabled: filter_enabled.map(runtime_fraction).transpose()?.unwrap_or(Fraction::ALWAYS),
        shadow_enabled: shadow_enabled.map(runtime_fraction).transpose()?.unwrap_or(Fraction::NEVER),
        allow_private_network_access: is_true(allow_private_network_access),
        forward_not_matching_preflights: forward_not_matching_preflights.is_none_or(|flag| flag.value),
    })
}

/// Faults; `None` if the message says nothing.
pub(super) fn fault(mut message: fault_v3::HttpFault, report: &mut Report) -> Refusable<Option<Fault>> {
    let delay = message.delay.take().map(delay).transpose().at("delay")?;
    let abort = message.abort.take().map(abort).transpose().at("abort")?;
    let headers = take(&mut message.headers).into_iter().map(header).collect::<Refusable<_>>()?;
    let max_active = u32_of(message.max_active_faults.take());
    report.ignore_rest("fault", &message);
    if delay.is_none() && abort.is_none() {
        return Ok(None);
    }
    Ok(Some(Fault { delay, abort, headers, max_active }))
}

fn delay(message: common_fault::FaultDelay) -> Refusable<Delay> {
    use common_fault::fault_delay::FaultDelaySecifier;
    let common_fault::FaultDelay { percentage, fault_delay_secifier } = message;
    let duration = match fault_delay_secifier {
        Some(FaultDelaySecifier::FixedDelay(fixed)) => super::common::duration(&fixed)?,
        Some(FaultDelaySecifier::HeaderDelay(_)) => return Err(Refusal::new("header_delay", "not supported")),
        None => return Err(Refusal::new("fixed_delay", "missing")),
    };
    Ok(Delay { duration, fraction: percentage.map(fraction).transpose()?.unwrap_or(Fraction::NEVER) })
}

fn abort(message: fault_v3::FaultAbort) -> Refusable<Abort> {
    use fault_v3::fault_abort::ErrorType;
    let fault_v3::FaultAbort { percentage, response_body, error_type } = message;
    if !response_body.is_empty() {
        return Err(Refusal::new("response_body", "not supported"));
    }
    let with = match error_type {
        Some(ErrorType::HttpStatus(status)) => AbortWith::HttpStatus(
            u16::try_from(status)
                .ok()
                .filter(|code| (200..600).contains(code))
                .ok_or_else(|| Refusal::new("http_status", "outside 200 to 599"))?,
        ),
        Some(ErrorType::GrpcStatus(status)) => AbortWith::GrpcStatus(status),
        Some(ErrorType::HeaderAbort(_)) => return Err(Refusal::new("header_abort", "not supported")),
        None => return Err(Refusal::new("error_type", "missing")),
    };
    Ok(Abort { with, fraction: percentage.map(fraction).transpose()?.unwrap_or(Fraction::NEVER) })
}

/// The `jwt_authn` filter.
pub(super) fn jwt_authn(mut message: jwt::JwtAuthentication) -> Refusable<JwtAuthn> {
    let providers = take(&mut message.providers)
        .into_iter()
        .map(|(name, message)| Ok((name.clone(), provider(message).at(format!("providers.{name}"))?)))
        .collect::<Refusable<std::collections::BTreeMap<_, _>>>()?;
    let mut named = HashMap::new();
    for (name, message) in take(&mut message.requirement_map) {
        named.insert(name, requirement(message)?);
    }
    let rules = take(&mut message.rules)
        .into_iter()
        .map(|message| rule(message, &named))
        .collect::<Refusable<Vec<_>>>()
        .at("rules")?;
    let authn = JwtAuthn {
        providers,
        rules,
        bypass_cors_preflight: take(&mut message.bypass_cors_preflight),
        strip_failure_response: take(&mut message.strip_failure_response),
    };
    take(&mut message.stat_prefix);
    refuse_rest(&message)?;
    for rule in &authn.rules {
        if let Some(requires) = &rule.requires {
            check_providers(requires, &authn)?;
        }
    }
    Ok(authn)
}

fn check_providers(requirement: &JwtRequirement, authn: &JwtAuthn) -> Refusable<()> {
    match requirement {
        JwtRequirement::Provider { name, .. } if !authn.providers.contains_key(name) => {
            Err(Refusal::new("rules", format!("provider {name} is not there")))
        }
        JwtRequirement::Any(list) | JwtRequirement::All(list) => {
            list.iter().try_for_each(|inner| check_providers(inner, authn))
        }
        _ => Ok(()),
    }
}

fn provider(mut message: jwt::JwtProvider) -> Refusable<JwtProvider> {
    use jwt::jwt_provider::JwksSourceSpecifier;
    let non_empty = |text: String| Some(text).filter(|text| !text.is_empty());
    let jwks = match message.jwks_source_specifier.take() {
        Some(JwksSourceSpecifier::LocalJwks(source)) => Jwks::Inline(inline_text(source).at("local_jwks")?),
        Some(JwksSourceSpecifier::RemoteJwks(remote)) => remote_jwks(remote).at("remote_jwks")?,
        None => return Err(Refusal::new("jwks_source_specifier", "missing")),
    };
    let skew = match take(&mut message.clock_skew_seconds) {
        0 => 60,
        seconds => seconds,
    };
    // Only a cache in Envoy's workers.
    message.jwt_cache_config.take();
    let provider = JwtProvider {
        issuer: non_empty(take(&mut message.issuer)),
        audiences: take(&mut message.audiences),
        jwks,
        forward: take(&mut message.forward),
        from_headers: take(&mut message.from_headers)
            .into_iter()
            .map(|jwt::JwtHeader { name, value_prefix }| JwtHeader { name: name.to_ascii_lowercase(), value_prefix })
            .collect(),
        from_params: take(&mut message.from_params),
        from_cookies: take(&mut message.from_cookies),
        forward_payload_header: non_empty(take(&mut message.forward_payload_header).to_ascii_lowercase()),
        pad_forward_payload_header: take(&mut message.pad_forward_payload_header),
        payload_in_metadata: non_empty(take(&mut message.payload_in_metadata)),
        space_delimited_claims: message
            .normalize_payload_in_metadata
            .take()
            .map(|normalize| normalize.space_delimited_claims)
            .unwrap_or_default(),
        header_in_metadata: non_empty(take(&mut message.header_in_metadata)),
        claim_to_headers: take(&mut message.claim_to_headers)
            .into_iter()
            .map(claim_to_header)
            .collect::<Refusable<_>>()?,
        clock_skew: Duration::from_secs(u64::from(skew)),
        clear_route_cache: take(&mut message.clear_route_cache),
        require_expiration: take(&mut message.require_expiration),
        max_lifetime: opt_duration("max_lifetime", message.max_lifetime.take())?,
    };
    refuse_rest(&message)?;
    Ok(provider)
}

fn claim_to_header(mut message: jwt::JwtClaimToHeader) -> Refusable<ClaimToHeader> {
    let header = take(&mut message.header_name).to_ascii_lowercase();
    let claim = take(&mut message.claim_name);
    refuse_rest(&message).at("claim_to_headers")?;
    Ok(ClaimToHeader { header, claim })
}

fn remote_jwks(mut message: jwt::RemoteJwks) -> Refusable<Jwks> {
    let uri = message.http_uri.take().ok_or_else(|| Refusal::new("http_uri", "missing"))?;
    let (uri, cluster, timeout) = http_uri(uri)?;
    let cache = opt_duration("cache_duration", message.cache_duration.take())?.unwrap_or(Duration::from_secs(300));
    let async_fetch = message.async_fetch.take().is_some();
    // Fetches are repeated with back-off whatever the policy says.
    message.retry_policy.take();
    refuse_rest(&message)?;
    Ok(Jwks::Remote { uri, cluster, timeout, cache, async_fetch })
}

fn rule(message: jwt::RequirementRule, named: &HashMap<String, JwtRequirement>) -> Refusable<JwtRule> {
    use jwt::requirement_rule::RequirementType;
    let jwt::RequirementRule { r#match, requirement_type } = message;
    let mut refusal = None;
    let matcher = r#match.map(|matcher| route_match(matcher, &mut refusal));
    if let Some(refusal) = refusal {
        return Err(refusal.at("match"));
    }
    let matcher = match matcher {
        Some(matcher) if matcher.metadata.is_empty() && matcher.fraction.is_none() && !matcher.grpc => {
            Some(JwtRuleMatch {
                path: matcher.path,
                case_sensitive: matcher.case_sensitive,
                headers: matcher.headers,
                query: matcher.query,
            })
        }
        Some(_) => return Err(Refusal::new("match", "only path, headers and query are supported here")),
        None => None,
    };
    let requires = match requirement_type {
        None => None,
        Some(RequirementType::Requires(message)) => Some(requirement(message)?),
        Some(RequirementType::RequirementName(name)) => Some(
            named
                .get(&name)
                .cloned()
                .ok_or_else(|| Refusal::new("requirement_name", format!("{name} is not there")))?,
        ),
    };
    Ok(JwtRule { matcher, requires })
}

fn requirement(message: jwt::JwtRequirement) -> Refusable<JwtRequirement> {
    use jwt::jwt_requirement::RequiresType;
    let all = |list: Vec<jwt::JwtRequirement>| list.into_iter().map(requirement).collect::<Refusable<Vec<_>>>();
    Ok(match message.requires_type {
        Some(RequiresType::ProviderName(name)) => JwtRequirement::Provider { name, audiences: Vec::new() },
        Some(RequiresType::ProviderAndAudiences(jwt::ProviderWithAudiences { provider_name, audiences })) => {
            JwtRequirement::Provider { name: provider_name, audiences }
        }
        Some(RequiresType::RequiresAny(list)) => JwtRequirement::Any(all(list.requirements)?),
        Some(RequiresType::RequiresAll(list)) => JwtRequirement::All(all(list.requirements)?),
        Some(RequiresType::AllowMissing(_)) => JwtRequirement::AllowMissing,
        Some(RequiresType::AllowMissingOrFailed(_)) => JwtRequirement::AllowMissingOrFailed,
        Some(RequiresType::ExtractOnlyWithoutValidation(_)) => {
            return Err(Refusal::new("extract_only_without_validation", "not supported"));
        }
        None => return Err(Refusal::new("requires_type", "missing")),
    })
}
