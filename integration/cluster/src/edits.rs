//! Pieces of YAML on top of what is in the cluster, each under a field manager of its own, so that each can be taken back.
use std::collections::BTreeMap;

use serde_json::{Value, json};
use strata_lab::{LabError, Result};

use crate::kubectl::Kubectl;

/// apiVersion, kind, namespace, name.
type Key = (String, String, String, String);

/// What is in place.
#[derive(Debug, Default)]
pub(crate) struct Edits {
    placed: BTreeMap<String, Vec<Key>>,
    /// Objects that were not there before a piece brought them.
    brought: Vec<Key>,
    /// Labels of the others that a piece has set, as they were before.
    labels: BTreeMap<(String, Key), BTreeMap<String, Option<String>>>,
}

impl Edits {
    /// Puts a piece in place, or replaces it.
    pub(crate) fn place(&mut self, kubectl: &Kubectl, name: &str, yaml: &str) -> Result<()> {
        let keys = keys(yaml)?;
        for (key, document) in keys.iter().zip(documents(yaml)?) {
            if self.brought.contains(key) {
                continue;
            }
            match present(kubectl, key)? {
                None => self.brought.push(key.clone()),
                Some(object) => self.remember(name, key, &document, &object),
            }
        }
        kubectl.apply(&manager(name), yaml)?;
        let before = self.placed.insert(name.to_owned(), keys.clone()).unwrap_or_default();
        for gone in before.iter().filter(|key| !keys.contains(key)) {
            self.give_up(kubectl, name, gone)?;
        }
        Ok(())
    }

    /// Takes a piece back; one that is not in place is no error.
    pub(crate) fn remove(&mut self, kubectl: &Kubectl, name: &str) -> Result<()> {
        for key in self.placed.remove(name).unwrap_or_default() {
            self.give_up(kubectl, name, &key)?;
        }
        Ok(())
    }

    fn remember(&mut self, name: &str, key: &Key, document: &Value, object: &Value) {
        let known = self.labels.entry((name.to_owned(), key.clone())).or_default();
        for label in document["metadata"]["labels"].as_object().into_iter().flat_map(|labels| labels.keys()) {
            let before = object["metadata"]["labels"][label].as_str().map(str::to_owned);
            known.entry(label.clone()).or_insert(before);
        }
    }

    fn give_up(&mut self, kubectl: &Kubectl, name: &str, key: &Key) -> Result<()> {
        let held = self.placed.values().any(|keys| keys.contains(key));
        let (api_version, kind, namespace, object) = key;
        let place = if namespace.is_empty() { String::new() } else { format!("-n {namespace}") };
        if !held && self.brought.contains(key) {
            self.brought.retain(|brought| brought != key);
            let resource = qualified(api_version, kind);
            return kubectl.words(&format!("delete {resource} {place} {object} --ignore-not-found")).map(drop);
        }
        if let Some(labels) = self.labels.remove(&(name.to_owned(), key.clone())) {
            let labels = labels
                .into_iter()
                .map(|(label, before)| before.map_or_else(|| format!("{label}-"), |value| format!("{label}={value}")));
            let labels = labels.collect::<Vec<_>>().join(" ");
            let resource = qualified(api_version, kind);
            return kubectl.words(&format!("label {resource} {object} {place} --overwrite {labels}")).map(drop);
        }
        // A manager that applies nothing gives its fields up; others keep theirs.
        let mut empty = json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": object}});
        if !namespace.is_empty() {
            empty["metadata"]["namespace"] = json!(namespace);
        }
        kubectl.apply(&manager(name), &empty.to_string()).map(drop)
    }
}

fn manager(name: &str) -> String {
    name.trim_end_matches(".yaml").to_owned()
}

/// `kind.version.group`, as kubectl wants it where names are ambiguous.
fn qualified(api_version: &str, kind: &str) -> String {
    match api_version.split_once('/') {
        Some((group, version)) => format!("{kind}.{version}.{group}"),
        None => kind.to_owned(),
    }
}

fn present(kubectl: &Kubectl, key: &Key) -> Result<Option<Value>> {
    let (api_version, kind, namespace, name) = key;
    let place = if namespace.is_empty() { String::new() } else { format!("-n {namespace}") };
    let resource = qualified(api_version, kind);
    let text = kubectl.words(&format!("get {resource} {place} {name} --ignore-not-found -o json"))?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    serde_json::from_str(&text).map(Some).map_err(LabError::other)
}

/// The objects of a YAML text.
fn keys(yaml: &str) -> Result<Vec<Key>> {
    let mut keys = Vec::new();
    for document in documents(yaml)? {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let metadata = &document["metadata"];
        keys.push((
            text(&document["apiVersion"]),
            text(&document["kind"]),
            text(&metadata["namespace"]),
            text(&metadata["name"]),
        ));
    }
    Ok(keys)
}

/// The documents of a YAML text that say anything.
pub(crate) fn documents(yaml: &str) -> Result<Vec<Value>> {
    let mut documents = Vec::new();
    for text in yaml.split("\n---") {
        let value: Value = serde_saphyr::from_str(text).map_err(|error| LabError::Other(format!("{error}: {text}")))?;
        if !value.is_null() {
            documents.push(value);
        }
    }
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_text() {
        let text = "# c\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\napiVersion: networking.istio.io/v1\n\
                    kind: VirtualService\nmetadata: {name: p, namespace: shop}\n";
        let keys = keys(text).unwrap();
        assert_eq!(keys.len(), 2);
        assert_eq!(keys[1].3, "p");
        assert_eq!(qualified(&keys[1].0, &keys[1].1), "VirtualService.v1.networking.istio.io");
        assert_eq!(qualified(&keys[0].0, &keys[0].1), "Namespace");
    }
}
