//! DestinationRule, after Istio's admission.
use std::time::Duration;

use super::Check;
use crate::istio::{
    ClientTlsSettings, ConnectionPoolSettings, ConsistentHashLb, DestinationRuleSpec, LoadBalancerSettings,
    LocalityLoadBalancerSetting, OutlierDetection, SimpleLb, TlsMode, TrafficPolicy,
};
use crate::path::FieldPath;
use crate::scalar;

pub(super) fn destination_rule(c: &mut Check, spec: &DestinationRuleSpec) {
    let path = FieldPath::spec();
    c.host(&path.to("host"), &spec.host, true);
    if let Some(policy) = &spec.traffic_policy {
        traffic_policy(c, &path.to("trafficPolicy"), policy);
    }
    for (i, subset) in spec.subsets.iter().enumerate() {
        let path = path.to("subsets").to(i);
        c.require(&path.to("name"), &subset.name);
        if spec.subsets[..i].iter().any(|other| other.name == subset.name) {
            c.error(&path.to("name"), format!("{:?} occurs twice", subset.name));
        }
        if let Some(policy) = &subset.traffic_policy {
            traffic_policy(c, &path.to("trafficPolicy"), policy);
        }
    }
}

/// The four members a policy and its port level have alike.
struct Common<'a> {
    load_balancer: Option<&'a LoadBalancerSettings>,
    connection_pool: Option<&'a ConnectionPoolSettings>,
    outlier_detection: Option<&'a OutlierDetection>,
    tls: Option<&'a ClientTlsSettings>,
}

fn traffic_policy(c: &mut Check, path: &FieldPath, policy: &TrafficPolicy) {
    let own = Common {
        load_balancer: policy.load_balancer.as_ref(),
        connection_pool: policy.connection_pool.as_ref(),
        outlier_detection: policy.outlier_detection.as_ref(),
        tls: policy.tls.as_ref(),
    };
    common(c, path, &own);
    for (i, port) in policy.port_level_settings.iter().enumerate() {
        let path = path.to("portLevelSettings").to(i);
        match port.port {
            Some(port) => c.port(&path.to("port").to("number"), Some(port.number)),
            None => c.error(&path.to("port"), "missing: which port is meant?"),
        }
        let own = Common {
            load_balancer: port.load_balancer.as_ref(),
            connection_pool: port.connection_pool.as_ref(),
            outlier_detection: port.outlier_detection.as_ref(),
            tls: port.tls.as_ref(),
        };
        common(c, &path, &own);
    }
    if let Some(tunnel) = &policy.tunnel {
        let path = path.to("tunnel");
        if !["", "CONNECT", "POST"].contains(&tunnel.protocol.as_str()) {
            c.error(&path.to("protocol"), format!("{:?} is neither CONNECT nor POST", tunnel.protocol));
        }
        c.host(&path.to("targetHost"), &tunnel.target_host, false);
        c.port(&path.to("targetPort"), Some(tunnel.target_port));
    }
    if let Some(percent) = policy.retry_budget.as_ref().and_then(|budget| budget.percent) {
        c.percent(&path.to("retryBudget").to("percent"), percent);
    }
}

fn common(c: &mut Check, path: &FieldPath, own: &Common<'_>) {
    if let Some(balancer) = own.load_balancer {
        load_balancer(c, &path.to("loadBalancer"), balancer, own.outlier_detection.is_some());
    }
    if let Some(pool) = own.connection_pool {
        connection_pool(c, &path.to("connectionPool"), pool);
    }
    if let Some(detection) = own.outlier_detection {
        outlier_detection(c, &path.to("outlierDetection"), detection);
    }
    if let Some(settings) = own.tls {
        tls(c, &path.to("tls"), settings);
    }
}

fn load_balancer(c: &mut Check, path: &FieldPath, balancer: &LoadBalancerSettings, outlier: bool) {
    let hash = balancer.consistent_hash.as_ref();
    c.at_most_one(path, &[("simple", balancer.simple.is_some()), ("consistentHash", hash.is_some())]);
    if let Some(hash) = hash {
        consistent_hash(c, &path.to("consistentHash"), hash);
    }
    if balancer.simple == Some(SimpleLb::LeastConn) {
        c.warn(&path.to("simple"), "LEAST_CONN is deprecated and means LEAST_REQUEST");
    }
    if let Some(setting) = &balancer.locality_lb_setting {
        locality(c, &path.to("localityLbSetting"), setting, outlier);
    }
    if let Some(warmup) = &balancer.warmup {
        let path = path.to("warmup");
        if warmup.duration.is_none_or(|duration| duration.is_zero()) {
            c.error(&path.to("duration"), "missing: a time above 0 is needed");
        }
        if let Some(percent) = warmup.minimum_percent {
            c.percent(&path.to("minimumPercent"), percent);
        }
        if let Some(aggression) = warmup.aggression.filter(|aggression| aggression.is_nan() || *aggression < 1.0) {
            c.error(&path.to("aggression"), format!("{aggression} is below 1"));
        }
    }
}

