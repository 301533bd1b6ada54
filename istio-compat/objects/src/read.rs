//! A document -> one typed object, or the reasons why not.
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::fault::{Fault, Location, Severity};
use crate::kind::{Kind, KindError, Strictness};
use crate::object::{Object, ObjectKey, ObjectSet};
use crate::path::FieldPath;
use crate::validate;
use crate::yaml::{self, Node, YamlError};

/// A mistake whose file and line are not looked up yet.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mistake {
    pub(crate) severity: Severity,
    pub(crate) path: FieldPath,
    pub(crate) reason: String,
}

/// One object's text: who it is, and its nodes with their lines.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Document {
    pub(crate) key: ObjectKey,
    pub(crate) root: Node,
    pub(crate) file: Arc<Path>,
}

impl Document {
    pub(crate) fn location(&self) -> Location {
        Location { file: self.file.clone(), line: self.root.line }
    }

    /// The document as JSON, with the namespace it is in by default written out.
    pub(crate) fn to_value(&self) -> Value {
        let mut value = self.root.to_value();
        if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            if self.key.kind.namespaced() {
                metadata.insert("namespace".to_owned(), self.key.namespace.clone().into());
            } else {
                metadata.remove("namespace");
            }
        }
        value
    }
}

/// The documents of a file's text. Documents without a usable head become faults; `kind: List` is unfolded.
pub(crate) fn parse(text: &str, file: &Arc<Path>) -> Result<(Vec<Arc<Document>>, Vec<Fault>), YamlError> {
    let mut documents = Vec::new();
    let mut faults = Vec::new();
    let mut pending = yaml::documents(text)?;
    pending.reverse();
    while let Some(root) = pending.pop() {
        let line = root.line;
        match identify(&root) {
            Ok(Head::Object(key)) => documents.push(Arc::new(Document { key, root, file: file.clone() })),
            Ok(Head::List(items)) => pending.extend(items.into_iter().rev()),
            Err(fault) => faults.push(fault.at(&Location { file: file.clone(), line })),
        }
    }
    Ok((documents, faults))
}

enum Head {
    Object(ObjectKey),
    List(Vec<Node>),
}

fn identify(root: &Node) -> Result<Head, Fault> {
    let text = |node: &Node, key: &str| node.get(key).and_then(Node::as_str).map(str::to_owned);
    let missing =
        |field: &str| Fault::error("", field, "missing: every object needs apiVersion, kind and metadata.name");
    let api_version = text(root, "apiVersion").ok_or_else(|| missing("apiVersion"))?;
    let kind_name = text(root, "kind").ok_or_else(|| missing("kind"))?;
    if kind_name == "List" || (kind_name.ends_with("List") && root.get("items").is_some()) {
        return Ok(Head::List(root.get("items").and_then(Node::items).unwrap_or_default().to_vec()));
    }
    let name = root.get("metadata").and_then(|metadata| text(metadata, "name"));
    let namespace = root.get("metadata").and_then(|metadata| text(metadata, "namespace"));
    let shown = name.as_deref().unwrap_or("(no name)");
    let object = match &namespace {
        Some(namespace) => format!("{kind_name} {namespace}/{shown}"),
        None => format!("{kind_name} {shown}"),
    };
    let kind = Kind::resolve(&api_version, &kind_name).map_err(|error| match error {
        KindError::Unknown { .. } => Fault::warning(&object, "kind", error.to_string()),
        KindError::Version { .. } => Fault::error(&object, "apiVersion", error.to_string()),
    })?;
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Err(Fault::error(&object, "metadata.name", "missing: the object needs a name"));
    };
    let namespace = match (kind.namespaced(), namespace) {
        (false, _) => String::new(),
        (true, Some(namespace)) if !namespace.is_empty() => namespace,
        (true, _) => "default".to_owned(),
    };
    Ok(Head::Object(ObjectKey { kind, namespace, name }))
}

