//! What a chain changes of Istio's metrics: the configuration of its filter `istio.stats`. Without the filter they are as
//! they always are; where istiod leaves it out to turn all of them off, all of them are turned off in it.
use std::collections::BTreeMap;

use compat_objects::istio::{
    IstioMetric, MetricSelector, Metrics, MetricsOverrides, TagOperation, TagOverride, WorkloadMode,
};
use xds_proto::istio::stats::{MetricConfig, PluginConfig, Reporter};

use super::{Builder, InForce};

/// Istio's metrics: what a Telemetry calls them, in the order of these names, and their names without `istio_`.
const ALL: [(IstioMetric, &str); 10] = [
    (IstioMetric::GrpcRequestMessages, "request_messages_total"),
    (IstioMetric::GrpcResponseMessages, "response_messages_total"),
    (IstioMetric::RequestCount, "requests_total"),
    (IstioMetric::RequestDuration, "request_duration_milliseconds"),
    (IstioMetric::RequestSize, "request_bytes"),
    (IstioMetric::ResponseSize, "response_bytes"),
    (IstioMetric::TcpClosedConnections, "tcp_connections_closed_total"),
    (IstioMetric::TcpOpenedConnections, "tcp_connections_opened_total"),
    (IstioMetric::TcpReceivedBytes, "tcp_received_bytes_total"),
    (IstioMetric::TcpSentBytes, "tcp_sent_bytes_total"),
];

/// Whether there is a metric of this name.
pub(crate) fn is_metric(name: &str) -> bool {
    ALL.iter().any(|(_, known)| *known == name)
}

/// All that is said of one metric.
#[derive(Default)]
struct Change<'t> {
    disabled: Option<bool>,
    tags: BTreeMap<&'t str, &'t TagOverride>,
}

impl Builder<'_, '_> {
    /// `None`: nothing is changed.
    pub(in crate::waypoint) fn stats(&self, in_force: &[InForce<'_>]) -> Option<PluginConfig> {
        let metrics = || in_force.iter().flat_map(|(_, object)| &object.spec.metrics);
        let defaults = &self.mesh.providers.defaults().metrics;
        let named = |metrics: &Metrics| metrics.providers.iter().map(|provider| provider.name.clone()).collect();
        let mut providers: Vec<String> = defaults.clone();
        for found in metrics().map(named).filter(|found: &Vec<String>| !found.is_empty()) {
            providers = found;
        }
        // What is said for providers that are not in force any more is void.
        let in_scope = |name: &String| providers.contains(name) && self.mesh.providers.fetches_metrics(name).is_ok();
        if !providers.iter().any(in_scope) {
            return Some(plugin(vec![nothing()]));
        }
        let (mut current, mut silent) = (defaults.clone(), false);
        let mut changes: BTreeMap<usize, Change<'_>> = BTreeMap::new();
        for metrics in metrics() {
            if !metrics.providers.is_empty() {
                current = named(metrics);
            }
            if !current.iter().any(in_scope) {
                continue;
            }
            for change in metrics.overrides.iter().filter(|change| is_of_servers(change)) {
                silent = change.disabled == Some(true) && concerns_all(change.selector.as_ref());
                if silent {
                    continue;
                }
                for place in concerned(change.selector.as_ref()) {
                    let known = changes.entry(place).or_default();
                    known.disabled = change.disabled.or(known.disabled);
                    known.tags.extend(change.tag_overrides.iter().map(|(name, tag)| (name.as_str(), tag)));
                }
            }
        }
        let changed = match silent {
            true => vec![nothing()],
            false => changes.into_iter().map(|(place, change)| config(ALL[place].1, &change)).collect(),
        };
        (!changed.is_empty()).then(|| plugin(changed))
    }
}

/// Turns every metric off.
fn nothing() -> MetricConfig {
    MetricConfig { drop: true, ..MetricConfig::default() }
}

fn plugin(metrics: Vec<MetricConfig>) -> PluginConfig {
    let reporter = Reporter::ServerGateway as i32;
    PluginConfig { disable_host_header_fallback: true, metrics, reporter, ..PluginConfig::default() }
}

/// A waypoint is the server's side.
fn is_of_servers(change: &MetricsOverrides) -> bool {
    change.selector.as_ref().is_none_or(|selector| selector.mode != WorkloadMode::Client)
}

fn concerns_all(selector: Option<&MetricSelector>) -> bool {
    selector.is_none_or(|selector| {
        selector.custom_metric.is_none() && matches!(selector.metric, None | Some(IstioMetric::AllMetrics))
    })
}

/// Places in [`ALL`]. A metric of the user's own is none of them: nothing here could report it.
fn concerned(selector: Option<&MetricSelector>) -> Vec<usize> {
    let all = concerns_all(selector);
    let is_named = |metric: IstioMetric, name: &str| {
        selector.is_some_and(|selector| match &selector.custom_metric {
            Some(custom) => custom == name,
            None => selector.metric == Some(metric),
        })
    };
    let chosen = ALL.iter().enumerate().filter(|(_, (metric, name))| all || is_named(*metric, name));
    chosen.map(|(place, _)| place).collect()
}

fn config(name: &str, change: &Change<'_>) -> MetricConfig {
    let (mut dimensions, mut tags_to_remove) = (BTreeMap::new(), Vec::new());
    for (name, tag) in &change.tags {
        match tag.operation {
            TagOperation::Upsert => drop(dimensions.insert((*name).to_owned(), tag.value.clone())),
            TagOperation::Remove => tags_to_remove.push((*name).to_owned()),
        }
    }
    MetricConfig {
        dimensions,
        name: name.to_owned(),
        tags_to_remove,
        drop: change.disabled == Some(true),
        ..MetricConfig::default()
    }
}
