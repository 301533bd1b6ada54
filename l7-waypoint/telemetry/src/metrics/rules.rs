//! What a chain changes of Istio's metrics: the overrides of a Telemetry, which come as `stats.PluginConfig`.
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;
use xds_model::envoy::telemetry::StatsFilter;

use super::Metric;
use super::labels::Labels;
use crate::expression::Expression;
use crate::record::Record;

/// What Istio shows for a value that is not to be had.
const UNKNOWN: &str = "unknown";

/// Compiled once for a chain; the default changes nothing.
#[derive(Default)]
pub struct MetricRules {
    /// Of labels; `None`: cannot be read.
    expressions: Vec<Option<Expression>>,
    /// By metric.
    rules: [Rule; Metric::ALL.len()],
}

#[derive(Default)]
struct Rule {
    dropped: bool,
    tags: BTreeMap<String, Tag>,
}

/// What becomes of a label.
#[derive(Clone, Copy)]
enum Tag {
    Removed,
    /// By the expression at this place.
    Set(usize),
}

/// Combinations of values that requests have given to labels. There is a bound to them, or senders could fill the memory.
#[derive(Default)]
pub(super) struct Values(Mutex<HashSet<Vec<Arc<str>>>>);

/// In a process.
const MOST_VALUES: usize = 10_000;

impl Values {
    /// These, or as many times `unknown` if there are too many others already.
    pub(super) fn bounded(&self, values: &[Arc<str>]) -> Vec<Arc<str>> {
        if values.is_empty() {
            return Vec::new();
        }
        let mut known = self.0.lock();
        if known.contains(values) || known.len() < MOST_VALUES {
            known.insert(values.to_vec());
            return values.to_vec();
        }
        vec![UNKNOWN.into(); values.len()]
    }
}

impl MetricRules {
    /// Never fails: metrics are no reason to refuse a chain. What cannot be read is told and shown as `unknown`.
    pub fn compile(config: &StatsFilter) -> Self {
        let mut compiled = Self::default();
        let mut places: BTreeMap<&str, usize> = BTreeMap::new();
        for change in &config.metrics {
            let mut tags: Vec<(&str, Tag)> =
                change.tags_to_remove.iter().map(|tag| (tag.as_str(), Tag::Removed)).collect();
            for (tag, text) in &change.dimensions {
                if !is_label(tag) {
                    tracing::warn!(tag, "no label can have this name: it is left out");
                    continue;
                }
                let place = *places.entry(text).or_insert_with(|| {
                    let read = Expression::compile(text);
                    let read =
                        read.inspect_err(|error| tracing::warn!(tag, expression = text, error, "shown as unknown"));
                    compiled.expressions.push(read.ok());
                    compiled.expressions.len() - 1
                });
                tags.push((tag, Tag::Set(place)));
            }
            let concerned = Metric::ALL.iter().filter(|metric| change.name.is_empty() || change.name == metric.name());
            for metric in concerned {
                let rule = &mut compiled.rules[*metric as usize];
                rule.dropped = change.drop;
                rule.tags.extend(tags.iter().map(|(name, tag)| ((*name).to_owned(), *tag)));
            }
        }
        compiled
    }

    /// Whether labels are made from what is in a request or its response.
    pub fn looks_at_requests(&self) -> bool {
        !self.expressions.is_empty()
    }

    /// What the expressions say of a request.
    pub(super) fn values(&self, record: &Record<'_>) -> Vec<Arc<str>> {
        let value = |expression: &Option<Expression>| expression.as_ref()?.text(record);
        self.expressions.iter().map(|expression| value(expression).map_or_else(|| UNKNOWN.into(), Arc::from)).collect()
    }

    /// The labels of one metric, made from the standard ones; `None`: it is turned off.
    pub(super) fn labels(&self, metric: Metric, standard: &Labels, values: &[Arc<str>]) -> Option<Labels> {
        let rule = &self.rules[metric as usize];
        if rule.dropped {
            return None;
        }
        if rule.tags.is_empty() {
            return Some(standard.clone());
        }
        let set = |tag: &Tag| match tag {
            Tag::Removed => None,
            Tag::Set(place) => values.get(*place).cloned(),
        };
        let kept = standard.iter().filter_map(|(name, value)| match rule.tags.get(&**name) {
            None => Some((name.clone(), value.clone())),
            Some(tag) => Some((name.clone(), set(tag)?)),
        });
        let is_new = |name: &str| standard.iter().all(|(standard, _)| standard != name);
        let new = rule.tags.iter().filter(|(name, _)| is_new(name));
        Some(kept.chain(new.filter_map(|(name, tag)| Some((name.clone().into(), set(tag)?)))).collect())
    }
}

/// Whether Prometheus takes it as a label's name. Names that begin with `__` are its own.
fn is_label(name: &str) -> bool {
    let first = name.chars().next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_');
    first && !name.starts_with("__") && name.chars().all(|other| other.is_ascii_alphanumeric() || other == '_')
}