/// Types a value of a known kind. Warnings come with the object; any error means no object.
pub(crate) fn type_value(kind: Kind, value: &Value) -> (Option<Object>, Vec<Mistake>) {
    let mut track = serde_path_to_error::Track::new();
    let mut unknown = Vec::new();
    let tracked = serde_path_to_error::Deserializer::new(value, &mut track);
    let mut note = |path: serde_ignored::Path<'_>| unknown.push(FieldPath::of_ignored(&path));
    let typed = Object::read(kind, serde_ignored::Deserializer::new(tracked, &mut note));
    let (severity, effect) = match kind.strictness() {
        Strictness::Refuse => (Severity::Error, "the object is refused so that a misspelling cannot loosen it"),
        Strictness::Warn => (Severity::Warning, "ignored"),
    };
    let mut mistakes: Vec<Mistake> = unknown
        .into_iter()
        .map(|path| Mistake { severity, path, reason: format!("unknown field: {effect}") })
        .collect();
    match typed {
        Ok(object) => {
            mistakes.extend(validate::object(&object));
            let refused = mistakes.iter().any(|mistake| mistake.severity == Severity::Error);
            ((!refused).then_some(object), mistakes)
        }
        Err(error) => {
            let path = FieldPath::of_error(&track.path());
            mistakes.push(Mistake { severity: Severity::Error, path, reason: error.to_string() });
            (None, mistakes)
        }
    }
}

/// Places a mistake in the last of `documents` that has the field (later ones overlay earlier ones).
pub(crate) fn place(mistake: Mistake, key: &ObjectKey, documents: &[Arc<Document>]) -> Fault {
    let fault = Fault {
        severity: mistake.severity,
        file: None,
        line: 0,
        object: key.to_string(),
        field: mistake.path.to_string(),
        reason: mistake.reason,
    };
    let best = documents.iter().map(|d| (d.root.locate(&mistake.path), d)).max_by_key(|((_, depth), _)| *depth);
    match best {
        Some(((line, _), document)) => fault.at(&Location { file: document.file.clone(), line }),
        None => fault,
    }
}

/// Types one JSON value, as an API server would hand it out.
///
/// # Errors
/// Every reason why the value is no object in force. Warnings come with the object.
pub fn read_value(value: Value) -> Result<(Object, Vec<Fault>), Vec<Fault>> {
    let text = value.to_string();
    let (set, faults) = read_str(&text, Path::new("(value)"));
    match set.iter().next() {
        Some((_, object)) if set.len() == 1 => Ok((object.clone(), faults)),
        _ => Err(faults),
    }
}

/// Types what an API server said of an object whose kind is known (items of its lists do not say their kind).
/// Without an object the faults hold an error; warnings come with the object. No fault has a place.
pub fn read_object(key: &ObjectKey, value: &Value) -> (Option<Object>, Vec<Fault>) {
    let (object, mistakes) = type_value(key.kind, value);
    (object, mistakes.into_iter().map(|mistake| place(mistake, key, &[])).collect())
}

/// Reads every object of a YAML text. What is wrong is in the faults; what is right is in the set. Of two
/// objects of the same key the later one counts.
pub fn read_str(text: &str, file: &Path) -> (ObjectSet, Vec<Fault>) {
    let file: Arc<Path> = file.into();
    let mut set = ObjectSet::default();
    let (documents, mut faults) = match parse(text, &file) {
        Ok(parsed) => parsed,
        Err(error) => {
            let fault = Fault::error("", "", error.reason).at(&Location { file, line: error.line });
            return (set, vec![fault]);
        }
    };
    for document in documents {
        let (object, mistakes) = type_value(document.key.kind, &document.to_value());
        if let Some(object) = object {
            set.insert(object, Some(document.location()));
        }
        let documents = [document.clone()];
        faults.extend(mistakes.into_iter().map(|mistake| place(mistake, &document.key, &documents)));
    }
    (set, faults)
}
