//! YAML text -> documents whose every node knows its line.
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;

use crate::path::{FieldPath, Segment};

/// A YAML node with its line (from 1; 0 unknown).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) line: u32,
    body: Body,
}

#[derive(Clone, Debug, PartialEq)]
enum Body {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

/// Where and why a text is no YAML.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub(crate) struct YamlError {
    pub(crate) line: u32,
    pub(crate) reason: String,
}

/// All documents of a YAML (or JSON) text; empty ones are left out.
pub(crate) fn documents(text: &str) -> Result<Vec<Node>, YamlError> {
    let options = serde_saphyr::options! {
        // A hundred pods with status are some 10 000 nodes: room for a large cluster in one file, no more.
        budget: serde_saphyr::budget! {
            max_documents: 50_000,
            max_nodes: 5_000_000,
            max_events: 20_000_000,
        },
        // YAML 1.2: a label `enabled: yes` is a text, not a truth.
        strict_booleans: true,
    };
    serde_saphyr::from_multiple_with_options::<Node>(text, options).map_err(|error| YamlError {
        line: error.location().map_or(0, |at| line_number(at.line())),
        reason: one_line(&error.without_snippet().to_string()),
    })
}

/// Parser messages may span lines; a fault is one line.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn line_number(line: u64) -> u32 {
    u32::try_from(line).unwrap_or(0)
}

impl Node {
    /// The same tree without lines.
    pub(crate) fn to_value(&self) -> Value {
        match &self.body {
            Body::Null => Value::Null,
            Body::Bool(value) => Value::Bool(*value),
            Body::Number(value) => Value::Number(value.clone()),
            Body::String(value) => Value::String(value.clone()),
            Body::List(nodes) => Value::Array(nodes.iter().map(Node::to_value).collect()),
            Body::Map(entries) => {
                let entries = entries.iter().map(|(key, node)| (key.clone(), node.to_value()));
                Value::Object(entries.collect::<Map<_, _>>())
            }
        }
    }

    /// The member of a map.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        match &self.body {
            Body::Map(entries) => entries.iter().find(|(name, _)| name == key).map(|(_, node)| node),
            _ => None,
        }
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match &self.body {
            Body::String(text) => Some(text),
            _ => None,
        }
    }

    /// The members of a list.
    pub(crate) fn items(&self) -> Option<&[Node]> {
        match &self.body {
            Body::List(nodes) => Some(nodes),
            _ => None,
        }
    }

    /// Line of the field `path` names, or of the deepest part of it that exists; and how many steps of it exist.
    pub(crate) fn locate(&self, path: &FieldPath) -> (u32, usize) {
        let mut node = self;
        for (depth, segment) in path.0.iter().enumerate() {
            let next = match (segment, &node.body) {
                (Segment::Key(key), Body::Map(_)) => node.get(key),
                (Segment::Index(index), Body::List(nodes)) => nodes.get(*index),
                _ => None,
            };
            let Some(next) = next else { return (node.line, depth) };
            node = next;
        }
        (node.line, path.0.len())
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        let spanned = Spanned::<Body>::deserialize(deserializer)?;
        Ok(Node { line: line_number(spanned.referenced.line()), body: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Body, D::Error> {
        deserializer.deserialize_any(BodyVisitor)
    }
}

struct BodyVisitor;

impl<'de> Visitor<'de> for BodyVisitor {
    type Value = Body;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Body, E> {
        Ok(Body::Null)
    }

    fn visit_none<E>(self) -> Result<Body, E> {
        Ok(Body::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Body, D::Error> {
        Body::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Body, E> {
        Ok(Body::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Body, E> {
        Ok(Body::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Body, E> {
        Ok(Body::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Body, E> {
        Number::from_f64(value).map(Body::Number).ok_or_else(|| E::custom("the number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Body, E> {
        Ok(Body::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Body, E> {
        Ok(Body::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Body, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = seq.next_element::<Node>()? {
            nodes.push(node);
        }
        Ok(Body::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body, A::Error> {
        let mut entries: Vec<(String, Node)> = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let node = map.next_value::<Node>()?;
            if entries.iter().any(|(name, _)| *name == key) {
                return Err(A::Error::custom(format!("key {key:?} occurs twice")));
            }
            entries.push((key, node));
        }
        Ok(Body::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_keep_their_lines() {
        let text = "a: 1\nb:\n- x\n- y: {z: 'q'}\n---\n# nothing\n---\nc:\n  d: true\n";
        let documents = documents(text).unwrap();
        assert_eq!(documents.len(), 2);
        let path = FieldPath::default().to("b").to(1).to("y").to("z");
        assert_eq!(documents[0].locate(&path), (4, 4));
        assert_eq!(documents[0].locate(&FieldPath::default().to("b").to(7)).1, 1);
        assert_eq!(documents[1].line, 8);
        assert_eq!(documents[1].to_value(), serde_json::json!({"c": {"d": true}}));
    }

    #[test]
    fn scalars_are_typed_as_kubernetes_types_them() {
        let text =
            "{n: 9901, s: '9901', ip: 10.8.0.1, v6: 'fd00::1', f: 12.5, neg: -3, none: ~, 9901: {mode: X}, t: 7200s}";
        let value = documents(text).unwrap()[0].to_value();
        let wanted = serde_json::json!({
            "n": 9901, "s": "9901", "ip": "10.8.0.1", "v6": "fd00::1", "f": 12.5, "neg": -3, "none": null,
            "9901": {"mode": "X"}, "t": "7200s"
        });
        assert_eq!(value, wanted);
    }

    #[test]
    fn broken_text_names_the_line() {
        let error = documents("a: 1\nb: [1, 2\nc: 3\n").unwrap_err();
        assert!(error.line >= 2, "{error:?}");
        assert!(!error.reason.contains('\n'));
        assert!(documents("a: 1\na: 2\n").is_err());
    }

    #[test]
    fn json_is_read_too() {
        let text = "{\n\t\"a\": [1, {\"b\": null}]\n}\n";
        assert_eq!(documents(text).unwrap()[0].to_value(), serde_json::json!({"a": [1, {"b": null}]}));
    }

    #[test]
    fn aliases_cannot_explode() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..12 {
            let refs = vec![format!("*a{}", i - 1); 10].join(", ");
            text.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
        }
        assert!(documents(&text).is_err());
    }
}