fn consistent_hash(c: &mut Check, path: &FieldPath, hash: &ConsistentHashLb) {
    let keys = [
        ("httpHeaderName", hash.http_header_name.is_some()),
        ("httpCookie", hash.http_cookie.is_some()),
        ("useSourceIp", hash.use_source_ip.is_some()),
        ("httpQueryParameterName", hash.http_query_parameter_name.is_some()),
    ];
    c.at_most_one(path, &keys);
    if keys.iter().all(|(_, set)| !set) {
        c.error(path, "what is hashed? httpHeaderName, httpCookie, useSourceIp or httpQueryParameterName is needed");
    }
    c.at_most_one(path, &[("ringHash", hash.ring_hash.is_some()), ("maglev", hash.maglev.is_some())]);
    c.at_most_one(path, &[("minimumRingSize", hash.minimum_ring_size.is_some()), ("maglev", hash.maglev.is_some())]);
    if let Some(cookie) = &hash.http_cookie {
        c.require(&path.to("httpCookie").to("name"), &cookie.name);
    }
    if let Some(maglev) = hash.maglev.filter(|maglev| maglev.table_size != 0) {
        let size = maglev.table_size;
        if size > 5_000_011 || !is_prime(size) {
            c.error(&path.to("maglev").to("tableSize"), format!("{size} is no prime up to 5000011"));
        }
    }
}

fn is_prime(number: u64) -> bool {
    number >= 2
        && (2..).take_while(|divisor| divisor * divisor <= number).all(|divisor| !number.is_multiple_of(divisor))
}

fn locality(c: &mut Check, path: &FieldPath, setting: &LocalityLoadBalancerSetting, outlier: bool) {
    let ways = [("distribute", !setting.distribute.is_empty()), ("failover", !setting.failover.is_empty())];
    c.at_most_one(path, &ways);
    c.at_most_one(path, &[("distribute", ways[0].1), ("failoverPriority", !setting.failover_priority.is_empty())]);
    for (i, share) in setting.distribute.iter().enumerate() {
        let sum: u64 = share.to.values().map(|share| u64::from(*share)).sum();
        if sum != 100 {
            c.error(&path.to("distribute").to(i).to("to"), format!("the shares sum up to {sum}, not 100"));
        }
    }
    for (i, failover) in setting.failover.iter().enumerate() {
        let path = path.to("failover").to(i);
        if failover.from == failover.to {
            c.error(&path, "from and to are the same region");
        }
        if failover.from.contains(['/', '*']) || failover.to.contains(['/', '*']) {
            c.error(&path, "only whole regions, without / and *");
        }
    }
    if (ways[1].1 || !setting.failover_priority.is_empty()) && !outlier {
        c.warn(path, "failover has no effect without outlierDetection beside it");
    }
}

fn connection_pool(c: &mut Check, path: &FieldPath, pool: &ConnectionPoolSettings) {
    let times = |c: &mut Check, path: &FieldPath, value: Option<scalar::Duration>| {
        if value.is_some_and(|value| !value.is_zero() && *value < Duration::from_millis(1)) {
            c.error(path, "below 1ms");
        }
    };
    if let Some(tcp) = &pool.tcp {
        let path = path.to("tcp");
        if tcp.max_connections < 0 {
            c.error(&path.to("maxConnections"), format!("{} is negative", tcp.max_connections));
        }
        times(c, &path.to("connectTimeout"), tcp.connect_timeout);
        times(c, &path.to("idleTimeout"), tcp.idle_timeout);
        times(c, &path.to("maxConnectionDuration"), tcp.max_connection_duration);
    }
    if let Some(http) = &pool.http {
        let path = path.to("http");
        let counts = [
            ("http1MaxPendingRequests", http.http1_max_pending_requests),
            ("http2MaxRequests", http.http2_max_requests),
            ("maxRequestsPerConnection", http.max_requests_per_connection),
            ("maxRetries", http.max_retries),
            ("maxConcurrentStreams", http.max_concurrent_streams),
        ];
        for (name, value) in counts.iter().filter(|(_, value)| *value < 0) {
            c.error(&path.to(*name), format!("{value} is negative"));
        }
        times(c, &path.to("idleTimeout"), http.idle_timeout);
    }
}

fn outlier_detection(c: &mut Check, path: &FieldPath, detection: &OutlierDetection) {
    for (name, value) in
        [("maxEjectionPercent", detection.max_ejection_percent), ("minHealthPercent", detection.min_health_percent)]
    {
        c.percent(&path.to(name), f64::from(value));
    }
    for (name, value) in [("interval", detection.interval), ("baseEjectionTime", detection.base_ejection_time)] {
        if value.is_some_and(|value| *value < Duration::from_millis(1)) {
            c.error(&path.to(name), "below 1ms");
        }
    }
    if detection.consecutive_local_origin_failures.is_some() && !detection.split_external_local_origin_errors {
        c.error(&path.to("consecutiveLocalOriginFailures"), "needs splitExternalLocalOriginErrors: true");
    }
    if detection.consecutive_errors != 0 {
        c.warn(&path.to("consecutiveErrors"), "deprecated and without effect: use consecutive5xxErrors");
    }
}

fn tls(c: &mut Check, path: &FieldPath, tls: &ClientTlsSettings) {
    let files = !tls.client_certificate.is_empty() || !tls.private_key.is_empty();
    match tls.mode {
        TlsMode::Mutual if tls.credential_name.is_empty() => {
            c.require(&path.to("clientCertificate"), &tls.client_certificate);
            c.require(&path.to("privateKey"), &tls.private_key);
        }
        TlsMode::Mutual if files || !tls.ca_certificates.is_empty() => {
            c.error(&path.to("credentialName"), "excludes clientCertificate, privateKey and caCertificates");
        }
        TlsMode::IstioMutual if files || !tls.ca_certificates.is_empty() || !tls.credential_name.is_empty() => {
            c.error(path, "ISTIO_MUTUAL uses the workload's own certificate: no other may be named");
        }
        TlsMode::Simple if files => c.error(path, "SIMPLE sends no client certificate: use MUTUAL"),
        _ => {}
    }
}
