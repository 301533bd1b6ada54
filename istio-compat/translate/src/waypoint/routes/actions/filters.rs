//! Cross-origin sharing and faults: configuration of filters, route by route.
use std::collections::HashMap;

use compat_objects::istio::{CorsPolicy, HttpFaultInjection, HttpRoute, UnmatchedPreflights};

use super::super::Rule;
use super::super::matches::string;
use super::Refused;
use crate::pb::{Any, any, boolv, duration, ext, hundred_percent, millionths, types};
use ext::filters::common::fault::v3 as common_fault;
use ext::filters::http::{cors::v3 as cors, fault::v3 as fault};

pub(super) fn per_filter(rule: &HttpRoute, at: &Rule<'_>) -> Result<HashMap<String, Any>, Refused> {
    let mut config = HashMap::new();
    if let Some(asked) = &rule.cors_policy {
        let policy = cors_policy(asked).map_err(|reason| (at.at("corsPolicy.allowOrigins"), reason))?;
        config.insert("envoy.filters.http.cors".to_owned(), any(&policy));
    }
    if let Some(asked) = &rule.fault {
        let fault = fault_injection(asked).map_err(|reason| (at.at("fault.abort"), reason))?;
        config.insert("envoy.filters.http.fault".to_owned(), any(&fault));
    }
    Ok(config)
}

fn cors_policy(asked: &CorsPolicy) -> Result<cors::CorsPolicy, String> {
    let mut origins = Vec::new();
    for origin in &asked.allow_origins {
        origins.push(string(origin)?.unwrap_or_else(|| crate::pb::regex_match(".*")));
    }
    for origin in &asked.allow_origin {
        origins.push(crate::pb::exact(origin));
    }
    Ok(cors::CorsPolicy {
        allow_origin_string_match: origins,
        allow_methods: asked.allow_methods.join(","),
        allow_headers: asked.allow_headers.join(","),
        expose_headers: asked.expose_headers.join(","),
        max_age: asked.max_age.map(|age| age.as_secs().to_string()).unwrap_or_default(),
        allow_credentials: asked.allow_credentials.and_then(boolv),
        filter_enabled: Some(hundred_percent()),
        forward_not_matching_preflights: match asked.unmatched_preflights {
            UnmatchedPreflights::Unspecified => None,
            UnmatchedPreflights::Forward => boolv(true),
            UnmatchedPreflights::Ignore => boolv(false),
        },
        ..Default::default()
    })
}

fn fault_injection(asked: &HttpFaultInjection) -> Result<fault::HttpFault, String> {
    let hundredths =
        |percent: i32| types::v3::FractionalPercent { numerator: u32::try_from(percent).unwrap_or(0), denominator: 0 };
    let delay = asked.delay.as_ref().map(|delay| common_fault::FaultDelay {
        percentage: Some(
            delay.percentage.map_or_else(|| hundredths(delay.percent.unwrap_or(0)), |p| millionths(p.value)),
        ),
        fault_delay_secifier: delay
            .fixed_delay
            .and_then(|d| duration(d.0))
            .map(common_fault::fault_delay::FaultDelaySecifier::FixedDelay),
    });
    let abort = match &asked.abort {
        Some(abort) => {
            let error = match (&abort.http_status, &abort.grpc_status) {
                (Some(status), _) => match u32::try_from(*status) {
                    Ok(status @ 200..=599) => fault::fault_abort::ErrorType::HttpStatus(status),
                    _ => return Err(format!("httpStatus {status} is not between 200 and 599")),
                },
                (None, Some(name)) => {
                    let code = grpc_code(name).ok_or_else(|| format!("{name:?} is no gRPC status"))?;
                    fault::fault_abort::ErrorType::GrpcStatus(code)
                }
                (None, None) => return Err("needs httpStatus or grpcStatus".to_owned()),
            };
            let percentage = abort.percentage.map_or_else(|| hundredths(0), |p| millionths(p.value));
            Some(fault::FaultAbort { percentage: Some(percentage), error_type: Some(error), ..Default::default() })
        }
        None => None,
    };
    Ok(fault::HttpFault { delay, abort, ..Default::default() })
}

fn grpc_code(name: &str) -> Option<u32> {
    const NAMES: [&str; 17] = [
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    (0_u32..).zip(NAMES).find(|(_, known)| known.eq_ignore_ascii_case(name)).map(|(code, _)| code)
}
