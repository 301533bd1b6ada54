//! Kubernetes' label selectors, compiled.
use std::collections::BTreeMap;

use compat_objects::core::LabelSelector;

/// Labels of a pod or namespace.
pub(crate) type Labels = BTreeMap<String, String>;

#[derive(Clone, Debug)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    DoesNotExist(String),
}

/// All requirements must hold; none means everything matches.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selector(Vec<Requirement>);

impl Selector {
    /// # Errors
    /// The field below the selector that is wrong, and why.
    pub(crate) fn compile(selector: &LabelSelector) -> Result<Selector, (String, String)> {
        let equal = selector.match_labels.iter().flatten();
        let mut requirements: Vec<Requirement> =
            equal.map(|(key, value)| Requirement::In(key.clone(), vec![value.clone()])).collect();
        for (i, expression) in selector.match_expressions.iter().flatten().enumerate() {
            let key = expression.key.clone();
            let values = expression.values.clone().unwrap_or_default();
            let field = format!("matchExpressions[{i}]");
            requirements.push(match (expression.operator.as_str(), values.is_empty()) {
                ("In", false) => Requirement::In(key, values),
                ("NotIn", false) => Requirement::NotIn(key, values),
                ("Exists", true) => Requirement::Exists(key),
                ("DoesNotExist", true) => Requirement::DoesNotExist(key),
                ("In" | "NotIn", true) => return Err((format!("{field}.values"), "at least one is needed".to_owned())),
                ("Exists" | "DoesNotExist", false) => {
                    return Err((format!("{field}.values"), format!("{} takes none", expression.operator)));
                }
                (other, _) => return Err((format!("{field}.operator"), format!("{other:?} is unknown"))),
            });
        }
        Ok(Selector(requirements))
    }

    pub(crate) fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::DoesNotExist(key) => !labels.contains_key(key),
        })
    }
}
